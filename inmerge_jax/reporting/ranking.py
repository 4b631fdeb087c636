"""AUROC of the 14 findings of ChestX-ray14: intervals, and ranks among published results."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from inmerge_jax.reporting.formatting import describe_test
from inmerge_jax.reporting.published import (
    CHESTXRAY14,
    PublishedFindings,
    comparable_findings,
)
from inmerge_jax.reporting.resampling import bootstrap_auroc, draw_counts
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
class Ranking:
    """The AUROCs and ranks of one run.

    Attributes:
      names: the findings, and "mean".
      arms: arm -> one AUROC per name.
      comparable: published rows with the same test images.
      notes: one-sentence notes on comparability, intervals and ranks.
    """

    names: tuple[str, ...]
    arms: Mapping[str, tuple[RankedAuroc, ...]]
    comparable: tuple[PublishedFindings, ...]
    notes: tuple[str, ...]


def rank_findings(run: Run, resamples: int = RESAMPLES) -> Ranking | None:
    """The ranks of a run on ChestX-ray14; None for another data set."""
    if run.dataset["name"] != "chestxray14":
        return None
    names = (*run.dataset["classes"], "mean")
    comparable = comparable_findings(run.dataset)
    values = {arm: _mean_aucs(run, arm) for arm in run.arms}
    rivals = [*values.values(), *(row.values for row in comparable)]
    arms = {}
    for arm, aucs in values.items():
        ends = _intervals(run, arm, len(names), resamples)
        ranks = [1 + sum(row[i] > auc for row in rivals) for i, auc in enumerate(aucs)]
        arms[arm] = tuple(
            RankedAuroc(auc, *interval, 0 if math.isnan(auc) else rank)
            for auc, interval, rank in zip(aucs, ends, ranks, strict=True)
        )
    notes = [_comparability(run, comparable)]
    how = "n/a, the run folder lacks test labels or score files"
    if run.scored:
        images = describe_test(run.dataset["counts"]["test"], run.examples, run.test_patients)
        how = f"percentiles of {resamples:,} bootstrap resamples of the {images}"
    among = ", ".join(("the arms", *(row.label for row in comparable)))
    notes += [f"AUROC intervals: {how}.", f"Ranks: among {among}, by the mean over seeds."]
    undefined = np.max([[cell.undefined for cell in cells] for cells in arms.values()], axis=0)
    few = [f"{name} {count:,}" for name, count in zip(names, undefined, strict=True) if count]
    if few:
        notes.append(f"Resamples left out, without a positive or negative image: {', '.join(few)}.")
    return Ranking(names, arms, comparable, tuple(notes))


def _comparability(run: Run, comparable: tuple[PublishedFindings, ...]) -> str:
    """Which published rows can be compared, or why none can."""
    counts, split = run.dataset["counts"], run.dataset.get("split")
    full, images = run.dataset.get("full_counts") or counts, f"{counts['test']:,}"
    if comparable:
        trained = ""
        if counts["train"] != full["train"]:
            trained = f"; this run trained on {counts['train']:,} of {full['train']:,} images"
        labels = ", ".join(row.label for row in comparable)
        return f"Same {images} test images: {labels}{trained}."
    reason = f"no published row has the test images of the split {split}"
    if counts["test"] != full["test"]:
        reason = f"the run has {images} of the split's {full['test']:,} test images"
    elif rows := [row for row in CHESTXRAY14 if row.same_as == split]:
        reason = f"the {images} test images are not the {rows[0].images:,} of {split}"
    return f"NOT COMPARABLE with the published rows: {reason}."


def _mean_aucs(run: Run, arm: str) -> tuple[float, ...]:
    """AUROC of every finding, and their mean, each the mean over the seeds that define it."""
    tests = [result["test"] for result in run.arm(arm).values()]
    rows = [[*map(number, test["auc_per_class"]), number(test["auc"])] for test in tests]
    return tuple(np.ma.masked_invalid(rows).mean(0).filled(np.nan).tolist())


def _intervals(run: Run, arm: str, width: int, resamples: int) -> list[tuple[float, float, int]]:
    """(low, high, undefined resamples) of every finding and of their mean, mean over seeds."""
    labels = run.test_labels
    if labels is None or not run.scored:
        return [(math.nan, math.nan, 0)] * width
    scores = [s for (_, a), s in run.test_scores.items() if a == arm]
    rng = np.random.default_rng(0)
    chunks = []
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        counts = draw_counts(len(labels), size, rng, run.test_patients)
        each = [
            [bootstrap_auroc(labels[:, k] == 1, s[:, k], counts) for k in range(width - 1)]
            for s in scores
        ]
        # Whether a resample has an AUROC depends on the labels alone, so it is equal for all seeds.
        chunks.append(np.mean(each, axis=0))
    values = np.concatenate(chunks, axis=1)
    mean = np.ma.masked_invalid(values).mean(0).filled(np.nan)
    tail = 50 * (1 - CONFIDENCE)
    ends = []
    for row in (*values, mean):
        known = row[np.isfinite(row)]
        low, high = np.percentile(known, (tail, 100 - tail)) if known.size else (math.nan, math.nan)
        ends.append((float(low), float(high), int(row.size - known.size)))
    return ends
