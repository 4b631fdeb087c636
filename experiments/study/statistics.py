"""Uncertainty of test AUC and ACC, and of their differences between two arms on the same images.

Scores are float (seeds, images, classes) throughout: the same seeds and images in every arm.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from inmerge_jax.reporting.resampling import draw_counts, patient_index
from inmerge_jax.reporting.summary import class_columns

METRICS = ("auc", "acc")
CONFIDENCE = 0.95
Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
"""Standard errors in half of an interval: 1.96."""
POWER = 0.8
"""How often a difference that is called detectable is distinguished from zero."""
_QUANTILES = 2000
"""Of the spread of seeds, over which a probability is averaged."""
_EXACT = 16
"""Seeds up to which all sign flips are counted."""
_ROWS = 64
"""Permutations whose AUCs are counted together, so that the counts stay in the cache."""


class Interval(NamedTuple):
    """A mean over trainings, and how sure it is over other trainings and other test images.

    Attributes:
      value: the mean.
      low: end of the 95 % interval.
      high: likewise.
      half_width: of the interval, if its ends were equally far from the mean.
      p: two-sided, of the mean being zero.
      seeds_error: standard error of the mean over trainings; 0 for one training.
      images_error: over the choice of test images.
    """

    value: float
    low: float
    high: float
    half_width: float
    p: float
    seeds_error: float = 0.0
    images_error: float = 0.0

    def above(self, lowest: float) -> "Interval":
        """Cut to where the value can be, `lowest` to 1; half-width and p stay."""
        return self._replace(low=max(self.low, lowest), high=min(self.high, 1.0))


def metric_of_counts(
    name: str, labels: np.ndarray, scores: np.ndarray, task: str, counts: np.ndarray
) -> np.ndarray:
    """AUC or ACC of many resamples of the images at once.

    Args:
      name: "auc" (mean over classes that the resample has both answers of) or "acc".
      labels: int (n,), or 0 and 1 (n, classes) for a multi-label task.
      scores: (n, classes).
      task: one of medmnist's words.
      counts: (resamples, n), how often each image is drawn.

    Returns:
      (resamples,); NaN where no class has both answers.
    """
    if name == "acc":
        right = right_answers(labels, scores, task)
        return counts @ right / counts.sum(1)
    columns = [_auc(y, s, counts) for _, y, s in class_columns(labels, scores, task)]
    aucs = np.array(columns)
    known = np.isfinite(aucs)
    total = np.where(known, aucs, 0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


def right_answers(labels: np.ndarray, scores: np.ndarray, task: str) -> np.ndarray:
    """Share of right answers for each image, (n,)."""
    if labels.ndim == 2:
        return ((scores > 0.5) == (labels == 1)).mean(axis=1)
    if task == "binary-class":
        return ((scores[:, -1] > 0.5) == (labels == 1)).astype(float)
    return (scores.argmax(axis=1) == labels).astype(float)


def _auc(positive: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mann-Whitney's statistic with weights; ties count half."""
    order = np.argsort(scores[~positive], kind="stable")
    ascending = scores[~positive][order]
    # Images first: rows of resamples are then added whole.
    ones, zeros = counts.T[positive], counts.T[~positive][order]
    below = np.concatenate([np.zeros_like(zeros[:1]), np.cumsum(zeros, axis=0)])
    start, end = (np.searchsorted(ascending, scores[positive], side) for side in ("left", "right"))
    wins = (ones * (below[start] + below[end])).sum(0) / 2
    pairs = ones.sum(0) * zeros.sum(0)
    return np.where(pairs > 0, wins / np.maximum(pairs, 1), np.nan)


