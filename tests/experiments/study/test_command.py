"""A question's command line, from nothing to an answer that names what it lacks."""

import dataclasses
import json

import pytest

from experiments.study import command, store
from experiments.study.cells import Backbone, Cell, Treatment
from experiments.study.question import Question
from inmerge_jax.reporting.tables import Table
from inmerge_jax.training import environment

START = Backbone("phantom", "vgg11", 0, 1, 0.05)
CELLS = (
    Cell(START, "finetune", 1),
    Cell(START, "inmerge", 1, treatment=Treatment("merge", threshold=-1.0)),
)


def analyse(kept):
    (group,) = kept.groups().values()
    return {"group": group.compare((("inmerge", "finetune"),), resamples=9, permutations=9)}


def table_of_arms(found):
    rows = tuple((arm,) for arm in found["group"]["arms"])
    return [Table("t", ("arm",), rows, tuple("arm" for _ in rows))]


QUESTION = Question(
    name="medmnist",
    number=1,
    title="A title",
    asked="What?",
    cells=CELLS,
    analyse=analyse,
    came_out=lambda found: f"seeds {found['group']['over']['finetune']}",
    sure=lambda found: "not at all",
    tables=table_of_arms,
    figures=lambda found: [],
)


@pytest.fixture
def options(tmp_path, monkeypatch):
    # Not the folder of whoever runs the tests.
    monkeypatch.setattr(environment, "enable_compilation_cache", lambda: None)
    return ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]


def run(options, *more):
    return command.main(QUESTION, [*options, *more])


@pytest.mark.long
def test_from_nothing_to_an_answer(options, tmp_path, capsys):
    assert run(options, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "3 of 3 cells are left" in text and "chest phantom" in text and CELLS[0].hash in text
    assert not (tmp_path / "runs").exists()

    assert run(options, "--analyse") == 2
    assert "no cell is finished yet" in capsys.readouterr().err

    assert run(options, "--minutes", "0.000001") == 2
    assert run(options) == 0
    text = capsys.readouterr().out
    assert "What came out: seeds [0]" in text and "not complete" not in text
    stored = json.loads((tmp_path / "results" / "study" / "medmnist.json").read_bytes())
    assert stored["finished"] == stored["planned"] == 3
    assert str(tmp_path) not in json.dumps(stored)

    (tmp_path / "results" / "cells" / f"{CELLS[1].hash}.json").unlink()
    assert run(options, "--analyse") == 0
    assert "2 cells of 3 that are planned: this answer is not complete" in (
        " ".join(capsys.readouterr().out.split())
    )


@pytest.mark.long
def test_one_cell_again(options, tmp_path, capsys):
    assert run(options, "--only", CELLS[1].hash) == 0
    assert "none is kept" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    assert run(options) == 0
    again = ["--output", str(tmp_path / "again"), *options[2:], "--only", CELLS[1].hash]
    assert run(again) == 0
    auc = store.read(CELLS[1], tmp_path / "results" / "cells")["result"]["test"]["auc"]
    assert f"test AUC {auc:.6f}; {auc:.6f} is kept" in capsys.readouterr().out

    path = tmp_path / "results" / "cells" / f"{CELLS[1].hash}.json"
    record = json.loads(path.read_text())
    record["result"]["test"]["auc"] += 0.1
    path.write_text(json.dumps(record))
    assert run(again) == 1


def test_help_and_bad_input(options, capsys):
    with pytest.raises(SystemExit) as end:
        run(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "--dry-run" in text and "What?" in text
    assert run(options, "--only", "0000") == 2
    assert "--only 0000: medmnist has no cell of that hash" in capsys.readouterr().err
    assert run(options, "--data", "breast") == 2
    assert "--data breast: medmnist has none of these; it has phantom" in capsys.readouterr().err
    assert run(options, "--models", "vgg11", "resnet") == 2
    assert "--models resnet: medmnist has none of these; it has vgg11" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(["--parallel", "nothing"])


def test_cells_are_chosen_by_data_network_and_seed():
    grid = tuple(
        Cell(Backbone(data, model, seed, 1))
        for data in ("phantom", "breastmnist")
        for model in ("vgg11", "resnet18")
        for seed in (0, 1)
    )
    question = dataclasses.replace(QUESTION, cells=grid)

    def found(**options):
        cells = command.chosen(question, command.StudyConfig(**options))
        return {(c.backbone.data, c.backbone.model, c.backbone.seed) for c in cells}

    assert len(found()) == 8
    assert found(data=("phantom",), seeds=1) == {("phantom", m, 0) for m in ("vgg11", "resnet18")}
    assert found(models=("resnet18",), data=("phantom", "breastmnist"), seeds=1) == {
        (data, "resnet18", 0) for data in ("phantom", "breastmnist")
    }
