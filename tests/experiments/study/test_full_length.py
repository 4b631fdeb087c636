"""The benchmark's length: the grid, both kinds of batch statistics, what is looked at when."""

import dataclasses

import numpy as np
import pytest

from experiments.study import archive as store
from experiments.study import runner, stages
from experiments.study.questions import full_length
from experiments.study.trials import Backbone, Trial, with_dependencies
from tests.experiments.study.test_pretrained import stored


def with_both(trials, gain=0.0):
    """An archive of these trials, whose re-estimated scores of merging arms are `gain` better."""
    # Positives that are ranked this high give a backbone the published AUC.
    archive = stored(trials, dict.fromkeys(("backbone", *full_length.ARMS), 2.0))
    for trial in with_dependencies(trials):
        scores = archive.scores(trial).copy()
        positive = archive.labels[trial.backbone.data].labels == 1
        scores[positive, 1] += gain * (trial.arm == "paper")
        archive.arrays[f"renewed/{trial.hash}"] = scores
        archive.arrays[f"corrupted/{trial.hash}"] = np.zeros((7, 3, len(scores)), np.uint8)
    return archive


def test_the_grid_is_that_of_the_protocol():
    by_data = {}
    for trial in full_length.grid():
        by_data.setdefault(trial.backbone.data, set()).add(trial.backbone.seed)
        assert trial.backbone.rate == 1e-3 and trial.learning_rate == pytest.approx(1e-4)
    assert by_data["breastmnist"] == by_data["retinamnist"] == set(range(8))
    assert by_data["pneumoniamnist"] == by_data["bloodmnist_like"] == set(range(5))
    assert len(full_length.grid()) == 26 * 3


def unrelated(trials):
    """An archive of these trials, whose backbones are far from the published AUC."""
    archive = stored(trials, {"backbone": -2.0})
    for trial in with_dependencies(trials):
        archive.arrays[f"renewed/{trial.hash}"] = archive.scores(trial)
        archive.arrays[f"corrupted/{trial.hash}"] = np.zeros((7, 3, 40), np.uint8)
    return archive


def test_training_ends_after_three_seeds_if_backbones_do_not_reach_the_published_row():
    first = full_length.first_grid()
    assert {trial.backbone.seed for trial in first} == {0, 1, 2}
    archive = unrelated(first)
    assert full_length.later(archive) == () and full_length.QUESTION.is_complete(archive)
    found = full_length.analyse(archive)
    assert "pooled" not in found and full_length.overview(found).effect == "not compared"
    text = full_length.table(found)
    assert "| BreastMNIST, resnet18, 100 epochs | 3 | 0." in text and "| 0.901 |" in text
    assert "do not reach" in text and full_length.short_table(found) == ""
    assert full_length.merged_table(found) == ""
    full_length.figure(found)

    archive = with_both(first)
    assert {*first, *full_length.later(archive)} == set(full_length.grid())
    assert not full_length.QUESTION.is_complete(archive)
    # Of two seeds the comparison is shown, and decides nothing.
    two = [trial for trial in first if trial.backbone.seed < 2]
    assert full_length.later(with_both(two)) == ()
    assert "| BreastMNIST, resnet18, 100 epochs | 2 | 0." in full_length.QUESTION.check(
        with_both(two)
    )


def test_backbones_that_diverged_do_not_end_the_training():
    first = full_length.first_grid()
    archive = with_both(first)
    lost = next(t.first() for t in first if t.backbone.data == "breastmnist")
    short = next(t.first() for t in first if t.backbone.data == "pneumoniamnist")
    for start in (lost, short):
        gone = {t.hash for t in with_dependencies(first) if t.first() == start}
        records = {one: row for one, row in archive.records.items() if one not in gone}
        diverged = {**archive.diverged, start.hash: "epoch 1"}
        archive = dataclasses.replace(archive, records=records, diverged=diverged)
        assert len(full_length.later(archive)) == 26 * 3 - len(first)
    # Neither do backbones of fewer epochs, which have no published row to reach.
    archive = with_both([t for t in first if t.backbone.data in full_length.full_sets()])
    assert len(full_length.later(archive)) == 26 * 3 - len(first)
    # Without any backbone of a data set, it does not reach the row.
    assert not full_length.reach_the_benchmark([])


def test_nothing_is_compared_if_all_backbones_together_do_not_reach_the_published_row():
    archive, others = with_both(full_length.grid()), unrelated(full_length.grid())
    for trial in with_dependencies(full_length.grid()):
        if trial.backbone.seed >= full_length.CHECK_SEEDS:
            archive.records[trial.hash] = others.records[trial.hash]
    found = full_length.analyse(archive)
    assert found["planned"] == found["stored"] == 26 * 4 and "pooled" not in found


def test_nothing_is_looked_at_before_all_trials_are_measured():
    trials = full_length.grid()
    archive = with_both(trials)
    del archive.arrays[f"renewed/{trials[-1].hash}"]
    found = full_length.analyse(archive)
    assert found["planned"] - found["stored"] == 1 and "pooled" not in found
    assert full_length.QUESTION.left(archive) == [trials[-1]]
    # The predictions of corrupted images are for another question.
    del archive.arrays[f"corrupted/{trials[-2].hash}"]
    assert full_length.QUESTION.left(archive) == list(trials[-2:])
    archive.arrays[f"renewed/{trials[-1].hash}"] = archive.scores(trials[-1])
    assert "pooled" in full_length.analyse(archive)


def test_the_answer():
    found = full_length.analyse(with_both(full_length.grid(), gain=1.0))
    full, short = found["pooled"]["full"], found["pooled"]["short"]
    running, renewed = (full[kind]["paper"] for kind in full_length.STATISTICS)
    assert running["trials"] == renewed["trials"] == 16
    assert short["running"]["paper"]["trials"] == 10 and "p_holm" not in short["running"]["paper"]
    assert running["mean"] == 0 and renewed["mean"] > 0 and renewed["p_holm"] < 0.05
    assert full_length.overview(found).verdict.startswith("no effect")
    text = full_length.table(found)
    assert "BreastMNIST, resnet18 (8 seeds, 100+30 epochs), running | " in text
    assert "published 0.901 |" in text and "12+4 epochs" not in text
    assert "all 16 pairs, re-estimated" in text
    text = full_length.short_table(found)
    assert "(5 seeds, 12+4 epochs), running |" in text and "100+30 epochs" not in text
    assert "all 10 pairs, running" in text and ", p " not in text and "published" not in text
    assert full_length.merged_table(found).count("%") == 4 * 2
    full_length.figure(found)


@pytest.mark.long
def test_further_predictions_of_a_finished_trial_are_measured(tmp_path):
    trial = Trial(Backbone("phantom", "resnet18", 0, 1, 0.05), "finetune", 1)
    paths = stages.Paths(tmp_path, tmp_path / "runs", tmp_path / "results")
    runner.run_trials([trial], paths)
    dataset = stages.plan_of(trial, paths).dataset
    store.keep(trial, paths.trial(trial), paths.results, dataset)
    assert not full_length.measured(trial, store.read(paths.results))
    full_length.measure(trial, paths)
    found = store.read(paths.results)
    assert full_length.measured(trial, found)
    renewed, running = found.arrays[f"renewed/{trial.hash}"], found.scores(trial)
    assert renewed.shape == running.shape and not np.allclose(renewed, running)
    classes = found.arrays[f"corrupted/{trial.hash}"]
    assert classes.shape == (7, 3, len(running)) and classes.dtype == np.uint8
    assert (classes != running.argmax(1)).any() and (classes == running.argmax(1)).any()