def bootstrap(values: np.ndarray, resampled: np.ndarray, rng: np.random.Generator) -> Interval:
    """The mean over seeds, with an interval over seeds and images together.

    Each resample draws images, and seeds with replacement. A few seeds vary too little when drawn
    so: their deviations are stretched by sqrt(n / (n - 1)), and the whole distribution to the
    half-width sqrt(t^2 s^2 + z^2 i^2), with the error s of the seeds and Student's t of n - 1
    degrees of freedom, and the error i of the images with the normal z. So combined, intervals
    cover at least as often as they say (Banerjee 1961), also where two seeds agree by chance. p is
    where the half-width is the mean itself. With one seed the interval is over images alone.

    Args:
      values: (seeds,), on the images as they are.
      resampled: (resamples, seeds), on each resample of the images.
      rng: draws the seeds.
    """
    seeds = len(values)
    value, images = float(np.mean(values)), resampled.mean(1)
    means, own = images, 0.0
    if seeds > 1:
        drawn = rng.integers(0, seeds, resampled.shape)
        deviations = resampled - images[:, None]
        of_seeds = np.take_along_axis(deviations, drawn, axis=1).mean(1)
        means = images + np.sqrt(seeds / (seeds - 1)) * of_seeds
        own = float(np.var(values, ddof=1)) / seeds
    errors = float(np.sqrt(own)), float(np.nanstd(images, ddof=1))

    def half_width(tail: float) -> float:
        return float(half_width_at(tail, seeds, *errors))

    tail = (1 - CONFIDENCE) / 2
    half = half_width(tail)
    low, high = np.nanquantile(means, [tail, 1 - tail])
    stretch = 2 * half / (high - low) if high > low else 0.0
    ends = float(value - stretch * (value - low)), float(value + stretch * (high - value))
    return Interval(value, *ends, half, _p(abs(value), half_width), *errors)


def half_width_at(
    tail: float, seeds: int, seeds_error: float | np.ndarray, images_error: float
) -> np.ndarray:
    """Half of an interval that leaves `tail` out at either end, see `bootstrap`."""
    t = stats.t.isf(tail, seeds - 1) if seeds > 1 else 0.0
    return np.hypot(t * seeds_error, stats.norm.isf(tail) * images_error)


def detectable(row: Mapping[str, Any], comparisons: int = 1) -> float:
    """`smallest_detectable` by the errors that were measured, as if they were the true ones.

    Args:
      row: what `compare` gave of a difference.
      comparisons: of which this one has the smallest p, by Holm's correction.
    """
    seeds = len(row["seeds"])
    return smallest_detectable(seeds, row["seeds_error"], row["images_error"], comparisons)


def smallest_detectable(
    seeds: int, seeds_error: float, images_error: float, comparisons: int = 1
) -> float:
    """The true difference whose interval leaves zero out with probability `POWER`.

    The interval is that of `bootstrap`, whose width varies with the spread of the few seeds drawn:
    this averages over it. With no error over seeds it is 2.80 errors over images; with none over
    images, what the noncentral t distribution gives.

    Args:
      seeds: paired trainings.
      seeds_error: standard error of their mean; 0 for one.
      images_error: over the choice of test images.
      comparisons: of which this one has the smallest p, by Holm's correction.
    """
    error = float(np.hypot(seeds_error, images_error))
    if error == 0:
        return 0.0
    tail = (1 - CONFIDENCE) / 2 / comparisons
    drawn = np.array([seeds_error])
    if seeds_error > 0:
        shares = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
        drawn = seeds_error * np.sqrt(stats.chi2.ppf(shares, seeds - 1) / (seeds - 1))
    half = half_width_at(tail, seeds, drawn, images_error)

    def missing(size: float) -> float:
        found = stats.norm.sf((half - size) / error) + stats.norm.cdf((-half - size) / error)
        return float(found.mean()) - POWER

    return float(optimize.brentq(missing, 0, float(half.max()) + 2 * error))


