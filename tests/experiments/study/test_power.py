"""The simulation of the protocol's verdict."""

import numpy as np
import pytest

from experiments.study import archive, power, statistics
from experiments.study.questions import pretrained
from tests.experiments.study import test_pretrained


@pytest.mark.parametrize("others", [16, 8])
def test_a_simulated_verdict_is_that_of_the_analysis(monkeypatch, others):
    monkeypatch.setattr(statistics, "_FLIPS", 4000)
    rng, same = np.random.default_rng(1), 0
    pairs = rng.normal(0, 0.012, (40, 3, 5, 16))
    pairs[:, 0] += rng.normal(0.004, 0.003, (40, 5, 1))
    paper, more = pairs[:, :1], pairs[:, 1:, :, :others]
    found = power._verdicts(paper, more, pretrained.LEVEL)
    assert len(set(found.tolist())) > 1
    for one, rest, verdict in zip(paper, more, found, strict=True):
        rows = [
            {
                "auc": statistics.over_trials(arm.ravel()),
                "mixed": statistics.mixed_model({str(n): some for n, some in enumerate(arm)}),
            }
            for arm in (*one, *rest)
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
    lines = power.table({"": power.PLANNED}, [(0.0, 0.0), (0.02, 0.0)]).splitlines()
    shares = [[float(x) for x in line.replace("%", "").split("|")[2:-1]] for line in lines[2:]]
    assert all(abs(sum(row[:4]) - 100) < 2 for row in shares)
    assert shares[0][2] > 80 and shares[1][0] == 100
    # So large an effect is found at the first look.
    assert shares[0][4] > 100 and shares[1][4] == 80


def test_more_looks_decide_more_with_the_spread_of_the_pairs(monkeypatch):
    monkeypatch.setattr(power, "RUNS", 500)
    two, four, wider = power.designs(archive.read()).values()
    assert four.looks == (16, 32, 48, 64) and four.others == 16 and four.level == 0.0125
    undecided = []
    for design in (two, four, wider):
        looks = power.simulated(design, 0.0, 0.0, np.random.default_rng(0))
        undecided.append((np.stack(looks) == 0).all(0).mean())
    assert undecided[1] < undecided[0] - 0.1 and undecided[1] < undecided[2] - 0.1


def test_further_looks_start_from_the_stored_pairs(monkeypatch):
    monkeypatch.setattr(power, "RUNS", 200)
    stored = archive.read()
    looks = power.further(stored)
    assert len(looks) == len(pretrained.LOOKS)
    paper = pretrained.analyse(stored)["pooled"]["paper"]
    verdict = power._VERDICTS.index(pretrained.conclusion(paper))
    assert (looks[0] == verdict).all()  # The first look is known.
    assert f"| 16 seeds, 80 pairs | {'0.0 % | ' * 3}100.0 % |" in power.further_table(stored)


def test_each_look_is_that_of_its_seeds(monkeypatch):
    monkeypatch.setattr(power, "RUNS", 200)
    design = power.Design((0.03, 0.02, 0.01, 0.01, 0.0), (16, 32), 16, 0.0125)
    looks = power.simulated(design, 0.004, 0.001, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    auc = rng.normal(0, np.array(design.spread)[:, None] / np.sqrt(2), (200, 4, 5, 32))
    auc[:, 1] += rng.normal(0.004, 0.001, (200, 5, 1))
    pairs = auc[:, 1:] - auc[:, :1]
    for seeds, found in zip((16, 32), looks, strict=True):
        own = power._verdicts(pairs[:, :1, :, :seeds], pairs[:, 1:, :, :16], 0.0125)
        np.testing.assert_array_equal(found, own)
    assert (looks[0] != looks[1]).any()


def test_the_spread_does_not_depend_on_the_sign_of_an_effect():
    trials = pretrained.selection_grid()
    stored = test_pretrained.stored(trials, val=test_pretrained.BEST)
    grid = pretrained.comparison_grid(stored)
    archived = test_pretrained.stored((*trials, *grid), val=test_pretrained.BEST)
    for trial in grid:
        if trial.arm == "paper":
            seed = trial.backbone.seed
            gap = 0.01 * (-1) ** seed if seed in power.SPREAD_SEEDS else 1.0
            archived.records[trial.hash]["result"]["test"]["auc"] += gap
    found = power.spread(archived)
    assert found == pytest.approx(dict.fromkeys(pretrained.RECIPES, 0.01))
    assert "| all | 0.0100 |" in power.spread_table(archived)
