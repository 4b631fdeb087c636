"""Tables of numeric features, and the options that each data set reads."""

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer as from_sklearn

from inmerge_jax.data import DataConfig, load_breast_cancer, load_dataset, load_table, reads
from inmerge_jax.data.splitting import SPLITS
from inmerge_jax.errors import UsageError
from tests.data.edits import change

HEADER = ["age", "label", "bmi"]


def make_rows(count=30):
    rng = np.random.default_rng(0)
    names = ("ill", "well", "well")
    return [[20 + row, names[row % 3], round(rng.normal(25, 3), 3)] for row in range(count)]


def write(path, rows, header=HEADER):
    path.write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")
    return path


def test_every_row_is_in_one_split_with_its_class_and_features(tmp_path):
    rows = make_rows()
    data = load_table(write(tmp_path / "patients.csv", rows))
    assert (data.name, data.size_text, data.channels) == ("table-patients", "2 features", 2)
    assert data.modality == "table" and data.features == ("age", "bmi")
    assert data.classes == ("ill", "well") and data.task == "binary-class"
    found = {}
    for part in (data.train, data.val, data.test):
        assert part.images.dtype == np.float32
        for name, label, values in zip(part.names, part.labels, part.images, strict=True):
            found[name] = (values.tolist(), data.classes[label])
    for number, (age, label, bmi) in enumerate(rows, 2):
        assert found[f"line {number}"] == ([age, float(np.float32(bmi))], label)
    assert len(found) == 30
    assert [np.sum(getattr(data, part).labels == 0) for part in SPLITS] == [7, 1, 2]
    shuffled = load_table(write(tmp_path / "patients.csv", rows[::-1]))
    for part in SPLITS:
        values = [set(map(tuple, getattr(one, part).images)) for one in (data, shuffled)]
        assert values[0] == values[1]
    assert shuffled.fingerprint != data.fingerprint  # Batches are by position in the file.


def test_groups_and_splits_are_read(tmp_path):
    rows = [[*row, f"p{number // 3}"] for number, row in enumerate(make_rows())]
    data = load_table(write(tmp_path / "a.csv", rows, [*HEADER, "Patient"]))
    owners = [set(getattr(data, part).patients.tolist()) for part in SPLITS]
    assert sum(map(len, owners)) == 10 and len(set.union(*owners)) == 10
    assert data.features == ("age", "bmi")

    splits = ["train"] * 15 + ["Valid"] * 6 + ["test"] * 9
    rows = [[*row, split] for row, split in zip(make_rows(), splits, strict=True)]
    data = load_table(write(tmp_path / "a.csv", rows, [*HEADER, "split"]))
    assert [len(getattr(data, part)) for part in SPLITS] == [15, 6, 9]
    np.testing.assert_array_equal(data.test.images[:, 0], np.arange(41, 50))


def test_classes_that_are_numbers_are_in_their_order(tmp_path):
    rows = [[number, (2, 10, 1)[number % 3], 0] for number in range(30)]
    data = load_table(write(tmp_path / "a.csv", rows))
    assert data.classes == ("1", "2", "10") and data.task == "multi-class"
    ages = data.train.images[:, 0].astype(int)
    np.testing.assert_array_equal(data.train.labels, np.array([1, 2, 0])[ages % 3])


@pytest.mark.parametrize(
    ("changed", "header", "message"),
    [
        (change(3, 0, ""), HEADER, "line 5: age is missing; fill it in"),
        (change(3, 2, "nan"), HEADER, "line 5: bmi is nan; fill it in"),
        (change(3, 2, "-inf"), HEADER, "line 5: bmi is -inf"),
        (change(3, 2, "high"), HEADER, "line 5: bmi is 'high'.*encode it as numbers"),
        (change(3, 1, ""), HEADER, "line 5: label is missing"),
        (lambda rows: rows, ["age", "class", "bmi"], "no column label; its header is age, class"),
        (lambda rows: rows, ["split", "label", "group"], "has no column of numbers"),
        (lambda rows: rows, ["group", "label", "patient"], "columns group and patient; keep one"),
        (lambda rows: rows, ["split", "label", "bmi"], "line 2: split '20'; choose train"),
        (lambda rows: [*rows, [1, "ill"]], HEADER, "line 32: it has not the 3 cells"),
        (lambda rows: [], HEADER, "holds no rows"),
        (lambda rows: [[1, "ill", 2]] * 9, HEADER, "only the class ill"),
        (
            lambda rows: [[1_700_000_000 + n, *row[1:]] for n, row in enumerate(rows)],
            HEADER,
            "age has values from 1700000000 to 1700000029, .*subtract an offset",
        ),
    ],
)
def test_a_bad_table_is_named_with_line_and_remedy(changed, header, message, tmp_path):
    with pytest.raises(UsageError, match=message) as error:
        load_table(write(tmp_path / "a.csv", changed(make_rows()), header))
    assert str(tmp_path / "a.csv") in str(error.value)


def test_the_breast_cancer_table_is_scikit_learns():
    data = load_breast_cancer()
    table = from_sklearn()
    assert data.classes == ("malignant", "benign") and data.features == tuple(table.feature_names)
    parts = [getattr(data, part) for part in SPLITS]
    assert [len(part) for part in parts] == [399, 57, 113]
    rows = []
    for part in parts:
        ours = [int(name.removeprefix("row ")) for name in part.names]
        np.testing.assert_array_equal(part.images, table.data[ours].astype(np.float32))
        np.testing.assert_array_equal(part.labels, table.target[ours])
        assert abs(part.labels.mean() - table.target.mean()) < 0.01
        rows += ours
    assert sorted(rows) == list(range(569))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "signals:"}, "`data` signals:: give folder:PATH"),
        ({"name": "other:x"}, "`data` other:x: only folder:PATH, tfds:NAME, signals:PATH"),
        ({"name": "signals:x.csv", "size": 28}, "`size` 28 is not read for signals:x.csv"),
        ({"name": "table:x.csv", "channels": 3}, "`channels` 3 is not read for table:x.csv"),
        ({"name": "breast_cancer", "download": False}, "`download` is not read for breast_cancer"),
        ({"name": "breast_cancer", "resize": "nearest"}, "`resize` nearest is not read"),
        ({"name": "phantom3d", "resize": "nearest"}, "`resize` nearest is not read for phantom3d"),
        ({"name": "phantom3d", "file": "x.npz"}, "`file` x.npz is not read for phantom3d"),
        ({"name": "breast_cancr"}, "did you mean breast_cancer"),
    ],
)
def test_options_that_a_data_set_does_not_read_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        load_dataset(DataConfig(**options))


def test_what_each_data_set_reads():
    assert reads("breastmnist", "download") and not reads("phantom", "download")
    assert reads("folder:x", "resize") and not reads("signals:x", "size")
