"""Uncertainty of test AUC and ACC, and of their differences between two arms on the same images.

Two kinds of interval: the crossed bootstrap over trainings and test images of one data set
(`bootstrap`), and Student's interval over the trainings of all data sets (`over_trials`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from inmerge_jax.reporting.summary import class_columns

METRICS = ("auc", "acc")
CONFIDENCE, POWER = 0.95, 0.8
MARGIN = 0.005
"""Largest difference in AUC that counts as no effect; other outcomes have their own margin."""
_FLIPS = 20_000
"""Sign flips; all of them are used where there are no more."""


class Interval(NamedTuple):
    """A mean over trainings with an interval over trainings and test images.

    Attributes:
      mean: over the trainings.
      low, high: ends of the 95 % interval.
      p: two-sided, of a mean of zero.
    """

    mean: float
    low: float
    high: float
    p: float


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
    by_image = np.ascontiguousarray(counts.T)
    columns = [_auc(y, s, by_image) for _, y, s in class_columns(labels, scores, task)]
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
    """Mann-Whitney's statistic with weights (n, resamples); ties count half."""
    order = np.argsort(scores[positive], kind="stable")
    ascending = scores[positive][order]
    ones, zeros = counts[positive][order], counts[~positive]
    below = np.cumsum(ones, axis=0, dtype=counts.dtype)
    below = np.concatenate([np.zeros_like(counts[:1]), below])
    start, end = (np.searchsorted(ascending, scores[~positive], side) for side in ("left", "right"))
    total = ones.sum(0)
    wins = (zeros * (2 * total - below[start] - below[end])).sum(0) / 2
    pairs = total * zeros.sum(0)
    return np.where(pairs > 0, wins / np.maximum(pairs, 1), np.nan)


def bootstrap(values: np.ndarray, resampled: np.ndarray, rng: np.random.Generator) -> Interval:
    """The mean over seeds, with an interval over seeds and images together.

    Each resample draws images, and seeds with replacement. Few seeds vary too little when drawn so:
    their deviations are scaled by sqrt(n / (n - 1)), and the interval to the half-width
    sqrt(t^2 s^2 + z^2 i^2), with the standard error s over seeds and Student's t of n - 1 degrees
    of freedom, and the standard error i over images and the normal z. Such intervals cover at least
    as often as they state (Banerjee 1961). p is twice the tail whose half-width is the mean. With
    one seed the interval is over images alone.

    Args:
      values: (seeds,), on all test images.
      resampled: (resamples, seeds), on each resample of the images.
      rng: draws the seeds.
    """
    seeds = len(values)
    mean, images = float(np.mean(values)), resampled.mean(1)
    means, seeds_error = images, 0.0
    if seeds > 1:
        drawn = rng.integers(0, seeds, resampled.shape)
        deviations = np.take_along_axis(resampled - images[:, None], drawn, axis=1).mean(1)
        means = images + np.sqrt(seeds / (seeds - 1)) * deviations
        seeds_error = float(stats.sem(values))
    images_error = float(np.nanstd(images, ddof=1))

    def half_width(tail: float) -> float:
        t = stats.t.isf(tail, seeds - 1) if seeds > 1 else 0.0
        return float(np.hypot(t * seeds_error, stats.norm.isf(tail) * images_error))

    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(means, [tail, 1 - tail])
    scale = 2 * half_width(tail) / (high - low) if high > low else 0.0
    low, high = mean - scale * (mean - low), mean + scale * (high - mean)
    return Interval(mean, float(low), float(high), _p(abs(mean), half_width))


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