def _p(value: float, half_width: Callable[[float], float]) -> float:
    """Twice the tail whose half-width is `value`."""
    smallest, half = -690.0, float(np.log(0.5))  # Logarithms of tails.
    if value == 0:
        return 1.0
    if half_width(np.exp(smallest)) <= value:
        return 0.0
    return 2 * float(
        np.exp(optimize.brentq(lambda tail: half_width(np.exp(tail)) - value, smallest, half))
    )


def permutation_over_images(
    labels: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    task: str,
    rng: np.random.Generator,
    permutations: int = 1000,
    patients: np.ndarray | None = None,
) -> dict[str, float]:
    """Two-sided p of a paired permutation test whose units are the test images, for each metric.

    Under the null hypothesis it does not matter which arm's network an image was given to: each
    permutation exchanges the two arms' answers to a random half of the images, those of all seeds
    and, where `patients` says whose image each is, all images of a patient together. For AUC,
    answers are ranks within their own network, so that two networks may be calibrated differently
    (Venkatraman and Begg 1996). It asks about these trained networks, with other images; not about
    other trainings, for which see `sign_flips_over_seeds`.
    """
    index = patient_index(len(labels), patients)
    swaps = (rng.random((permutations, int(index.max()) + 1)) < 0.5)[:, index]
    swaps = np.concatenate([np.zeros_like(swaps[:1]), swaps])  # The first is what was seen.
    right = [np.mean([right_answers(labels, s, task) for s in arm], 0) for arm in (first, second)]
    gain = right[0] - right[1]
    gaps = {
        "auc": np.mean(
            [_auc_gaps(labels, *pair, task, swaps) for pair in zip(first, second, strict=True)], 0
        ),
        "acc": np.where(swaps, -gain, gain).mean(1),
    }
    return {name: float(np.mean(abs(gap) >= abs(gap[0]) - 1e-12)) for name, gap in gaps.items()}


def _auc_gaps(
    labels: np.ndarray, first: np.ndarray, second: np.ndarray, task: str, swaps: np.ndarray
) -> np.ndarray:
    """AUC of one network's ranks minus another's after each exchange of answers, (exchanges,).

    swaps: bool (exchanges, n), whose answers are exchanged.
    """
    # Twice the ranks, which ties make halves.
    one, two = (np.rint(2 * stats.rankdata(s, axis=0)).astype(int) for s in (first, second))
    gaps = [
        _auc_of_ranks(positive, np.where(swaps, b, a))
        - _auc_of_ranks(positive, np.where(swaps, a, b))
        for (_, positive, a), (_, _, b) in zip(
            class_columns(labels, one, task), class_columns(labels, two, task), strict=True
        )
        if 0 < positive.sum() < positive.size
    ]
    return np.mean(gaps, axis=0) if gaps else np.zeros(len(swaps))


