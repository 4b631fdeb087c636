"""Uncertainty of test AUC and ACC, and of their differences between two arms on the same images.

Two kinds of interval: the crossed bootstrap over trainings and test images of one data set
(`bootstrap`), and Student's interval over the trainings of all data sets (`over_trials`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from inmerge_jax.reporting.resampling import bootstrap_auroc
from inmerge_jax.reporting.summary import class_columns, right_answers

METRICS = ("auc", "acc")
CONFIDENCE, POWER = 0.95, 0.8
MARGIN = 0.005
"""Largest difference in AUC that counts as no effect; other outcomes have their own margin."""
_FLIPS = 1_000_000
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
    aucs = np.array(
        [bootstrap_auroc(y, s, counts) for _, y, s in class_columns(labels, scores, task)]
    )
    known = np.isfinite(aucs)
    total = np.where(known, aucs, 0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


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

    Exact for 19 trainings or fewer, where it cannot be below 2 / 2**n; else by random flips.
    """
    return _sign_flips(np.asarray(differences, np.float64).tobytes())


@functools.cache
def _sign_flips(differences: bytes) -> float:
    def mean(x: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(x, axis=axis)

    found = stats.permutation_test(
        (np.frombuffer(differences),),
        mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=_FLIPS,
        batch=20_000,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def over_trials(
    differences: Sequence[float], margin: float = MARGIN, *, tested: bool = True
) -> dict[str, Any]:
    """Paired differences between trainings, summarised.

    Trainings count as independent draws, including those that share their test images.

    Args:
      differences: of the pairs.
      margin: the largest difference that counts as no effect.
      tested: compute "p", which takes seconds for many pairs.

    Returns:
      "trials" (how many), "positive" (how many are above zero), "mean" (NaN without trainings), "p"
      (sign flips); for two trainings or more also "sd", "low" and "high" (Student's 95 % interval)
      and "p_equivalent" (two one-sided t tests against +-`margin`; 0 or 1 where all differences are
      equal).
    """
    values = np.asarray(differences, np.float64)
    count = len(values)
    found: dict[str, Any] = {
        "trials": count,
        "positive": int((values > 0).sum()),
        "mean": float(values.mean()) if count else float("nan"),
    }
    if tested:
        found["p"] = sign_flips(values) if count > 1 else 1.0
    if count < 2:
        return found
    interval = stats.ttest_1samp(values, 0).confidence_interval(CONFIDENCE)
    found |= {"sd": float(values.std(ddof=1)), "low": interval.low, "high": interval.high}
    found["p_equivalent"] = float(abs(found["mean"]) >= margin)
    if found["sd"] > 0:
        found["p_equivalent"] = float(DescrStatsW(values).ttost_mean(-margin, margin)[0])
    return {name: float(x) if isinstance(x, np.floating) else x for name, x in found.items()}


def mixed_model(
    differences: Mapping[str, Sequence[float]], margin: float = MARGIN
) -> dict[str, Any]:
    """The mean of paired differences, with a random effect of the data set.

    Fitted by restricted maximum likelihood, profiled over the ratio of the variances between data
    sets and between pairs; intervals and tests are Wald's. Data sets of any number of pairs.

    Args:
      differences: of the pairs, by data set; those without pairs do not count.
      margin: the largest difference that counts as no effect.

    Returns:
      "trials", "mean", "low" and "high" (95 %), "p" (of a mean of zero), "p_equivalent" (two
      one-sided tests against +-`margin`), "sets", "between" and "within" (standard deviations);
      where all differences are equal, no interval and no deviations.
    """
    sets = [np.asarray(some, np.float64) for some in differences.values() if len(some)]
    values = np.concatenate([*sets, np.zeros(0)])
    if len(values) < 2:
        mean = float(values.mean()) if len(values) else float("nan")
        return {"trials": len(values), "mean": mean, "p": 1.0, "p_equivalent": 1.0}
    if np.ptp(values) == 0:
        mean = float(values[0])
        equivalent = float(abs(mean) >= margin)
        return {
            "trials": len(values),
            "mean": mean,
            "p": float(mean == 0),
            "p_equivalent": equivalent,
        }
    sizes = np.array([len(some) for some in sets], np.float64)
    means = np.array([some.mean() for some in sets])
    around = sum(float(((some - some.mean()) ** 2).sum()) for some in sets)

    def fit(ratio: float) -> tuple[float, float, float, float]:
        """Mean, its variance, the variance of pairs, and the objective, for a ratio."""
        weights = sizes / (1 + ratio * sizes)
        mean = float(weights @ means / weights.sum())
        squares = around + float(weights @ (means - mean) ** 2)
        within = squares / (len(values) - 1)
        objective = (len(values) - 1) * np.log(squares) + np.log(1 + ratio * sizes).sum()
        return mean, within / weights.sum(), within, float(objective + np.log(weights.sum()))

    if around == 0:  # Data sets are then the observations.
        mean, variance, within = float(means.mean()), float(stats.sem(means)) ** 2, 0.0
        between = float(means.var(ddof=1))
    else:
        logs = np.linspace(-12, 12, 241)
        best = min(logs, key=lambda x: fit(np.exp(x))[3])
        found = optimize.minimize_scalar(
            lambda x: fit(np.exp(x))[3],
            bounds=(best - 0.1, best + 0.1),
            method="bounded",
            options={"xatol": 1e-10},
        )
        ratio = min((0.0, float(np.exp(found.x))), key=lambda x: fit(x)[3])
        ratio = ratio if len(sets) > 1 else 0.0  # Of one data set, any ratio fits.
        mean, variance, within, _ = fit(ratio)
        between = ratio * within
    error = float(np.sqrt(variance))
    half = error * float(stats.norm.isf((1 - CONFIDENCE) / 2))
    return {
        "trials": len(values),
        "mean": mean,
        "low": mean - half,
        "high": mean + half,
        "p": 2 * float(stats.norm.sf(abs(mean) / error)),
        "p_equivalent": float(stats.norm.sf((margin - abs(mean)) / error)),
        "sets": len(sets),
        "between": float(np.sqrt(between)),
        "within": float(np.sqrt(within)),
    }


def add_holm(
    rows: Sequence[dict[str, Any]], level: float = 1 - CONFIDENCE, margin: float = MARGIN
) -> None:
    """Adds Holm's correction over all rows, of `over_trials` or of `mixed_model`.

    Each row gets "p_holm"; one with some spread also "needed": the smallest number of pairs, more
    than there are, with which it would be decided at `level` with 80 % power, if the observed mean
    and spread were the true ones. By verdict, "significant" and "equivalent"; infinity where no
    number would do. A row of `mixed_model` also gets "needed_sets", the number of data sets with as
    many pairs each that would decide.
    """
    if not rows:
        return
    corrected = multipletests([row["p"] for row in rows], method="holm")[1]
    for row, p in zip(rows, corrected, strict=True):
        row["p_holm"] = float(p)
        powers = _powers(row, level, len(rows), margin)
        if powers is not None:
            row["needed"] = {
                name: max(row["trials"] + 1.0, _smallest(power)) for name, power in powers.items()
            }
        if row.get("sets"):
            each = row["trials"] / row["sets"]
            spread = float(np.hypot(row["between"], row["within"] / np.sqrt(each)))
            row["needed_sets"] = _needed_sets(row["mean"], spread, level, len(rows), margin)


def _needed_sets(
    mean: float, spread: float, level: float, comparisons: int, margin: float
) -> float:
    """Data sets with which a mean over them would be decided; `spread` is that of their means."""
    powers = _wald_powers(mean, lambda n: spread / np.sqrt(n), level, comparisons, margin)
    return min(map(_smallest, powers.values()))


def needed(*rows: Mapping[str, Any]) -> float | None:
    """The pairs with which all rows, of `add_holm`, would have the same verdict; None if unknown.

    Infinity where no number would do.
    """
    every = [row.get("needed") for row in rows]
    if not every or None in every:
        return None
    return min(max(one[name] for one in every) for name in ("significant", "equivalent"))


def _powers(
    row: Mapping[str, Any], level: float, comparisons: int, margin: float
) -> dict[str, Callable[[float], float]] | None:
    """The power of both kinds of tests by the number of pairs; None where there is no spread."""
    if not (row.get("sd") or row.get("sets")):
        return None
    if row.get("sets"):
        between, within = row["between"] ** 2 / row["sets"], row["within"] ** 2
        return _wald_powers(
            row["mean"], lambda pairs: np.sqrt(between + within / pairs), level, comparisons, margin
        )
    size, sd = abs(row["mean"]), row["sd"]
    alpha = level / comparisons  # Of Holm's first step.

    def significant(pairs: float) -> float:
        if pairs < np.log2(2 / alpha):  # Sign flips cannot give so small a p.
            return 0.0
        critical = stats.t.isf(alpha / 2, pairs - 1)
        shift = size * np.sqrt(pairs) / sd
        return float(stats.norm.sf(critical - shift))

    def equivalent(pairs: float) -> float:
        return _equivalent(size, sd / np.sqrt(pairs), stats.t.isf(level, pairs - 1), margin)

    return {"significant": significant, "equivalent": equivalent}


def _wald_powers(
    mean: float, error: Callable[[float], float], level: float, comparisons: int, margin: float
) -> dict[str, Callable[[float], float]]:
    """The power of Wald's tests by a number of pairs or data sets that `error` depends on."""
    size, critical = abs(mean), stats.norm.isf(level / comparisons / 2)  # Of Holm's first step.

    def significant(count: float) -> float:
        return float(stats.norm.sf(critical - size / error(count)))

    def equivalent(count: float) -> float:
        return _equivalent(size, error(count), stats.norm.isf(level), margin)

    return {"significant": significant, "equivalent": equivalent}


def _equivalent(mean: float, error: float, critical: float, margin: float) -> float:
    """Probability that an estimate of `mean` is within the margin by both one-sided tests."""
    room = margin - critical * error
    inside = stats.norm.cdf((room - mean) / error) - stats.norm.cdf((-room - mean) / error)
    return max(0.0, float(inside))


def _smallest(power: Callable[[float], float]) -> float:
    """The smallest number of pairs with 80 % power; infinity where a million are too few."""
    low, high = 1, 2
    while power(high) < POWER:
        low, high = high, 2 * high
        if high > 1e6:
            return float("inf")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return float(high)


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
