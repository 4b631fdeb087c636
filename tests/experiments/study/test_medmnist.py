"""Question 1's pooled difference: over the trainings that merging changed, and no others."""

import pytest

from experiments import medmnist
from experiments.study.statistics import interval_over_trainings, sign_flips_over_seeds


def group(data, gaps, seeds, finetuned, identical=()):
    return {
        "key": [data],
        "differences": {"inmerge - finetune": {"auc": {"seeds": gaps}}},
        "identical": {"inmerge - finetune": list(identical)},
        "over": {"inmerge": seeds, "finetune": finetuned},
    }


def test_a_training_that_merged_nothing_is_not_pooled():
    groups = {
        "one": group("a", [0.0, 0.25, -0.5, 0.0], [0, 1, 2, 3], [0, 1, 2, 3], [0, 3]),
        "two": group("b", [0.125], [0, 1], [1]),
        "without": {"differences": {}, "over": {}},
    }
    merges = {"one": {0: 0, 1: 7, 2: 1, 3: 5}, "two": {0: 9, 1: 2}, "without": {}}
    found = medmnist.pool(groups, merges, "inmerge")
    gaps = [0.25, -0.5, 0.125]
    low, high = interval_over_trainings(gaps)
    assert found == {
        "trainings": 3,
        "merged_nothing": 2,
        "mean": pytest.approx(-0.125 / 3),
        "data_sets": {"a": -0.125, "b": 0.125},
        "better": 2,
        "p_seeds": sign_flips_over_seeds(gaps),
        "low": low,
        "high": high,
    }


def test_one_training_has_no_interval_and_none_no_mean():
    groups = {"one": group("a", [0.25], [0], [0])}
    assert "low" not in medmnist.pool(groups, {"one": {0: 3}}, "inmerge")
    assert medmnist.pool(groups, {"one": {0: 0}}, "inmerge") is None
