"""Intervals, permutation tests and corrections, against other implementations and known cases."""

import itertools

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from experiments.study import statistics
from inmerge_jax.reporting.resampling import draw_counts
from inmerge_jax.training.metrics import compute_metrics

TASKS = {"binary-class": 2, "multi-class": 4, "multi-label, binary-class": 3}


def make_scores(task, images=60, seeds=2, skill=1.0, seed=0):
    rng = np.random.default_rng(seed)
    classes = TASKS[task]
    if task.startswith("multi-label"):
        labels = rng.integers(0, 2, (images, classes)).astype(np.uint8)
        truth = labels.astype(float)
    else:
        labels = rng.integers(0, classes, images).astype(np.int32)
        truth = np.eye(classes)[labels]
    scores = skill * truth + rng.standard_normal((seeds, images, classes))
    scores = np.round(1 / (1 + np.exp(-scores)), 2)  # rounded, so that some are equal
    return labels, scores


@pytest.mark.parametrize("task", TASKS)
def test_a_weighted_metric_is_that_of_repeated_images(task):
    labels, scores = make_scores(task)
    rng = np.random.default_rng(1)
    counts = draw_counts(len(labels), 8, rng)
    for name in statistics.METRICS:
        found = statistics.metric_of_counts(name, labels, scores[0], task, counts)
        for value, count in zip(found, counts, strict=True):
            index = np.repeat(np.arange(len(labels)), count)
            expected = compute_metrics(labels[index], scores[0][index], task)
            assert value == pytest.approx(getattr(expected, name), abs=1e-12)


def test_a_class_that_a_resample_lacks_is_left_out():
    labels = np.array([0, 0, 1, 2], np.int32)
    scores = np.random.default_rng(0).random((4, 3))
    counts = np.array([[2, 1, 1, 0], [4, 0, 0, 0]])
    found = statistics.metric_of_counts("auc", labels, scores, "multi-class", counts)
    one = roc_auc_score(labels[:3] == 0, scores[:3, 0], sample_weight=[2, 1, 1])
    two = roc_auc_score(labels[:3] == 1, scores[:3, 1], sample_weight=[2, 1, 1])
    assert found[0] == pytest.approx((one + two) / 2)
    assert np.isnan(found[1])


@pytest.mark.long
@pytest.mark.parametrize("images", [0, 0.3, 1])
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_few_seeds_are_not_taken_for_many(seeds, images):
    """Trainings vary by 1 and the choice of images by `images`, the same for all trainings."""
    rng = np.random.default_rng(0)
    hits, rejected, trials = 0, 0, 400
    for _ in range(trials):
        values = rng.standard_normal(seeds) + images * rng.standard_normal()
        resampled = values + images * rng.standard_normal((400, 1))
        found = statistics.bootstrap(values, resampled, rng)
        hits += found.low <= 0 <= found.high
        rejected += found.p < 0.05
    assert 0.92 <= hits / trials
    assert rejected / trials <= 0.08


def test_two_seeds_that_agree_by_chance_leave_the_images_error():
    rng = np.random.default_rng(0)
    values = np.array([0.01, 0.01])
    found = statistics.bootstrap(values, values + 0.01 * rng.standard_normal((4000, 1)), rng)
    assert half_width(found) == pytest.approx(1.96 * 0.01, rel=0.05)
    assert found.p == pytest.approx(2 * stats.norm.sf(1), rel=0.1)
    exactly = statistics.bootstrap(values, np.tile(values, (50, 1)), rng)
    assert (exactly.low, exactly.high, exactly.p) == (0.01, 0.01, 0.0)


