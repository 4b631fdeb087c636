import json

import numpy as np
import pytest

from experiments import cost


@pytest.mark.long
def test_the_memory_of_the_process_that_asks_does_not_count():
    config = cost.CostConfig(width=0.05, batch_size=8, epochs=1)
    ballast = np.ones(3 * 2**27)
    found = cost.run_arm(config, "vgg11", "backbone")
    assert found["peak_bytes"] < ballast.nbytes


def row(seconds=1.0):
    one = {"epoch": seconds, "epoch_low": seconds, "epoch_high": seconds}
    figures = {**one, "compile": 2.0, "peak_bytes": 2**20, "merged": 3}
    ratio = {"median": 1.0, "low": 1.0, "high": 1.0}
    around = {
        "started": "2026-01-01T00:00:00+00:00",
        "cpus": 2,
        "git": {"commit": "a" * 40, "dirty": False},
        "packages": {"jax": "0.0"},
    }
    return dict.fromkeys(cost.ARMS, figures) | {
        "ratio": ratio,
        "environment": around,
        "seconds": 6.0,
    }


def stored(results):
    return json.loads((results / "study/cost.json").read_bytes())


def test_a_network_is_stored_as_it_is_done_and_not_measured_again(tmp_path, monkeypatch):
    measured = []

    def measure(config, model):
        if model == "resnet18" and not measured.count("resnet18"):
            measured.append(model)
            raise KeyboardInterrupt
        measured.append(model)
        return row(float(len(measured)))

    monkeypatch.setattr(cost, "measure", measure)
    wanted = ["--models", "vgg16", "resnet18", "vgg11"]
    with pytest.raises(KeyboardInterrupt):
        cost.main(wanted, tmp_path)
    assert list(stored(tmp_path)["analysis"]["models"]) == ["vgg16"]
    cost.main(wanted, tmp_path)
    assert measured == ["vgg16", "resnet18", "resnet18", "vgg11"]
    answer = stored(tmp_path)
    assert list(answer["analysis"]["models"]) == ["vgg16", "resnet18", "vgg11"]
    assert (answer["finished"], answer["planned"]) == (27, 54)
    assert answer["command"].endswith(" vgg16 vgg19 resnet18 resnet50 densenet121 vgg11")
    cost.main(["--models", "vgg16", "--overwrite"], tmp_path)
    assert stored(tmp_path)["analysis"]["models"]["vgg16"]["finetune"]["epoch"] == 5.0
    cost.main(["--models", "vgg16", "--rounds", "2"], tmp_path)
    assert list(stored(tmp_path)["analysis"]["models"]) == ["vgg16"]
    assert stored(tmp_path)["command"] == "python -m experiments.cost --rounds 2"


def test_a_network_that_there_is_not_is_named_before_anything_runs(tmp_path, capsys):
    assert cost.main(["--models", "vgg16", "vgg15"], tmp_path) == 2
    assert "--models vgg15" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_each_arm_is_timed_in_a_process_of_its_own():
    config = cost.CostConfig(models=("vgg11",), width=0.05, batch_size=8, epochs=2, rounds=1)
    found = {"config": config.options, "models": {"vgg11": cost.measure(config, "vgg11")}}
    vgg11 = found["models"]["vgg11"]
    assert vgg11["inmerge"]["merged"] > 0 == vgg11["finetune"]["merged"]
    for arm in cost.ARMS:
        one = vgg11[arm]
        assert 0 < one["epoch_low"] <= one["epoch"] <= one["epoch_high"] < 60
        assert one["compile"] > 0.05
        assert 100 * 2**20 < one["peak_bytes"] < 3 * 2**30
    assert vgg11["ratio"]["low"] == vgg11["ratio"]["median"] == vgg11["ratio"]["high"] > 0
    assert "vgg11" in cost.came_out(found) and "1 pair" in cost.sure(found)
    (table,) = cost.tables(found)
    assert len(table.rows) == 3 == len(table.kinds)
    (plot,) = cost.figures(found)
    assert plot.svg.startswith("<svg")
