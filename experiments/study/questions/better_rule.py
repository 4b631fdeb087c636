"""Is another rule better than the paper's? A search, then one test. See docs/protocol.md, 4."""

import functools
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from experiments.study import statistics
from experiments.study.analysis import groups, intervals, merged_share
from experiments.study.archive import Archive
from experiments.study.datasets import SOURCES
from experiments.study.questions import shared
from experiments.study.questions.question import Found, Overview, Question, is_lost
from experiments.study.render import difference, dot_plot, markdown, p_value, share
from experiments.study.trials import Backbone, Treatment, Trial, with_dependencies
from inmerge_jax.reporting.plots import Plot

MODEL, WIDTH = "resnet18", 0.25
# Training images (None: all), epochs of the backbone and of the second stage.
SEARCHED = {"bloodmnist_like_few": (500, 30, 10), "retinamnist": (None, 30, 10)}
TESTED = {
    "breastmnist": (None, 30, 10),
    "pneumoniamnist": (None, 6, 3),
    "chestxray14": (None, 15, 5),
}
CANDIDATES = 48
LEVELS: dict[str, tuple[Any, ...]] = {
    "threshold": (("threshold", 0.1), ("threshold", 0.3), ("quantile", 0.5), ("quantile", 0.8)),
    "partner": ("nearest", "mutual"),
    "alpha": (0.5, 0.8, 0.95),
    "every": (1, 0),
    "until": (1.0, 0.5),
    "along": ("kernel", "norm", "consumer"),
    "layers": ("deep", "redundant"),
    "average": (None, 0.99),
    "statistics": ("running", "renewed"),
}
"""Factors of the candidates and their levels."""
ROUNDS = ((2, CANDIDATES), (6, 16), (14, 5))
"""Seeds (those of earlier rounds included) and candidates of each round of the halving."""
FIRST_SEED, TEST_SEEDS = 200, range(24)
PAPER = Treatment("merge")
_LOST = "diverged in the search or the test"
GAIN = statistics.MARGIN
"""Gain in test AUC that makes the winner a recommendation."""


@functools.cache
def candidates() -> tuple[Treatment, ...]:
    """The rules to search: random combinations of all levels, each factor in equal shares."""
    rng = np.random.default_rng(1)
    # Each level as often as the others of its factor, in random order.
    columns = {
        name: [levels[i % len(levels)] for i in rng.permutation(CANDIDATES)]
        for name, levels in LEVELS.items()
    }
    found = []
    for row in zip(*columns.values(), strict=True):
        fields = dict(zip(columns, row, strict=True))
        name, value = fields.pop("threshold")
        found.append(Treatment("variant", **{name: value}, **fields))
    return tuple(found)


def control_of(rule: Treatment) -> Treatment:
    """No merging, with the rule's averaged weights and batch statistics."""
    return Treatment(average=rule.average, statistics=rule.statistics)


def second_stage(data: str, seed: int, rule: Treatment, name: str = "") -> Trial:
    """The second stage with a rule.

    Args:
      data: key of `SEARCHED` or `TESTED`.
      seed: of the backbone.
      rule: a candidate, or a control.
      name: of the arm; by default the rule's place among `candidates`, or its evaluation.
    """
    images, epochs, more = {**SEARCHED, **TESTED}[data]
    start = Backbone(data, MODEL, seed, epochs, WIDTH, images=images)
    return Trial(start, name or _name(rule), more, treatment=rule)


def _name(rule: Treatment) -> str:
    if rule.kind == "variant":
        return f"candidate {candidates().index(rule) + 1}"
    average = "" if rule.average is None else f", averaged weights {rule.average:g}"
    return f"finetune{average}, {rule.statistics} statistics"


def round_grid(rules: Sequence[Treatment], seeds: Sequence[int]) -> tuple[Trial, ...]:
    """Second stages of these rules and of their controls."""
    every = [*dict.fromkeys(map(control_of, rules)), *rules]
    return tuple(
        second_stage(data, FIRST_SEED + seed, rule)
        for seed, data, rule in product(seeds, SEARCHED, every)
    )


class Gain(NamedTuple):
    """What a rule gained in a round of the search.

    Attributes:
      by_data: data set to the gains in validation AUC, by seed.
      score: mean over the data sets of the mean gain, in standard deviations of a data set's gains.
      merged: kernels that merged per update, as a share of those that can; mean over the trials.
    """

    by_data: dict[str, list[float]]
    score: float
    merged: float


