"""How often the analyses of questions 1 and 4 are right: simulations of the protocol's verdicts."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.study import datasets
from experiments.study.analysis import groups
from experiments.study.archive import Archive
from experiments.study.questions import better_rule, pretrained
from experiments.study.render import markdown
from experiments.study.statistics import CONFIDENCE, MARGIN
from experiments.study.trials import with_dependencies

SD = 0.016
"""Standard deviation of a pair, of the protocol's pilot."""
TRUTHS = ((0.0, 0.0), (0.0, 0.003), (0.0, 0.005), (0.005, 0.0), (0.005, 0.005))
"""Mean effect of the paper's rule, and standard deviation of its effects between data sets."""
RUNS = 4000
SPREAD_SEEDS = range(10)
"""Seeds from which the spread of the pairs was estimated before the first look."""
WIDER = 1.4
"""Factor on that spread, for a second simulation."""
_SETS, _OTHERS = len(pretrained.RECIPES), len(pretrained.MERGING) - 1
_VERDICTS = ("undecided", "helps", "harms", "no effect")


class Design(NamedTuple):
    """When the primary outcome is looked at, and how.

    Attributes:
      spread: standard deviation of a pair, of each data set.
      looks: seeds of each data set at each look.
      others: the most seeds of the other two merging arms.
      level: of each test.
    """

    spread: Sequence[float] | np.ndarray
    looks: Sequence[int]
    others: int
    level: float


PLANNED = Design((SD,) * _SETS, (16, 32), 32, 0.025)
"""The protocol's first design."""


def spread(archive: Archive) -> dict[str, float]:
    """Root mean square of the paper's rule minus fine-tuning in test AUC, by data set.

    It does not depend on the signs of the differences, and estimates their standard deviation where
    the mean effect is 0.
    """
    found = {}
    for data, rate in pretrained.chosen(pretrained.selection(archive)).items():
        gaps = []
        for seed in SPREAD_SEEDS:
            start = pretrained.backbone(data, rate, seed)
            paper, plain = (
                archive.records[pretrained.second_stage(start, arm).hash]["result"]["test"]["auc"]
                for arm in pretrained.LATER_ARMS[::-1]
            )
            gaps.append(paper - plain)
        found[data] = float(np.sqrt(np.mean(np.square(gaps))))
    return found


def spread_table(archive: Archive) -> str:
    """`spread` as Markdown."""
    found = spread(archive)
    rows = [(datasets.SOURCES[data].title, f"{sd:.4f}") for data, sd in found.items()]
    rows.append(("all", f"{np.sqrt(np.mean(np.square(list(found.values())))):.4f}"))
    return markdown(("Data set", "Root mean square difference in test AUC"), rows)


def designs(archive: Archive) -> dict[str, Design]:
    """The first design and that of today with the spread of the stored pairs, and a wider one."""
    sds, looks = np.array(list(spread(archive).values())), pretrained.LOOKS
    today = Design(sds, looks, looks[0], pretrained.LEVEL)
    return {
        "two looks: ": PLANNED._replace(spread=sds),
        "four looks: ": today,
        f"four looks, {WIDER:g} times the spread: ": today._replace(spread=WIDER * sds),
    }


