"""Trials on the phantom: trained, stored, skipped, resumed to the same bits."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments.study import archive, runner, stages
from experiments.study.trials import Backbone, Treatment, Trial
from inmerge_jax.errors import UsageError
from inmerge_jax.training.experiment import initial_variables, step_options
from inmerge_jax.training.metrics_file import read_metrics
from inmerge_jax.training.preemption import TrainingInterrupted
from inmerge_jax.training.workdir import lock
from tests.paths import SHARED, needs

START = Backbone("phantom", "vgg11", 0, 2, 0.1)
MERGE = Treatment("merge", threshold=-1.0, skip=4)
TRIALS = (
    Trial(START),
    Trial(START, "finetune", 2),
    Trial(START, "in.merge", 2, treatment=MERGE),
    Trial(START, "ema", 2, treatment=Treatment("ema", decay=0.9)),
    Trial(START, "decay", 2, treatment=Treatment("decay", decay=0.5)),
    Trial(START, "released", 2, treatment=dataclasses.replace(MERGE, kind="released")),
)


def run(trials, paths, **rest):
    runner.run_trials(trials, paths, **rest)
    return {c.arm: runner.read_result(paths.trial(c)) for c in trials if runner.finished(c, paths)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    paths = stages.Paths(tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("study"))
    return paths, run(TRIALS, paths)


def weights(paths, trial):
    _, _, state = stages.best_state(trial, paths)
    return [leaf.tobytes() for leaf in jax.tree.leaves(state)]


@pytest.mark.long
def test_every_trial_has_its_result(trained):
    paths, results = trained
    assert list(results) == [trial.arm for trial in TRIALS]
    assert sum(results["in.merge"]["merged"]) > 0
    assert results["finetune"]["merged"] == []
    losses = {
        arm: [json.loads(line)["train_loss"] for line in open(paths.trial(c) / "metrics.jsonl")]
        for arm, c in zip(results, TRIALS, strict=True)
    }
    assert losses["ema"] == losses["finetune"] != losses["in.merge"]
    assert losses["decay"][-1] != losses["finetune"][-1]
    # Before each of the 64 validation images, in two epochs.
    assert sum(results["released"]["val_merged"]) > sum(results["released"]["merged"]) > 0
    assert losses["released"][0] == losses["in.merge"][0]
    assert results["ema"]["val"] != results["finetune"]["val"] or (
        json.loads((paths.trial(TRIALS[3]) / "metrics.jsonl").read_text().splitlines()[0])
        != json.loads((paths.trial(TRIALS[1]) / "metrics.jsonl").read_text().splitlines()[0])
    )


@pytest.mark.long
def test_a_backbone_whose_checkpoint_is_gone_is_trained_again_but_not_stored(trained, tmp_path):
    paths, _ = trained
    elsewhere = stages.Paths(paths.data, tmp_path / "study")
    done = []
    run(TRIALS[2:3], elsewhere, keep=done.append)
    assert [trial.arm for trial in done] == ["in.merge"]
    assert runner.finished(TRIALS[0], elsewhere) and not runner.finished(TRIALS[1], elsewhere)
    same = [runner.read_result(p.trial(TRIALS[2]))["test"] for p in (paths, elsewhere)]
    assert same[0] == same[1]


@pytest.mark.long
def test_a_trial_of_another_commit_is_restarted(trained, tmp_path):
    paths, results = trained
    elsewhere = stages.Paths(paths.data, tmp_path)
    calls = iter(range(10**6))
    with pytest.raises(TrainingInterrupted):
        run(TRIALS[:1], elsewhere, should_stop=lambda: next(calls) > 6)
    folder = elsewhere.trial(TRIALS[0])
    file = folder / "environment.json"
    other = json.loads(file.read_bytes())
    other["git"]["commit"] = "0" * 40
    file.write_text(json.dumps(other))
    assert any(path.is_dir() for path in folder.iterdir())
    found = run(TRIALS[:1], elsewhere)["backbone"]
    assert found["test"] == results["backbone"]["test"]
    assert json.loads(file.read_bytes())["git"]["commit"] != "0" * 40
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


@pytest.mark.long
def test_a_single_stage_on_few_images_with_wrong_labels(tmp_path):
    start = Backbone("phantom", "resnet18", 1, 0, 0.05, images=48, wrong_labels=0.25)
    merge = dataclasses.replace(MERGE, skip=10, statistics="renewed")
    none = Treatment(statistics="renewed")
    trials = (Trial(start, "none", 2, 1e-3, none), Trial(start, "merge", 2, 1e-3, merge))
    paths = stages.Paths(tmp_path / "data", tmp_path / "study")
    results = run(trials, paths)
    assert {path.name for path in (tmp_path / "study" / "trials").iterdir()} == {
        trial.hash for trial in trials
    }
    # The phantom's 96 images have batches of 24.
    assert all(result["steps"] == 2 * 2 for result in results.values())
    assert sum(results["merge"]["merged"]) > 0
    assert stages.images_of(trials[0]) == 2 * 48
    dataset = stages.plan_of(trials[0], paths).dataset
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (48, 48, 96)
    other = run([Trial(start, "none", 2, 1e-3)], paths)["none"]
    assert other["val"] != results["none"]["val"]


def test_balanced_classes_weight_the_loss_of_both_stages(tmp_path):
    paths = stages.Paths(tmp_path / "data", tmp_path / "study")
    plain = Backbone("phantom", "resnet18", 1, 1, 0.05)
    balanced = Trial(dataclasses.replace(plain, class_weights="balanced"), "a", 1)
    assert step_options(stages.plan_of(Trial(plain), paths))["pos_weight"] is None
    plan = stages.plan_of(balanced, paths)
    counts = np.bincount(plan.dataset.train.labels)
    weights = counts.sum() / (len(counts) * counts)
    np.testing.assert_allclose(step_options(plan)["pos_weight"], weights, rtol=1e-6)
    assert "balanced" in balanced.name


@pytest.mark.long
def test_a_variant_is_trained_with_averaged_weights(tmp_path):
    start = Backbone("phantom", "resnet18", 1, 1, 0.05)
    fields = {"partner": "mutual", "along": "consumer", "layers": "redundant", "average": 0.9}
    variant = Treatment("variant", 1.0, -1.0, until=0.5, statistics="renewed", **fields)
    paths = stages.Paths(tmp_path / "data", tmp_path / "study")
    results = run([Trial(start, "variant", 4, 1e-3, variant)], paths)
    layers = results["variant"]["layers"]
    assert len(layers) == 8 and all(name.endswith("conv1/kernel") for name in layers)
    lines = read_metrics(paths.trial(Trial(start, "variant", 4, 1e-3, variant)) / "metrics.jsonl")
    assert [sum(line["merged"]) > 0 for line in lines] == [True, True, False, False]
    losses = {line["val_loss"] for line in lines[-1:]}
    for field, value in (("average", None), ("statistics", "running")):
        other = Trial(start, "other", 4, 1e-3, dataclasses.replace(variant, **{field: value}))
        run([other], paths)
        more = read_metrics(paths.trial(other) / "metrics.jsonl")
        # The weights are trained in the same way, and evaluated in another.
        assert [line["train_loss"] for line in more] == [line["train_loss"] for line in lines]
        losses.add(more[-1]["val_loss"])
    assert len(losses) == 3


@pytest.mark.long
def test_stopped_and_resumed_is_the_same(trained, tmp_path):
    paths, _ = trained
    elsewhere = stages.Paths(paths.data, tmp_path)
    shutil.copytree(paths.trial(TRIALS[0]), elsewhere.trial(TRIALS[0]))
    calls = iter(range(10**6))
    with pytest.raises(TrainingInterrupted):
        run(TRIALS[2:3], elsewhere, should_stop=lambda: next(calls) > 6)
    assert not runner.finished(TRIALS[2], elsewhere)
    run(TRIALS[2:3], elsewhere)
    assert weights(paths, TRIALS[2]) == weights(elsewhere, TRIALS[2])
    one, two = (json.loads((p.trial(TRIALS[2]) / "result.json").read_bytes()) for p in
                (paths, elsewhere))  # fmt: skip
    assert one["test"] == two["test"] and one["merged"] == two["merged"]


@pytest.mark.long
def test_trials_that_another_process_trains_are_left_to_it(tmp_path):
    paths = stages.Paths(tmp_path, tmp_path)
    other = Trial(dataclasses.replace(START, seed=1))
    trials = (Trial(START, "finetune", 1), other)
    with lock(paths.trial(Trial(START))):
        found = runner.run_trials(trials, paths)
        assert (found.trained, found.busy) == (1, [Trial(START)])
        assert [path.name for path in paths.trial(Trial(START)).iterdir()] == [".lock"]
    assert runner.finished(other, paths) and not runner.finished(trials[0], paths)
    found = runner.run_trials(trials, paths)
    assert (found.trained, found.busy) == (2, [])
    assert runner.finished(trials[0], paths)


@pytest.mark.long
def test_a_training_that_diverges_does_not_end_the_others(trained, tmp_path):
    paths = stages.Paths(trained[0].data, tmp_path)
    wild = dataclasses.replace(START, learning_rate=3e38)
    trials = [Trial(wild), Trial(wild, "finetune", 1), Trial(START)]
    ((trial, message),) = runner.run_trials(trials, paths).diverged.items()
    assert trial == trials[0] and "loss became" in message
    assert [runner.finished(trial, paths) for trial in trials] == [False, False, True]


@pytest.mark.long
def test_no_trial_begins_after_the_time_is_up(trained, tmp_path):
    paths = stages.Paths(trained[0].data, tmp_path)
    assert run(TRIALS[:1], paths, until=0) == {}


def maps():
    return len(Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts Linux's maps of memory")
def test_a_long_grid_does_not_use_up_the_maps_of_a_process(trained, tmp_path):
    paths = stages.Paths(trained[0].data, tmp_path)
    counts = []
    for seed in range(4):
        run([Trial(dataclasses.replace(START, seed=seed))], paths)
        counts.append(maps())
    assert counts[-1] < counts[0] + 100, counts


@pytest.mark.long
def test_devices_share_batches_evenly(trained):
    paths, _ = trained
    many = dataclasses.replace(paths, devices=8)
    assert len(stages.plan_of(TRIALS[0], many).devices) == 8
    assert len(stages.plan_of(TRIALS[0], dataclasses.replace(paths, devices=5)).devices) == 1
    assert len(stages.plan_of(TRIALS[0], paths).devices) == 1


@pytest.mark.long
def test_the_networks_weights_are_those_of_the_best_checkpoint(trained):
    paths, results = trained
    for trial in (TRIALS[2], TRIALS[3]):
        dataset = stages.plan_of(trial, paths).dataset
        scores = stages.weights_of(trial, paths)(dataset.test.images)
        right = (scores.argmax(1) == dataset.test.labels).mean()
        assert right == pytest.approx(results[trial.arm]["test"]["acc"])


@pytest.mark.long
def test_an_unknown_data_set_is_named(trained):
    bad = Trial(dataclasses.replace(START, data="nothing"))
    with pytest.raises(UsageError, match="data set nothing: unknown; choose one of"):
        runner.run_trial(bad, trained[0], None)


@pytest.mark.long
def test_a_stored_trial_has_the_scores_that_its_run_wrote(trained, tmp_path):
    paths, results = trained
    dataset = stages.plan_of(TRIALS[1], paths).dataset
    archive.keep(TRIALS[1], paths.trial(TRIALS[1]), tmp_path, dataset)
    stored = archive.read(tmp_path)
    scores = stored.scores(TRIALS[1])
    assert scores.dtype == np.float32 and scores.shape == (96, 6)
    labels = stored.labels["phantom"].labels
    assert (scores.argmax(1) == labels).mean() == results["finetune"]["test"]["acc"]
    assert stored.records[TRIALS[1].hash]["result"]["test"] == results["finetune"]["test"]
    assert str(tmp_path) not in (tmp_path / archive.TABLE).read_text()
    by_epoch = stored.records[TRIALS[1].hash]["result"]["val_auc_by_epoch"]
    assert len(by_epoch) == TRIALS[1].epochs
    assert max(by_epoch) == pytest.approx(results["finetune"]["val"]["auc"], abs=1e-4)
    none = tmp_path / "none"
    archive.keep(TRIALS[1], paths.trial(TRIALS[1]), none, dataset, with_scores=False)
    assert archive.read(none).arrays == {}
    assert archive.read(none).records == stored.records


@pytest.mark.long
@needs(SHARED / "data" / "weights")
def test_a_pretrained_backbone_starts_from_the_file_and_sees_images_from_0_to_1(tmp_path):
    paths = stages.Paths(SHARED / "data", tmp_path)
    start = Backbone("breastmnist_64", "vgg16", 0, 1, optimizer="sgd", weights="edges")
    plan = stages.plan_of(Trial(start), paths)
    params, _ = initial_variables(plan, 0)
    file = load_file(SHARED / "data" / stages.EDGES)["features.28.weight"]
    last = params["conv5_3"]["kernel"]
    np.testing.assert_array_equal(last, file.transpose(2, 3, 1, 0).astype(np.float32))
    assert plan.shape == (64, 64, 3) and plan.recipe.batch_size == 64
    assert plan.recipe.mean == (0.0,) * 3 and plan.recipe.std == (1.0,) * 3
