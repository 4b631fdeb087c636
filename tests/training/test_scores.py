import medmnist
import numpy as np
import pandas as pd
import pytest
from medmnist.info import INFO

from inmerge_jax.errors import UsageError
from inmerge_jax.training.metrics import Metrics, compute_metrics, read_scores, write_scores
from tests.paths import MEDMNIST, needs

SOME = Metrics(0.75, 0.5, (0.75,), 0)


def make_scores(labels, task, columns, seed=0):
    """Float32 scores as a network gives them, some tied, that know a little of the labels."""
    rng = np.random.default_rng(seed)
    if task == "multi-label, binary-class":
        scores = 1 / (1 + np.exp(-(rng.normal(size=labels.shape) + labels)))
    else:
        scores = np.exp(rng.normal(size=(len(labels), columns)) + np.eye(columns)[labels[:, 0]])
        scores /= scores.sum(axis=1, keepdims=True)
    scores[::3] = np.round(scores[::3], 2)
    return scores.astype(np.float32)


def rescored(monkeypatch, root, path):
    """What medmnist makes of the file, with its data sets in `root`."""
    monkeypatch.setattr(medmnist.Evaluator.__init__, "__defaults__", (None, str(root)))
    return medmnist.Evaluator.parse_and_evaluate(str(path))


def check_rescores(monkeypatch, root, folder, flag, size, split, labels, columns):
    task = INFO[flag]["task"]
    scores = make_scores(labels, task, columns)
    metrics = compute_metrics(labels, scores, task)
    path = write_scores(folder, flag, size, split, scores, metrics, "inmerge-seed0")
    text = path.read_text()
    found = rescored(monkeypatch, root, path)
    assert found.AUC == pytest.approx(metrics.auc, rel=1e-14, abs=0)
    assert found.ACC == pytest.approx(metrics.acc, rel=1e-14, abs=0)
    # medmnist writes the scores again, under the name and with the text that it finds right.
    assert list(folder.iterdir()) == [path]
    assert path.read_text() == text
    np.testing.assert_array_equal(read_scores(path).astype(np.float32), scores)


@pytest.mark.parametrize(
    ("flag", "size", "columns"),
    [
        ("bloodmnist", 28, 8),
        ("breastmnist", 224, 2),
        ("retinamnist", 64, 5),
        ("chestmnist", 128, 14),
        ("phantom", 32, 5),
    ],
)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_medmnist_rescores_each_task(monkeypatch, tmp_path, flag, size, columns, split):
    monkeypatch.setitem(INFO, "phantom", {"task": "multi-class"})
    rng = np.random.default_rng(1)
    labels = rng.integers(0, columns, (60, 1))
    if flag == "chestmnist":
        labels = rng.integers(0, 2, (60, columns))
    pixels = "" if size == 28 else f"_{size}"
    np.savez(tmp_path / f"{flag}{pixels}.npz", **{f"{split}_labels": labels})
    check_rescores(monkeypatch, tmp_path, tmp_path / "scores", flag, size, split, labels, columns)


@pytest.mark.parametrize(("flag", "columns"), [("breastmnist", 2), ("retinamnist", 5)])
@needs(MEDMNIST / "breastmnist.npz")
@needs(MEDMNIST / "retinamnist.npz")
def test_medmnist_rescores_real_sets(monkeypatch, tmp_path, flag, columns):
    with np.load(MEDMNIST / f"{flag}.npz") as file:
        labels = file["test_labels"]
    check_rescores(monkeypatch, MEDMNIST, tmp_path, flag, 28, "test", labels, columns)


def test_name_and_text_are_medmnists(tmp_path):
    scores = np.array([[1e-9, 1.0], [0.1, 0.9], [1.5e-5, 0.3333333]], np.float32)
    path = write_scores(tmp_path, "breastmnist", 64, "val", scores, SOME, "a")
    assert path == tmp_path / "breastmnist_64_val_[AUC]0.750_[ACC]0.500@a.csv"
    assert path.read_text() == pd.DataFrame(scores).to_csv(header=None)


def test_undefined_auc_has_a_name(tmp_path):
    metrics = Metrics(float("nan"), 1.0, (float("nan"),) * 2, 2)
    path = write_scores(tmp_path, "phantom", 28, "test", np.ones(3, np.float32), metrics, "a")
    assert path.name == "phantom_test_[AUC]nan_[ACC]1.000@a.csv"
    assert read_scores(path).tolist() == [[1.0]] * 3


def test_reads_in_the_order_of_indices(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("2,0.2\n0,0.0\n1,0.1\n")
    assert read_scores(path).tolist() == [[0.0], [0.1], [0.2]]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"flag": "blood_like"}, "blood_like"),
        ({"flag": ""}, "name"),
        ({"run": "a@b"}, "a@b"),
        ({"run": "p0.3"}, r"p0\.3"),
        ({"split": "testing"}, "testing"),
        ({"scores": np.zeros((2, 2, 2))}, r"\(2, 2, 2\)"),
    ],
)
def test_refuses_what_medmnist_could_not_read(tmp_path, changed, words):
    right = {"flag": "phantom", "size": 28, "split": "val", "scores": np.zeros(2), "run": "a"}
    with pytest.raises(ValueError, match=words):
        write_scores(tmp_path / "new", metrics=SOME, **{**right, **changed})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", [None, "", "a,b\n", "0,0.1\n1\n", "1\n2\n"])
def test_refuses_to_read_another_file(tmp_path, text):
    path = tmp_path / "scores.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match="score"):
        read_scores(path)


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        write_scores(tmp_path / "file" / "in", "phantom", 28, "val", np.zeros(2), SOME, "a")
