"""The stored results: complete, unchanged, and equal bytes for equal content."""

import csv
import dataclasses
import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from experiments.study import archive
from experiments.study.archive import Labels
from experiments.study.questions import QUESTIONS
from experiments.study.trials import Backbone, Treatment, Trial
from inmerge_jax.errors import UsageError
from inmerge_jax.training.metrics import compute_metrics

START = Backbone("chestxray14", "resnet18", 0, 4, stem="imagenet")
TRIALS = (
    Trial(START),
    Trial(START, "inmerge, adaptive", 2, treatment=Treatment("merge", quantile=0.5)),
    Trial(START, "decay", 2, 1e-3, Treatment("decay", decay=5e-4)),
    Trial(Backbone("phantom", "vgg16", 0, 1, weights="edges"), "r", 1, 1e-3, Treatment("released")),
    Trial(
        Backbone("phantom", "vgg11", 0, 0, images=48, wrong_labels=0.25),
        "only",
        30,
        1e-3,
        Treatment("merge", statistics="renewed"),
    ),
    Trial(dataclasses.replace(START, class_weights="balanced")),
    Trial(START, "v", 2, 1e-3, Treatment("variant", until=0.5, along="norm", average=0.9)),
)
LABELS = Labels(
    np.array([[0, 1], [1, 0], [1, 1]], np.uint8), "multi-label, binary-class", np.arange(3)
)


def record(trial, auc=0.123456789012345):
    metrics = {"auc": auc, "acc": 0.5, "auc_per_class": [0.1, None], "undefined": 1}
    layers = [] if trial.arm != "inmerge, adaptive" else ["conv1/kernel"]
    counts = [3] * len(layers)
    result = {"best_epoch": 1, "epochs": trial.epochs or 4, "steps": 12, "seconds": 1.25}
    result |= {"val": metrics, "test": metrics, "layers": layers, "kernels": counts}
    result |= {"selected": counts, "merged": counts, "warnings": ["one\ntwo"]}
    if trial.treatment.kind == "released":
        result |= {"val_selected": [30], "val_merged": [7]}
    layer = {"name": "conv1/kernel", "mean": 0.123456, "above": {"0.3": 0.0}}
    environment = {"started": "2026-01-01", "cpus": 2, "packages": {"jax": "0.1", "flax": "0.2"}}
    environment |= {"git": {"commit": None, "dirty": True}, "processor": "a, b"}
    similarity = {"before": [layer], "after": [layer]}
    return archive.make_record(trial, result, similarity, environment)


def add(folder, *trials, labels=LABELS):
    records = {trial.hash: record(trial) for trial in trials}
    arrays = {f"scores/{trial.hash}": np.eye(3, 2, dtype=np.float32) for trial in trials}
    archive.add(folder, records, arrays, {"chestxray14": labels})
    return records


def test_what_is_added_is_read(tmp_path):
    records = add(tmp_path, *TRIALS)
    found = archive.read(tmp_path)
    assert found.records == records
    for trial in TRIALS:
        assert archive.trial_of(found.records[trial.hash]).hash == trial.hash
        np.testing.assert_array_equal(found.scores(trial), np.eye(3, 2))
    assert found.records[TRIALS[0].hash]["similarity"]["before"][0]["mean"] == 0.1235
    assert "before" not in found.records[TRIALS[1].hash]["similarity"]
    labels = found.labels["chestxray14"]
    np.testing.assert_array_equal(labels.labels, LABELS.labels)
    np.testing.assert_array_equal(labels.patients, LABELS.patients)
    assert labels.task == LABELS.task


