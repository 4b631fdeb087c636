"""The checks pass for the library's functions, and fail for wrong ones."""

import jax
import numpy as np
import pytest

from experiments.benchmarks.accelerator import correctness
from experiments.benchmarks.accelerator.correctness import (
    check_merge,
    check_similarity,
    relative_error,
)
from inmerge_jax import MergeRule, merge_kernels, quantile

CPU = jax.devices("cpu")[0]


@pytest.mark.long
@pytest.mark.parametrize("partner", ["random", "nearest"])
@pytest.mark.parametrize("threshold", [0.3, quantile(0.5)], ids=["fixed", "quantile"])
def test_the_merge_agrees_with_the_oracle(partner, threshold):
    rule = MergeRule(probability=0.6, threshold=threshold, partner=partner)
    found = check_merge(rule, True, CPU)
    assert found["passed"] and found["merged"] > 0
    assert found["error"] <= 1e-6


def too_far(params, key, kernels, rule):
    """Keeps less of the kernel than the rule says."""
    return merge_kernels(params, key, kernels, MergeRule(0.6, rule.threshold, 0.75, rule.partner))


def too_many(params, key, kernels, rule):
    """Merges pairs below the threshold."""
    return merge_kernels(params, key, kernels, MergeRule(0.6, 0.2, rule.alpha, rule.partner))


def none(params, key, kernels, rule):
    """Merges nothing."""
    return merge_kernels(params, key, kernels, MergeRule(0.6, 1.0, rule.alpha, rule.partner))


def others(params, key, kernels, rule):
    """Changes a kernel that was not selected."""
    params, stats = merge_kernels(params, key, kernels, rule)
    return {name: weight * 1.001 for name, weight in params.items()}, stats


@pytest.mark.parametrize("wrong", [too_far, too_many, none, others])
def test_a_wrong_merge_is_noticed(wrong, monkeypatch):
    monkeypatch.setattr(correctness, "merge_kernels", wrong)
    assert not check_merge(MergeRule(probability=0.6), True, CPU)["passed"]


def test_wrong_similarities_are_noticed(monkeypatch):
    assert check_similarity(True, CPU)["passed"]
    right = correctness.kernel_similarity
    monkeypatch.setattr(
        correctness,
        "kernel_similarity",
        lambda params, kernels: right(jax.tree.map(lambda x: x + 0.01, params), kernels),
    )
    assert not check_similarity(True, CPU)["passed"]


def ten_steps(scale, merges, loss):
    """The device's steps differ from the CPU's by `scale`; rounding explains its own size."""

    def run(devices, precision, tiny, noise=0.0):
        ours = len(devices) > 1
        error = scale if ours else noise
        return {
            "losses": np.full(10, 2.0 * (1 + (loss if ours else 0))),
            "merged": np.full((10, 2), 3 + (merges if ours else 0)),
            "first": {"kernel": np.ones(4) * (1 + error), "merged": np.ones(4)},
        }

    return run


@pytest.mark.parametrize(
    ("scale", "merges", "loss", "passed"),
    [
        (0, 0, 0, True),
        (4e-6, 0, 0, True),
        (6e-6, 0, 0, False),
        (0, 1, 0, False),
        (0, 0, 1e-4, False),
    ],
)
def test_training_that_differs_is_noticed(scale, merges, loss, passed, monkeypatch):
    monkeypatch.setattr(correctness, "ten_steps", ten_steps(scale, merges, loss))
    found = correctness.check_training("highest", 0.0, True, CPU)
    assert found["passed"] is passed
    assert found["quantities"]["kernel"]["error"] == pytest.approx(scale)
    # A step without any gradient has an error of 1.
    coarse = correctness.check_training("default", 1.0, True, CPU)["quantities"]
    assert coarse["kernel"]["limit"] == 0.7


def test_a_training_step_agrees_with_itself_on_more_devices():
    found = correctness.check_training("highest", 0.0, True, CPU)
    assert found["devices"] == 8 and found["passed"]
    # Sums over eight devices are rounded in another way.
    assert 0 < found["error"] < found["limit"] < 0.1
    assert set(found["quantities"]) == {"kernel", "bias", "merged", "loss"}


def test_nan_is_an_error():
    assert relative_error([1.0, np.nan], [1.0, 2.0]) == float("inf")
    assert relative_error([1.0, 2.0], [1.0, 2.0]) == 0
