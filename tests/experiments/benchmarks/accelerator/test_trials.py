"""A trial of part 4 is the training that the study's runner does."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.benchmarks.accelerator import grids, trials
from experiments.benchmarks.accelerator.grids import GRIDS
from experiments.benchmarks.accelerator.several_seeds import (
    kind_of,
    make_program,
    shared_numbers,
    shared_treatment,
    train_together,
)
from experiments.study import archive, corrupted_predictions, datasets, runner
from experiments.study.corrupted_predictions import are_stored
from experiments.study.questions import full_length, pretrained
from experiments.study.stages import Paths, weights_of
from experiments.study.treatments import make_treatment, numbers
from experiments.study.trials import Treatment, with_dependencies
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_text
from inmerge_jax.training.experiment import initial_variables
from tests.experiments.study.test_pretrained import stored
from tests.training import tiny

GRID = GRIDS["phantom"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return Paths(tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs"), devices=2)


def train(paths, seeds, arm=None, starts=None):
    program = make_program(GRID, "phantom", len(seeds), paths)
    if arm is None:
        chosen = [GRID.backbone("phantom", seed) for seed in seeds]
        starts = [initial_variables(program.plan, seed) for seed in seeds]
    else:
        chosen = [GRID.second("phantom", seed, arm) for seed in seeds]
    return train_together(program, chosen, starts)


@pytest.fixture(scope="module")
def alone(paths):
    (backbone,) = train(paths, [1])
    arms = {arm: train(paths, [1], arm, [backbone.weights])[0] for arm in ("inmerge", "released")}
    return {"backbone": backbone, **arms}


@pytest.mark.long
def test_a_trial_is_what_the_runner_trains(paths, alone):
    chosen = [GRID.backbone("phantom", 1)]
    chosen += [GRID.second("phantom", 1, arm) for arm in ("inmerge", "released")]
    runner.run_trials(chosen, paths)
    for trial in chosen:
        expected, found = runner.read_result(paths.trial(trial)), alone[trial.arm]
        for name in ("best_epoch", "epochs", "steps", "layers", "kernels", "selected", "merged"):
            assert found.result[name] == expected[name], name
        if trial.arm == "released":
            for name in ("val_selected", "val_merged"):
                assert found.result[name] == expected[name] and sum(expected[name]) > 0, name
        for part in ("val", "test"):
            assert found.result[part]["auc"] == pytest.approx(expected[part]["auc"], abs=2e-3)
        images = np.asarray(make_program(GRID, "phantom", 1, paths).plan.dataset.test.images)
        scores = weights_of(trial, paths)(images)
        np.testing.assert_allclose(found.scores, scores, atol=1e-4)
        if trial.is_backbone:
            assert found.further == {}
        else:
            classes = corrupted_predictions.predicted(trial, paths, weights_of(trial, paths))
            assert classes.shape == found.further["corrupted"].shape == (7, 3, len(images))
            assert (classes == found.further["corrupted"]).mean() > 0.99
    assert sum(alone["inmerge"].result["merged"]) > 0


@pytest.mark.long
def test_scores_with_renewed_statistics_are_those_that_the_study_measures(
    paths, tmp_path, monkeypatch
):
    monkeypatch.setattr(full_length, "wants_renewed", lambda trial: True)
    grid = dataclasses.replace(GRID, model="resnet18", width=0.05, epochs=1)
    program = make_program(grid, "phantom", 2, paths)
    chosen = [grid.backbone("phantom", seed) for seed in (0, 1)]
    starts = [initial_variables(program.plan, seed) for seed in (0, 1)]
    one = train_together(program, chosen, starts)[1]
    places = dataclasses.replace(paths, results=tmp_path)
    runner.run_trials(chosen[1:], places)
    full_length.measure(chosen[1], places)
    measured = archive.read(tmp_path).arrays[f"renewed/{chosen[1].hash}"]
    np.testing.assert_allclose(one.further["renewed"], measured, atol=1e-4)
    assert not np.allclose(one.further["renewed"], one.scores, atol=1e-4)


def test_the_grid_of_full_length_has_trials_of_the_study():
    planned = with_dependencies(full_length.grid())
    full = {t.hash for t in planned if t.backbone.data in ("breastmnist", "retinamnist")}
    assert {trial.hash for trial in GRIDS["full_length"].trials()} == full
    # Other grids train them too, and then store what the question needs of them.
    shared = [trial for trial in GRIDS["small"].trials() if trial.hash in full]
    assert len(shared) == len(full) and all(map(full_length.wants_renewed, shared))
    assert not full_length.wants_renewed(GRID.backbone("phantom", 0))


@pytest.mark.long
def test_seeds_that_train_together_train_as_alone(paths, alone):
    backbones = train(paths, [0, 1])
    starts = [one.weights for one in backbones]
    pairs = [(backbones[1], alone["backbone"])]
    pairs += [(train(paths, [0, 1], arm, starts)[1], alone[arm]) for arm in ("inmerge", "released")]
    for found, expected in pairs:
        for name in ("merged", "best_epoch"):
            assert found.result[name] == expected.result[name]
        assert found.result.get("val_merged") == expected.result.get("val_merged")
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    assert not np.allclose(backbones[0].scores, backbones[1].scores, atol=1e-4)


@pytest.mark.long
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


@pytest.mark.parametrize(
    "treatment",
    [Treatment("noise"), Treatment("variant"), Treatment("merge", average=0.9)],
)
def test_what_only_the_study_trains_is_refused(treatment):
    with pytest.raises(ValueError, match="only fine-tunes and merges"):
        shared_numbers(treatment, (), 1)


def test_every_grid_has_paired_arms_and_trials_of_their_own():
    for name, grid in GRIDS.items():
        trials = list(grid.trials())
        assert len({trial.hash for trial in trials}) == len(trials), name
        if name == "pretrained":  # Its learning rates are those of the stored trials.
            continue
        stages = [grid.stages(data, [grid.first_seed]) for data in grid.data]
        assert len(trials) == sum(map(len, stages)) * grid.seeds
        seeds = [(data, seed) for data, unit in grid.units(4) for seed in unit]
        every = range(grid.first_seed, grid.first_seed + grid.seeds)
        assert sorted(seeds) == sorted((d, s) for d in grid.data for s in every)
        merging = [one for one in grid.arms.values() if kind_of(one)]
        assert "finetune" in grid.arms and len({one.skip for one in merging}) == 1


def test_the_grids_of_the_primary_question_are_its_trials(monkeypatch):
    choice = stored(pretrained.selection_grid())
    assert set(GRIDS["learning_rates"].trials()) == set(pretrained.selection_grid())
    rates = pretrained.chosen(pretrained.selection(choice))
    monkeypatch.setattr(grids, "chosen_rates", lambda: rates)
    planned = with_dependencies(pretrained.comparison_grid(choice))
    assert set(GRIDS["pretrained"].trials()) == set(planned)


def test_no_trial_is_trained_before_the_learning_rates_are_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(grids, "chosen_rates", lambda: {"breastmnist_64": 1e-3})
    assert not list(GRIDS["pretrained"].trials())
    with pytest.raises(UsageError, match="its learning rates are not chosen yet"):
        trials.check_data(GRIDS["pretrained"], tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"breastmnist.npz is missing.*--data-dir|--data-dir"):
        trials.check_data(GRIDS["small"], tmp_path)
    trials.check_data(GRID, tmp_path)


def test_chestxray14_is_not_built_before_the_time_begins(tmp_path):
    grid = dataclasses.replace(GRID, data=("chestxray14",))
    with pytest.raises(UsageError, match=r"Data_Entry_2017_v2020.csv.gz is missing"):
        trials.check_data(grid, tmp_path)
    (tmp_path / "nih").mkdir()
    write_text(tmp_path / datasets.CHESTXRAY14_LABELS, "")
    trials.check_data(grid, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.long
def test_records_are_what_the_study_reads(paths, alone, tmp_path):
    known = {trial.arm: trial for trial in GRID.trials() if trial.backbone.seed == 1}
    around = {"started": "2026-01-01", "git": {}, "cpus": 2, "packages": {"jax": "0"}}
    around |= {"device": "chip", "driver": "1.2"}
    labels = archive.labels_of(make_program(GRID, "phantom", 1, paths).plan.dataset)
    arrays = {"labels-phantom": labels.labels, "task-phantom": np.array(labels.task)}
    records = {}
    for arm, one in alone.items():
        trial = known[arm]
        records[trial.hash] = archive.make_record(trial, one.result, one.similarity, around)
        arrays[f"scores-{trial.hash}"] = one.scores
        for name, predictions in one.further.items():
            arrays[f"{name}-{trial.hash}"] = predictions
    assert trials.import_records(records, arrays, "c" * 40, tmp_path) == 3
    assert trials.import_records(records, arrays, "d" * 40, tmp_path) == 0
    found = archive.read(tmp_path)
    record = found.records[known["inmerge"].hash]
    assert record["trained"]["git"] == {"commit": "c" * 40, "dirty": False}
    assert record["trained"]["device"] == "chip"
    np.testing.assert_array_equal(found.scores(known["inmerge"]), alone["inmerge"].scores)
    assert {trial.arm for trial in known.values() if are_stored(trial, found)} == {
        "inmerge",
        "released",
    }
    assert found.labels["phantom"].task == labels.task
    with pytest.raises(UsageError, match="unknown are of no grid"):
        trials.import_records({"unknown": {}}, arrays, "c" * 40, tmp_path)
    trial, one = known["finetune"], alone["backbone"]
    late = {trial.hash: archive.make_record(trial, one.result, one.similarity, around)}
    other = arrays | {"labels-phantom": 1 - labels.labels, f"scores-{trial.hash}": one.scores}
    with pytest.raises(UsageError, match="other test labels"):
        trials.import_records(late, other, "c" * 40, tmp_path)