def sign_flips(differences: Sequence[float]) -> float:
    """Two-sided p of paired differences between trainings, by `scipy.stats.permutation_test`.

    Exact for 14 trainings or fewer, where it cannot be below 2 / 2**n; else by random flips.
    """

    def mean(x: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(x, axis=axis)

    found = stats.permutation_test(
        (np.asarray(differences, np.float64),),
        mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=_FLIPS,
        batch=2000,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def over_trials(differences: Sequence[float], margin: float = MARGIN) -> dict[str, Any]:
    """Paired differences between trainings, summarised.

    Trainings count as independent draws, including those that share their test images.

    Args:
      differences: of the pairs.
      margin: the largest difference that counts as no effect.

    Returns:
      "trials" (how many), "positive" (how many are above zero), "mean", "p" (sign flips); for two
      trainings or more also "sd", "low" and "high" (Student's 95 % interval) and "p_equivalent"
      (two one-sided t tests against +-`margin`; 0 or 1 where all differences are equal).
    """
    values = np.asarray(differences, np.float64)
    count = len(values)
    found: dict[str, Any] = {
        "trials": count,
        "positive": int((values > 0).sum()),
        "mean": float(values.mean()),
        "p": sign_flips(values) if count > 1 else 1.0,
    }
    if count == 1:
        return found
    interval = stats.ttest_1samp(values, 0).confidence_interval(CONFIDENCE)
    found |= {"sd": float(values.std(ddof=1)), "low": interval.low, "high": interval.high}
    found["p_equivalent"] = float(abs(found["mean"]) >= margin)
    if found["sd"] > 0:
        found["p_equivalent"] = float(DescrStatsW(values).ttost_mean(-margin, margin)[0])
    return {name: float(x) if isinstance(x, np.floating) else x for name, x in found.items()}


def add_holm(
    rows: Sequence[dict[str, Any]], level: float = 1 - CONFIDENCE, margin: float = MARGIN
) -> None:
    """Adds Holm's correction over all rows.

    Each row gets "p_holm"; one of `over_trials` with some spread also "needed", see
    `trials_needed`, for tests at `level`.
    """
    if not rows:
        return
    corrected = multipletests([row["p"] for row in rows], method="holm")[1]
    for row, p in zip(rows, corrected, strict=True):
        row["p_holm"] = float(p)
        if row.get("sd"):
            row["needed"] = trials_needed(row["sd"], row["mean"], len(rows), level, margin)


def trials_needed(
    sd: float,
    mean: float,
    comparisons: int = 1,
    level: float = 1 - CONFIDENCE,
    margin: float = MARGIN,
) -> int:
    """Paired trainings with which a difference would be significant, with 80 % power.

    A difference of the observed size, or of `margin` if that is larger, for a t test at the level
    of Holm's first step; and at least as many as sign flips need for so small a p.

    Args:
      sd: standard deviation of the paired differences, above 0.
      mean: observed difference.
      comparisons: that Holm's correction is over.
      level: of the tests, before the correction.
      margin: smallest difference of interest.
    """
    test, alpha = TTestPower(), level / comparisons
    # Beyond three standard deviations a few trials suffice, and the noncentral t is not reliable.
    size, flips = min(max(abs(mean), margin) / sd, 3.0), int(np.ceil(np.log2(2 / alpha)))
    few = np.arange(2, 11)
    enough = test.power(size, few, alpha) >= POWER
    if enough.any():  # The solver does not converge for so few.
        return max(flips, int(few[enough.argmax()]))
    count = test.solve_power(effect_size=size, alpha=alpha, power=POWER)
    return max(flips, int(np.ceil(np.max(count))))


def is_significant(row: Mapping[str, Any], level: float = 1 - CONFIDENCE) -> bool:
    """Whether the difference is significant after Holm's correction."""
    return row["p_holm"] < level


def verdict(row: Mapping[str, Any], level: float = 1 - CONFIDENCE) -> str:
    """The conclusion about a difference in AUC of `over_trials`, after `add_holm`.

    "helps" or "harms" where the difference is significant; "no effect" where it is within
    the margin by two one-sided tests; else "undecided". Each test is at `level`.
    """
    if is_significant(row, level):
        return "helps" if row["mean"] > 0 else "harms"
    equivalent = row.get("p_equivalent")
    return "no effect" if equivalent is not None and equivalent < level else "undecided"
