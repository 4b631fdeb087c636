import json

import numpy as np
import pytest

from experiments.study.questions import cost
from inmerge_jax.errors import UsageError


@pytest.mark.long
def test_the_memory_of_the_process_that_asks_does_not_count():
    config = cost.CostConfig(width=0.05, batch_size=8, updates=2)
    ballast = np.ones(3 * 2**27)
    found = cost.run(config, "vgg11", ("backbone",), config.updates)
    assert found["peak_bytes"] < ballast.nbytes


def row(seconds=1.0):
    figures = {"compile": seconds, "peak_bytes": 2**20, "merged": 3}
    return dict.fromkeys(cost.ARMS, figures) | {"environment": around(), "seconds": 6.0}


def times(limit=90, factor=(2.0,) * 12):
    plain = np.linspace(1, 2, 12)
    updates = {arm: plain.tolist() for arm in cost.ARMS}
    updates["inmerge"] = (plain * factor).tolist()
    return {"limit": limit, "updates": updates, "environment": around(), "seconds": 1.0}


def around():
    return {
        "started": "2026-01-01T00:00:00+00:00",
        "cpus": 2,
        "git": {"commit": "a" * 40, "dirty": False},
        "packages": {"jax": "0.0"},
    }


def stored(results):
    return json.loads((results / "cost.json").read_bytes())


def test_a_network_is_stored_when_it_is_finished_and_not_measured_again(tmp_path, monkeypatch):
    measured = []

    def measure(config, model):
        if model == "resnet18" and not measured.count("resnet18"):
            measured.append(model)
            raise KeyboardInterrupt
        measured.append(model)
        return row(float(len(measured)))

    monkeypatch.setattr(cost, "measure", measure)
    monkeypatch.setattr(cost, "measure_time", lambda config, model: times(config.limit))
    where = ["--results", str(tmp_path)]
    wanted = [*where, "--models", "vgg16", "resnet18", "vgg11"]
    with pytest.raises(KeyboardInterrupt):
        cost.main(wanted)
    assert list(stored(tmp_path)["models"]) == ["vgg16"]
    cost.main(wanted)
    assert measured == ["vgg16", "resnet18", "resnet18", "vgg11"]
    assert list(stored(tmp_path)["models"]) == ["vgg16", "resnet18", "vgg11"]
    cost.main([*where, "--models", "vgg16", "--overwrite"])
    assert stored(tmp_path)["models"]["vgg16"]["finetune"]["compile"] == 5.0
    cost.main([*where, "--models", "vgg16", "--limit", "9"])
    assert stored(tmp_path)["models"]["vgg16"]["time"]["limit"] == 9 and len(measured) == 5
    cost.main([*where, "--models", "vgg16", "--rounds", "2"])
    assert list(stored(tmp_path)["models"]) == ["vgg16"]


def test_an_unknown_network_is_named_before_anything_runs(tmp_path):
    with pytest.raises(UsageError, match="--models vgg15: unknown"):
        cost.main(["--results", str(tmp_path), "--models", "vgg16", "vgg15"])
    assert not list(tmp_path.iterdir())


def test_the_ratio_is_of_updates_that_are_neighbours():
    slow = row() | {"time": times()}
    assert cost.ratio(slow, "inmerge") == pytest.approx((2, 2, 2))
    assert cost.ratio(slow, "backbone") == pytest.approx((1, 1, 1))
    noisy = row() | {"time": times(factor=[0.5, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.6, 1.7, 1.8, 2, 9])}
    # The third and the tenth of twelve: 0.5 to the 12th times 1 + 12 + 66 is 0.019 below each.
    assert cost.ratio(noisy, "inmerge") == pytest.approx((1.4, 1.0, 1.8))


@pytest.mark.long
def test_each_arm_is_measured_in_a_process_of_its_own_and_timed_in_one():
    config = cost.CostConfig(("vgg11",), width=0.05, batch_size=8, updates=4, rounds=1, limit=1)
    measured = cost.measure(config, "vgg11") | {"time": cost.measure_time(config, "vgg11")}
    assert measured["inmerge"]["merged"] > 0 == measured["finetune"]["merged"]
    for arm in cost.ARMS:
        updates = measured["time"]["updates"][arm]
        assert len(updates) >= 16 and all(0 < seconds < 60 for seconds in updates)
        assert measured[arm]["compile"] > 0.05
        assert 100 * 2**20 < measured[arm]["peak_bytes"] < 3 * 2**30
