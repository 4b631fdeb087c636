import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from medmnist.evaluator import getACC, getAUC

from inmerge_jax.training.metrics import TASKS, compute_metrics, json_metrics, selection_notice
from inmerge_jax.training.recipes import RECIPES

LABELLED = [task for task in TASKS if task != "segmentation"]

pytestmark = pytest.mark.filterwarnings("error")
MULTI_LABEL = "multi-label, binary-class"


def example(task, seed, *, rows=40, classes=4, ties=False, dtype=np.float32):
    """Labels with every class present, and scores that know a little of them."""
    rng = np.random.default_rng(seed)
    if task == MULTI_LABEL:
        labels = rng.integers(0, 2, (rows, classes))
        labels[0], labels[1] = 0, 1
        scores = 0.3 * labels + 0.7 * rng.random((rows, classes))
    else:
        classes = 2 if task == "binary-class" else classes
        labels = rng.permutation(np.arange(rows) % classes)[:, None]
        scores = rng.random((rows, classes)) + 0.5 * np.eye(classes)[labels[:, 0]]
        scores /= scores.sum(axis=1, keepdims=True)
    return labels, (np.round(scores, 1) if ties else scores).astype(dtype)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(6, 60),
    classes=st.integers(2, 6),
    ties=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
)
@pytest.mark.parametrize("task", LABELLED)
def test_equals_medmnist(task, seed, rows, classes, ties, dtype):
    labels, scores = example(task, seed, rows=rows, classes=classes, ties=ties, dtype=dtype)
    found = compute_metrics(labels, scores, task)
    assert found.auc == pytest.approx(getAUC(labels, scores, task), rel=1e-14, abs=0)
    assert found.acc == pytest.approx(getACC(labels, scores, task), rel=1e-14, abs=0)
    assert found.undefined == 0
    assert np.mean(found.auc_per_class) == pytest.approx(found.auc)


def test_per_class_auroc_is_the_share_of_pairs_in_order():
    labels, scores = example("multi-class", 3, ties=True)
    found = compute_metrics(labels, scores, "multi-class")
    for k, auc in enumerate(found.auc_per_class):
        inside, outside = scores[labels[:, 0] == k, k], scores[labels[:, 0] != k, k]
        above = (inside[:, None] > outside).mean() + 0.5 * (inside[:, None] == outside).mean()
        assert auc == pytest.approx(above)


@pytest.mark.parametrize("shape", ["(n,)", "(n, 1)", "(n, 2)"])
def test_binary_scores_may_have_one_column(shape):
    labels, scores = example("binary-class", 5)
    given = {"(n,)": scores[:, 1], "(n, 1)": scores[:, 1:], "(n, 2)": scores}[shape]
    found = compute_metrics(labels[:, 0], given, "binary-class")
    assert found == compute_metrics(labels, scores, "binary-class")
    assert found.auc_per_class == (found.auc, found.auc)


@pytest.mark.parametrize("task", ["multi-class", "ordinal-regression"])
def test_absent_class_is_counted_and_left_out(task):
    labels, scores = example(task, 7)
    labels[labels == 2] = 1
    found = compute_metrics(labels, scores, task)
    assert found.undefined == 1 and math.isnan(found.auc_per_class[2])
    assert found.auc == pytest.approx(np.mean(np.delete(found.auc_per_class, 2)))
    assert found.acc == getACC(labels, scores, task)


def test_one_kind_of_label_is_counted_and_left_out():
    labels, scores = example(MULTI_LABEL, 8)
    labels[:, 0], labels[:, 3] = 0, 1
    found = compute_metrics(labels, scores, MULTI_LABEL)
    assert found.undefined == 2
    assert [math.isnan(auc) for auc in found.auc_per_class] == [True, False, False, True]
    assert found.auc == pytest.approx(getAUC(labels[:, 1:3], scores[:, 1:3], MULTI_LABEL))
    assert found.acc == pytest.approx(getACC(labels, scores, MULTI_LABEL))


@pytest.mark.parametrize("task", LABELLED)
def test_one_row_has_an_accuracy_and_no_auc(task):
    labels, scores = example(task, 9)
    found = compute_metrics(labels[:1], scores[:1], task)
    assert math.isnan(found.auc) and found.undefined == len(found.auc_per_class)
    assert json_metrics(found)["auc"] is None and json_metrics(found)["auc_per_class"][0] is None
    assert 0 <= found.acc <= 1


def test_dict_is_json_ready():
    labels, scores = example("multi-class", 1)
    found = compute_metrics(labels, scores, "multi-class")
    assert json_metrics(found) == {
        "auc": found.auc,
        "acc": found.acc,
        "auc_per_class": list(found.auc_per_class),
        "undefined": 0,
    }
    assert all(type(auc) is float for auc in (found.auc, found.acc, *found.auc_per_class))


@pytest.mark.parametrize(
    ("labels", "scores", "task", "words"),
    [
        ([0, 1], [[0.5, 0.5]] * 2, "regression", "unknown task 'regression'"),
        ([0, 1], [[0.5, 0.5]] * 3, "multi-class", "same number of rows"),
        ([], np.zeros((0, 2)), "multi-class", "at least one"),
        ([0, 1], [0.5, 0.5], "multi-class", "scores need one column per class"),
        ([[0, 1]], [[0.1, 0.2, 0.3]], MULTI_LABEL, "wrong number of columns"),
        ([[0, 1]], [[0.1, 0.9]], "multi-class", "wrong number of columns"),
        ([0, 2], [[0.5, 0.5]] * 2, "multi-class", r"outside 0\.\.1: 0\.\.2"),
        ([[0, 2]], [[0.5, 0.5]], MULTI_LABEL, r"outside 0\.\.1"),
        ([0, 1], [[0.5, np.nan]] * 2, "binary-class", "2 scores are not finite"),
    ],
)
def test_refuses(labels, scores, task, words):
    with pytest.raises(ValueError, match=words):
        compute_metrics(labels, scores, task)


@pytest.mark.parametrize(
    ("task", "labels", "defined"),
    [
        ("binary-class", [[1], [1]], False),
        ("binary-class", [[1], [0]], True),
        ("multi-class", [[2], [2]], False),
        ("multi-class", [[2], [0]], True),
        ("multi-label, binary-class", [[1, 0, 1], [1, 0, 1]], False),
        ("multi-label, binary-class", [[1, 0, 1], [1, 1, 1]], True),
    ],
)
def test_a_validation_set_without_any_auc_is_noticed(task, labels, defined):
    classes = 2 if task == "binary-class" else 3
    val = SimpleNamespace(labels=np.array(labels))
    dataset = SimpleNamespace(val=val, task=task, num_classes=classes)
    found = {name: selection_notice(RECIPES[name], dataset) for name in ("medmnist", "released")}
    assert ("lowest validation loss" in found["medmnist"]) != defined
    assert found["released"] == "", "which selects by the loss"
