"""The search for a better rule: its candidates, its rounds, and the test of the winner."""

import dataclasses
import hashlib

import numpy as np
import pytest

from experiments.study.archive import Archive
from experiments.study.questions import better_rule
from experiments.study.trials import with_dependencies
from tests.experiments.study.test_pretrained import stored

RULES = better_rule.candidates()


def searched(trials, gains=(), test_gains=None):
    """An archive of these trials; `gains` by number of a rule are in validation AUC."""
    archive = stored(trials, test_gains)
    for trial in trials:
        gain = np.random.default_rng(int(trial.hash, 16)).normal(0, 1e-4)
        if trial.treatment in RULES:
            gain += dict(gains).get(RULES.index(trial.treatment), 0.0)
        result = archive.records[trial.hash]["result"]
        result["val"]["auc"] = 0.8 + gain
        if trial.treatment.kind == "variant":
            result |= {"layers": ["conv"], "kernels": [64], "merged": [32]}
    return archive


def complete(gains, test_gains=None):
    """All trials of the search and the test."""
    trials = better_rule.QUESTION.trials
    while True:
        archive = searched(trials, gains, test_gains)
        more = (*better_rule.QUESTION.trials, *better_rule.later(archive))
        if len(more) == len(trials):
            return archive
        trials = more


