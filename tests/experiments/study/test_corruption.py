"""Robustness and calibration of the arms: what counts, against plain sums, and when."""

import dataclasses

import numpy as np
import pytest

from experiments.study.questions import corruption, full_length, pretrained
from tests.experiments.study.test_pretrained import BEST, DATA, IMAGES, comparison, stored
from tests.experiments.study.test_scarce import both

SEEDS, SOME = 6, 30
"""Seeds, and test images that are corrupted."""


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(pretrained, "LOOKS", (SEEDS,))
    monkeypatch.setattr(pretrained, "RECIPES", {data: pretrained.RECIPES[data] for data in DATA})
    monkeypatch.setattr(full_length, "PLAN", {"breastmnist": (SEEDS, 100, 30)})


def everything(worse=(), reached=2.0):
    """All trials; arms of `worse` are right about this much fewer corrupted images."""
    archive = both(
        stored((*pretrained.selection_grid(), *comparison()), val=BEST),
        # Positives that are ranked this high give a backbone the published AUC.
        stored(full_length.grid(), {"backbone": reached}),
    )
    for trials in corruption.grids(archive).values():
        for trial in trials:
            rng = np.random.default_rng(trial.backbone.seed)
            labels = archive.labels[trial.backbone.data].labels[:SOME]
            wrong = rng.random((7, 3, SOME)) < 0.2 + dict(worse).get(trial.arm, 0)
            archive.arrays[f"corrupted/{trial.hash}"] = np.where(wrong, 1 - labels, labels).astype(
                np.uint8
            )
    return archive


def test_the_trials_are_those_of_both_questions_on_images_with_one_label(small):
    found = corruption.grids(everything())
    assert {name: len(trials) for name, trials in found.items()} == {
        "pretrained": 2 * SEEDS * 4,
        "from random weights": SEEDS * 3,
    }
    data = {trial.backbone.data for trials in found.values() for trial in trials}
    assert data == {"breastmnist_64", "retinamnist_64", "breastmnist"}
    # Without learning rates the trials of the first are not known.
    assert corruption.grids(stored(full_length.grid())) == {}
    assert not corruption.QUESTION.is_complete(stored(full_length.grid()))
    some = [t for t in pretrained.selection_grid() if t.backbone.data == DATA[0]]
    assert corruption.grids(stored((*some, *full_length.grid()), val=BEST)) == {}


def test_nothing_is_looked_at_before_all_trials_are_measured(small):
    archive = everything()
    assert corruption.QUESTION.is_complete(archive)
    last = corruption.grids(archive)["pretrained"][-1]
    del archive.arrays[f"corrupted/{last.hash}"]
    assert list(corruption.QUESTION.left(archive)) == [last]
    assert set(corruption.analyse(archive)) == {"planned", "stored", "diverged"}


def test_a_rule_that_errs_more_harms(small):
    archive = everything({"paper": 0.2})
    found = corruption.analyse(archive)
    rows = found["pooled"]["pretrained"]
    assert set(rows) == set(pretrained.MERGING)
    assert set(found["pooled"]["from random weights"]) == set(full_length.MERGING)
    assert rows["paper"]["error"]["trials"] == 2 * SEEDS
    assert corruption.conclusion(rows["paper"]["error"]) == "harms"
    # Equal answers and equal scores.
    assert corruption.conclusion(rows["released"]["error"]) == "no effect"
    assert rows["paper"]["ece"]["mean"] == 0

    gaps = []
    for data in ("breastmnist_64", "retinamnist_64"):
        for seed in range(SEEDS):
            errors = []
            for arm in ("paper", "finetune"):
                (trial,) = (
                    t
                    for t in corruption.grids(archive)["pretrained"]
                    if (t.backbone.data, t.backbone.seed, t.arm) == (data, seed, arm)
                )
                labels = archive.labels[data].labels[:SOME]
                wrong = archive.arrays[f"corrupted/{trial.hash}"] != labels
                by_class = [wrong[..., labels == label].mean(-1) for label in (0, 1)]
                errors.append(np.mean(by_class))
            gaps.append(errors[0] - errors[1])
    assert rows["paper"]["error"]["mean"] == pytest.approx(np.mean(gaps))

    text = corruption.table(found)
    assert "balanced error, corrupted: all pairs, pretrained" in text and "], 12 pairs, p " in text
    assert (
        "calibration error (ECE): all pairs, from random weights" in text
        and "], 6 pairs, p " in text
    )
    shown = corruption.overview(found)
    assert "balanced error, corrupted: harms" in shown.verdict
    assert "(ECE): no effect larger than ±0.01" in shown.verdict
    corruption.figure(found)


