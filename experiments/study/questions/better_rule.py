"""Is another rule better than the paper's? A search, then one test. See docs/protocol.md, 4."""

import functools
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from experiments.study import statistics
from experiments.study.analysis import groups, intervals
from experiments.study.archive import Archive
from experiments.study.questions import shared
from experiments.study.questions.question import Found, Overview, Question, is_lost
from experiments.study.render import difference, dot_plot, markdown, p_value
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
FIRST_SEED, TEST_SEEDS = 200, range(8)
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


def gains(
    rules: Sequence[Treatment], seeds: Sequence[int], archive: Archive
) -> dict[Treatment, list[float]]:
    """Validation AUC minus that of its control, of each rule: by seed, mean over the data sets.

    A pair is missing where the control or the backbone diverged. A rule that diverged itself, or
    has no pair, has no gains.
    """

    def val(trial: Trial) -> float:
        return float(archive.records[trial.hash]["result"]["val"]["auc"])

    found: dict[Treatment, list[float]] = {}
    for rule in rules:
        by_seed: dict[int, list[float]] = {}
        lost = False
        for seed, data in product(seeds, SEARCHED):
            own, control = (
                second_stage(data, FIRST_SEED + seed, one) for one in (rule, control_of(rule))
            )
            if is_lost(control, archive):
                continue
            lost |= is_lost(own, archive)
            if not lost:
                by_seed.setdefault(seed, []).append(val(own) - val(control))
        if by_seed and not lost:
            found[rule] = [float(np.mean(some)) for some in by_seed.values()]
    return found


def search(archive: Archive) -> list[dict[Treatment, list[float]]]:
    """The gains in each finished round; those with the highest mean go on to the next.

    A round without any gain is the last.
    """
    found: list[dict[Treatment, list[float]]] = []
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


def _best(found: Mapping[Treatment, Sequence[float]], left: int) -> list[Treatment]:
    return sorted(found, key=lambda rule: -float(np.mean(found[rule])))[:left]


def winner(archive: Archive) -> Treatment | None:
    """The rule with the highest mean gain of the last round; None before its trials are stored."""
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
                    **statistics.over_trials(some[rule]),
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


def search_table(archive: Archive) -> str:
    """The rules of each finished round with their mean gain in validation AUC, the best first."""
    rows = []
    for number, some in enumerate(search(archive), 1):
        for rule in _best(some, 5 if number < len(ROUNDS) else len(some)):
            described = rule.described()
            limit = "quantile" if "quantile" in described else "threshold"
            fields = (f"{limit} {described[limit]:g}", *(_cell(rule, name) for name in _SHOWN))
            gap = difference(statistics.over_trials(some[rule]), 4)
            rows.append((f"{number}", _name(rule).removeprefix("candidate "), *fields, gap))
    columns = ("Round", "Candidate", "Merged above", *_SHOWN, "Gain in validation AUC")
    return markdown(columns, rows)


_SHOWN = tuple(name for name in LEVELS if name != "threshold")


def _cell(rule: Treatment, name: str) -> str:
    value = getattr(rule, name)
    if name == "every":
        return "update" if value == 1 else "epoch"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


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
    analyse=analyse,
    table=table,
    figure=figure,
    overview=overview,
)
