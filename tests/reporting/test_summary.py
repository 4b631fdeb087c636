import json
import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from inmerge_jax.errors import UsageError
from inmerge_jax.reporting.published import published_reference
from inmerge_jax.reporting.runs import read_run
from inmerge_jax.reporting.summary import (
    auc_influence,
    class_columns,
    right_answers,
    single_image_classes,
    spread,
    summarize,
)
from tests.reporting.folder import edit, markdown, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "three")


def test_means_and_sds_are_those_of_the_results(folder):
    stored = json.loads((folder / "results.json").read_text())["arms"]
    summary = summarize(read_run(folder))
    for arm, results in stored.items():
        for metric in ("auc", "acc"):
            values = [result["test"][metric] for result in results]
            found = summary.arms[arm][metric]
            assert tuple(found.values.values()) == tuple(values)
            assert found.mean == pytest.approx(np.mean(values))
            assert found.sd == pytest.approx(np.std(values, ddof=1))


def test_paired_interval_is_scipys(folder):
    stored = json.loads((folder / "results.json").read_text())["arms"]
    left, right = ([r["test"]["auc"] for r in stored[arm]] for arm in ("inmerge", "finetune"))
    expected = stats.ttest_rel(left, right).confidence_interval(0.95)
    found = summarize(read_run(folder)).differences["inmerge", "finetune"]["auc"]
    assert found.interval == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.mean == pytest.approx(np.mean(np.subtract(left, right)))


def test_interval_by_hand():
    # Mean 2, sd 1, t(0.975, 2 degrees) = 4.302653: half-width 4.302653 / sqrt(3).
    found = spread({0: 1.0, 1: 2.0, 2: 3.0})
    assert found.interval == pytest.approx((2 - 2.4841377, 2 + 2.4841377))


def test_one_seed_has_no_sd_and_no_interval():
    found = spread({4: 0.7})
    assert (found.mean, found.sd, found.interval) == (0.7, None, None)


def test_nan_stays_visible_and_out_of_the_mean():
    found = spread({0: 0.5, 1: math.nan, 2: 0.7})
    assert found.count == 2
    assert found.mean == pytest.approx(0.6)
    assert math.isnan(found.values[1])
    assert math.isnan(spread({0: math.nan}).mean)


def test_differences_pair_the_same_seeds_whatever_their_order(tmp_path):
    folder = write_run(tmp_path / "run")
    before = summarize(read_run(folder)).differences["inmerge", "finetune"]["auc"]

    def shuffle(results):
        results["arms"]["inmerge"].reverse()
        results["arms"]["finetune"].pop(0)

    edit(folder, shuffle)
    after = summarize(read_run(folder)).differences["inmerge", "finetune"]["auc"]
    assert after.values == {seed: before.values[seed] for seed in (1, 2)}


def test_influence_gives_the_auc_and_delongs_variance():
    rng = np.random.default_rng(0)
    positive = np.arange(90) % 3 == 0
    scores = np.round(rng.normal(size=90) + positive, 1)  # rounded, so that there are ties
    auc, pull = auc_influence(positive, scores)
    assert auc == pytest.approx(roc_auc_score(positive, scores))
    wins = (scores[positive][:, None] > scores[~positive]) + 0.5 * (
        scores[positive][:, None] == scores[~positive]
    )
    variance = wins.mean(1).var(ddof=1) / 30 + wins.mean(0).var(ddof=1) / 60
    assert (pull**2).sum() / 90**2 == pytest.approx(variance)


def test_margin_agrees_with_a_bootstrap_of_the_mean_auc(folder):
    def mean_auc(labels, scores):
        wins = (s[labels == k][:, None] > s[labels != k] for k, s in enumerate(scores.T))
        return np.mean([win.mean() for win in wins])

    run = read_run(folder)
    found = summarize(run).sampling
    rng = np.random.default_rng(1)
    labels, gains = run.test_labels, []
    for _ in range(600):
        rows = rng.integers(0, len(labels), len(labels))
        gain = [
            mean_auc(labels[rows], run.test_scores[seed, "inmerge"][rows])
            - mean_auc(labels[rows], run.test_scores[seed, "finetune"][rows])
            for seed in run.seeds
        ]
        gains.append(np.mean(gain))
    margin = found.margin["inmerge", "finetune"]["auc"]
    assert margin == pytest.approx(1.96 * np.std(gains), rel=0.15)


