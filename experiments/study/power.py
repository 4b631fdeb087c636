"""How often the analyses of questions 1 and 4 are right: simulations of the protocol's verdicts."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from experiments.study.questions import better_rule, pretrained
from experiments.study.render import markdown
from experiments.study.statistics import CONFIDENCE, MARGIN

SD = 0.016
"""Standard deviation of a pair, of the protocol's pilot."""
TRUTHS = ((0.0, 0.0), (0.0, 0.003), (0.0, 0.005), (0.005, 0.0), (0.005, 0.005))
"""Mean effect of the paper's rule, and standard deviation of its effects between data sets."""
RUNS = 4000
_SETS, _ARMS = len(pretrained.RECIPES), len(pretrained.MERGING)
_VERDICTS = ("undecided", "helps", "harms", "no effect")


def simulated(mean: float, between: float, rng: np.random.Generator) -> list[np.ndarray]:
    """The verdict about the first of three arms at each look, as numbers of `_VERDICTS`.

    All arms are compared with the same fine-tuning, and the other two have no effect. t tests stand
    in for sign flips.

    Args:
      mean: effect of the first arm.
      between: its standard deviation between data sets.
      rng: draws the trials.
    """
    shape = (RUNS, 1 + _ARMS, _SETS, pretrained.LOOKS[-1])
    auc = rng.normal(0, SD / np.sqrt(2), shape)
    auc[:, 1] += rng.normal(mean, between, (RUNS, _SETS, 1))
    pairs = auc[:, 1:] - auc[:, :1]
    return [_verdicts(pairs[..., :seeds]) for seeds in pretrained.LOOKS]


def _verdicts(pairs: np.ndarray) -> np.ndarray:
    """Where both analyses agree, (runs,); pairs are (runs, arms, data sets, seeds)."""
    count, seeds = pairs[0, 0].size, pairs.shape[-1]
    mean = pairs.mean((2, 3))
    total = ((pairs - mean[..., None, None]) ** 2).sum((2, 3))
    inside = ((pairs - pairs.mean(-1, keepdims=True)) ** 2).sum((2, 3))
    # Restricted maximum likelihood of a balanced design: the variance between data sets is 0 where
    # the mean squares say so.
    of_sets = (total - inside) / (_SETS - 1)
    of_pairs = inside / (_SETS * (seeds - 1))
    error = np.sqrt(np.where(of_sets > of_pairs, of_sets, total / (count - 1)) / count)
    both = (
        (np.sqrt(total / (count - 1) / count), stats.t(count - 1)),
        (error, stats.norm()),
    )
    found = []
    for one, distribution in both:
        p = 2 * distribution.sf(np.abs(mean) / one)
        # Of Holm's steps, for the first arm: its own factor, and none of a smaller p.
        order = np.sort(p, axis=1)
        steps = np.maximum.accumulate(order * np.arange(_ARMS, 0, -1), axis=1)
        holm = np.take_along_axis(steps, (p[:, :1] > order).sum(1, keepdims=True), axis=1)[:, 0]
        equivalent = distribution.sf((MARGIN - np.abs(mean[:, 0])) / one[:, 0])
        verdict = np.where(equivalent < pretrained.LEVEL, 3, 0)
        found.append(np.where(holm < pretrained.LEVEL, np.where(mean[:, 0] > 0, 1, 2), verdict))
    return np.where(found[0] == found[1], found[0], 0)


def table(truths: Sequence[tuple[float, float]] = TRUTHS) -> str:
    """Shares of the verdicts by truth, after both looks, and of decisions at the first look."""
    rng, rows = np.random.default_rng(0), []
    for mean, between in truths:
        first, second = simulated(mean, between, rng)
        last = np.where(first > 0, first, second)
        shares = [(last == number).mean() for number in (1, 2, 3, 0)]
        cells = (f"{100 * share:.0f} %" for share in (*shares, (first > 0).mean()))
        rows.append((f"{mean:g}, {between:g}", *cells))
    columns = (
        "mean effect, its deviation between data sets",
        *("helps", "harms", "no effect", "undecided", "decided at the first look"),
    )
    return markdown(columns, rows)


def in_the_test(seeds: int, mean: float, rng: np.random.Generator) -> np.ndarray:
    """The verdict about the first of two rules in the test of question 4, as in `simulated`.

    Both are compared with the same fine-tuning, and the other has no effect.

    Args:
      seeds: on each data set.
      mean: effect of the first rule.
      rng: draws the trials.
    """
    pairs = seeds * len(better_rule.TESTED)
    auc = rng.normal(0, SD / np.sqrt(2), (RUNS, 3, pairs))
    auc[:, 1] += mean
    gaps = auc[:, 1:] - auc[:, :1]
    size, error = np.abs(gaps.mean(-1)), stats.sem(gaps, axis=-1)
    p, other = 2 * stats.t.sf(size / error, pairs - 1).T
    holm = np.where(p <= other, 2 * p, np.maximum(p, 2 * other))
    equivalent = stats.t.sf((MARGIN - size[:, 0]) / error[:, 0], pairs - 1)
    verdict = np.where(equivalent < 1 - CONFIDENCE, 3, 0)
    return np.where(holm < 1 - CONFIDENCE, np.where(gaps[:, 0].mean(-1) > 0, 1, 2), verdict)


def table_of_the_test(counts: Sequence[int] = (8, len(better_rule.TEST_SEEDS))) -> str:
    """Shares of the verdicts of question 4's test by seeds and true effect."""
    rng, rows = np.random.default_rng(0), []
    for seeds in counts:
        for mean in (0.0, MARGIN, 2 * MARGIN):
            found = in_the_test(seeds, mean, rng)
            cells = (f"{100 * (found == number).mean():.0f} %" for number in (1, 2, 3, 0))
            label = f"{seeds} seeds, {seeds * len(better_rule.TESTED)} pairs: {mean:g}"
            rows.append((label, *cells))
    columns = ("mean effect", "helps", "harms", "no effect", "undecided")
    return markdown(columns, rows)
