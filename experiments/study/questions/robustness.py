"""Errors on corrupted test images, and calibration."""

from typing import Any

import numpy as np

from experiments.study import corrupted_predictions, statistics
from experiments.study.analysis import Group, drawn_counts, groups
from experiments.study.archive import Archive
from experiments.study.corrupted_predictions import are_stored
from experiments.study.prediction_errors import balanced_error, calibration_error
from experiments.study.questions import shared
from experiments.study.questions.question import Found, Overview, Question
from experiments.study.render import difference, dot_plot, markdown
from experiments.study.stages import Paths
from experiments.study.trials import Treatment, Trial
from inmerge_jax.reporting.plots import Plot

ARMS = {"inmerge": shared.PAPER, "inmerge, adaptive": Treatment("merge", quantile=0.5)}
SHOWN = ("backbone", "finetune", *ARMS)
LEVELS, BINS = (1, 2, 3, 4, 5), 10
MEASURES = ("error", "rise", "ece")
"""Balanced error under corruption, its rise above that on clean images, calibration error."""


def measure(trial: Trial, paths: Paths) -> None:
    """Predicts the corrupted test images with a finished trial's best weights; stores the classes.

    Raises:
      UsageError: its checkpoint is gone.
    """
    corrupted_predictions.measure(trial, paths, LEVELS, None)


def analyse(archive: Archive) -> Found:
    """By data set: errors and calibration of the arms, and their differences from fine-tuning."""
    known = [trial for trial in QUESTION.stored(archive) if are_stored(trial, archive)]
    own = {group.name: _analyse_group(group) for group in groups(known, archive)}
    every = [
        row for one in own.values() for by in one["differences"].values() for row in by.values()
    ]
    statistics.add_holm(every)
    pooled = {
        arm: {
            name: statistics.over_trials(
                [gap for one in own.values() for gap in one["differences"][arm][name]["gaps"]]
            )
            for name in MEASURES
        }
        for arm in ARMS
    }
    statistics.add_holm([row for by in pooled.values() for row in by.values()])
    for row in every:
        del row["gaps"]
    return {"groups": own, "pooled": pooled}


def _analyse_group(group: Group) -> dict[str, Any]:
    """The arms of one network on one data set, on the same seeds and the same drawn images."""
    archive, data = group.archive, group.backbone.data
    seeds = sorted(set.intersection(*(set(group.arms[arm]) for arm in SHOWN)))
    labels, counts = archive.labels[data].labels, drawn_counts(archive, data)
    values: dict[str, dict[str, np.ndarray]] = {}
    for arm in SHOWN:
        trials = [group.arms[arm][seed] for seed in seeds]
        scores = np.stack([archive.scores(trial) for trial in trials])
        predicted = np.stack([archive.arrays[f"corrupted/{trial.hash}"] for trial in trials])
        error = np.stack([balanced_error(labels, x, counts).mean((1, 2)) for x in predicted])
        clean = balanced_error(labels, scores.argmax(2), counts).T
        ece = np.stack([calibration_error(labels, x, counts, BINS) for x in scores])
        values[arm] = {"error": error, "rise": error - clean, "ece": ece, "clean": clean}
    differences: dict[str, Any] = {}
    for arm in ARMS:
        differences[arm] = {}
        for name in MEASURES:
            gaps = values[arm][name] - values["finetune"][name]
            interval = statistics.bootstrap(gaps[:, 0], gaps[:, 1:].T, np.random.default_rng(0))
            differences[arm][name] = {**interval._asdict(), "gaps": gaps[:, 0].tolist()}
    means = {
        arm: {name: float(x[:, 0].mean()) for name, x in of.items()} for arm, of in values.items()
    }
    return {"seeds": len(seeds), "arms": means, "differences": differences}


def table(found: Found) -> str:
    """A row for each data set and arm."""
    rows = []
    for name, group in found["groups"].items():
        for arm, row in group["arms"].items():
            gap = group["differences"].get(arm, {})
            values = (f"{row[what]:.3f}" for what in ("clean", "error"))
            ece = f"{row['ece']:.3f}"
            gaps = difference(gap.get("rise")), difference(gap.get("ece"))
            rows.append((f"{name}: {arm}", *values, gaps[0], ece, gaps[1]))
    columns = (
        *("Balanced error", "Clean images", "Corrupted", "Rise, minus fine-tuning's"),
        *("Calibration error (ECE)", "ECE minus fine-tuning's"),
    )
    return markdown(columns, rows)


def figure(found: Found) -> Plot:
    """How much more than fine-tuning's the error of an arm rises under corruption."""
    series = {
        name: {arm: row["rise"] for arm, row in group["differences"].items()}
        for name, group in found["groups"].items()
    }
    unit = "rise of the balanced error, minus fine-tuning's"
    return dot_plot("Robustness to corruption", unit, series)


def overview(found: Found) -> Overview:
    """The rise of the error with the paper's rule; a lower one helps."""
    row = found["pooled"]["inmerge"]["rise"]
    shown = shared.overview("rise of the error minus fine-tuning's", row)
    verdict = {"helps": "harms", "harms": "helps"}.get(shown.verdict, shown.verdict)
    return shown._replace(verdict=verdict.replace("AUC", "balanced error"))


QUESTION = Question(
    name="robustness",
    title="Are merged networks more robust?",
    hypothesis=(
        "With merging, errors rise less under image corruption, and calibration is better."
    ),
    trials=shared.second_stages(ARMS),
    analyse=analyse,
    table=table,
    figure=figure,
    overview=overview,
    measure=measure,
    measured=are_stored,
)
