"""The simulation of the protocol's verdict."""

import numpy as np

from experiments.study import power, statistics
from experiments.study.questions import pretrained


def test_a_simulated_verdict_is_that_of_the_analysis(monkeypatch):
    monkeypatch.setattr(statistics, "_FLIPS", 4000)
    rng, same = np.random.default_rng(1), 0
    pairs = rng.normal(0, 0.012, (40, 3, 5, 16))
    pairs[:, 0] += rng.normal(0.004, 0.003, (40, 5, 1))
    found = power._verdicts(pairs)
    assert len(set(found.tolist())) > 1
    for run, verdict in zip(pairs, found, strict=True):
        rows = [
            {
                "auc": statistics.over_trials(arm.ravel()),
                "mixed": statistics.mixed_model({str(n): some for n, some in enumerate(arm)}),
            }
            for arm in run
        ]
        for kind in ("auc", "mixed"):
            statistics.add_holm([row[kind] for row in rows], pretrained.LEVEL)
        same += pretrained.conclusion(rows[0]) == power._VERDICTS[verdict]
    assert same >= 39  # Sign flips are no t tests.


def test_a_simulated_verdict_of_question_4_is_that_of_the_analysis(monkeypatch):
    monkeypatch.setattr(statistics, "_FLIPS", 20_000)
    monkeypatch.setattr(power, "RUNS", 40)
    found = power.in_the_test(24, 0.005, np.random.default_rng(1))
    auc = np.random.default_rng(1).normal(0, power.SD / np.sqrt(2), (40, 3, 72))
    auc[:, 1] += 0.005
    assert len(set(found.tolist())) > 1
    same = 0
    for (base, first, second), verdict in zip(auc, found, strict=True):
        rows = [statistics.over_trials(arm - base) for arm in (first, second)]
        statistics.add_holm(rows)
        same += statistics.verdict(rows[0]) == power._VERDICTS[verdict]
    assert same >= 39  # Sign flips are no t tests.


def test_shares_of_verdicts_add_up():
    lines = power.table([(0.0, 0.0), (0.02, 0.0)]).splitlines()
    shares = [[float(x) for x in line.replace("%", "").split("|")[2:-1]] for line in lines[2:]]
    assert all(abs(sum(row[:4]) - 100) < 2 for row in shares)
    assert shares[0][2] > 80 and shares[1][0] == 100