def gains(
    rules: Sequence[Treatment], seeds: Sequence[int], archive: Archive
) -> dict[Treatment, Gain]:
    """Validation AUC at the best epoch minus that of its control, of each rule.

    A pair is missing where the control or the backbone diverged. A rule that diverged itself, that
    has no pair on a data set, or that merged nothing in any trial, has no gains. The standard
    deviation of a data set's gains is that between the seeds of a rule, pooled over the rules.
    """

    def val(trial: Trial) -> float:
        return float(archive.records[trial.hash]["result"]["val"]["auc"])

    found: dict[Treatment, tuple[dict[str, list[float]], float]] = {}
    for rule in rules:
        by_data: dict[str, list[float]] = {data: [] for data in SEARCHED}
        merged: list[float] = []
        lost = False
        for seed, data in product(seeds, SEARCHED):
            own, control = (
                second_stage(data, FIRST_SEED + seed, one) for one in (rule, control_of(rule))
            )
            if is_lost(control, archive):
                continue
            lost |= is_lost(own, archive)
            if not lost:
                by_data[data].append(val(own) - val(control))
                merged.append(merged_share(archive.records[own.hash]["result"]))
        if not lost and all(by_data.values()) and any(merged):
            found[rule] = by_data, float(np.mean(merged))
    spreads = {
        data: _pooled_deviation([by_data[data] for by_data, _ in found.values()])
        for data in SEARCHED
    }
    return {
        rule: Gain(
            by_data,
            float(np.mean([np.mean(some) / spreads[data] for data, some in by_data.items()])),
            merged,
        )
        for rule, (by_data, merged) in found.items()
    }


def _pooled_deviation(samples: Sequence[Sequence[float]]) -> float:
    """The standard deviation within samples; 1 where there is none."""
    squares = sum(float(np.sum((np.asarray(some) - np.mean(some)) ** 2)) for some in samples)
    freedom = sum(len(some) - 1 for some in samples)
    return float(np.sqrt(squares / freedom)) if squares > 0 else 1.0


def search(archive: Archive) -> list[dict[Treatment, Gain]]:
    """The gains in each finished round; those with the highest scores go on to the next.

    A round without any gain is the last.
    """
    found: list[dict[Treatment, Gain]] = []
    rules: Sequence[Treatment] = candidates()
    for seeds, left in ROUNDS:
        rules = _best(found[-1], left) if found else rules
        trials = with_dependencies(round_grid(rules, range(seeds)))
        if not all(t.hash in archive.records or is_lost(t, archive) for t in trials):
            break
        found.append(gains(rules, range(seeds), archive))
        if not found[-1]:
            break
    return found


def _best(found: Mapping[Treatment, Gain], left: int) -> list[Treatment]:
    return sorted(found, key=lambda rule: -found[rule].score)[:left]


def winner(archive: Archive) -> Treatment | None:
    """The rule with the highest score of the last round; None before its trials are stored."""
    found = search(archive)
    return _best(found[-1], 1)[0] if len(found) == len(ROUNDS) and found[-1] else None


def later(archive: Archive) -> tuple[Trial, ...]:
    """The trials of the rounds after the first, and those of the test."""
    found, trials = search(archive), []
    for done, (seeds, left) in zip(found, ROUNDS[1:], strict=False):
        trials += round_grid(_best(done, left), range(seeds))
    best = winner(archive)
    return (*trials, *(() if best is None else test_grid(best)))


def test_grid(best: Treatment) -> tuple[Trial, ...]:
    """The trials of the test: the winner and the paper's rule, and no merging for each."""
    arms = {
        "finetune": Treatment(),
        "finetune as the winner": control_of(best),
        "paper": PAPER,
        "winner": best,
    }
    return tuple(
        second_stage(data, seed, rule, name)
        for seed, data in product(TEST_SEEDS, TESTED)
        for name, rule in arms.items()
        if name != "finetune as the winner" or rule != Treatment()
    )


def pairs_of(best: Treatment) -> tuple[tuple[str, str], ...]:
    """The pairs of the test."""
    control = "finetune" if control_of(best) == Treatment() else "finetune as the winner"
    return ("winner", control), ("paper", "finetune")


def analyse(archive: Archive) -> Found:
    """The search; once all trials are stored, the test."""
    rounds = search(archive)
    found: Found = {
        "rounds": [
            [
                {
                    "name": _name(rule),
                    **rule.described(),
                    **some[rule]._asdict(),
                }
                for rule in _best(some, len(some))
            ]
            for some in rounds
        ]
    }
    best = winner(archive)
    planned = () if best is None else with_dependencies(test_grid(best))
    found |= shared.progress(planned, archive)
    found[_LOST] = [trial.name for trial in QUESTION.planned(archive) if is_lost(trial, archive)]
    if best is None or not shared.is_complete(found):
        return found
    own, pairs = groups(planned, archive), pairs_of(best)
    pooled = {
        pair[0]: statistics.over_trials([gap for g in own for gap in g.differences(pair, "auc")])
        for pair in pairs
    }
    statistics.add_holm(list(pooled.values()))
    return found | {
        "groups": {
            group.name: {
                "seeds": len(group.records("finetune")),
                **{arm: group.mean(arm, "auc") for arm in ("backbone", "finetune")},
                "merged": {arm: group.merged(arm) for arm in ("winner", "paper")},
            }
            for group in own
        },
        "intervals": intervals(own, pairs),
        "pooled": pooled,
    }


