import copy
import json
import os
import subprocess
import sys

import pytest

from experiments import tables
from experiments.benchmarks.timing import machine
from experiments.reliability import soak

ROW = {
    "resident_mb": 1000.0,
    "workers_mb": 500.0,
    "processes": 2,
    "programs": 16,
    "threads": 17,
    "files": 7,
    "tensorstore_threads": 5,
}


def rows(change=None, at=12):
    found = [{"steps": 100 * index, **ROW} for index in range(1, 21)]
    if change:
        found[at] |= change
    return found


@pytest.mark.long
def test_a_short_one_measures_every_evaluation(tmp_path):
    # One evaluation more than the warm-up; on 48 steps memory has not settled, so no verdict.
    config = soak.SoakConfig(48, every=8, batch_size=8, model="vgg11", skip=6, width=0.05)
    found = soak.soak(config, tmp_path)
    assert [row["steps"] for row in found] == [8, 16, 24, 32, 40, 48]
    assert len({row["programs"] for row in found[1:]}) == 1 and found[0]["programs"] > 1
    assert all(row["resident_mb"] > 50 and row["files"] > 2 for row in found)
    assert soak.judge(found)["grown"]["programs"] == 0


def test_what_is_flat_passes():
    assert soak.judge(rows())["passed"]
    assert soak.judge(rows({"programs": 9, "resident_mb": 100.0}, at=0))["passed"], "the warm-up"
    assert soak.judge(rows({"threads": 16}))["passed"]
    assert soak.judge(rows({"workers_mb": 13.0}, at=19))["passed"], "they end with the last batch"


@pytest.mark.parametrize(
    "change",
    [
        {"programs": 17},
        {"threads": 18},
        {"files": 8},
        {"resident_mb": 1051.0},
        {"resident_mb": 949.0},
        {"workers_mb": 526.0},
        {"processes": 3},
        {"tensorstore_threads": soak.POOL_LIMIT + 1},
    ],
)
def test_every_growth_is_noticed(change):
    options = {"data_dir": "here", "workers": 2, "batch_size": 6}
    stored = {"options": options, "rows": rows(change), "verdict": soak.judge(rows(change))}
    stored["environment"] = machine()
    assert not stored["verdict"]["passed"] and "**Not passed**" in soak.markdown(stored)
    good = copy.deepcopy(stored) | {"verdict": soak.judge(rows())}
    assert "Passed" in soak.markdown(good)


def test_without_workers_there_is_nothing_to_say_of_them():
    none = [row | {"workers_mb": 0.0, "processes": 0} for row in rows()]
    verdict = soak.judge(none)
    assert verdict["passed"] and list(verdict["memory"]) == ["resident_mb"]
    options = {"data_dir": None, "workers": 0, "batch_size": 16}
    stored = {"options": options, "rows": none, "verdict": verdict, "environment": machine()}
    assert "worker" not in soak.markdown(stored)


def test_children_are_counted_until_they_were_waited_for():
    before = len(soak._children())
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert child.pid in soak._children() and len(soak._children()) == before + 1
    assert soak._resident_mb(child.pid) == 0
    child.wait()
    assert child.pid not in soak._children()


def test_workers_and_too_few_images_are_refused(tmp_path, capsys):
    assert soak.main(["--workers", "2", "--output", str(tmp_path / "soak.json")]) == 2
    assert "add --data-dir" in capsys.readouterr().err
    few = ["--steps", "500", "--output", str(tmp_path / "soak.json")]
    assert soak.main(few) == 2
    assert "5 evaluations, of which the first 5 are the warm-up" in capsys.readouterr().err
    for wrong, said in (("--every 0", "--every 0: choose 1 or more"), ("--skip 99", "--skip 99")):
        small = "--steps 60 --every 10 --batch-size 2".split()
        assert soak.main([*small, *wrong.split(), "--output", str(tmp_path / "soak.json")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "soak.json").exists()


@pytest.mark.parametrize("name", ["soak", "soak_shards"])
def test_the_stored_ones_passed(name):
    stored = json.loads((tables.RESULTS / f"{name}.json").read_bytes())
    assert stored["verdict"] == json.loads(json.dumps(soak.judge(stored["rows"])))
    assert stored["verdict"]["passed"]