def test_margin_of_accuracy_is_that_of_paired_differences(folder):
    run = read_run(folder)
    labels = run.test_labels
    hits = {k: scores.argmax(1) == labels for k, scores in run.test_scores.items()}
    gain = np.mean([1.0 * hits[s, "inmerge"] - hits[s, "finetune"] for s in run.seeds], axis=0)
    found = summarize(run).sampling.margin["inmerge", "finetune"]["acc"]
    assert found == pytest.approx(1.959964 * gain.std() / len(labels) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("task", ["binary-class", "multi-label, binary-class"])
def test_margin_of_every_task(tmp_path, task):
    folder = write_run(tmp_path / "run", task=task, classes=("normal", "nodule"))
    found = summarize(read_run(folder)).sampling
    assert 0 < found.margin["inmerge", "finetune"]["auc"] < 0.2


def test_one_label_is_no_pair_of_classes(tmp_path):
    task = "multi-label, binary-class"
    folder = write_run(tmp_path / "run", seeds=(0,), task=task, classes=("nodule",))
    run = read_run(folder)
    labels = np.load(folder / "labels.npz")["test"]
    ((number, positive, _),) = class_columns(run.test_labels, run.test_scores[0, "inmerge"], task)
    assert number == 0
    np.testing.assert_array_equal(positive, labels[:, 0] == 1)
    right = right_answers(run.test_labels, run.test_scores[0, "inmerge"], task).mean()
    assert right == pytest.approx(run.arm("inmerge")[0]["test"]["acc"])


def test_a_class_of_one_test_image_has_no_margin_and_the_note_says_why(tmp_path):
    task = "multi-label, binary-class"
    folder = write_run(tmp_path / "run", seeds=(0,), task=task)
    labels = np.load(folder / "labels.npz")["test"]
    labels[:, 2] = np.arange(len(labels)) == 5
    np.savez(folder / "labels.npz", test=labels)
    assert single_image_classes(read_run(folder)) == ["effusion"]
    assert "since one test image alone has or lacks effusion." in markdown(folder)


def test_a_class_without_a_positive_leaves_the_margin_to_the_others(tmp_path):
    folder = write_run(tmp_path / "run")
    labels = np.load(folder / "labels.npz")["test"]
    np.savez(folder / "labels.npz", test=np.where(labels == 3, 0, labels))
    assert summarize(read_run(folder)).sampling.standard_error["auc"] > 0


def test_no_margin_without_labels(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "labels.npz").unlink()
    assert summarize(read_run(folder)).sampling is None


def test_no_margin_without_all_scores_and_the_report_says_so(tmp_path):
    folder = write_run(tmp_path / "run")
    (lost,) = (folder / "seed1" / "finetune" / "scores").glob("*_test_*")
    lost.unlink()
    run = read_run(folder)
    assert summarize(run).sampling is None
    assert "no test scores of finetune, seed 1, so no margin over test images" in run.missing


def test_images_of_a_patient_are_drawn_together(tmp_path):
    folder = write_run(tmp_path / "run")
    alone = summarize(read_run(folder)).sampling
    labels = np.load(folder / "labels.npz")["test"]
    np.savez(folder / "labels.npz", test=labels, test_patients=np.arange(len(labels)))
    each = summarize(read_run(folder)).sampling
    assert (each.standard_error, each.margin) == (alone.standard_error, alone.margin)
    # Every image twice: as many patients as before, so the uncertainty stays the same.
    for path in folder.glob("seed*/*/scores/*_test_*"):
        rows = path.read_text().splitlines()
        twice = rows + [f"{len(rows) + i},{row.split(',', 1)[1]}" for i, row in enumerate(rows)]
        path.write_text("\n".join(twice) + "\n")
    patients = np.tile(np.arange(len(labels)), 2)
    np.savez(folder / "labels.npz", test=np.tile(labels, 2), test_patients=patients)
    twice = summarize(read_run(folder)).sampling
    assert twice.standard_error["acc"] == pytest.approx(alone.standard_error["acc"])
    assert twice.standard_error["auc"] == pytest.approx(alone.standard_error["auc"], rel=0.03)
    assert f"{2 * len(labels)} test images of {len(labels)} patients" in markdown(folder)


def test_merges_are_summed_from_the_results(folder):
    stored = json.loads((folder / "results.json").read_text())["arms"]["inmerge"]
    summary = summarize(read_run(folder))
    assert summary.merged == tuple(sum(result["merged"]) for result in stored)
    assert summary.layers[0].merged == tuple(result["merged"][0] for result in stored)


def test_published_number_only_for_the_benchmarks_network():
    breast, full = {"name": "breastmnist", "size": 28}, {"name": "resnet18", "stem": "small"}
    found = published_reference(breast, full)
    assert (found.auc, found.acc) == (0.901, 0.863)
    assert published_reference(breast, full | {"width": 0.5}) is None
    assert published_reference(breast | {"size": 224}, full) is None
    assert published_reference(breast | {"title": "breastmnist"}, full) == found
    unverified = breast | {"title": "breastmnist (unverified file)"}
    assert published_reference(unverified, full) is None
    assert published_reference(breast, full | {"stem": "imagenet"}) is None
    assert published_reference({"name": "phantom", "size": 28}, full) is None


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no results\.json.*--resume"):
        read_run(tmp_path)


def test_damaged_results_are_refused_by_name(tmp_path):
    (tmp_path / "results.json").write_text('{"dataset": ')
    with pytest.raises(UsageError, match=r"results\.json is damaged .*restore the original"):
        read_run(tmp_path)