def test_equal_content_gives_equal_bytes_in_any_order(tmp_path):
    add(tmp_path / "one", *TRIALS)
    for trial in TRIALS[::-1]:
        add(tmp_path / "two", trial)
    for name in (archive.TABLE, archive.ARRAYS, archive.CHECKSUMS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_further_measurements_of_a_trial_are_added(tmp_path):
    records = add(tmp_path, *TRIALS)
    one = TRIALS[1].hash
    more = {"running": {"auc": 0.5}}
    classes = np.ones((2, 5, 3), np.uint8)
    archive.add(
        tmp_path, {one: records[one] | {"batch_statistics": more}}, {f"corrupted/{one}": classes}
    )
    found = archive.read(tmp_path)
    assert found.records[one]["batch_statistics"] == more and len(found.records) == len(TRIALS)
    np.testing.assert_array_equal(found.arrays[f"corrupted/{one}"], classes)


def test_other_labels_are_refused_and_nothing_is_written(tmp_path):
    add(tmp_path, TRIALS[0])
    before = (tmp_path / archive.CHECKSUMS).read_text()
    with pytest.raises(UsageError, match="holds other test labels of chestxray14"):
        add(tmp_path, TRIALS[1], labels=LABELS._replace(labels=1 - LABELS.labels))
    assert (tmp_path / archive.CHECKSUMS).read_text() == before


def test_a_changed_or_missing_file_is_named(tmp_path):
    assert archive.read(tmp_path).records == {}
    add(tmp_path, *TRIALS)
    table = tmp_path / archive.TABLE
    text = table.read_text()
    table.write_text(text.replace("0.123456789012345", "0.923456789012345"))
    archive._read.cache_clear()
    with pytest.raises(UsageError, match=r"trials.csv has SHA-256 .* git checkout"):
        archive.read(tmp_path)
    table.unlink()
    with pytest.raises(UsageError, match="trials.csv is missing"):
        archive.read(tmp_path)


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    # The lock excludes threads as it does processes, since each opens the folder itself.
    trials = [Trial(Backbone("phantom", "vgg11", seed, 1)) for seed in range(8)]
    with ThreadPoolExecutor(len(trials)) as pool:
        list(pool.map(lambda trial: add(tmp_path, trial), trials))
    assert set(archive.read(tmp_path).records) == {trial.hash for trial in trials}


def test_stored_trials_have_the_hash_of_their_configuration():
    records = archive.read().records
    assert len(records) >= 401
    for one, stored in records.items():
        assert archive.trial_of(stored).hash == one


@pytest.mark.long
def test_stored_metrics_are_those_of_the_stored_scores():
    stored = archive.read()
    for one, row in stored.records.items():
        if f"scores/{one}" not in stored.arrays:
            continue  # Another test says which these may be.
        labels = stored.labels[row["config"]["backbone"]["data"]]
        found = compute_metrics(labels.labels, stored.arrays[f"scores/{one}"], labels.task)
        assert found.auc == pytest.approx(row["result"]["test"]["auc"], abs=1e-6), one
        assert found.acc == pytest.approx(row["result"]["test"]["acc"], abs=1e-6), one


def test_the_table_is_plain_csv_and_the_checksums_are_those_of_sha256sum():
    lines = (archive.RESULTS / archive.CHECKSUMS).read_text().splitlines()
    for line in lines:
        expected, name = line.split("  ")
        assert hashlib.sha256((archive.RESULTS / name).read_bytes()).hexdigest() == expected
    with open(archive.RESULTS / archive.TABLE) as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == list(archive.COLUMNS)
    found = archive.read()
    assert len(rows) >= 401
    scored = {name.removeprefix("scores/") for name in found.arrays if name.startswith("scores/")}
    kept = {
        one
        for one, record in found.records.items()
        if all(q.keeps_scores(archive.trial_of(record)) for q in QUESTIONS.values())
    }
    assert {row["hash"] for row in rows} == set(found.records) and kept == scored
    readme = (archive.RESULTS / "README.md").read_text()
    missing = [name for name in archive.COLUMNS if f"`{name}`" not in readme]
    assert not missing, "describe these columns in experiments/results/README.md"


def test_no_stored_file_names_a_folder_of_a_machine():
    for path in archive.RESULTS.rglob("*"):
        if path.suffix in (".csv", ".json", ".jsonl"):
            text = path.read_text()
            assert not any(name in text for name in ("/work", "/tmp/", "/home")), path
