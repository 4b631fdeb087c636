"""A trial of part 4 is the training that the study's runner does."""

import jax
import numpy as np
import pytest

from experiments.benchmarks.accelerator import trials
from experiments.benchmarks.accelerator.grids import GRIDS
from experiments.benchmarks.accelerator.trials import (
    kind_of,
    make_program,
    shared_numbers,
    shared_treatment,
)
from experiments.study import runner, store
from experiments.study.cells import Treatment
from experiments.study.stages import Places, weights_of
from experiments.study.treatments import make_treatment, numbers
from inmerge_jax.errors import UsageError
from inmerge_jax.training.experiment import initial_variables
from tests.training import tiny

GRID = GRIDS["phantom"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return Places(tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs"), devices=2)


def train(places, seeds, arm=None, starts=None):
    program = make_program(GRID, "phantom", len(seeds), places)
    if arm is None:
        cells = [GRID.backbone("phantom", seed) for seed in seeds]
        starts = [initial_variables(program.plan, seed) for seed in seeds]
    else:
        cells = [GRID.second("phantom", seed, arm) for seed in seeds]
    return trials.train_together(program, cells, starts)


@pytest.fixture(scope="module")
def alone(places):
    (backbone,) = train(places, [1])
    (merged,) = train(places, [1], "inmerge", [backbone.weights])
    return {"backbone": backbone, "inmerge": merged}


def test_a_trial_is_what_the_runner_trains(places, alone):
    cells = [GRID.backbone("phantom", 1), GRID.second("phantom", 1, "inmerge")]
    runner.run_cells(cells, places)
    for cell in cells:
        expected, found = runner.read_result(places.cell(cell)), alone[cell.arm]
        for name in ("best_epoch", "epochs", "steps", "layers", "kernels", "selected", "merged"):
            assert found.result[name] == expected[name], name
        for part in ("val", "test"):
            assert found.result[part]["auc"] == pytest.approx(expected[part]["auc"], abs=2e-3)
        images = np.asarray(make_program(GRID, "phantom", 1, places).plan.dataset.test.images)
        scores = weights_of(cell, places)(images)
        np.testing.assert_allclose(found.scores, scores, atol=1e-4)
    assert sum(alone["inmerge"].result["merged"]) > 0


def test_seeds_that_train_together_train_as_alone(places, alone):
    backbones = train(places, [0, 1])
    merged = train(places, [0, 1], "inmerge", [one.weights for one in backbones])
    for found, expected in ((backbones[1], alone["backbone"]), (merged[1], alone["inmerge"])):
        assert found.result["merged"] == expected.result["merged"]
        assert found.result["best_epoch"] == expected.result["best_epoch"]
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    assert not np.allclose(backbones[0].scores, backbones[1].scores, atol=1e-4)


@pytest.mark.parametrize(
    "treatment",
    [
        Treatment(),
        Treatment("merge", threshold=-1.0),
        Treatment("merge", threshold=-1.0, partner="random"),
        Treatment("merge", quantile=0.5),
        Treatment("merge", threshold=-1.0, every=2),
    ],
)
def test_every_rule_is_a_branch_of_one_program(treatment):
    kernels, (params, _) = tiny.kernels(), tiny.init()
    kinds = (("nearest", False), ("random", False), ("nearest", True))
    shared = jax.jit(shared_treatment(kernels, kinds))
    key = jax.random.key(0)
    for step in (2, 3):
        found, stats = shared(params, key, step, shared_numbers(treatment, kinds, 4))
        if treatment.kind == "none":
            expected, merged = params, 0
        else:
            alone = make_treatment("merge", kernels)
            expected, one = alone(params, key, step, numbers(treatment, 4))
            merged = int(one.merged.sum())
            assert (merged > 0) == (step % treatment.every == 0)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
        assert int(stats.merged.sum()) == merged


def test_every_grid_has_paired_arms_and_trials_of_their_own():
    for name, grid in GRIDS.items():
        cells = list(grid.cells())
        assert len({cell.hash for cell in cells}) == len(cells), name
        assert len(cells) == len(grid.data) * grid.seeds * (1 + len(grid.arms))
        seeds = [(data, seed) for data, unit in grid.units(4) for seed in unit]
        assert sorted(seeds) == sorted((d, s) for d in grid.data for s in range(grid.seeds))
        merging = [one for one in grid.arms.values() if kind_of(one)]
        assert "finetune" in grid.arms and len({one.skip for one in merging}) == 1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"breastmnist.npz is missing.*--data-dir|--data-dir"):
        trials.check_data(GRIDS["small"], tmp_path)
    trials.check_data(GRID, tmp_path)


def test_records_are_what_the_study_reads(places, alone, tmp_path):
    cells = {arm: cell for cell in GRID.cells() if cell.backbone.seed == 1 for arm in [cell.arm]}
    around = {"started": "2026-01-01", "git": {}, "cpus": 2, "packages": {"jax": "0"}}
    around |= {"device": "chip", "driver": "1.2"}
    records, arrays = {}, {"labels-phantom": None, "task-phantom": None}
    labels = store.labels_of(make_program(GRID, "phantom", 1, places).plan.dataset)
    arrays |= {"labels-phantom": labels.labels, "task-phantom": np.array(labels.task)}
    for arm, one in alone.items():
        cell = cells[arm]
        records[cell.hash] = store.make_record(cell, one.result, one.similarity, around)
        arrays[f"scores-{cell.hash}"] = one.scores
    assert trials.keep_records(records, arrays, "c" * 40, tmp_path) == 2
    assert trials.keep_records(records, arrays, "d" * 40, tmp_path) == 0
    stored = store.read(cells["inmerge"], tmp_path)
    assert stored["trained"]["git"] == {"commit": "c" * 40, "dirty": False}
    assert stored["trained"]["device"] == "chip"
    found = store.read_test_scores(cells["inmerge"], tmp_path)
    np.testing.assert_array_equal(found, alone["inmerge"].scores)
    assert store.read_labels("phantom", tmp_path).task == labels.task
    with pytest.raises(UsageError, match="unknown are of no grid"):
        trials.keep_records({"unknown": {}}, arrays, "c" * 40, tmp_path)
    other = arrays | {"labels-phantom": 1 - labels.labels}
    cell = cells["finetune"]
    one = alone["backbone"]
    late = {cell.hash: store.make_record(cell, one.result, one.similarity, around)}
    other[f"scores-{cell.hash}"] = one.scores
    with pytest.raises(UsageError, match="other test labels"):
        trials.keep_records(late, other, "c" * 40, tmp_path)