def _auc_of_ranks(positive: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """AUC of each row of ranks, (rows,): int (rows, n) from 0 to 2 n; by counting, not sorting."""
    found = []
    for rows in np.array_split(ranks, -(-len(ranks) // _ROWS)):
        shape = len(rows), 2 * positive.size + 1
        places = rows + shape[1] * np.arange(len(rows))[:, None]
        ones, zeros = (
            np.bincount(places[:, chosen].ravel(), minlength=shape[0] * shape[1]).reshape(shape)
            for chosen in (positive, ~positive)
        )
        below = np.cumsum(zeros, axis=1) - zeros / 2
        found.append((ones * below).sum(1))
    return np.concatenate(found) / (positive.sum() * (~positive).sum())


def sign_flips_over_seeds(differences: Sequence[float]) -> float:
    """Two-sided p of a paired permutation test whose units are trainings: exact, by all flips.

    With n trainings it can't go below 2 / 2**n; above 16 of them, 100,000 random flips are used.
    """
    values = np.asarray(differences, np.float64)
    if len(values) <= _EXACT:
        signs = np.array(list(itertools.product((1, -1), repeat=len(values))))
    else:
        signs = np.random.default_rng(0).choice([1, -1], (100_000, len(values)))
        signs[0] = 1
    sums = np.abs(signs @ values)
    return float(np.mean(sums >= abs(values.sum()) - 1e-12))


def interval_over_trainings(differences: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean over two trainings or more.

    The trainings count as independent draws, also those that share their test images.
    """
    values = np.asarray(differences, np.float64)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values)
    return float(values.mean() - half), float(values.mean() + half)


def over_trainings(differences: Sequence[float]) -> dict[str, float]:
    """The "mean", and of two trainings or more "low" and "high" by `interval_over_trainings`."""
    found = {"mean": float(np.mean(differences))}
    if len(differences) == 1:
        return found
    low, high = interval_over_trainings(differences)
    return found | {"low": low, "high": high}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: p-values that may be compared with 0.05 one by one, in the same order."""
    order = np.argsort(p_values, kind="stable")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def compare(
    labels: np.ndarray,
    arms: Mapping[str, Mapping[int, np.ndarray]],
    task: str,
    pairs: Sequence[tuple[str, str]],
    *,
    resamples: int = 1000,
    permutations: int = 1000,
    seed: int = 0,
    patients: np.ndarray | None = None,
) -> dict[str, Any]:
    """Everything that a table states of some arms on one data set, JSON-ready.

    Args:
      labels: of the test images.
      arms: name to seed to scores (images, classes). A difference is over the seeds of both arms.
      task: one of medmnist's words.
      pairs: the differences to take, first minus second.
      resamples: of the bootstrap.
      permutations: of the test over images.
      seed: of all draws.
      patients: see `draw_counts`.

    Returns:
      {"arms": {name: {metric: row}}, "differences": {"a - b": {metric: row}}}: a row has what
      `Interval` has, with "mean" for its value; sd over seeds (None for one) and "seeds", each
      one's value. A difference also has p_images and p_seeds, of the permutation tests over either.
    """
    counts = draw_counts(len(labels), resamples, np.random.default_rng(seed), patients)
    counts = np.concatenate([np.ones((1, len(labels)), counts.dtype), counts])
    values = {
        arm: {
            m: {s: metric_of_counts(m, labels, x, task, counts) for s, x in scores.items()}
            for m in METRICS
        }
        for arm, scores in arms.items()
    }
    found: dict[str, Any] = {"arms": {}, "differences": {}}
    for arm, scores in arms.items():
        chosen = sorted(scores)
        found["arms"][arm] = {
            m: _row(np.stack([values[arm][m][s] for s in chosen], axis=1), seed, 0.0)
            for m in METRICS
        }
    for first, second in pairs:
        shared = sorted(set(arms.get(first, {})) & set(arms.get(second, {})))
        if not shared:
            continue
        p_images = permutation_over_images(
            labels,
            np.stack([arms[first][s] for s in shared]),
            np.stack([arms[second][s] for s in shared]),
            task,
            np.random.default_rng(seed),
            permutations,
            patients,
        )
        rows = {}
        for m in METRICS:
            one, two = (values[arm][m] for arm in (first, second))
            rows[m] = _row(np.stack([one[s] - two[s] for s in shared], axis=1), seed, -1.0)
            rows[m]["p_images"] = p_images[m]
            rows[m]["p_seeds"] = sign_flips_over_seeds(rows[m]["seeds"])
        found["differences"][f"{first} - {second}"] = rows
    return found


def _row(values: np.ndarray, seed: int, lowest: float) -> dict[str, Any]:
    """From (1 + resamples, seeds), of which the first is on the images as they are."""
    interval = bootstrap(values[0], values[1:], np.random.default_rng(seed)).above(lowest)
    return {
        "mean": interval.value,
        "sd": float(np.std(values[0], ddof=1)) if values.shape[1] > 1 else None,
        **{name: value for name, value in interval._asdict().items() if name != "value"},
        "seeds": values[0].tolist(),
    }
