import json

import pytest

from experiments import fidelity

TRAIN = "--devices 1 --cache None --skip 11 --phantom.train 16 --phantom.val 5 --phantom.test 12"


def options(folder, *more):
    return [
        *"--data phantom --epochs 1 --merging-epochs 1 --batch-size 8 --width 0.05".split(),
        *"--size 16 --threshold -1 --learning-rate 0.001".split(),
        *("--output", str(folder / "runs"), "--result", str(folder / "fidelity.json")),
        *(f"--train-options={TRAIN}", *more),
    ]


def test_it_counts_merges_of_both_presets_and_goes_on_where_it_stopped(tmp_path, capsys):
    assert fidelity.main(options(tmp_path)) == 0
    stored = json.loads((tmp_path / "fidelity.json").read_text())
    paper, released = stored["paper"], stored["released"]
    assert paper["training_passes"] == released["training_passes"] == [2]
    assert paper["validation_passes"] == [0] and released["validation_passes"] == [5]
    assert paper["training_merges"][0] > 0 and paper["validation_merges"] == [0]
    assert released["validation_merges"][0] > released["training_merges"][0] > 0
    assert (paper["rule"]["partner"], released["rule"]["partner"]) == ("nearest", "random")
    printed = capsys.readouterr().out
    assert fidelity.table(stored) in printed
    assert f"| 5 | {released['validation_merges'][0]} | " in fidelity.table(stored)

    before = (tmp_path / "runs" / "paper" / "results.json").stat().st_mtime_ns
    assert fidelity.main(options(tmp_path)) == 0
    assert (tmp_path / "runs" / "paper" / "results.json").stat().st_mtime_ns == before
    assert fidelity.main(options(tmp_path, "--epochs", "2")) == 2
    assert "other options" in capsys.readouterr().err


def test_unknown_options_end_with_status_2():
    with pytest.raises(SystemExit) as stop:
        fidelity.main(["--no-such-option"])
    assert stop.value.code == 2
