"""Are merged networks more robust or better calibrated? See docs/protocol.md, section 5."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from experiments.study import datasets, statistics
from experiments.study.analysis import Group, drawn_counts, groups
from experiments.study.archive import Archive
from experiments.study.corrupted_predictions import is_wanted, measure, measured
from experiments.study.prediction_errors import balanced_error, calibration_error
from experiments.study.questions import full_length, pretrained, shared
from experiments.study.questions.question import Found, Overview, Question
from experiments.study.render import difference, dot_plot, markdown, p_value
from experiments.study.trials import Trial, with_dependencies
from inmerge_jax.reporting.plots import Plot

MARGIN, BINS = 0.01, 15
LEVEL = pretrained.LEVEL
"""Of the tests about the pairs of section 1, which are those of a look."""
OUTCOMES = {"error": "balanced error, corrupted", "ece": "calibration error (ECE)"}
MERGING = {"pretrained": pretrained.MERGING, "from random weights": full_length.MERGING}
"""The questions whose trials are measured, and their arms."""


def grids(archive: Archive) -> dict[str, list[Trial]]:
    """The second stages of each question of which all trials are stored.

    None before the pairs of a look of the first question are.
    """
    full = (*full_length.first_grid(), *full_length.later(archive))
    every = dict(zip(MERGING, (pretrained.comparison_grid(archive), full), strict=True))
    complete = {
        name: [t for t in trials if is_wanted(t)]
        for name, trials in every.items()
        if shared.is_complete(shared.progress(with_dependencies(trials), archive))
    }
    return complete if pretrained.is_selected(archive) and "pretrained" in complete else {}


def analyse(archive: Archive) -> Found:
    """Errors and calibration by study, data set and arm; once all trials are measured."""
    planned = grids(archive)
    every = [trial for trials in planned.values() for trial in trials]
    found: Found = shared.progress(every, archive, measured)
    if not shared.is_complete(found):
        return found
    found |= {"groups": {}, "pooled": {}, "waiting": [s for s in MERGING if s not in planned]}
    for study, trials in planned.items():
        backbones = groups(with_dependencies(trials), archive)
        if study != "pretrained" and not full_length.reach_the_benchmark(backbones):
            continue
        own = {
            f"{datasets.SOURCES[g.backbone.data].title}, {study}": _analyse_group(g, MERGING[study])
            for g in groups(trials, archive)
        }
        pooled: dict[str, dict[str, Any]] = {}
        for arm, outcome in product(MERGING[study], OUTCOMES):
            rows = [g["differences"][arm][outcome] for g in own.values() if arm in g["differences"]]
            gaps = [gap for row in rows for gap in row.pop("gaps")]
            if gaps:
                pooled.setdefault(arm, {})[outcome] = statistics.over_trials(gaps, MARGIN)
        tested = [row for by in pooled.values() for row in by.values()]
        level = LEVEL if study == "pretrained" else 1 - statistics.CONFIDENCE
        statistics.add_holm(tested, level, MARGIN)
        found["groups"][study], found["pooled"][study] = own, pooled
    return found


def _analyse_group(group: Group, arms: Sequence[str]) -> dict[str, Any]:
    """Each arm against fine-tuning on the seeds of both, and on the same drawn images."""
    archive, data = group.archive, group.backbone.data
    labels, counts = archive.labels[data].labels, drawn_counts(archive, data)

    def values_of(trial: Trial) -> dict[str, np.ndarray]:
        corrupted = archive.arrays[f"corrupted/{trial.hash}"]
        some = slice(corrupted.shape[-1])
        error = balanced_error(labels[some], corrupted, counts[:, some]).mean((1, 2))
        return {
            "error": error,
            "ece": calibration_error(labels, archive.scores(trial), counts, BINS),
        }

    values = {
        arm: {seed: values_of(trial) for seed, trial in group.arms.get(arm, {}).items()}
        for arm in ("finetune", *arms)
    }
    differences: dict[str, Any] = {}
    for arm, outcome in product(arms, OUTCOMES):
        seeds = sorted(set(values[arm]) & set(values["finetune"]))
        if not seeds:
            continue
        gaps = np.stack([values[arm][s][outcome] - values["finetune"][s][outcome] for s in seeds])
        drawn = gaps[:, 1:].T
        if outcome == "ece":
            # Resamples have a larger calibration error, the more so in a well calibrated network.
            drawn = drawn - drawn.mean(0) + gaps[:, 0]
        interval = statistics.bootstrap(gaps[:, 0], drawn, np.random.default_rng(0))
        row = {**interval._asdict(), "gaps": gaps[:, 0].tolist()}
        differences.setdefault(arm, {})[outcome] = row
    means = {
        outcome: float(np.mean([by[outcome][0] for by in values["finetune"].values()]))
        for outcome in OUTCOMES
    }
    return {"finetune": means, "differences": differences}


def table(found: Found) -> str:
    """Differences from fine-tuning by outcome: each data set, and all pairs of each study."""
    rows = []
    for outcome, title in OUTCOMES.items():
        for study, by_arm in found["pooled"].items():
            for name, group in found["groups"][study].items():
                gaps = {arm: difference(by[outcome]) for arm, by in group["differences"].items()}
                cells = (gaps.get(arm, "") for arm in pretrained.MERGING)
                rows.append((f"{title}: {name}", f"{group['finetune'][outcome]:.3f}", *cells))
            pooled = {arm: by[outcome] for arm, by in by_arm.items()}
            cells = (_cell(pooled[a]) if a in pooled else "" for a in pretrained.MERGING)
            rows.append((f"{title}: all pairs, {study}", "", *cells))
    columns = ("", "Fine-tuning", *(f"{arm} minus fine-tuning" for arm in pretrained.MERGING))
    reasons = {
        study: "its trials are not complete"
        if study in found["waiting"]
        else "the backbones do not reach the benchmark"
        for study in MERGING
        if study not in found["pooled"]
    }
    note = "".join(f"\nNot compared: {study}, since {why}.\n" for study, why in reasons.items())
    return markdown(columns, rows) + note + shared.diverged_note(found)


def _cell(row: Mapping[str, Any]) -> str:
    p, equivalent = (p_value(row[name]) for name in ("p_holm", "p_equivalent"))
    return f"{difference(row, 4)}, {row['trials']} pairs, p {p}, of equivalence {equivalent}"


def conclusion(row: Mapping[str, Any]) -> str:
    """The verdict about an outcome, of which less is better."""
    verdict = statistics.verdict(row, LEVEL)
    return {"helps": "harms", "harms": "helps"}.get(verdict, verdict)


def figure(found: Found) -> Plot:
    """Difference of the error under corruption from fine-tuning's, by data set and arm."""
    series: dict[str, Found] = {}
    for own in found["groups"].values():
        for name, group in own.items():
            for arm, row in group["differences"].items():
                series.setdefault(arm, {})[name] = row["error"]
    unit = "balanced error, minus fine-tuning's"
    return dot_plot("Robustness to corruption", unit, series, margin=MARGIN)


def overview(found: Found) -> Overview:
    """The paper's rule, both outcomes, over the pairs of the primary question."""
    rows = found["pooled"]["pretrained"]["paper"]
    effects, verdicts = [], []
    for outcome, title in OUTCOMES.items():
        row = rows[outcome]
        effects.append(f"{title}: {difference(row, 4)}")
        verdict = shared.in_words(conclusion(row), statistics.needed(row), str(MARGIN))
        verdicts.append(f"{title}: {verdict}")
    return Overview("; ".join(effects), str(rows["error"]["trials"]), "; ".join(verdicts))


QUESTION = Question(
    name="corruption",
    title="Are networks with merging more robust or better calibrated?",
    hypothesis=(
        "A second stage with merging has another error on corrupted images, or another calibration "
        "error, than the same stage without it."
    ),
    trials=(),
    later=lambda archive: tuple(t for trials in grids(archive).values() for t in trials),
    choices=pretrained.rates_table,
    has_chosen=lambda archive: bool(grids(archive)),
    analyse=analyse,
    table=table,
    figure=figure,
    overview=overview,
    measure=measure,
    measured=measured,
)
