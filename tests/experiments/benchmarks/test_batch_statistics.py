"""The command that measures re-estimated batch statistics."""

import itertools
import json
from pathlib import Path

import pytest

from experiments.benchmarks import batch_statistics


@pytest.fixture
def trained(monkeypatch):
    """Commands of the trainings, which are replaced by runs with made-up results."""
    commands = []

    def run(command):
        commands.append(" ".join(command))
        options = dict(itertools.pairwise(command))
        value = 0.5 + 0.25 * (options["--recompute-batch-stats"] == "all")
        stages = [
            {"test": {"auc": value - step, "acc": value + step}, "merged": [8, 2]}
            for step in (0.0, 0.125)
        ]
        folder = Path(options["--output"])
        folder.mkdir(parents=True)
        arms = {arm: stages for arm in ("backbone", "finetune", "inmerge")}
        (folder / "results.json").write_text(json.dumps({"arms": arms}))

    monkeypatch.setattr(batch_statistics, "run_trainer", run)
    return commands


def test_each_run_is_trained_once_and_means_are_stored(trained, tmp_path, capsys):
    output = tmp_path / "found.json"
    arguments = ["--data-dir", "data", "--work", str(tmp_path / "work"), "--output", str(output)]
    assert batch_statistics.main(arguments) == 0
    assert len(trained) == len(set(trained)) == 8
    assert sum("--threshold -1 --arms finetune inmerge" in command for command in trained) == 4
    assert batch_statistics.main(arguments) == 0 and len(trained) == 8
    rows = json.loads(output.read_bytes())["rows"]
    assert [(row["data"], row["arm"], row["rule"]) for row in rows[:4]] == [
        ("breastmnist", "backbone", "harsh"),
        ("breastmnist", "finetune", "harsh"),
        ("breastmnist", "inmerge", "harsh"),
        ("breastmnist", "inmerge", "paper"),
    ]
    assert rows[2]["off"] == {"auc": 0.4375, "acc": 0.5625} and rows[2]["merged"] == 10
    assert rows[2]["all"] == {"auc": 0.6875, "acc": 0.8125} and "merged" not in rows[0]
    assert "| BreastMNIST | inmerge, threshold -1 | 10 | 0.438, 0.562 | 0.688, 0.812 |" in (
        capsys.readouterr().out
    )
