"""The mean over all trainings: of those that the arm changed, and of no others."""

import pytest

from experiments.study import pooling
from experiments.study.statistics import holm, interval_over_trainings, sign_flips_over_seeds


def group(data, gaps, seeds, against, identical=(), stuck=None, acc=None):
    of_acc = [-gap for gap in gaps] if acc is None else acc
    return {
        "key": [data],
        "differences": {"inmerge - finetune": {"auc": {"seeds": gaps}, "acc": {"seeds": of_acc}}},
        "identical": {"inmerge - finetune": list(identical)},
        "over": {"inmerge": seeds, "finetune": against, "backbone": seeds},
        "same": {"backbone": stuck or [0.5] * len(seeds)},
    }


def test_a_training_that_merged_nothing_is_not_pooled():
    groups = {
        "one": group("a", [0.0, 0.25, -0.5, 0.0], [0, 1, 2, 3], [0, 1, 2, 3], [0, 3]),
        "two": group("b", [0.125], [0, 1], [1]),
        "without": {"differences": {}, "over": {}},
    }
    found = pooling.pool(groups, ("inmerge", "other"))
    assert list(found) == ["inmerge"] and found["inmerge"]["idle"] == 2
    gaps = [0.25, -0.5, 0.125]
    low, high = interval_over_trainings(gaps)
    p = sign_flips_over_seeds(gaps)
    assert found["inmerge"]["auc"] == {
        "trainings": 3,
        "mean": pytest.approx(-0.125 / 3),
        "median": 0.125,
        "data_sets": {"a": -0.125, "b": 0.125},
        "better": 2,
        "worse": 1,
        "p": p,
        "p_holm": holm([p, p])[0],
        "low": low,
        "high": high,
    }
    acc = found["inmerge"]["acc"]
    assert (acc["better"], acc["worse"], acc["median"]) == (1, 2, -0.125)
    assert found["inmerge"]["learned"] is None
    assert "-0.0417" in pooling.mean(found["inmerge"]["auc"]).replace("\u2212", "-")
    (row, _) = pooling.pooled_table(found, "finetune").rows
    assert row[:3] == ("inmerge: AUC", "3", "2 / 1")


def test_trainings_of_a_backbone_with_one_answer_are_shown_apart():
    groups = {
        "one": group("a", [0.25, 0.5], [0, 1], [0, 1], stuck=[1.0, 0.7]),
        "two": group("b", [0.125], [2], [2], stuck=[0.98]),
    }
    found = pooling.pool(groups, ("inmerge",))["inmerge"]
    assert found["auc"]["trainings"] == 3 and found["auc"]["mean"] == pytest.approx(0.875 / 3)
    assert found["learned"]["auc"]["trainings"] == 2
    assert found["learned"]["auc"]["mean"] == pytest.approx(0.3125)
    alone = {"one": group("a", [0.25], [0], [0], stuck=[1.0])}
    assert pooling.pool(alone, ("inmerge",))["inmerge"]["learned"] is None


def test_one_training_has_no_interval_and_none_no_mean():
    found = pooling.pool({"one": group("a", [0.25], [0], [0])}, ("inmerge",))["inmerge"]
    assert "low" not in found["auc"] and "[" not in pooling.mean(found["auc"])
    assert pooling.pool({"one": group("a", [0.25], [0], [0], [0])}, ("inmerge",)) == {}


def test_the_verdict_names_what_is_told_and_only_that():
    gaps = [0.01 * (1 + seed / 100) for seed in range(12)]
    seeds = list(range(12))
    mixed = [0.01 * (-1) ** seed for seed in seeds]
    groups = {"one": group("a", gaps, seeds, seeds, acc=mixed)}
    pooled = pooling.pool(groups, ("inmerge",))
    said = pooling.verdict(pooled, "finetune")
    assert "inmerge AUC" in said and "inmerge ACC" not in said
    groups = {"one": group("a", mixed, seeds, seeds, acc=mixed)}
    said = pooling.verdict(pooling.pool(groups, ("inmerge",)), "finetune")
    assert "no arm is distinguished" in said


def test_few_trainings_are_said_to_be_too_few_and_their_intervals_told():
    groups = {"one": group("a", [-0.01, -0.011, -0.012], [0, 1, 2], [0, 1, 2], acc=[0.0] * 3)}
    pooled = pooling.pool(groups, ("inmerge",))
    assert "no p below 0.25" in pooling.verdict(pooled, "finetune")
    said = pooling.alone(pooled)
    assert "better: none, worse: inmerge" in said
    assert "worse: none" in pooling.alone(pooled, "acc")