def test_p_and_interval_say_the_same_and_images_count_too():
    rng = np.random.default_rng(0)
    values = np.array([0.010, 0.012, 0.008, 0.011])
    resampled = values + 0.02 * rng.standard_normal((4000, 1))
    found = statistics.bootstrap(values, resampled, rng)
    assert found.low < 0 < found.high and found.p > 0.3
    assert half_width(found) == pytest.approx(1.96 * 0.02, rel=0.06)
    sure = statistics.bootstrap(values, values + 1e-4 * rng.standard_normal((4000, 1)), rng)
    assert sure.low > 0 and sure.p < 0.02
    (alone,) = [statistics.bootstrap(values[:1], resampled[:, :1], rng)]
    assert half_width(alone) == pytest.approx(1.96 * 0.02, rel=0.06)


def half_width(found):
    return (found.high - found.low) / 2


def test_the_bootstraps_width_is_delongs():
    labels, scores = make_scores("binary-class", images=400, seeds=1)
    counts = draw_counts(400, 4000, np.random.default_rng(0))
    whole = np.ones((1, 400), int)
    value, resampled = (
        statistics.metric_of_counts("auc", labels, scores[0], "binary-class", x)
        for x in (whole, counts)
    )
    found = statistics.bootstrap(value, resampled[:, None], np.random.default_rng(0))
    positive, s = labels == 1, scores[0][:, 1]
    placements = [np.mean((s[positive][:, None] > s[~positive]) + 0.0, axis=k) for k in (0, 1)]
    delong = np.sqrt(sum(np.var(p, ddof=1) / len(p) for p in placements))
    assert half_width(found) / 1.96 == pytest.approx(delong, rel=0.1)


def test_intervals_cover_the_truth_about_as_often_as_they_state():
    rng = np.random.default_rng(0)
    truth, hits, trials = stats.norm.cdf(1 / np.sqrt(2)), 0, 120
    labels = np.repeat([0, 1], 40).astype(np.int32)
    for _ in range(trials):
        s = labels + rng.standard_normal(80)
        scores = np.stack([-s, s], axis=1)
        counts = np.concatenate([np.ones((1, 80), int), draw_counts(80, 300, rng)])
        values = statistics.metric_of_counts("auc", labels, scores, "binary-class", counts)
        found = statistics.bootstrap(values[:1], values[1:, None], rng)
        hits += found.low <= truth <= found.high
    assert 0.87 <= hits / trials <= 0.995


def test_the_interval_over_trials_is_students_and_p_that_of_all_sign_flips():
    found = statistics.over_trials([0.01, 0.03])
    # 12.706 is the t of 95 % with one degree of freedom; the standard error is 0.01.
    ends = (found["low"], found["high"])
    assert ends == pytest.approx((0.02 - 0.12706, 0.02 + 0.12706), rel=1e-4)
    assert (found["trials"], found["positive"], found["p"]) == (2, 2, 0.5)
    assert statistics.over_trials([1, 1, 1])["p"] == 2 / 8
    assert statistics.over_trials([0.3, -0.3])["p"] == 1
    assert statistics.over_trials([0.1]) == {"trials": 1, "positive": 1, "mean": 0.1, "p": 1.0}
    values = np.random.default_rng(0).standard_normal(10) + 0.4
    signs = np.array(list(itertools.product((1, -1), repeat=10)))
    extreme = np.abs(signs @ values) >= abs(values.sum()) - 1e-12
    assert statistics.over_trials(values)["p"] == pytest.approx(extreme.mean())
    assert 0 < statistics.over_trials(np.linspace(1, 2, 30))["p"] < 1e-3


@pytest.mark.long
def test_holms_correction_is_over_all_rows():
    rows = [{"p": p} for p in (0.01, 0.04, 0.03)]
    statistics.add_holm(rows)
    assert [row["p_holm"] for row in rows] == pytest.approx([0.03, 0.06, 0.06])
    assert [statistics.is_significant(row) for row in rows] == [True, False, False]
    statistics.add_holm([])


