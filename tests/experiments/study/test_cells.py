import dataclasses

import pytest

from experiments.study.all_questions import QUESTIONS
from experiments.study.cells import Backbone, Cell, Treatment, with_backbones

START = Backbone("phantom", "vgg11", 0, 2, 0.1)


def test_the_hash_is_that_of_what_decides_the_result():
    cell = Cell(START, "inmerge", 3, treatment=Treatment("merge"))
    assert len(cell.hash) == 10
    assert dataclasses.replace(cell, arm="another name").hash == cell.hash
    for changed in (
        dataclasses.replace(cell, epochs=4),
        dataclasses.replace(cell, learning_rate=1e-3),
        dataclasses.replace(cell, treatment=Treatment("noise")),
        *(
            dataclasses.replace(cell, treatment=dataclasses.replace(cell.treatment, **other))
            for other in (
                {"alpha": 0.5},
                {"threshold": 0.1},
                {"quantile": 0.5},
                {"partner": "random"},
                {"skip": 3},
                {"every": 0},
                {"probability": 0.1},
            )
        ),
        *(
            dataclasses.replace(cell, backbone=dataclasses.replace(START, **other))
            for other in ({"seed": 1}, {"width": 0.2}, {"optimizer": "sgd"}, {"epochs": 3})
        ),
    ):
        assert changed.hash != cell.hash


def test_what_has_no_effect_does_not_change_the_hash():
    plain = Cell(START, "finetune", 3)
    assert dataclasses.replace(plain, treatment=Treatment(alpha=0.1)).hash == plain.hash
    adaptive = Cell(START, "a", 3, treatment=Treatment("merge", quantile=0.5))
    other = dataclasses.replace(
        adaptive, treatment=dataclasses.replace(adaptive.treatment, threshold=0.9)
    )
    assert other.hash == adaptive.hash
    whole = dataclasses.replace(START, width=1)
    assert Cell(whole).hash == Cell(dataclasses.replace(START, width=1.0)).hash
    named = dataclasses.replace(START, learning_rate=START.rate)
    assert Cell(named).hash == Cell(START).hash


def test_the_hash_is_the_same_in_every_process_and_version():
    assert Cell(START).hash == "1ae1ea816c"
    assert Cell(START, "x", 3, treatment=Treatment("merge")).hash == "667f8d2367"


def test_backbones_come_first_and_once():
    cells = [Cell(START, "a", 1), Cell(START, "b", 2), Cell(START), Cell(START, "c", 1)]
    assert [cell.arm for cell in with_backbones(cells)] == ["backbone", "a", "b"]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)
def test_a_grids_arms_are_told_apart_by_name(question):
    seen = {}
    for cell in with_backbones(question.cells):
        key = (cell.backbone, cell.arm)
        assert seen.setdefault(key, cell.hash) == cell.hash


def test_a_small_stem_is_not_named_so_that_older_hashes_stand():
    start = Backbone("chestxray14", "vgg16", 0, 4)
    assert Cell(start).hash == "9927e1e683"
    other = Cell(dataclasses.replace(start, stem="imagenet"))
    assert other.hash != Cell(start).hash
    assert other.described()["backbone"]["stem"] == "imagenet"