def test_the_candidates_are_those_of_the_protocol():
    assert len(set(RULES)) == better_rule.CANDIDATES >= 40
    for name, levels in better_rule.LEVELS.items():
        counts = [
            sum(
                rule.described().get(level[0]) == level[1]
                if name == "threshold"
                else getattr(rule, name) == level
                for rule in RULES
            )
            for level in levels
        ]
        assert counts == [better_rule.CANDIDATES // len(levels)] * len(levels), name
    # NumPy does not promise that a later version draws the same.
    hashes = [better_rule.second_stage("retinamnist", 200, rule).hash for rule in RULES]
    assert hashlib.sha256("".join(hashes).encode()).hexdigest()[:10] == "00d5d959a5"
    seeds = {trial.backbone.seed for trial in better_rule.QUESTION.trials}
    assert seeds == {200, 201}
    assert {t.backbone.data for t in better_rule.QUESTION.trials} == {
        "bloodmnist_like_few",
        "retinamnist",
    }
    assert len(better_rule.QUESTION.trials) == 2 * 2 * (48 + 4)


def test_the_best_go_on_and_meet_their_own_control():
    first = better_rule.QUESTION.trials
    assert better_rule.later(searched(first[:-1])) == ()
    archive = searched(first, {7: 0.02, 30: 0.01})
    more = better_rule.later(archive)
    rules = {t.treatment for t in more if t.treatment.kind == "variant"}
    assert len(rules) == 16 and {RULES[7], RULES[30]} <= rules
    assert {trial.backbone.seed for trial in more} == set(range(200, 206))
    for rule in rules:
        control = better_rule.control_of(rule)
        assert (control.average, control.statistics) == (rule.average, rule.statistics)
        assert control.kind == "none" and control in {trial.treatment for trial in more}
    # A gain is over the control of the same evaluation, so that averaging alone gains nothing.
    (averaged,) = (
        trial
        for trial in first
        if trial.treatment == better_rule.control_of(RULES[7])
        and trial.backbone.seed == 200
        and trial.backbone.data == "retinamnist"
    )
    archive.records[averaged.hash]["result"]["val"]["auc"] += 0.04
    (some,) = better_rule.search(archive)
    gain = some[RULES[7]]
    assert np.mean(gain.by_data["retinamnist"]) == pytest.approx(0.02 - 0.02, abs=1e-3)
    assert np.mean(gain.by_data["bloodmnist_like_few"]) == pytest.approx(0.02, abs=1e-3)
    assert gain.merged == 32 / 64 / 4


def test_a_rule_that_diverges_leaves_the_search():
    first = better_rule.QUESTION.trials
    archive = searched(first, {7: 0.02})
    lost = next(trial for trial in first if trial.treatment == RULES[7])
    del archive.records[lost.hash]
    archive = dataclasses.replace(archive, diverged={lost.hash: "epoch 1"})
    (some,) = better_rule.search(archive)
    assert RULES[7] not in some and len(some) == 47
    assert RULES[7] not in {trial.treatment for trial in better_rule.later(archive)}
    assert better_rule.analyse(archive)["diverged in the search or the test"] == [lost.name]


def test_a_gain_counts_in_standard_deviations_of_its_data_set():
    first = better_rule.QUESTION.trials
    archive = searched(first, {7: 0.01, 30: 0.01})
    # Of RetinaMNIST, all gains are ten times as large and ten times as uncertain.
    for trial in first:
        val = archive.records[trial.hash]["result"]["val"]
        if trial.backbone.data == "retinamnist":
            val["auc"] = 0.8 + 10 * (val["auc"] - 0.8)
    # Each of two rules is ahead by as many standard deviations, on one data set alone.
    ahead = {7: "retinamnist", 30: "bloodmnist_like_few"}
    for trial in first:
        if trial.treatment in RULES and ahead.get(RULES.index(trial.treatment)):
            if ahead[RULES.index(trial.treatment)] != trial.backbone.data:
                archive.records[trial.hash]["result"]["val"]["auc"] = 0.8
    (some,) = better_rule.search(archive)
    means = {rule: np.mean(some[RULES[rule]].by_data[data]) for rule, data in ahead.items()}
    assert means[7] > 9 * means[30]
    assert some[RULES[7]].score == pytest.approx(some[RULES[30]].score, rel=0.25)


def test_a_rule_that_merges_nothing_cannot_win():
    first = better_rule.QUESTION.trials
    archive = searched(first, {7: 0.02})
    own = [t for t in first if t.treatment == RULES[7]]
    for trial in own[1:]:
        archive.records[trial.hash]["result"]["merged"] = [0]
    (some,) = better_rule.search(archive)
    assert RULES[7] in some
    archive.records[own[0].hash]["result"]["merged"] = [0]
    (some,) = better_rule.search(archive)
    assert RULES[7] not in some and len(some) == 47


def without(archive, trials):
    """The archive in which these trials diverged."""
    lost = {trial.hash: "epoch 1" for trial in trials}
    records = {one: row for one, row in archive.records.items() if one not in lost}
    return dataclasses.replace(archive, records=records, diverged=lost)


def test_a_pair_is_missing_where_the_control_or_the_backbone_diverged():
    first = better_rule.QUESTION.trials
    archive = searched(first, {7: 0.02})
    control = better_rule.control_of(RULES[7])
    lost = [t for t in first if t.treatment == control and t.backbone.seed == 200]
    (some,) = better_rule.search(without(archive, lost))
    assert len(some) == 48
    for rule, gain in some.items():
        count = 1 if better_rule.control_of(rule) == control else 2
        assert [len(values) for values in gain.by_data.values()] == [count, count]
    backbone = next(t.first() for t in first if t.backbone.seed == 200)
    starting = [t for t in first if t.first() == backbone]
    (some,) = better_rule.search(without(archive, [backbone, *starting]))
    assert len(some) == 48
    assert all(sum(map(len, gain.by_data.values())) == 3 for gain in some.values())
    # If nothing is left, the search ends without a winner.
    none = without(archive, {t.first() for t in first} | set(first))
    assert better_rule.search(none) == [{}] and better_rule.winner(none) is None
    assert better_rule.later(none) == () and "pooled" not in better_rule.analyse(none)


def test_the_winner_is_tested_on_other_data_once():
    archive = complete({7: 0.02}, {"winner": 2.0})
    assert better_rule.winner(archive) == RULES[7]
    tested = better_rule.test_grid(RULES[7])
    assert {t.backbone.data for t in tested}.isdisjoint(better_rule.SEARCHED)
    assert {t.backbone.seed for t in tested} == set(range(24))
    found = better_rule.analyse(archive)
    assert [len(some) for some in found["rounds"]] == [48, 16, 5]
    assert found["pooled"]["winner"]["trials"] == 72
    assert better_rule.is_recommended(found)
    assert better_rule.overview(found).verdict == "helps; recommended"
    assert "all 72 pairs" in better_rule.table(found)
    assert better_rule.merged_table(found).count(" 12.50 %") == 3
    text = better_rule.search_table(archive)
    assert text.count("\n| 1, ") == 5 and text.count("\n| 3, ") == 5 and "| 3, 8 | " in text
    keeps = better_rule.QUESTION.keeps_scores
    assert all(map(keeps, tested))
    assert not any(keeps(t) for t in better_rule.later(archive) if t not in tested)
    better_rule.figure(found)

    same = better_rule.analyse(complete({7: 0.02}))
    assert not better_rule.is_recommended(same)
    assert better_rule.overview(same).verdict.endswith("not recommended")


def test_nothing_of_the_test_is_looked_at_before_all_of_it_is_stored():
    archive = complete({7: 0.02})
    last = better_rule.test_grid(RULES[7])[-1]
    records = {one: row for one, row in archive.records.items() if one != last.hash}
    found = better_rule.analyse(Archive(records, archive.arrays, archive.labels))
    assert found["planned"] - found["stored"] == 1 and "pooled" not in found
    assert len(with_dependencies(better_rule.test_grid(RULES[7]))) == found["planned"]
