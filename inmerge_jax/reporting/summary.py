"""A run's numbers: arms over seeds, paired differences, how far test images move them, merges."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from inmerge_jax.reporting.published import Published, published_reference
from inmerge_jax.reporting.resampling import patient_index
from inmerge_jax.reporting.runs import Run, number

METRICS = ("auc", "acc")
PAIRS = (("inmerge", "finetune"), ("finetune", "backbone"))
CONFIDENCE = 0.95
RELEASED_RULE = {
    "probability": 0.3,
    "threshold": 0.3,
    "alpha": 0.8,
    "partner": "random",
    "skip": 10,
}


@dataclass(frozen=True)
class Spread:
    """Values of one quantity over seeds.

    Attributes:
      seeds: the seeds, paired with `values`; NaN stays in `values` and out of mean and sd.
      mean: mean of the finite values, NaN if there is none.
      sd: sample standard deviation (n - 1) of the finite values, None for fewer than two.
      interval: two-sided 95 % t-interval of the mean, None for fewer than two, and for values that
        are all the same: two seeds can coincide, and no width at all would pretend to certainty.
    """

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    sd: float | None
    interval: tuple[float, float] | None

    @property
    def count(self) -> int:
        """Number of finite values."""
        return sum(map(math.isfinite, self.values))


@dataclass(frozen=True)
class Resolution:
    """What the test images can tell apart, apart from any spread over seeds.

    Attributes:
      images: number of test images.
      patients: whose images these are, where that is known.
      error: metric -> standard error of one arm's mean over seeds (the last arm that was run).
      smallest: (left, right) -> metric -> 1.96 standard errors of their paired difference.
    """

    images: int
    patients: int | None
    error: dict[str, float]
    smallest: dict[tuple[str, str], dict[str, float]]


@dataclass(frozen=True)
class LayerMerges:
    """Merges of one layer over the whole merging stage, by seed."""

    name: str
    kernels: int
    selected: tuple[int, ...]
    merged: tuple[int, ...]

    @property
    def share(self) -> float:
        """Share of the selected kernels that found a partner above the threshold."""
        return sum(self.merged) / max(sum(self.selected), 1)


@dataclass(frozen=True)
class Summary:
    """Everything that the tables and the report's headline state."""

    arms: dict[str, dict[str, Spread]]
    differences: dict[tuple[str, str], dict[str, Spread]]
    resolution: Resolution | None
    layers: tuple[LayerMerges, ...]
    published: Published | None
    undefined: int
    val_merged: tuple[int, ...] | None = None
    """Kernels merged in validation, by seed; None where validation did not merge."""

    @property
    def merged(self) -> tuple[int, ...]:
        """Kernels merged over all layers, by seed."""
        return tuple(map(sum, zip(*(layer.merged for layer in self.layers), strict=True)))


def summarize(run: Run) -> Summary:
    """Computes a run's summary from its results, test scores and labels."""
    arms = {arm: {metric: arm_spread(run, arm, metric) for metric in METRICS} for arm in run.arms}
    differences = {
        (left, right): {metric: _difference(arms, left, right, metric) for metric in METRICS}
        for left, right in PAIRS
        if left in arms and right in arms
    }
    tests = [result["test"] for arm in run.arms for result in run.arm(arm).values()]
    return Summary(
        arms=arms,
        differences=differences,
        resolution=resolve(run),
        layers=layer_merges(run),
        published=published_reference(run.dataset, run.results.get("model", {})),
        undefined=max((int(test.get("undefined") or 0) for test in tests), default=0),
        val_merged=_val_merged(run),
    )


def spread(seeds: Sequence[int], values: Sequence[float]) -> Spread:
    """Mean, sample sd and t-interval over the finite ones of `values`."""
    finite = np.array([value for value in values if math.isfinite(value)], np.float64)
    mean = float(finite.mean()) if finite.size else math.nan
    sd = interval = None
    if finite.size >= 2:
        sd = float(finite.std(ddof=1))
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, finite.size - 1)) * sd / finite.size**0.5
        interval = (mean - half, mean + half) if sd > 1e-9 else None
    return Spread(tuple(seeds), tuple(values), mean, sd, interval)


def arm_spread(run: Run, arm: str, metric: str) -> Spread:
    """One arm's test metric over its seeds."""
    results = run.arm(arm)
    return spread(sorted(results), [number(results[s]["test"][metric]) for s in sorted(results)])


def _difference(arms: dict[str, dict[str, Spread]], left: str, right: str, metric: str) -> Spread:
    first, second = (
        dict(zip(arms[arm][metric].seeds, arms[arm][metric].values, strict=True))
        for arm in (left, right)
    )
    seeds = sorted(first.keys() & second.keys())
    return spread(seeds, [first[seed] - second[seed] for seed in seeds])


def auc_influence(positive: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray]:
    """One class's AUC and each image's pull on it, after DeLong, DeLong & Clarke-Pearson (1988).

    Args:
      positive: bool (n,).
      scores: float (n,), higher meaning more likely positive.

    Returns:
      The AUC, and values (n,) of which `sum(values**2) / n**2` is DeLong's variance of the AUC;
      for two arms on the same images the values' difference gives that of the AUCs' difference.
      NaN where a class has fewer than two images on either side, as the variance is then unknown.
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


def _pulls(labels: np.ndarray, scores: np.ndarray, task: str) -> dict[str, np.ndarray]:
    """Each test image's pull on the mean AUC and on ACC; NaN where it cannot be estimated."""
    columns = class_columns(labels, scores, task)
    known = [(y, s) for _, y, s in columns if 0 < y.sum() < y.size]
    auc = np.mean([auc_influence(y, s)[1] for y, s in known], axis=0) if known else np.nan
    if labels.ndim == 2:
        right = ((scores > 0.5) == (labels == 1)).mean(axis=1)
    elif task == "binary-class":
        right = (scores[:, -1] > 0.5) == (labels == 1)
    else:
        right = scores.argmax(axis=1) == labels
    return {"auc": np.broadcast_to(auc, labels.shape[:1]), "acc": right - right.mean()}


def resolve(run: Run) -> Resolution | None:
    """Standard errors from the test images; None without labels and all arms' and seeds' scores."""
    labels, task = run.test_labels, run.dataset.get("task", "")
    if labels is None or not run.scored:
        return None
    pulls = {key: _pulls(labels, scores, task) for key, scores in run.test_scores.items()}
    index = patient_index(len(labels), run.test_patients)

    def error(values: list[np.ndarray]) -> float:
        # A patient's images are drawn together, so their pulls add up.
        of_patients = np.bincount(index, np.mean(values, axis=0))
        return float(np.sqrt((of_patients**2).sum()) / len(labels))

    last = [arm for arm in run.arms if any(a == arm for _, a in pulls)][-1]
    smallest = {}
    for left, right in PAIRS:
        seeds = [s for s in run.seeds if (s, left) in pulls and (s, right) in pulls]
        if seeds:
            smallest[left, right] = {
                metric: stats.norm.ppf((1 + CONFIDENCE) / 2)
                * error([pulls[s, left][metric] - pulls[s, right][metric] for s in seeds])
                for metric in METRICS
            }
    single = {m: error([v[m] for (_, arm), v in pulls.items() if arm == last]) for m in METRICS}
    patients = None if run.test_patients is None else int(index.max()) + 1
    return Resolution(len(labels), patients, single, smallest)


def any_merged(run: Run) -> bool:
    """Whether the arm inmerge has merged a kernel, in training or in validation."""
    return any(
        any(result["merged"]) or any(result.get("val_merged") or ())
        for result in run.arm("inmerge").values()
    )


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
