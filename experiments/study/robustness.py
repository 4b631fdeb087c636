"""Question 6: errors on corrupted test images, and calibration, of the three arms."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.study import shared, store, telling
from experiments.study.cells import Cell, Treatment
from experiments.study.command import main
from experiments.study.corruptions import SEVERITIES, corrupt
from experiments.study.prediction_errors import (
    balanced_error,
    calibration_error,
    reliability,
)
from experiments.study.question import Kept, Question, told, where
from experiments.study.stages import Places, plan_of, weights_of
from experiments.study.statistics import bootstrap, detectable, draw_counts, holm
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_arrays
from inmerge_jax.reporting.plots import COLOURS, GUIDE, Plot, make_plot
from inmerge_jax.reporting.tables import Table

ARMS = {"inmerge": shared.PAPER, "inmerge, adaptive": Treatment("merge", quantile=0.5)}
SHOWN = ("backbone", "finetune", *ARMS)
PREDICTIONS = "robustness.npz"
"""Beside the answer."""
LEVELS = range(1, 6)
MEASURES = {
    "error": "error under corruption",
    "rise": "rise with corruption",
    "ece": "calibration error",
}
RESAMPLES = 1000


def measure(cells: Sequence[Cell], places: Places) -> None:
    """Predicts corrupted test images with the best weights of finished cells; keeps the classes.

    A cell whose checkpoint is gone is named and left out.
    """
    file = places.results / "study" / PREDICTIONS
    kept = read_predictions(file)
    corrupted: dict[str, list[np.ndarray]] = {}
    for cell in cells:
        if cell.hash in kept:
            continue
        plan = plan_of(cell, places)
        data = cell.backbone.data
        if data not in corrupted:
            images = plan.dataset.test.images[:]
            corrupted[data] = [corrupt(images, n, level) for n in SEVERITIES for level in LEVELS]
        try:
            predict = weights_of(cell, places)
        except UsageError as error:
            print(f"not measured: {cell.hash} {cell.name}: {error}", file=sys.stderr)
            continue
        classes = [predict(images).argmax(1).astype(np.uint8) for images in corrupted[data]]
        kept[cell.hash] = np.stack(classes).reshape(len(SEVERITIES), len(LEVELS), -1)
        write_arrays(file, kept)
        print(f"{cell.hash} {cell.name}: {len(classes)} corrupted copies of the test images")


def measured(cell: Cell, places: Places) -> bool:
    """Whether the cell's predictions are kept, so that its weights are not needed."""
    return cell.hash in read_predictions(places.results / "study" / PREDICTIONS)


def read_predictions(file: Path) -> dict[str, np.ndarray]:
    """Hash of a cell to uint8 (corruptions, severities, images), the predicted classes."""
    if not file.exists():
        return {}
    with np.load(file) as arrays:
        return dict(arrays)


def analyse(kept: Kept) -> dict[str, Any]:
    """By data set: balanced errors, their differences from finetune, calibration."""
    predictions = read_predictions(kept.folder.parent / "study" / PREDICTIONS)
    known = Kept(tuple(c for c in kept.cells if c.hash in predictions), kept.folder)
    groups = {
        where(key): {"key": list(key), **found}
        for key, cells in known.groups().items()
        if (found := _analyse_group(key[0], cells, predictions))
    }
    sure = [
        row[name]
        for group in groups.values()
        for row in group["differences"].values()
        for name in MEASURES
        if len(row[name]["seeds"]) > 1
    ]
    for row, p in zip(sure, holm([row["p"] for row in sure]), strict=True):
        row["p_holm"] = p
    return {"groups": groups}


def _analyse_group(data: str, cells: Kept, predictions: dict[str, np.ndarray]) -> dict[str, Any]:
    """The arms of one network on one data set, on the same seeds and the same drawn images."""
    arms = {arm: cells.by_arm()[arm] for arm in SHOWN if arm in cells.by_arm()}
    seeds = sorted(set.intersection(*(set(of) for of in arms.values())))
    if not seeds:
        return {}
    labels, _, patients = store.read_labels(data, cells.folder)
    drawn = draw_counts(len(labels), RESAMPLES, np.random.default_rng(0), patients)
    counts = np.concatenate([np.ones((1, len(labels)), int), drawn])
    errors, clean_errors, eces, rows = {}, {}, {}, {}
    for arm, of in arms.items():
        # (seeds, resamples, corruptions, severities)
        errors[arm] = np.stack(
            [balanced_error(labels, predictions[of[s].hash], counts) for s in seeds]
        )
        scores = np.stack([store.read_test_scores(of[s], cells.folder) for s in seeds])
        clean_errors[arm] = balanced_error(labels, scores.argmax(2), counts).T
        eces[arm] = np.stack([calibration_error(labels, x, counts) for x in scores])
        by_severity = [clean_errors[arm], *np.moveaxis(errors[arm].mean(2), 2, 0)]
        rows[arm] = {
            "clean": float(clean_errors[arm][:, 0].mean()),
            "corruptions": {
                name: errors[arm][:, 0, index].mean(0).tolist()
                for index, name in enumerate(SEVERITIES)
            },
            "mean": float(errors[arm][:, 0].mean()),
            "severities": [_interval(values) for values in by_severity],
            "ece": eces[arm][:, 0].tolist(),
            "bins": reliability(labels, scores, counts),
        }
    differences = {}
    for arm in arms:
        if arm != "finetune" and "finetune" in arms:
            gap = (errors[arm] - errors["finetune"]).mean((2, 3))
            clean = clean_errors[arm] - clean_errors["finetune"]
            sure = eces[arm] - eces["finetune"]
            differences[arm] = {
                **{"error": _interval(gap), "rise": _interval(gap - clean)},
                "ece": _interval(sure),
            }
    found = {"seeds": seeds, "images": len(labels)}
    return {**found, "arms": rows, "differences": differences}


