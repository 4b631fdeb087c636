"""Differences between arms: per group with images drawn, and over all trainings."""

import dataclasses

import numpy as np
import pytest

from experiments.study import analysis
from experiments.study.archive import Archive, Labels
from experiments.study.trials import Backbone, Treatment, Trial
from inmerge_jax.training.metrics import compute_metrics

IMAGES = 60
PAIR = ("inmerge", "finetune")


def make(data="breastmnist", seeds=3, same=(), constant=(), missing=()):
    """A group's trials and archive: random scores, equal in the seeds `same`."""
    rng = np.random.default_rng(len(data))
    labels = Labels(np.tile([0, 1], IMAGES // 2).astype(np.int32), "binary-class", None)
    records, arrays, trials = {}, {}, []
    for seed in range(seeds):
        start = Backbone(data, "resnet18", seed, 2)
        base = None
        for trial in (
            Trial(start),
            Trial(start, "finetune", 1),
            Trial(start, "inmerge", 1, treatment=Treatment("merge")),
        ):
            if (trial.arm, seed) in missing:
                continue
            p = 1 / (1 + np.exp(-labels.labels - rng.standard_normal(IMAGES)))
            if trial.arm == "backbone" and seed in constant:
                p = 0.1 * p
            if trial.arm == "inmerge" and seed in same:
                p = base
            base = p
            scores = np.stack([1 - p, p], 1).astype(np.float32)
            metrics = compute_metrics(labels.labels, scores, labels.task)
            merges = trial.arm == "inmerge"
            records[trial.hash] = {
                "result": {
                    "test": {"auc": metrics.auc, "acc": metrics.acc},
                    "layers": ["conv"] if merges else [],
                    "kernels": [10] if merges else [],
                    "merged": [0 if seed in same else 20] if merges else [],
                    "steps": 4,
                }
            }
            arrays[f"scores/{trial.hash}"] = scores
            trials.append(trial)
    return trials, Archive(records, arrays, {data: labels})


def both(*made):
    trials = [trial for some, _ in made for trial in some]
    joined = [{}, {}, {}]
    for _, one in made:
        for into, part in zip(joined, (one.records, one.arrays, one.labels), strict=True):
            into |= part
    return trials, Archive(*joined)


def gaps(trials, archive, metric="auc"):
    by = {(t.backbone.data, t.backbone.seed, t.arm): t for t in trials}
    values = {key: archive.records[t.hash]["result"]["test"][metric] for key, t in by.items()}
    return {
        (data, seed): values[data, seed, "inmerge"] - values[data, seed, "finetune"]
        for data, seed, arm in by
        if arm == "inmerge" and (data, seed, "finetune") in by
    }


def test_trainings_in_which_nothing_merged_do_not_count():
    trials, archive = both(make(same=[1]), make("retinamnist", seeds=2))
    found = analysis.pool(analysis.groups(trials, archive), [PAIR])["inmerge - finetune"]
    wanted = gaps(trials, archive)
    del wanted["breastmnist", 1]
    row = found["auc"]
    assert found["unchanged"] == 1 and row["trials"] == 4
    assert row["mean"] == pytest.approx(np.mean(list(wanted.values())))
    assert row["positive"] == sum(gap > 0 for gap in wanted.values())
    by_data = [
        np.mean([gap for (data, _), gap in wanted.items() if data == one])
        for one in ("breastmnist", "retinamnist")
    ]
    assert row["data_sets"]["mean"] == pytest.approx(np.mean(by_data))
    assert row["p"] <= row["p_holm"] <= 1


@pytest.mark.long
def test_trainings_of_constant_backbones_can_be_left_out():
    trials, archive = make(seeds=4, constant=[0, 2])
    own = analysis.groups(trials, archive)
    row = analysis.pool(own, [PAIR], learned=True)["inmerge - finetune"]["auc"]
    wanted = gaps(trials, archive)
    assert row["trials"] == 2
    assert row["mean"] == pytest.approx((wanted["breastmnist", 1] + wanted["breastmnist", 3]) / 2)


def test_with_several_labels_an_answer_is_the_set_of_labels():
    trial = Trial(Backbone("chestxray14", "resnet18", 0, 1))
    labels = Labels(np.zeros((4, 2), np.uint8), "multi-label, binary-class", None)
    scores = np.array([[0.9, 0.1], [0.8, 0.4], [0.6, 0.7], [0.1, 0.2]])
    for factor, expected in ((1.0, False), (0.5, True)):
        archive = Archive({}, {f"scores/{trial.hash}": scores * factor}, {"chestxray14": labels})
        assert analysis.is_constant(archive, trial) is expected


def test_a_difference_is_over_the_seeds_of_both_arms():
    trials, archive = make(missing=[("inmerge", 2)])
    (group,) = analysis.groups(trials, archive)
    row = group.interval(PAIR)
    wanted = gaps(trials, archive)
    assert row["seeds"] == row["changed"] == 2
    assert row["mean"] == pytest.approx(np.mean(list(wanted.values())))
    assert row["low"] < row["mean"] < row["high"] and 0 < row["p"] <= 1
    assert group.interval(("inmerge", "absent")) is None
    assert group.merged("inmerge") == pytest.approx(0.5) and group.merged("finetune") is None


def test_patients_are_drawn_with_all_of_their_images():
    _, archive = make()
    labels = archive.labels["breastmnist"]
    patients = np.repeat(np.arange(IMAGES // 4) + 7, 4)
    known = dataclasses.replace(archive, labels={"breastmnist": labels._replace(patients=patients)})
    counts = analysis.drawn_counts(known, "breastmnist")
    assert (counts[0] == 1).all() and counts.shape == (1 + analysis.RESAMPLES, IMAGES)
    assert (counts.reshape(len(counts), -1, 4) == counts.reshape(len(counts), -1, 4)[..., :1]).all()
    assert (analysis.drawn_counts(archive, "breastmnist")[1:].sum(1) == IMAGES).all()