def test_a_trial_that_diverged_is_missing_from_the_pairs_of_its_arm_alone(small):
    archive = everything()
    released = [t for t in comparison() if t.arm == "released"]
    for lost, pairs in (
        (released[:1], 2 * SEEDS - 1),
        ([t for t in released if t.backbone.data == "breastmnist_64"], SEEDS),
    ):
        hashes = {trial.hash: "epoch 1" for trial in lost}
        records = {one: row for one, row in archive.records.items() if one not in hashes}
        some = dataclasses.replace(archive, records=records, diverged=hashes)
        rows = corruption.analyse(some)["pooled"]["pretrained"]
        counts = {arm: by["error"]["trials"] for arm, by in rows.items()}
        assert counts == {
            **{arm: 2 * SEEDS for arm in ("paper", "quantile")},
            "released": pairs,
        }
        corruption.table(corruption.analyse(some))


def test_arms_are_not_compared_where_backbones_do_not_reach_the_benchmark(small):
    found = corruption.analyse(everything(reached=0.0))
    assert set(found["pooled"]) == {"pretrained"}
    words = "Not compared: from random weights, since the backbones do not reach the benchmark"
    assert words in corruption.table(found)


def test_the_primary_question_is_compared_before_the_other_trials_are_complete(small):
    archive = everything({"paper": 0.2})
    last = corruption.grids(archive)["from random weights"][-1]
    del archive.records[last.hash]
    found = corruption.analyse(archive)
    assert set(found["pooled"]) == {"pretrained"} and corruption.QUESTION.is_complete(archive)
    words = "Not compared: from random weights, since its trials are not complete"
    assert words in corruption.table(found)
    assert corruption.overview(found) == corruption.overview(
        corruption.analyse(everything({"paper": 0.2}))
    )


def test_the_interval_of_a_calibration_error_holds_its_estimate(small):
    """Resamples of a calibrated network have a larger error than all images have."""
    rng = np.random.default_rng(0)
    archive = everything()
    labels = archive.labels["breastmnist_64"].labels
    for trial in comparison():
        p = np.clip(labels + rng.normal(0, 0.02, len(labels)), 0, 1)
        if trial.arm == "paper":
            p = 0.3 + 0.4 * p
        archive.arrays[f"scores/{trial.hash}"] = np.stack([1 - p, p], 1).astype(np.float32)
    found = corruption.analyse(archive)
    for group in found["groups"]["pretrained"].values():
        row = group["differences"]["paper"]["ece"]
        assert row["low"] < row["mean"] < row["high"]
        assert row["mean"] - row["low"] == pytest.approx(row["high"] - row["mean"], rel=0.3)


def test_calibration_is_that_of_all_test_images(small):
    archive = everything()
    found = corruption.analyse(archive)
    (trial, *_) = corruption.grids(archive)["from random weights"]
    (group,) = found["groups"]["from random weights"].values()
    eces = []
    for seed in range(SEEDS):
        (trial,) = (
            t
            for t in corruption.grids(archive)["from random weights"]
            if t.backbone.seed == seed and t.arm == "finetune"
        )
        scores, labels = archive.scores(trial), archive.labels["breastmnist"].labels
        confidence, right = scores.max(1), scores.argmax(1) == labels
        bins = np.minimum((confidence * 15).astype(int), 14)
        total = 0.0
        for one in np.unique(bins):
            mine = bins == one
            total += abs(right[mine].mean() - confidence[mine].mean()) * mine.sum() / IMAGES
        eces.append(total)
    assert group["finetune"]["ece"] == pytest.approx(np.mean(eces), rel=1e-5)


def test_pairs_of_a_later_look_count(small, monkeypatch):
    archive = everything()
    monkeypatch.setattr(pretrained, "LOOKS", (SEEDS, SEEDS + 1))
    for trial in comparison():
        if trial.arm == "paper":
            auc = archive.records[trial.hash]["result"]["test"]
            auc["auc"] += 0.05 * (-1) ** trial.backbone.seed
    assert corruption.grids(archive) == {}  # The first look is undecided.
    later = [t for t in pretrained.comparison_grid(archive) if t.backbone.seed == SEEDS]
    assert {t.arm for t in later} == set(pretrained.LATER_ARMS)
    archive = both(archive, stored(later, val=BEST))
    for trial in later:
        archive.arrays[f"corrupted/{trial.hash}"] = np.zeros((7, 3, SOME), np.uint8)
    rows = corruption.analyse(archive)["pooled"]["pretrained"]
    pairs = {arm: row["error"]["trials"] for arm, row in rows.items()}
    assert pairs == {"paper": 2 * SEEDS + 2, "released": 2 * SEEDS, "quantile": 2 * SEEDS}
