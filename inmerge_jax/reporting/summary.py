"""A run's numbers: metrics over seeds, paired differences, margins over test images, merges."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from inmerge_jax.reporting.resampling import patient_index
from inmerge_jax.reporting.runs import Run, number

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Values of one quantity over seeds.

    Attributes:
      values: seed -> value. NaN is left out of mean, sd and interval.
      mean: mean of the finite values; NaN if there is none.
      sd: sample standard deviation (n - 1) of the finite values; None for fewer than two.
      interval: two-sided 95 % t-interval of the mean; None for fewer than two values, and for equal
        values, whose interval of width zero would understate the uncertainty.
    """

    values: Mapping[int, float]
    mean: float
    sd: float | None
    interval: tuple[float, float] | None

    @property
    def count(self) -> int:
        """Number of finite values."""
        return sum(map(math.isfinite, self.values.values()))


@dataclass(frozen=True)
class SamplingError:
    """Uncertainty from the choice of test images, without the variation over seeds.

    Attributes:
      standard_error: metric -> standard error of one arm's mean over seeds (the last arm run).
      margin: (left, right) -> metric -> 1.96 standard errors of the paired difference.
    """

    standard_error: dict[str, float]
    margin: dict[tuple[str, str], dict[str, float]]


@dataclass(frozen=True)
class LayerMerges:
    """Merges of one layer over the merging stage, by seed."""

    name: str
    kernels: int
    selected: tuple[int, ...]
    merged: tuple[int, ...]


@dataclass(frozen=True)
class Summary:
    """The numbers of the tables.

    Attributes:
      arms: arm -> metric -> test values.
      differences: (left, right) -> metric -> paired differences of the test values.
      sampling: uncertainty from the choice of test images; None without labels or scores.
      layers: layers that could merge, in order of depth.
      undefined: number of classes whose test AUC or Dice is undefined.
      val_merged: kernels merged in validation, by seed; None where validation does not merge.
    """

    arms: dict[str, dict[str, Spread]]
    differences: dict[tuple[str, str], dict[str, Spread]]
    sampling: SamplingError | None
    layers: tuple[LayerMerges, ...]
    undefined: int
    val_merged: tuple[int, ...] | None

    @property
    def merged(self) -> tuple[int, ...]:
        """Kernels merged in training, over all layers, by seed."""
        return tuple(map(sum, zip(*(layer.merged for layer in self.layers), strict=True)))

    @property
    def all_merged(self) -> tuple[int, ...]:
        """Kernels merged in training and validation, by seed."""
        in_validation = self.val_merged or (0,) * len(self.merged)
        return tuple(map(sum, zip(self.merged, in_validation, strict=True)))

    @property
    def shortcut_share(self) -> float:
        """Share of the merges that are in 1x1 convolutions of residual shortcuts."""
        inside = sum(sum(x.merged) for x in self.layers if "shortcut_conv" in x.name)
        return inside / max(sum(self.merged), 1)


def summarize(run: Run) -> Summary:
    """Computes a run's summary from its results, test scores and labels."""
    arms = {
        arm: {
            metric: spread({s: number(r["test"][metric]) for s, r in sorted(run.arm(arm).items())})
            for metric in run.metrics
        }
        for arm in run.arms
    }
    differences = {
        (left, right): {m: _difference(arms[left][m], arms[right][m]) for m in run.metrics}
        for left, right in run.pairs
        if left in arms and right in arms
    }
    tests = [result["test"] for arm in run.arms for result in run.arm(arm).values()]
    return Summary(
        arms=arms,
        differences=differences,
        sampling=sampling_error(run),
        layers=layer_merges(run),
        undefined=max((int(test.get("undefined") or 0) for test in tests), default=0),
        val_merged=_val_merged(run),
    )


def spread(values: Mapping[int, float]) -> Spread:
    """Mean, sample standard deviation and t-interval of the finite values over seeds."""
    finite = np.array([value for value in values.values() if math.isfinite(value)], np.float64)
    mean = float(finite.mean()) if finite.size else math.nan
    sd = interval = None
    if finite.size >= 2:
        sd = float(finite.std(ddof=1))
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, finite.size - 1)) * sd / finite.size**0.5
        interval = (mean - half, mean + half) if sd > 1e-9 else None
    return Spread(values, mean, sd, interval)


def _difference(left: Spread, right: Spread) -> Spread:
    seeds = sorted(left.values.keys() & right.values.keys())
    return spread({seed: left.values[seed] - right.values[seed] for seed in seeds})


def auc_influence(positive: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray]:
    """One class's AUC and each image's influence on it (DeLong, DeLong & Clarke-Pearson 1988).

    Args:
      positive: bool (n,).
      scores: float (n,), higher meaning more likely positive.

    Returns:
      The AUC, and values (n,) of which `sum(values**2) / n**2` is DeLong's variance of the AUC.
      For two arms on the same images, the values' difference gives the variance of the AUCs'
      difference. NaN where a class has fewer than two images on either side.
    """
    count, ones = positive.size, int(positive.sum())
    zeros = count - ones
    if min(ones, zeros) < 2:
        return math.nan, np.full(count, math.nan)
    ranks = stats.rankdata(scores)
    placement = np.empty(count)
    placement[positive] = (ranks[positive] - stats.rankdata(scores[positive])) / zeros
    placement[~positive] = 1 - (ranks[~positive] - stats.rankdata(scores[~positive])) / ones
    auc = float(placement[positive].mean())
    scale = np.where(
        positive, count / (ones * (ones - 1)) ** 0.5, count / (zeros * (zeros - 1)) ** 0.5
    )
    return auc, (placement - auc) * scale


