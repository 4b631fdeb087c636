"""AUROC of the 14 findings of ChestX-ray14: intervals, and ranks among published results."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from inmerge_jax.reporting.published import CHESTXRAY14, comparable_findings
from inmerge_jax.reporting.resampling import draw_counts
from inmerge_jax.reporting.runs import Run, number
from inmerge_jax.reporting.summary import CONFIDENCE

RESAMPLES = 1000
_CHUNK = 50
"""Number of resamples held in memory at once."""


@dataclass(frozen=True)
class RankedAuroc:
    """One arm's AUROC of one finding, mean over seeds.

    Attributes:
      auc: mean AUROC; NaN where the test split has only positive or only negative images.
      low: lower end of the bootstrap interval; NaN without test labels or a seed's scores.
      high: upper end of the bootstrap interval.
      undefined: number of resamples without a value.
      rank: 1 for the highest AUROC among the arms and the comparable published rows; ties share a
        rank; 0 where `auc` is NaN.
    """

    auc: float
    low: float
    high: float
    undefined: int
    rank: int


@dataclass(frozen=True)
class PublishedRow:
    """A published row: values in the order of `Ranking.names`, the mean last."""

    label: str
    split: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Ranking:
    """The AUROCs and ranks of one run.

    Attributes:
      names: the findings, and "mean".
      arms: arm -> one AUROC per name.
      published: every published row.
      comparable: labels of the published rows with the same test images.
      comparability: which published rows can be compared, or why none can.
      images: number of test images.
      patients: number of test patients; None where the data set does not name them.
      resamples: number of bootstrap resamples; 0 without intervals.
    """

    names: tuple[str, ...]
    arms: Mapping[str, tuple[RankedAuroc, ...]]
    published: tuple[PublishedRow, ...]
    comparable: tuple[str, ...]
    comparability: str
    images: int
    patients: int | None
    resamples: int


def rank_findings(run: Run, resamples: int = RESAMPLES) -> Ranking | None:
    """The ranks of a run on ChestX-ray14; None for another data set."""
    if run.dataset["name"] != "chestxray14":
        return None
    names = (*run.dataset["classes"], "mean")
    comparable = comparable_findings(run.dataset)
    rivals = [(*row.auc, row.mean) for row in comparable]
    values = {arm: _mean_aucs(run, arm) for arm in run.arms}
    arms = {}
    for arm, aucs in values.items():
        cells = []
        for index, ends in enumerate(_intervals(run, arm, len(names), resamples)):
            others = [found[index] for found in (*values.values(), *rivals)]
            above = sum(other > aucs[index] for other in others)
            rank = 0 if math.isnan(aucs[index]) else 1 + above
            cells.append(RankedAuroc(aucs[index], *ends, rank))
        arms[arm] = tuple(cells)
    return Ranking(
        names=names,
        arms=arms,
        published=tuple(PublishedRow(x.label, x.split, (*x.auc, x.mean)) for x in CHESTXRAY14),
        comparable=tuple(row.label for row in comparable),
        comparability=_comparability(run),
        images=run.dataset["counts"]["test"],
        patients=None if run.test_patients is None else len(np.unique(run.test_patients)),
        resamples=resamples if run.scored else 0,
    )


def _comparability(run: Run) -> str:
    data, split = run.dataset, run.dataset.get("split")
    counts, full = data["counts"], data.get("full_counts") or data["counts"]
    labels = ", ".join(row.label for row in comparable_findings(data))
    if labels and counts["train"] != full["train"]:
        return (
            f"Same {counts['test']:,} test images: {labels}; this run trained on "
            f"{counts['train']:,} of {full['train']:,} images."
        )
    if labels:
        return f"Same {counts['test']:,} test images: {labels}."
    reason = f"no published row has the test images of the split {split}"
    if counts["test"] != full["test"]:
        reason = f"the run has {counts['test']:,} of the split's {full['test']:,} test images"
    elif rows := [row for row in CHESTXRAY14 if row.same_as == split]:
        reason = f"the {counts['test']:,} test images are not the {rows[0].images:,} of {split}"
    return f"NOT COMPARABLE with the published rows: {reason}."


def bootstrap_auroc(positive: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """AUROC in resamples of the images; ties count half.

    Args:
      positive: bool (n,).
      scores: float (n,).
      counts: int (resamples, n), number of times that each image is in each resample.

    Returns:
      float64 (resamples,), NaN where a resample lacks positive or negative images.
    """
    order = np.argsort(scores, kind="stable")
    ranked, counts = scores[order], counts[:, order].astype(np.float64)
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    ones = np.add.reduceat(counts * positive[order], starts, axis=1)
    zeros = np.add.reduceat(counts * ~positive[order], starts, axis=1)
    below = np.cumsum(zeros, axis=1) - zeros / 2
    pairs = ones.sum(1) * zeros.sum(1)
    wins = (ones * below).sum(1)
    return np.where(pairs > 0, wins / np.where(pairs > 0, pairs, 1), np.nan)


def _mean_aucs(run: Run, arm: str) -> tuple[float, ...]:
    """AUROC of every finding, and "auc", mean over the seeds that define it."""
    tests = [result["test"] for result in run.arm(arm).values()]
    columns = [[number(auc) for auc in test["auc_per_class"]] for test in tests]
    columns = [[*column, number(test["auc"])] for column, test in zip(columns, tests, strict=True)]
    return tuple(_mean(values) for values in zip(*columns, strict=True))


def _mean(values: tuple[float, ...]) -> float:
    defined = [value for value in values if math.isfinite(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _intervals(run: Run, arm: str, width: int, resamples: int) -> list[tuple[float, float, int]]:
    """(low, high, undefined resamples) of every finding and of their mean, mean over seeds."""
    labels = run.test_labels
    if labels is None or not run.scored:
        return [(math.nan, math.nan, 0)] * width
    scores = [s for (_, a), s in run.test_scores.items() if a == arm]
    rng = np.random.default_rng(0)
    found = []
    for start in range(0, resamples, _CHUNK):
        some = min(_CHUNK, resamples - start)
        counts = draw_counts(len(labels), some, rng, run.test_patients)
        each = [
            [bootstrap_auroc(labels[:, k] == 1, s[:, k], counts) for k in range(width - 1)]
            for s in scores
        ]
        # Whether a resample has an AUROC depends on the labels alone, so it is equal for all seeds.
        found.append(np.mean(each, axis=0))
    values = np.concatenate(found, axis=1)
    defined = np.isfinite(values)
    total = np.where(defined, values, 0).sum(0)
    mean = np.where(defined.any(0), total / np.maximum(defined.sum(0), 1), np.nan)
    tail = 50 * (1 - CONFIDENCE)
    ends = []
    for row in (*values, mean):
        known = row[np.isfinite(row)]
        low, high = np.percentile(known, (tail, 100 - tail)) if known.size else (math.nan, math.nan)
        ends.append((float(low), float(high), int(row.size - known.size)))
    return ends