def _interval(values: np.ndarray) -> dict[str, Any]:
    """Of (seeds, 1 + resamples), of which the first is on the images as they are."""
    found = bootstrap(values[:, 0], values[:, 1:].T, np.random.default_rng(0))
    row = found._asdict()
    return {"mean": row.pop("value"), **row, "seeds": values[:, 0].tolist()}


def came_out(found: dict[str, Any]) -> str:
    """Mean errors and calibration of the arms."""
    parts = []
    for name, group in found["groups"].items():
        errors = ", ".join(f"{arm} {row['mean']:.3f}" for arm, row in group["arms"].items())
        eces = ", ".join(f"{arm} {np.mean(row['ece']):.3f}" for arm, row in group["arms"].items())
        gaps = "; ".join(
            f"{arm} {telling.difference(row['rise'])}"
            for arm, row in group["differences"].items()
            if arm != "backbone"
        )
        parts.append(
            f"{name}: mean balanced error under corruption {errors}; its rise above the error on "
            f"clean images, minus finetune's: {gaps}; expected calibration error {eces}"
        )
    rises = [
        row["rise"]
        for group in found["groups"].values()
        for arm, row in group["differences"].items()
        if arm != "backbone"
    ]
    less = sum(told(row) and row["mean"] < 0 for row in rises)
    verdict = (
        f"In {less} of {len(rises)} comparisons the errors of an arm with merging rise less under "
        "corruption than finetune's (p < 0.05 after Holm's correction)"
        if less
        else "Not as far as these data show: in none of "
        f"{len(rises)} comparisons do the errors of an arm with merging rise less under corruption "
        "than finetune's (p < 0.05 after Holm's correction)"
    )
    return f"{verdict}. {'. '.join(parts)}."


def sure(found: dict[str, Any]) -> str:
    """Which intervals leave zero out."""
    clear = [
        f"{'lower' if row[what]['mean'] < 0 else 'higher'} {words} of {arm} on {name}"
        for what, words in MEASURES.items()
        for name, group in found["groups"].items()
        for arm, row in group["differences"].items()
        if arm != "backbone" and told(row[what])
    ]
    seeds = min((len(group["seeds"]) for group in found["groups"].values()), default=0)
    said = (
        f"Distinguished from zero (p < 0.05 after Holm's correction): {'; '.join(clear)}"
        if clear
        else "No arm with merging is distinguished from finetune, neither in its error under "
        "corruption, in how much that rises above its error on clean images, nor in its "
        "calibration error, after Holm's correction"
    )
    alone = f" {telling.ONE_SEED}" if seeds == 1 else ""
    sizes = {
        words: [
            detectable(row[what])
            for group in found["groups"].values()
            for arm, row in group["differences"].items()
            if arm != "backbone"
        ]
        for what, words in MEASURES.items()
    }
    seen = "; ".join(
        f"{words} {min(some):.3f} to {max(some):.3f}" for words, some in sizes.items() if some
    )
    missed = [words for words, some in sizes.items() if some and max(some) > telling.NEEDED]
    so = (
        f" So one of {telling.NEEDED:g} may well have been missed in {', '.join(missed)}."
        if missed
        else ""
    )
    return (
        f"{said}; intervals over seeds and test images together. Distinguished from zero about "
        f"four times out of five, as the only comparison, would be a difference in {seen}.{so}"
        f"{alone}"
    )


def notes(found: dict[str, Any]) -> tuple[str, ...]:
    """What was trained and measured."""
    return (
        f"{shared.PAGE_NOTE}.",
        "Robustness is the rise: an arm with a lower error on clean images too may have a lower "
        "one under corruption without it.",
        "None of this is told apart from batch statistics that lag (question 3).",
        "The corruptions are ours, defined at 28 px, not MedMNIST-C's.",
    )