@pytest.mark.parametrize("sd", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("mean", [0.001, -0.03])
@pytest.mark.parametrize("comparisons", [1, 28])
def test_the_pairs_needed_have_80_percent_power(sd, mean, comparisons):
    rows = [row(mean, sd, 3) for _ in range(comparisons)]
    statistics.add_holm(rows)
    needed = rows[0]["needed"]
    alpha, size = 0.05 / comparisons, abs(mean) / sd

    def power(n):
        critical = stats.t.isf(alpha / 2, n - 1)
        return stats.nct(n - 1, size * np.sqrt(n)).sf(critical)

    count = needed["significant"]
    assert 0.5 ** (count - 1) <= alpha and power(count) > 0.78
    assert power(count - 1) < 0.82 or 0.5 ** (count - 2) > alpha
    if abs(mean) > statistics.MARGIN:
        assert needed["equivalent"] == np.inf
        return
    draws = np.random.default_rng(0)
    count, hits = int(needed["equivalent"]), 0
    for _ in range(2000):
        error = sd * np.sqrt(draws.chisquare(count - 1) / (count - 1) / count)
        found = draws.normal(mean, sd / np.sqrt(count))
        hits += abs(found) < statistics.MARGIN - stats.t.isf(0.05, count - 1) * error
    assert hits / 2000 == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("mean", [-0.01, 0.001])
def test_the_data_sets_needed_have_80_percent_power(mean):
    between, within, each = 0.012, 0.02, 16
    row = {"trials": 5 * each, "mean": mean, "p": 0.3, "sets": 5}
    row |= {"between": between, "within": within}
    statistics.add_holm([row, dict(row), dict(row)])
    count = int(row["needed_sets"])
    error = np.sqrt((between**2 + within**2 / each) / count)
    found = np.random.default_rng(0).normal(mean, error, 20_000)
    if abs(mean) > statistics.MARGIN:
        hits = 2 * stats.norm.sf(np.abs(found) / error) < 0.05 / 3
    else:
        hits = np.abs(found) < statistics.MARGIN - stats.norm.isf(0.05) * error
    assert 0.79 < hits.mean() < 0.83


def test_what_is_undecided_needs_more_pairs_than_there_are(monkeypatch):
    monkeypatch.setattr(statistics, "_FLIPS", 4000)
    draws = np.random.default_rng(0)
    seen = 0
    for _ in range(25):
        between = draws.choice([0, 0.005])
        by_set = {
            str(n): draws.normal(draws.normal(0, between), 0.012, draws.integers(10, 17))
            for n in range(5)
        }
        pairs = statistics.over_trials(np.concatenate(list(by_set.values())))
        mixed = statistics.mixed_model(by_set)
        for one in (pairs, mixed):
            statistics.add_holm([one])
        verdicts = [statistics.verdict(one) for one in (pairs, mixed)]
        if verdicts[0] != verdicts[1] or verdicts[0] == "undecided":
            seen += 1
            assert statistics.needed(pairs, mixed) > pairs["trials"]
    assert seen > 4


def test_pairs_that_nothing_would_decide():
    """Data sets whose effects differ: more pairs of the same ones do not tell their mean."""
    some = {
        name: [mean - 0.001, mean + 0.001] * 8 for name, mean in zip("abc", (-1, 0, 1), strict=True)
    }
    mixed = statistics.mixed_model(some)
    pairs = statistics.over_trials([x for values in some.values() for x in values])
    for one in (pairs, mixed):
        statistics.add_holm([one])
    assert statistics.verdict(mixed) == "undecided"
    assert mixed["needed"] == {"significant": np.inf, "equivalent": np.inf}
    assert statistics.needed(pairs, mixed) == np.inf


def row(mean, sd, count):
    values = np.linspace(-1, 1, count)
    values = mean + sd * (values - values.mean()) / values.std(ddof=1)
    found = statistics.over_trials(values)
    statistics.add_holm([found])
    return found


@pytest.mark.long
def test_a_verdict_is_one_of_four():
    assert statistics.verdict(row(0.02, 0.004, 12)) == "helps"
    assert statistics.verdict(row(-0.02, 0.004, 12)) == "harms"
    assert statistics.verdict(row(0.0005, 0.004, 20)) == "no effect"
    assert statistics.verdict(row(0.0005, 0.05, 20)) == "undecided"
    # Equivalence by hand: both one-sided t tests at 5 %.
    small = row(0.002, 0.004, 20)
    t = (statistics.MARGIN - 0.002) / (0.004 / np.sqrt(20))
    assert small["p_equivalent"] == pytest.approx(stats.t.sf(t, 19))


def test_the_mixed_model_of_a_balanced_design():
    """Its error is that of the means of the data sets, where these vary more than the pairs."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.01, (5, 16)) + np.array([[-0.02], [-0.01], [0], [0.01], [0.03]])
    found = statistics.mixed_model({str(n): list(some) for n, some in enumerate(values)})
    means = values.mean(1)
    assert found["mean"] == pytest.approx(means.mean())
    error = means.std(ddof=1) / np.sqrt(5)
    assert found["high"] - found["mean"] == pytest.approx(1.96 * error, rel=1e-3)
    # Without such variance it is that over all pairs, with the normal distribution.
    values = rng.normal(0, 0.01, 80)
    values = np.concatenate([values, -values]).reshape(16, 10).T
    found = statistics.mixed_model(
        {str(n): list(some - some.mean()) for n, some in enumerate(values)}
    )
    assert found["mean"] == pytest.approx(0, abs=1e-12)
    assert found["p"] == pytest.approx(1) and found["p_equivalent"] < 1e-3
    # The estimate does not exist where all data sets have the same differences.
    same = {name: [0.03, -0.03, 0.03, -0.03] for name in "abc"}
    found = statistics.mixed_model(same)
    error = 0.03 * np.sqrt(12 / 11) / np.sqrt(12)
    assert found["high"] == pytest.approx(1.96 * error, rel=1e-3) and found["mean"] == 0


@pytest.mark.parametrize("sizes", [(16, 16, 12, 16, 16), (3, 1, 7, 2, 9), (2, 2), (40, 1, 1)])
@pytest.mark.parametrize("between", [0.0, 0.01])
def test_the_mixed_model_maximises_the_restricted_likelihood(sizes, between):
    draws = np.random.default_rng(sum(sizes))
    sets = {
        str(n): draws.normal(draws.normal(0, between), 0.016, size) for n, size in enumerate(sizes)
    }
    found = statistics.mixed_model(sets)
    values = np.concatenate(list(sets.values()))
    whose = np.repeat(np.arange(len(sizes)), sizes)
    same, one = (whose[:, None] == whose).astype(float), np.ones(len(values))

    def fit(between, within):
        """The restricted likelihood by matrices: mean, its error, and -2 log L."""
        inverse = np.linalg.inv(between**2 * same + within**2 * np.eye(len(values)))
        information = one @ inverse @ one
        mean = one @ inverse @ values / information
        rest = values - mean
        log = -np.linalg.slogdet(inverse)[1] + np.log(information) + rest @ inverse @ rest
        return mean, 1 / np.sqrt(information), log

    mean, error, log = fit(found["between"], found["within"])
    assert found["mean"] == pytest.approx(mean, abs=1e-9)
    assert found["high"] - found["mean"] == pytest.approx(1.96 * error, rel=1e-4)
    for b in (found["between"] * 0.97, found["between"] * 1.03, 0.0, 0.002, 0.02):
        for w in (found["within"] * 0.97, found["within"], found["within"] * 1.03):
            assert fit(b, w)[2] >= log - 1e-7


def test_too_few_pairs_for_a_model_decide_nothing():
    for sets in ({}, {"a": []}, {"a": [0.1], "b": []}):
        found = statistics.mixed_model(sets)
        pairs = statistics.over_trials([x for some in sets.values() for x in some])
        for one in (found, pairs):
            statistics.add_holm([one])
            assert statistics.verdict(one) == "undecided"
        assert statistics.needed(pairs, found) is None
