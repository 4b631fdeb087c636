"""Cells on the phantom: trained, kept, skipped, resumed to the same bits, several at a time."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.study import command, runner, stages, store
from experiments.study.cells import Backbone, Cell, Treatment
from experiments.study.question import Kept, Question, add_holm
from inmerge_jax.errors import UsageError
from inmerge_jax.training.preemption import TrainingInterrupted
from inmerge_jax.training.train import NonFiniteLossError
from inmerge_jax.training.workdir import lock

START = Backbone("phantom", "vgg11", 0, 2, 0.1)
MERGE = Treatment("merge", threshold=-1.0, skip=4)
CELLS = (
    Cell(START),
    Cell(START, "finetune", 2),
    Cell(START, "in.merge", 2, treatment=MERGE),
    Cell(START, "ema", 2, treatment=Treatment("ema", decay=0.9)),
    Cell(START, "decay", 2, treatment=Treatment("decay", decay=0.5)),
)
PAIRS = (("in.merge", "finetune"), ("finetune", "backbone"))


def run(cells, places, **rest):
    runner.run_cells(cells, places, **rest)
    return {c.arm: runner.read_result(places.cell(c)) for c in cells if runner.finished(c, places)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    places = stages.Places(tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("study"))
    return places, run(CELLS, places)


def weights(places, cell):
    _, _, state = stages.best_state(cell, places)
    return [leaf.tobytes() for leaf in jax.tree.leaves(state)]


def test_every_cell_has_its_result(trained):
    places, results = trained
    assert list(results) == [cell.arm for cell in CELLS]
    assert sum(results["in.merge"]["merged"]) > 0
    assert results["finetune"]["merged"] == []
    losses = {
        arm: [json.loads(line)["train_loss"] for line in open(places.cell(c) / "metrics.jsonl")]
        for arm, c in zip(results, CELLS, strict=True)
    }
    assert losses["ema"] == losses["finetune"] != losses["in.merge"]
    assert losses["decay"][-1] != losses["finetune"][-1]
    assert results["ema"]["val"] != results["finetune"]["val"] or (
        json.loads((places.cell(CELLS[3]) / "metrics.jsonl").read_text().splitlines()[0])
        != json.loads((places.cell(CELLS[1]) / "metrics.jsonl").read_text().splitlines()[0])
    )


@pytest.mark.long
def test_a_kept_cell_is_not_trained_again_and_a_missing_backbone_is(trained, tmp_path):
    places, _ = trained
    kept = tmp_path / "cells"
    for cell in CELLS[:2]:
        store.keep(cell, dataclasses.replace(places, results=kept.parent))
    elsewhere = stages.Places(places.data, tmp_path / "study")

    def is_kept(cell):
        return store.read(cell, kept) is not None

    run(CELLS[:2], elsewhere, kept=is_kept)
    assert not (elsewhere.output / "cells").exists()
    done = []
    run(CELLS[:3], elsewhere, kept=is_kept, keep=done.append)
    assert [cell.arm for cell in done] == ["in.merge"]
    assert runner.finished(CELLS[0], elsewhere) and not runner.finished(CELLS[1], elsewhere)
    same = [runner.read_result(p.cell(CELLS[2]))["test"] for p in (places, elsewhere)]
    assert same[0] == same[1]
    record = store.read(CELLS[0], kept)
    assert record["result"]["test"] == runner.read_result(places.cell(CELLS[0]))["test"]
    assert not any(str(tmp_path) in path.read_text() for path in kept.rglob("*.json"))


def test_stopped_and_resumed_is_the_same(trained, tmp_path):
    places, _ = trained
    elsewhere = stages.Places(places.data, tmp_path)
    shutil.copytree(places.cell(CELLS[0]), elsewhere.cell(CELLS[0]))
    calls = iter(range(10**6))
    with pytest.raises(TrainingInterrupted):
        run(CELLS[2:3], elsewhere, should_stop=lambda: next(calls) > 6)
    assert not runner.finished(CELLS[2], elsewhere)
    run(CELLS[2:3], elsewhere)
    assert weights(places, CELLS[2]) == weights(elsewhere, CELLS[2])
    one, two = (json.loads((p.cell(CELLS[2]) / "result.json").read_bytes()) for p in
                (places, elsewhere))  # fmt: skip
    assert one["test"] == two["test"] and one["merged"] == two["merged"]


def test_a_cell_that_another_process_trains_is_left_to_it(tmp_path):
    places = stages.Places(tmp_path, tmp_path)
    with lock(places.cell(CELLS[0])), pytest.raises(UsageError, match="is in use: process"):
        runner.run_cells(CELLS[:1], places)
    assert list(places.cell(CELLS[0]).iterdir()) == []


@pytest.mark.long
def test_a_training_that_diverges_does_not_end_the_others(trained, tmp_path):
    places = stages.Places(trained[0].data, tmp_path)
    wild = dataclasses.replace(START, learning_rate=3e38)
    cells = [Cell(wild), Cell(wild, "finetune", 1), Cell(START)]
    (message,) = runner.run_cells(cells, places)
    assert "vgg11 x0.1 seed 0 backbone" in message and "loss became" in message
    assert [runner.finished(cell, places) for cell in cells] == [False, False, True]


def test_no_cell_begins_after_the_time_is_up(trained, tmp_path):
    places = stages.Places(trained[0].data, tmp_path)
    assert run(CELLS[:1], places, until=0) == {}


def maps():
    return len(Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts Linux's maps of memory")
def test_a_long_grid_does_not_use_up_the_maps_of_a_process(trained, tmp_path):
    places = stages.Places(trained[0].data, tmp_path)
    counts = []
    for seed in range(4):
        run([Cell(dataclasses.replace(START, seed=seed))], places)
        counts.append(maps())
    assert counts[-1] < counts[0] + 100, counts


def test_devices_share_batches_evenly(trained):
    places, _ = trained
    many = dataclasses.replace(places, devices=8)
    assert len(stages.plan_of(CELLS[0], many).devices) == 8
    assert len(stages.plan_of(CELLS[0], dataclasses.replace(places, devices=5)).devices) == 1
    assert len(stages.plan_of(CELLS[0], places).devices) == 1


def test_what_goes_wrong_in_cells_that_run_together_is_told_of_each(monkeypatch, tmp_path):
    cells = [Cell(dataclasses.replace(START, seed=seed)) for seed in range(3)]
    errors = {1: NonFiniteLossError("seed 1 diverged")}

    def train(cell, *_, **__):
        if cell.backbone.seed in errors:
            raise errors[cell.backbone.seed]

    monkeypatch.setattr(runner, "run_cell", train)
    monkeypatch.setattr(runner, "joint_steps", lambda *_: {})

    def together(cells):
        return runner.run_together(cells, stages.Places(tmp_path, tmp_path), None)

    assert together(cells) == [(cells[1], errors[1])] == together(cells[1:2])
    assert together(cells[:1]) == []
    errors[2] = UsageError("the disk is full")
    with pytest.raises(UsageError, match="the disk is full"):
        together(cells)


@pytest.fixture
def lockstep(monkeypatch):
    """The meeting places that the cells got."""
    made = []

    class Kept(runner.Lockstep):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(runner, "Lockstep", Kept)
    return made


@pytest.mark.long
def test_seeds_in_parallel_are_those_one_by_one(trained, tmp_path, lockstep):
    places, _ = trained
    elsewhere = stages.Places(places.data, tmp_path)
    arms = [c for c in CELLS if c.arm in ("backbone", "in.merge")]
    seeds = [
        [dataclasses.replace(c, backbone=dataclasses.replace(START, seed=seed)) for c in arms]
        for seed in (0, 1, 2)
    ]
    backbones = [arms[0] for arms in seeds]
    assert runner.abreast(backbones) == backbones
    assert runner.abreast([seeds[0][1], seeds[1][0], seeds[1][1]]) == [seeds[0][1]]
    run([cell for arms in seeds for cell in arms], elsewhere, parallel=True)
    # Batches of 24: two epochs of 96 images, three evaluations of 64, one of 96, and nothing alone.
    assert [one.joint for one in lockstep] == [2 * 4 + 3 * 3 + 4] * 2
    for number, cell in enumerate(arms):
        assert weights(places, cell) == weights(elsewhere, cell)
        different = [weights(elsewhere, arms[number]) for arms in seeds]
        assert different[0] != different[1] != different[2] != different[0]
    single = stages.Places(places.data, tmp_path / "single")
    run(seeds[1], single)
    for cell in seeds[1]:
        assert weights(single, cell) == weights(elsewhere, cell)
        assert runner.read_result(single.cell(cell)) | {"seconds": 0} == (
            runner.read_result(elsewhere.cell(cell)) | {"seconds": 0}
        )

    # One that was stopped before is a few steps ahead, so some of its steps are its own.
    resumed = stages.Places(places.data, tmp_path / "resumed")
    calls = iter(range(10**6))
    with pytest.raises(TrainingInterrupted):
        run(backbones[1:2], resumed, should_stop=lambda: next(calls) > 5)
    run(backbones, resumed, parallel=True)
    assert 0 < lockstep[-1].joint < lockstep[0].joint
    for cell in backbones:
        assert weights(resumed, cell) == weights(elsewhere, cell)


def test_a_comparison_of_kept_cells(trained, tmp_path):
    places, results = trained
    for cell in CELLS[:3]:
        store.keep(cell, dataclasses.replace(places, results=tmp_path))
    kept = Kept.of(CELLS, tmp_path / "cells")
    assert kept.cells == CELLS[:3]
    (group,) = kept.groups().values()
    found = group.compare(PAIRS, resamples=20, permutations=20)
    for arm in ("backbone", "finetune", "in.merge"):
        assert found["arms"][arm]["auc"]["mean"] == pytest.approx(results[arm]["test"]["auc"])
        assert found["arms"][arm]["acc"]["mean"] == pytest.approx(results[arm]["test"]["acc"])
    gap = found["differences"]["in.merge - finetune"]["auc"]["mean"]
    assert gap == pytest.approx(
        results["in.merge"]["test"]["auc"] - results["finetune"]["test"]["auc"]
    )
    assert 0 < found["merged"]["in.merge"] < 0.5 and found["merged"]["finetune"] is None


def test_an_arm_of_which_a_seed_is_missing_is_compared_over_the_others(trained, tmp_path):
    places, _ = trained
    second = [dataclasses.replace(c, backbone=dataclasses.replace(START, seed=1)) for c in CELLS]
    for cell in CELLS[:3]:
        store.keep(cell, dataclasses.replace(places, results=tmp_path))
    for old, new in zip(CELLS[:2], second[:2], strict=True):
        for suffix in (".json", ".npz"):
            kept = tmp_path / "cells"
            shutil.copy(kept / f"{old.hash}{suffix}", kept / f"{new.hash}{suffix}")
    kept = Kept.of([*CELLS, *second], tmp_path / "cells")
    found = kept.compare(PAIRS, resamples=20, permutations=20)
    assert found["over"] == {"backbone": [0, 1], "finetune": [0, 1], "in.merge": [0]}
    assert len(found["differences"]["in.merge - finetune"]["auc"]["seeds"]) == 1
    assert len(found["differences"]["finetune - backbone"]["auc"]["seeds"]) == 2
    add_holm([found], PAIRS)
    assert "p_holm" in found["differences"]["finetune - backbone"]["acc"]
    assert "p_holm" not in found["differences"]["in.merge - finetune"]["acc"], "one seed"
    assert found["identical"]["finetune - backbone"] == []


def test_networks_with_the_same_scores_are_known_and_have_no_p(trained, tmp_path):
    places, _ = trained
    kept = tmp_path / "cells"
    for cell in CELLS[:2]:
        store.keep(cell, dataclasses.replace(places, results=tmp_path))
        second = dataclasses.replace(cell, backbone=dataclasses.replace(START, seed=1))
        for suffix in (".json", ".npz"):
            shutil.copy(kept / f"{cell.hash}{suffix}", kept / f"{second.hash}{suffix}")
    both = [
        dataclasses.replace(cell, backbone=dataclasses.replace(START, seed=seed))
        for cell in CELLS[:2]
        for seed in (0, 1)
    ]
    shutil.copy(kept / f"{CELLS[0].hash}.npz", kept / f"{both[3].hash}.npz")
    found = Kept.of(both, kept).compare(PAIRS, resamples=20, permutations=20)
    assert found["identical"]["finetune - backbone"] == [1]
    counts = np.bincount(store.read_labels("phantom", kept).labels)
    assert found["labels"] == {"patients": None, "classes": len(counts)} | {
        "defined": len(counts),
        "constant": counts.max() / counts.sum(),
    }
    shutil.copy(kept / f"{CELLS[0].hash}.npz", kept / f"{both[2].hash}.npz")
    found = Kept.of(both, kept).compare(PAIRS, resamples=20, permutations=20)
    assert found["identical"]["finetune - backbone"] == [0, 1]
    add_holm([found], PAIRS)
    assert "p_holm" not in found["differences"]["finetune - backbone"]["acc"]


def test_the_networks_weights_are_those_of_the_best_checkpoint(trained):
    places, results = trained
    for cell in (CELLS[2], CELLS[3]):
        dataset = stages.plan_of(cell, places).dataset
        scores = stages.weights_of(cell, places)(dataset.test.images)
        right = (scores.argmax(1) == dataset.test.labels).mean()
        assert right == pytest.approx(results[cell.arm]["test"]["acc"])


def test_unknown_cells_and_data(trained):
    places, _ = trained
    question = Question("medmnist", 1, "t", "a", CELLS, *[None] * 5)
    with pytest.raises(UsageError, match="--only 123: medmnist has no cell of that hash"):
        command.chosen(question, command.StudyConfig(only=("123",)))
    one = command.StudyConfig(only=(CELLS[1].hash,))
    assert command.chosen(question, one) == (CELLS[1],)
    assert command.chosen(question, command.StudyConfig(seeds=1)) == CELLS
    assert command.chosen(question, command.StudyConfig(seeds=0)) == ()
    assert command.chosen(question, command.StudyConfig(data=("phantom",))) == CELLS
    bad = Cell(dataclasses.replace(START, data="nothing"))
    with pytest.raises(UsageError, match="data set nothing: unknown; choose one of"):
        runner.run_cell(bad, places, None)


def test_a_kept_cell_has_the_scores_that_its_run_wrote(trained, tmp_path):
    places, results = trained
    store.keep(CELLS[1], dataclasses.replace(places, results=tmp_path))
    scores = store.read_test_scores(CELLS[1], tmp_path / "cells")
    assert scores.dtype == np.float32 and scores.shape == (96, 6)
    labels = store.read_labels("phantom", tmp_path / "cells")
    assert (scores.argmax(1) == labels.labels).mean() == results["finetune"]["test"]["acc"]