def class_columns(labels: np.ndarray, scores: np.ndarray, task: str) -> list[tuple[int, Any, Any]]:
    """(class, positive bool (n,), score (n,)) of every class whose AUC enters the mean."""
    if task == "binary-class":
        return [(1, labels == 1, scores[:, -1])]
    if labels.ndim == 2:
        return [(k, labels[:, k] == 1, scores[:, k]) for k in range(scores.shape[1])]
    return [(k, labels == k, scores[:, k]) for k in range(scores.shape[1])]


def right_answers(labels: np.ndarray, scores: np.ndarray, task: str) -> np.ndarray:
    """Share of right answers for each image, float64 (n,)."""
    if labels.ndim == 2:
        return ((scores > 0.5) == (labels == 1)).mean(axis=1)
    if task == "binary-class":
        return ((scores[:, -1] > 0.5) == (labels == 1)).astype(float)
    return (scores.argmax(axis=1) == labels).astype(float)


def _influence(labels: np.ndarray, scores: np.ndarray, task: str) -> dict[str, np.ndarray]:
    """Each test image's influence on the mean AUC and on ACC; NaN where it is undefined."""
    columns = class_columns(labels, scores, task)
    known = [(y, s) for _, y, s in columns if 0 < y.sum() < y.size]
    auc = np.mean([auc_influence(y, s)[1] for y, s in known], axis=0) if known else np.nan
    right = right_answers(labels, scores, task)
    return {"auc": np.broadcast_to(auc, labels.shape[:1]), "acc": right - right.mean()}


def _mean_influence(values: np.ndarray) -> np.ndarray:
    """Each image's influence on the mean over classes of a metric (n, classes) with NaN."""
    count = np.count_nonzero(~np.isnan(values), axis=0)
    values = values[:, count > 0]
    if not values.size:
        return np.full(len(values), math.nan)
    centred = np.nan_to_num(values - np.nanmean(values, axis=0))
    return (centred * len(values) / count[count > 0]).mean(axis=1)


def sampling_error(run: Run) -> SamplingError | None:
    """Standard errors over the test images; None without labels and all scores or masks."""
    labels, task = run.test_labels, run.dataset.get("task", "")
    if labels is None or not run.scored:
        return None
    if run.segmentation:
        found = {
            key: {metric: _mean_influence(arrays[metric]) for metric in run.metrics}
            for key, arrays in run.test_masks.items()
        }
    else:
        found = {key: _influence(labels, scores, task) for key, scores in run.test_scores.items()}
    index = patient_index(len(labels), run.test_patients)

    def error(values: list[np.ndarray]) -> float:
        # A patient's images are sampled together, so their influences add up.
        by_patient = np.bincount(index, np.mean(values, axis=0))
        return float(np.sqrt((by_patient**2).sum()) / len(labels))

    margin = {}
    for left, right in run.pairs:
        seeds = [s for s in run.seeds if (s, left) in found and (s, right) in found]
        if seeds:
            margin[left, right] = {
                metric: stats.norm.ppf((1 + CONFIDENCE) / 2)
                * error([found[s, left][metric] - found[s, right][metric] for s in seeds])
                for metric in run.metrics
            }
    last = [value for (_, arm), value in found.items() if arm == run.arms[-1]]
    single = {metric: error([value[metric] for value in last]) for metric in run.metrics}
    return SamplingError(single, margin)


def single_image_classes(run: Run) -> list[str]:
    """Classes that one test image has, or all but one, so that their AUC has no standard error."""
    if run.segmentation or run.test_labels is None or not run.test_scores:
        return []
    scores = next(iter(run.test_scores.values()))
    columns = class_columns(run.test_labels, scores, run.dataset.get("task", ""))
    names = run.dataset["classes"]
    return [names[k] for k, y, _ in columns if 1 in (y.sum(), y.size - y.sum())]


def _val_merged(run: Run) -> tuple[int, ...] | None:
    results = [result for _, result in sorted(run.arm("inmerge").items())]
    if not any(result.get("val_passes") for result in results):
        return None
    return tuple(sum(result.get("val_merged", ())) for result in results)


def layer_merges(run: Run) -> tuple[LayerMerges, ...]:
    """Merges of each layer that could merge, in order of depth; empty if the arm was not run."""
    results = [result for _, result in sorted(run.arm("inmerge").items())]
    if not results or not results[0].get("layers"):
        return ()
    return tuple(
        LayerMerges(
            name=name,
            kernels=int(results[0]["kernels"][index]),
            selected=tuple(int(result["selected"][index]) for result in results),
            merged=tuple(int(result["merged"][index]) for result in results),
        )
        for index, name in enumerate(results[0]["layers"])
    )


def pairs_above(run: Run) -> dict[str, float]:
    """Layer -> share of kernel pairs above the run's threshold before merging, mean over seeds.

    Empty where the rule has no threshold (a quantile instead) or the run did not measure at it.
    """
    before = [x["before"] for (_, arm), x in run.similarity.items() if arm == "inmerge"]
    if not all(run.threshold in layer["above"] for layers in before for layer in layers):
        return {}
    return {
        layers[0]["name"]: float(np.mean([layer["above"][run.threshold] for layer in layers]))
        for layers in zip(*before, strict=True)
    }