def is_recommended(found: Found) -> bool:
    """Whether the winner gains at least `GAIN` with its interval above 0."""
    row = found["pooled"]["winner"]
    return bool(row["mean"] >= GAIN and row["low"] > 0)


def table(found: Found) -> str:
    """The test, by data set and over all pairs."""
    rows = []
    for name, group in found["groups"].items():
        cells = [difference(by.get(name), 4) for by in found["intervals"].values()]
        values = (f"{group[arm]:.3f}" for arm in ("backbone", "finetune"))
        rows.append((f"{name} ({group['seeds']} seeds)", *values, *cells))
    pooled = found["pooled"].values()
    cells = [f"{difference(row, 4)}, p {p_value(row['p_holm'])}" for row in pooled]
    rows.append((f"all {found['pooled']['winner']['trials']} pairs", "", "", *cells))
    columns = ("Test AUC", "Backbone", "Fine-tuning", *found["intervals"])
    lost = ", ".join(name for name in found[_LOST] if name not in found["diverged"])
    note = f"\nDiverged in the search: {lost}.\n" if lost else ""
    return markdown(columns, rows) + note + shared.diverged_note(found)


def merged_table(found: Found) -> str:
    """Kernels that merge per update, as a share of those that can, by data set of the test."""
    return shared.merged_table(found["groups"], ("winner", "paper"))


def search_table(archive: Archive) -> str:
    """The rules of each finished round with their gains in validation AUC, the best first."""
    rows = []
    for number, some in enumerate(search(archive), 1):
        for rule in _best(some, 5 if number < len(ROUNDS) else len(some)):
            gain = some[rule]
            by_data = (
                difference(statistics.over_trials(gain.by_data[data]), 4) for data in SEARCHED
            )
            label = f"{number}, {_name(rule).removeprefix('candidate ')}"
            rows.append((label, _words(rule), share(gain.merged, 2), *by_data, f"{gain.score:.2f}"))
    columns = (
        *("Round, candidate", "Rule", "Merged per update"),
        *(f"Gain, {SOURCES[data].title}" for data in SEARCHED),
        "Score",
    )
    return markdown(columns, rows)


def _words(rule: Treatment) -> str:
    """The levels of a candidate, in words."""
    limit = "threshold" if rule.quantile is None else "quantile"
    words = [
        f"{limit} {getattr(rule, limit):g}",
        f"{rule.partner} partner",
        f"alpha {rule.alpha:g}",
        "every update" if rule.every == 1 else "once per epoch",
    ]
    words += [] if rule.until == 1 else [f"first {100 * rule.until:.0f} % of the updates"]
    words += {"kernel": [], "norm": ["with batch norm"], "consumer": ["with consumer"]}[rule.along]
    words.append(f"{rule.layers} layers")
    words += [] if rule.average is None else ["averaged weights"]
    words += [] if rule.statistics == "running" else ["re-estimated statistics"]
    return ", ".join(words)


def figure(found: Found) -> Plot:
    """Differences of the test by data set."""
    return dot_plot("Minus fine-tuning", "difference in test AUC", found["intervals"])


def overview(found: Found) -> Overview:
    """The winner of the search, over all pairs of the test."""
    row = found["pooled"]["winner"]
    effect = f"winner of the search minus fine-tuning: {difference(row, 4)}"
    shown = shared.overview_of(effect, row, statistics.verdict(row))
    word = "recommended" if is_recommended(found) else "not recommended"
    return shown._replace(verdict=f"{shown.verdict}; {word}")


QUESTION = Question(
    name="better_rule",
    title="Is another rule better?",
    hypothesis=(
        "The rule that a search on two data sets finds has a higher mean test AUC than fine-tuning "
        "on three other ones."
    ),
    trials=round_grid(candidates(), range(ROUNDS[0][0])),
    later=later,
    choices=search_table,
    has_chosen=lambda archive: winner(archive) is not None,
    keeps_scores=lambda trial: trial.backbone.seed < FIRST_SEED,
    analyse=analyse,
    table=table,
    figure=figure,
    overview=overview,
    keeps_weights=False,
)
