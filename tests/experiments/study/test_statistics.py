"""Intervals, permutation tests and corrections, against other implementations and known cases."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from experiments.study import estimate, statistics
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
    counts = statistics.draw_counts(len(labels), 8, rng)
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


def test_the_bootstraps_width_is_delongs_and_grows_with_the_seeds_spread():
    labels, scores = make_scores("binary-class", images=400, seeds=1)
    alone = statistics.compare(
        labels, {"a": dict(enumerate(scores))}, "binary-class", [], resamples=4000
    )
    row = alone["arms"]["a"]["auc"]
    positive, s = labels == 1, scores[0][:, 1]
    placements = [np.mean((s[positive][:, None] > s[~positive]) + 0.0, axis=k) for k in (0, 1)]
    delong = np.sqrt(sum(np.var(p, ddof=1) / len(p) for p in placements))
    assert row["half_width"] / 1.96 == pytest.approx(delong, rel=0.1)


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
    assert found.half_width == pytest.approx(1.96 * 0.01, rel=0.05)
    assert found.p == pytest.approx(2 * stats.norm.sf(1), rel=0.1)
    exactly = statistics.bootstrap(values, np.tile(values, (50, 1)), rng)
    assert (exactly.low, exactly.high, exactly.p) == (0.01, 0.01, 0.0)


def test_an_interval_ends_where_the_value_can_be():
    found = statistics.Interval(-0.27, -1.1, 0.5, 0.8, 0.5)
    assert found.above(-1) == found._replace(low=-1)
    assert statistics.Interval(0.9, 0.7, 1.2, 0.25, 0.0).above(0).high == 1
    labels = np.tile([0, 1], 20).astype(np.int32)
    scores = [np.stack([1 - x, x], axis=1) for x in (labels * 0.8 + 0.1, 0.9 - labels * 0.8)]
    arms = {"a": {0: scores[0], 1: scores[1]}, "b": {0: scores[1], 1: scores[1]}}
    row = statistics.compare(labels, arms, "binary-class", [("a", "b")])
    assert row["differences"]["a - b"]["auc"]["low"] == -1 < row["arms"]["a"]["auc"]["low"] == 0


def test_a_patients_images_are_drawn_and_exchanged_together():
    labels, scores = make_scores("binary-class", images=80, seeds=2)
    arms = {"a": {0: scores[0]}, "b": {0: scores[1]}}
    once = statistics.compare(labels, arms, "binary-class", [("a", "b")])
    patients = np.tile(np.arange(80) + 7, 3)
    three = {arm: {0: np.tile(of[0], (3, 1))} for arm, of in arms.items()}
    known = statistics.compare(
        np.tile(labels, 3), three, "binary-class", [("a", "b")], patients=patients
    )
    for metric, row in known["differences"]["a - b"].items():
        for name in ("mean", "low", "high", "p", "p_images"):
            expected = once["differences"]["a - b"][metric][name]
            assert row[name] == pytest.approx(expected, abs=1e-9), (metric, name)
    more = statistics.compare(np.tile(labels, 3), three, "binary-class", [("a", "b")])
    gap, narrow = (found["differences"]["a - b"]["auc"] for found in (once, more))
    assert narrow["half_width"] < 0.7 * gap["half_width"]


def test_p_and_interval_say_the_same_and_images_count_too():
    rng = np.random.default_rng(0)
    values = np.array([0.010, 0.012, 0.008, 0.011])
    resampled = values + 0.02 * rng.standard_normal((4000, 1))
    found = statistics.bootstrap(values, resampled, rng)
    assert found.low < 0 < found.high and found.p > 0.3
    assert found.half_width == pytest.approx(1.96 * 0.02, rel=0.06)
    sure = statistics.bootstrap(values, values + 1e-4 * rng.standard_normal((4000, 1)), rng)
    assert sure.low > 0 and sure.p < 0.02
    (alone,) = [statistics.bootstrap(values[:1], resampled[:, :1], rng)]
    assert alone.half_width == pytest.approx(1.96 * 0.02, rel=0.06)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth, hits, trials = stats.norm.cdf(1 / np.sqrt(2)), 0, 120
    for _ in range(trials):
        labels = np.repeat([0, 1], 40).astype(np.int32)
        s = labels + rng.standard_normal(80)
        scores = np.stack([-s, s], axis=1)[None]
        found = statistics.compare(
            labels, {"a": dict(enumerate(scores))}, "binary-class", [], resamples=300
        )
        row = found["arms"]["a"]["auc"]
        hits += row["low"] <= truth <= row["high"]
    assert 0.87 <= hits / trials <= 0.995


@pytest.mark.parametrize("task", TASKS)
def test_permuting_images_gives_what_exchanging_ranks_one_by_one_gives(task):
    labels, scores = make_scores(task, images=30, seeds=4, skill=0.5)
    found = statistics.permutation_over_images(
        labels, scores[:2], scores[2:], task, np.random.default_rng(5), permutations=40
    )
    ranks = stats.rankdata(scores, axis=1)
    rng = np.random.default_rng(5)

    def gap(swap):
        a = np.where(swap[:, None], ranks[2:], ranks[:2])
        b = np.where(swap[:, None], ranks[:2], ranks[2:])
        aucs = [[compute_metrics(labels, one, task).auc for one in arm] for arm in (a, b)]
        return np.mean(aucs[0]) - np.mean(aucs[1])

    seen = gap(np.zeros(30, bool))
    extreme = [abs(gap(rng.random(30) < 0.5)) >= abs(seen) - 1e-12 for _ in range(40)]
    assert found["auc"] == pytest.approx((1 + sum(extreme)) / 41)
    assert 0 < found["acc"] <= 1


def test_permuting_images_without_any_auc_tells_nothing():
    labels, (scores, _) = np.zeros(8, np.int32), make_scores("binary-class", images=8)[1]
    found = statistics.permutation_over_images(
        labels, scores[None], scores[None, ::-1], "binary-class", np.random.default_rng(0), 20
    )
    assert found["auc"] == 1


def test_equal_arms_have_p_1_and_zero_differences():
    labels, scores = make_scores("multi-class")
    found = statistics.compare(
        labels,
        {"a": dict(enumerate(scores)), "b": dict(enumerate(scores))},
        "multi-class",
        [("a", "b")],
        resamples=50,
        permutations=50,
    )
    row = found["differences"]["a - b"]["auc"]
    assert (row["mean"], row["low"], row["high"]) == (0, 0, 0)
    assert row["p_images"] == row["p_seeds"] == row["p"] == 1


def test_a_difference_is_over_the_seeds_of_both_arms():
    labels, scores = make_scores("binary-class", seeds=3)
    found = statistics.compare(
        labels,
        {"a": dict(enumerate(scores)), "b": {1: scores[0], 2: scores[2]}, "c": {9: scores[0]}},
        "binary-class",
        [("a", "b"), ("a", "c"), ("a", "absent")],
        resamples=20,
        permutations=20,
    )
    assert list(found["differences"]) == ["a - b"]
    gaps = found["differences"]["a - b"]["auc"]["seeds"]
    values = found["arms"]["a"]["auc"]["seeds"]
    assert gaps == pytest.approx([values[1] - values[0], 0])


def test_the_permutation_test_is_uniform_without_and_small_with_a_difference():
    rng = np.random.default_rng(0)
    ps = []
    for trial in range(40):
        labels, first = make_scores("binary-class", images=50, seeds=1, seed=trial)
        second = first + 0.3 * rng.standard_normal(first.shape)
        third = first + 0.3 * rng.standard_normal(first.shape)
        p = statistics.permutation_over_images(labels, second, third, "binary-class", rng, 99)
        ps.append(p["auc"])
    assert 0.25 < np.mean(ps) < 0.75 and np.mean(np.array(ps) <= 0.1) < 0.3
    labels, good = make_scores("binary-class", images=200, seeds=1, skill=3)
    bad = np.random.default_rng(9).random(good.shape)
    p = statistics.permutation_over_images(labels, good, bad, "binary-class", rng, 199)
    assert p["auc"] <= 0.01 and p["acc"] <= 0.01


def test_permutation_ignores_another_calibration():
    labels, scores = make_scores("binary-class", images=80, seeds=2)
    cold = scores**7
    p = statistics.permutation_over_images(
        labels, scores, cold, "binary-class", np.random.default_rng(0), 50
    )
    assert p["auc"] == 1


def test_the_interval_over_trainings_is_students():
    low, high = statistics.interval_over_trainings([0.01, 0.03])
    # 12.706 is the t of 95 % with one degree of freedom; the standard error is 0.01.
    assert (low, high) == pytest.approx((0.02 - 0.12706, 0.02 + 0.12706), rel=1e-4)
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        low, high = statistics.interval_over_trainings(rng.normal(0.3, 1, 6))
        covered += low < 0.3 < high
    assert 0.935 < covered / 2000 < 0.965


def test_sign_flips_are_exact():
    assert statistics.sign_flips_over_seeds([1, 1, 1]) == 2 / 8
    assert statistics.sign_flips_over_seeds([0.3, -0.3]) == 1
    rng = np.random.default_rng(0)
    values = rng.standard_normal(10) + 0.4
    expected = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert statistics.sign_flips_over_seeds(values) == pytest.approx(expected)
    many = statistics.sign_flips_over_seeds(np.ones(30))
    assert 0 < many < 1e-4


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1, 1]
    assert statistics.holm([]) == []


def test_the_expected_error_shrinks_with_images():
    few, many = (estimate.error_over_images(50 * n, 100 * n) for n in (1, 100))
    assert many["auc"] == pytest.approx(few["auc"] / 10, rel=0.05)
    # Hanley and McNeil (1982) give about 0.032 for 51 abnormal and 58 normal images.
    one = estimate.error_over_images(51, 58, auc=0.893, acc=0.5, correlation=0.5)
    assert one["auc"] == pytest.approx(0.032, abs=1e-3)


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_detectable_over_seeds_is_what_the_noncentral_t_gives(seeds):
    size = statistics.smallest_detectable(seeds, 0.01, 0.0, 4)
    critical = stats.t.isf(0.025 / 4, seeds - 1)
    far = stats.nct(seeds - 1, size / 0.01)
    assert far.sf(critical) + far.cdf(-critical) == pytest.approx(0.8, abs=2e-3)


def test_detectable_over_images_is_the_normal_distributions():
    assert statistics.smallest_detectable(5, 0.0, 0.01) == pytest.approx(0.028016, rel=1e-4)
    assert statistics.smallest_detectable(1, 0.0, 0.01) == pytest.approx(0.028016, rel=1e-4)
    assert statistics.smallest_detectable(3, 0.0, 0.0) == 0


def test_what_is_detectable_is_distinguished_four_times_out_of_five():
    seeds, own, images = 3, 0.02, 0.01
    size = statistics.smallest_detectable(seeds, own, images)
    rng = np.random.default_rng(0)
    draws = size + images * rng.standard_normal((20000, 1))
    draws = draws + own * np.sqrt(seeds) * rng.standard_normal((20000, seeds))
    errors = draws.std(1, ddof=1) / np.sqrt(seeds)
    half = np.hypot(stats.t.isf(0.025, seeds - 1) * errors, stats.norm.isf(0.025) * images)
    assert np.mean(np.abs(draws.mean(1)) > half) == pytest.approx(0.8, abs=0.012)
