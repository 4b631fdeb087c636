"""Cells that are trained again: which, and what is said of them."""

import dataclasses
import json

import numpy as np

from experiments.study import reproduce, runner, store
from experiments.study.all_questions import QUESTIONS
from experiments.study.cells import Backbone, Cell
from experiments.study.stages import Places

CONFIG = reproduce.AgainConfig()
DRAWING = {name: getattr(CONFIG, name) for name in ("seed", "count", "limit")}

CELLS = [Cell(Backbone("phantom", "vgg11", 1, 1, 0.1))]


def test_cells_of_every_question_that_trains_are_drawn():
    for question in QUESTIONS:
        cells = reproduce.drawn(question, CONFIG)
        assert bool(cells) == bool(question.cells) and len(cells) <= CONFIG.count
        kinds = {(c.backbone.data, c.backbone.model, c.backbone.optimizer) for c in cells}
        assert len(kinds) == len(cells)
        for cell in cells:
            assert reproduce.seconds(cell) <= CONFIG.limit or len(cells) == 1
        assert len(reproduce.drawn(question, dataclasses.replace(CONFIG, limit=0))) <= 1


def test_another_seed_draws_other_cells():
    two = dataclasses.replace(CONFIG, count=2)
    first, other = (
        [reproduce.drawn(one, dataclasses.replace(two, seed=seed)) for one in QUESTIONS]
        for seed in (0, 1)
    )
    assert first != other and max(map(len, first)) == 2


def test_a_cell_is_compared_with_what_is_kept(tmp_path, monkeypatch):
    cell = Cell(Backbone("phantom", "vgg11", 0, 1, 0.1))
    places = Places(tmp_path, tmp_path / "runs", tmp_path / "results")
    runner.run_cells([cell], places, keep=lambda c: store.keep(c, places))
    monkeypatch.setattr(reproduce, "all_drawn", lambda config: [cell, *CELLS])
    for name in ("read", "read_test_scores"):
        inner = getattr(store, name)
        monkeypatch.setattr(store, name, lambda c, inner=inner: inner(c, places.kept))
    row = reproduce.compared(cell, [places, places])
    assert row["between_them"] == row["from_kept"] == 0 and len(set(row["auc"])) == 1
    assert reproduce.markdown({**DRAWING, "rows": [row]}).count("nothing, bit for bit") == 2
    left = reproduce.markdown({**DRAWING, "rows": [row]}).splitlines()[-1]
    assert left == f"Drawn, and not trained again yet: {CELLS[0].name}."
    scores = store.read_test_scores(cell)
    np.savez(places.kept / f"{cell.hash}.npz", scores=scores + np.float32(0.25))
    row = reproduce.compared(cell, [places, places])
    assert row["between_them"] == 0 and 0.24 < row["from_kept"] < 0.26
    assert "| nothing, bit for bit | 2.5e-01 |" in reproduce.markdown({**DRAWING, "rows": [row]})


def test_rows_of_another_drawing_are_not_taken_for_this_ones(tmp_path, capsys):
    path = tmp_path / "reproduce.json"
    path.write_text(json.dumps({"seed": 0, "count": 3, "limit": CONFIG.limit, "rows": []}))
    assert reproduce.main(["--output", str(path)]) == 2
    assert "has cells of --count 3, not 1" in capsys.readouterr().err