def simulated(
    design: Design, mean: float, between: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """The verdict about the paper's rule at each look, as numbers of `_VERDICTS`.

    All arms are compared with the same fine-tuning, and the other two have no effect. t tests stand
    in for sign flips.

    Args:
      design: of the looks.
      mean: effect of the paper's rule.
      between: its standard deviation between data sets.
      rng: draws the trials.
    """
    shape = (RUNS, 2 + _OTHERS, _SETS, design.looks[-1])
    auc = rng.normal(0, np.asarray(design.spread)[:, None] / np.sqrt(2), shape)
    auc[:, 1] += rng.normal(mean, between, (RUNS, _SETS, 1))
    pairs = auc[:, 1:] - auc[:, :1]
    found = []
    for seeds in design.looks:
        others = pairs[:, 1:, :, : min(seeds, design.others)]
        found.append(_verdicts(pairs[:, :1, :, :seeds], others, design.level))
    return found


def further(archive: Archive) -> list[np.ndarray]:
    """The verdict at each look as numbers of `_VERDICTS`, given the pairs of the first look.

    The effect on a data set is drawn around its observed mean with the standard error, and further
    pairs around that effect with the observed spread.
    """
    first, arms = pretrained.LOOKS[0], pretrained.MERGING
    rates = pretrained.chosen(pretrained.selection(archive))
    grid = [
        pretrained.second_stage(pretrained.backbone(data, rate, seed), arm)
        for seed, (data, rate), arm in product(range(first), rates.items(), pretrained.ARMS)
    ]
    own = groups(with_dependencies(grid), archive)
    stored = np.array([[g.differences((arm, "finetune"), "auc") for g in own] for arm in arms])
    paper, rng = stored[0], np.random.default_rng(0)
    mean, sd = paper.mean(-1, keepdims=True), paper.std(-1, ddof=1, keepdims=True)
    truth = rng.normal(mean, sd / np.sqrt(first), (RUNS, _SETS, 1))
    more = rng.normal(truth, sd, (RUNS, _SETS, pretrained.LOOKS[-1] - first))
    pairs = np.concatenate([np.broadcast_to(paper, (RUNS, *paper.shape)), more], -1)[:, None]
    others = np.broadcast_to(stored[1:], (RUNS, *stored[1:].shape))
    return [_verdicts(pairs[..., :seeds], others, pretrained.LEVEL) for seeds in pretrained.LOOKS]


def further_table(archive: Archive) -> str:
    """`further` as Markdown: shares of the verdicts by look."""
    rows = []
    for seeds, verdicts in zip(pretrained.LOOKS, further(archive), strict=True):
        cells = (f"{100 * (verdicts == number).mean():.1f} %" for number in (1, 2, 3, 0))
        rows.append((f"{seeds} seeds, {_SETS * seeds} pairs", *cells))
    return markdown(("look", "helps", "harms", "no effect", "undecided"), rows)


def _verdicts(paper: np.ndarray, others: np.ndarray, level: float) -> np.ndarray:
    """Where both analyses agree, (runs,); pairs are (runs, arms, data sets, seeds)."""
    means = np.concatenate([paper.mean((2, 3)), others.mean((2, 3))], axis=1)
    found = []
    for own, rest in zip(_errors(paper), _errors(others), strict=True):
        error, degrees = np.concatenate([own[0], rest[0]], axis=1), [own[1]] + [rest[1]] * _OTHERS
        p = 2 * stats.t.sf(np.abs(means) / error, degrees)
        # Of Holm's steps, for the first arm: its own factor, and none of a smaller p.
        order = np.sort(p, axis=1)
        steps = np.maximum.accumulate(order * np.arange(1 + _OTHERS, 0, -1), axis=1)
        holm = np.take_along_axis(steps, (p[:, :1] > order).sum(1, keepdims=True), axis=1)[:, 0]
        equivalent = stats.t.sf((MARGIN - np.abs(means[:, 0])) / error[:, 0], degrees[0])
        verdict = np.where(equivalent < level, 3, 0)
        found.append(np.where(holm < level, np.where(means[:, 0] > 0, 1, 2), verdict))
    return np.where(found[0] == found[1], found[0], 0)


def _errors(pairs: np.ndarray) -> tuple[tuple[np.ndarray, float], tuple[np.ndarray, float]]:
    """Standard errors (runs, arms) and degrees of freedom: over pairs, and of the mixed model."""
    count, seeds = pairs[0, 0].size, pairs.shape[-1]
    mean = pairs.mean((2, 3), keepdims=True)
    total = ((pairs - mean) ** 2).sum((2, 3))
    inside = ((pairs - pairs.mean(-1, keepdims=True)) ** 2).sum((2, 3))
    # Restricted maximum likelihood of a balanced design: the variance between data sets is 0 where
    # the mean squares say so.
    of_sets = (total - inside) / (_SETS - 1)
    of_pairs = inside / (_SETS * (seeds - 1))
    over_pairs = total / (count - 1)
    mixed = np.where(of_sets > of_pairs, of_sets, over_pairs)
    return (np.sqrt(over_pairs / count), count - 1), (np.sqrt(mixed / count), np.inf)


def table(compared: Mapping[str, Design], truths: Sequence[tuple[float, float]] = TRUTHS) -> str:
    """Shares of the verdicts by design and truth, after all looks, and mean number of pairs.

    Args:
      compared: start of a row's label to its design.
      truths: as `TRUTHS`.
    """
    rows = []
    for label, design in compared.items():
        rng = np.random.default_rng(0)
        for mean, between in truths:
            last, seeds = np.zeros(RUNS, int), np.zeros(RUNS)
            looks = simulated(design, mean, between, rng)
            for end, verdicts in zip(design.looks, looks, strict=True):
                seeds = np.where(last == 0, end, seeds)
                last = np.where(last == 0, verdicts, last)
            cells = (f"{100 * (last == number).mean():.0f} %" for number in (1, 2, 3, 0))
            name = f"{label}{mean:g}, {between:g}"
            rows.append((name, *cells, f"{_SETS * seeds.mean():.0f}"))
    columns = (
        "mean effect, its deviation between data sets",
        *("helps", "harms", "no effect", "undecided", "mean number of pairs"),
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