def tables(found: dict[str, Any]) -> list[Table]:
    """Balanced error by corruption; then what is compared with finetune."""
    rows, compared, kinds = [], [], []
    for name, group in found["groups"].items():
        for arm, row in group["arms"].items():
            by_kind = [f"{np.mean(values):.3f}" for values in row["corruptions"].values()]
            who, clean, mean = f"{name}: {arm}", f"{row['clean']:.3f}", f"{row['mean']:.3f}"
            rows.append((who, clean, *by_kind, mean))
            gap = group["differences"].get(arm)
            against = [""] * 3 if gap is None else [telling.difference(gap[m]) for m in MEASURES]
            figures = against[0], against[1], f"{np.mean(row['ece']):.3f}", against[2]
            compared.append((who, str(len(group["seeds"])), *figures))
            kinds.append("total" if arm == "backbone" else "arm")
    title = "Balanced error on test images, mean over five severities and seeds"
    more = (
        "Error over all corruptions, its rise above that on clean images, and expected calibration "
        "error on clean images, each minus finetune's [95% interval over seeds and images]"
    )
    columns = ("data set: arm", "clean", *SEVERITIES, "all")
    gaps = (f"{what}, minus finetune" for what in ("error", "rise"))
    heads = (
        "data set: arm",
        "seeds",
        *gaps,
        "calibration error",
        "calibration error, minus finetune",
    )
    return [
        Table(title, columns, tuple(rows), tuple(kinds)),
        Table(more, heads, tuple(compared), tuple(kinds)),
    ]


def figures(found: dict[str, Any]) -> list[Plot]:
    """Error against severity, and reliability, by data set."""
    drawn = []
    for name, group in found["groups"].items():
        drawn += [_severity_plot(name, group), _reliability_plot(name, group)]
    return drawn


def _colour(arm: str) -> str:
    return COLOURS.get(arm, "#009E73")


def _severity_plot(name: str, group: dict[str, Any]) -> Plot:
    def draw(axes: Any) -> None:
        for offset, (arm, row) in _side_by_side(group, 0.08):
            mean, low, high = (
                np.array([one[what] for one in row["severities"]])
                for what in ("mean", "low", "high")
            )
            _with_bars(axes, np.arange(6) + offset, mean, low, high, arm)
        axes.set_title(f"Errors by severity: {name}", fontsize=10)
        axes.set_xlabel("severity (0: clean)")
        axes.set_ylabel("mean balanced error")
        axes.figure.legend(loc="outside lower center", ncols=2)

    caption = (
        "Mean over seven corruptions and seeds, with the 95% interval over seeds and test images; "
        "lower is better. Arms share their images, so a bar is wider than what separates two "
        "lines; for that see the table. If merging made networks more robust, its lines would rise "
        "less."
    )
    return make_plot(draw, caption, f"Errors by severity: {name}")


def _reliability_plot(name: str, group: dict[str, Any]) -> Plot:
    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=GUIDE, lw=1, ls=":")
        for offset, (arm, row) in _side_by_side(group, 0.006):
            sure, right, low, high = (
                np.array([one[what] for one in row["bins"]])
                for what in ("confidence", "right", "low", "high")
            )
            _with_bars(axes, sure + offset, right, low, high, arm)
        axes.set_title(f"Reliability: {name}", fontsize=10)
        axes.set_xlabel("confidence")
        axes.set_ylabel("share of right answers")
        axes.figure.legend(loc="outside lower center", ncols=2)

    caption = (
        "All seeds together, ten bins of confidence, with the 95% interval over test images. On "
        "the dotted line confidence is what it promises; below it the network is too sure."
    )
    return make_plot(draw, caption, f"Reliability: {name}")


def _side_by_side(group: dict[str, Any], apart: float) -> list[tuple[float, tuple[str, Any]]]:
    """Arms with shifts along x, so that no bar hides another."""
    arms = list(group["arms"].items())
    return [(apart * (i - (len(arms) - 1) / 2), arm) for i, arm in enumerate(arms)]


def _with_bars(
    axes: Any, x: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray, arm: str
) -> None:
    bars = np.maximum([y - low, high - y], 0)
    axes.errorbar(x, y, bars, fmt="-o", color=_colour(arm), ms=3, lw=1.2, elinewidth=0.8, label=arm)


QUESTION = Question(
    name="robustness",
    number=6,
    title="Are merged networks more robust?",
    asked=(
        "Do networks trained with merging make fewer errors on corrupted test images, and are "
        "they better calibrated, as the paper's title suggests?"
    ),
    cells=shared.second_stages(ARMS),
    analyse=analyse,
    came_out=came_out,
    sure=sure,
    tables=tables,
    figures=figures,
    notes=notes,
    measure=measure,
    measured=measured,
)

if __name__ == "__main__":
    sys.exit(main(QUESTION))
