"""Signals from a CSV of the UCR archive's form and from an npz."""

import gzip

import numpy as np
import pytest

from inmerge_jax.data import DataConfig, load_dataset, load_signals
from inmerge_jax.data.splitting import SPLITS
from inmerge_jax.errors import UsageError
from tests.data.edits import change
from tests.paths import SHARED, needs

ECG = SHARED / "data" / "ecg" / "ecg5000_train.csv.gz"


def make_rows(count=30, length=5, seed=0):
    rng = np.random.default_rng(seed)
    return [[3 * (row % 2) - 1, *rng.normal(size=length).round(4)] for row in range(count)]


def write_csv(path, rows, separator=","):
    path.write_text("\n".join(separator.join(map(str, row)) for row in rows) + "\n")
    return path


def rows_of(data):
    """The class and the values of each signal, by its line in the file."""
    found = {}
    for part in (data.train, data.val, data.test):
        for name, label, signal in zip(part.names, part.labels, part.images, strict=True):
            assert name not in found
            found[name] = [int(data.classes[label]), *signal[:, 0]]
    return found


def test_every_row_of_a_csv_is_in_one_split_with_its_class(tmp_path):
    rows = make_rows()
    data = load_signals(write_csv(tmp_path / "heart.csv", rows))
    assert (data.name, data.size_text, data.channels) == ("signals-heart", "5 samples", 1)
    assert data.modality == "signal" and data.task == "binary-class"
    assert data.classes == ("-1", "2") and data.train.patients is None
    found = rows_of(data)
    assert len(found) == 30
    for number, row in enumerate(rows, 1):
        np.testing.assert_array_equal(found[f"line {number}"], np.array(row, np.float32))
    for part, share in zip((data.train, data.val, data.test), (0.7, 0.1, 0.2), strict=True):
        assert abs(len(part) - 30 * share) <= 1
        assert abs(np.bincount(part.labels)[0] - len(part) / 2) <= 1  # stratified
    assert data.fingerprint in data.source and data.train.images.dtype == np.float32


def test_the_split_depends_on_the_content_alone(tmp_path):
    rows = make_rows()
    data = load_signals(write_csv(tmp_path / "a.csv", rows))
    other = load_signals(write_csv(tmp_path / "b.csv", rows[::-1], separator="\t"))
    for part in SPLITS:
        kept = {getattr(data, part).images[k].tobytes() for k in range(len(getattr(data, part)))}
        again = getattr(other, part).images
        assert kept == {signal.tobytes() for signal in again}
    with gzip.open(tmp_path / "c.csv.gz", "wt") as file:
        file.write((tmp_path / "a.csv").read_text())
    assert load_signals(tmp_path / "c.csv.gz").fingerprint == data.fingerprint
    rows[3][2] += 1
    assert load_signals(write_csv(tmp_path / "a.csv", rows)).fingerprint != data.fingerprint


def test_equal_signals_are_in_one_split(tmp_path):
    rows = make_rows()
    data = load_signals(write_csv(tmp_path / "a.csv", rows * 3))
    parts = [{tuple(signal.ravel()) for signal in getattr(data, part).images} for part in SPLITS]
    assert sum(map(len, parts)) == 30 and len(set.union(*parts)) == 30


def test_an_npz_has_channels_groups_and_splits(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 7, 2)), np.arange(40) % 4
    groups = np.repeat(np.arange(10), 4)
    file = tmp_path / "x.npz"
    np.savez(file, x=x, y=y, groups=groups)
    data = load_dataset(DataConfig(name=f"signals:{file}"))
    assert data.train.images.shape[1:] == (7, 2) and data.classes == ("0", "1", "2", "3")
    owners = [set(getattr(data, part).patients.tolist()) for part in SPLITS]
    assert sum(map(len, owners)) == 10 and len(set.union(*owners)) == 10
    for part in (data.train, data.val, data.test):
        rows = [int(name.removeprefix("row ")) for name in part.names]
        np.testing.assert_array_equal(part.images, x[rows].astype(np.float32))
        np.testing.assert_array_equal(part.labels, y[rows])
        np.testing.assert_array_equal(part.patients, groups[rows])

    split = np.array(["train"] * 20 + ["validation"] * 8 + ["test"] * 12)
    np.savez(file, x=x[..., 0], y=y, split=split)
    data = load_signals(file)
    assert (len(data.train), len(data.val), len(data.test)) == (20, 8, 12)
    np.testing.assert_array_equal(data.val.images[..., 0], x[20:28, :, 0].astype(np.float32))


def test_a_class_too_small_for_every_split_is_kept_and_named(tmp_path):
    rows = make_rows()
    rows[4][0] = rows[9][0] = 7
    with pytest.warns(UserWarning, match=r"class 7 has too few .*: 1 train, 0 val, 1 test"):
        data = load_signals(write_csv(tmp_path / "a.csv", rows))
    assert data.classes == ("-1", "2", "7")
    assert data.source.endswith("; class 7: 1 train, 0 val, 1 test")
    assert [np.sum(getattr(data, part).labels == 2) for part in SPLITS] == [1, 0, 1]


@needs(ECG)
def test_real_heartbeats():
    with pytest.warns(UserWarning, match="class 4 has too few"):
        data = load_signals(ECG)
    assert (len(data.train), len(data.val), len(data.test)) == (350, 50, 100)
    assert data.size_text == "140 samples" and data.classes == ("0", "1", "2", "3", "4")
    counts = sum(np.bincount(getattr(data, part).labels, minlength=5) for part in SPLITS)
    assert counts.tolist() == [292, 177, 10, 19, 2]
    first = rows_of(data)["line 1"]
    np.testing.assert_array_equal(first[:3], np.array([0, -0.11252, -2.8272], np.float32))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda rows: [], r"a.csv holds no signals"),
        (lambda rows: [["label", "v1"], *rows], "line 1: the class 'label' is no integer"),
        (change(2, 0, 1.5), "line 3: the class '1.5' is no integer"),
        (change(2, 0, "inf"), "line 3: the class 'inf' is no integer"),
        (change(2, 0, "1e20"), "line 3: the class '1e20' is no integer of 64 bits"),
        (change(6, 3, "nan"), "line 7: sample 3 of 5 is nan; fill it in"),
        (change(6, 3, "1e300"), "line 7: sample 3 of 5 is 1e.300"),
        (change(6, 3, ""), "line 7: .*could not convert string to float"),
        (lambda rows: [*rows[:4], rows[4][:-1], *rows[5:]], "line 5: 4 samples, but line 1 has 5"),
        (lambda rows: [[row[0]] for row in rows], "holds no signals"),
        (lambda rows: [[0, *row[1:]] for row in rows], "only the class 0"),
        (lambda rows: rows[:2], "2 examples in 2 groups are too few"),
    ],
)
def test_a_bad_csv_is_named_with_row_and_remedy(changed, message, tmp_path):
    with pytest.raises(UsageError, match=message) as error:
        load_signals(write_csv(tmp_path / "a.csv", changed(make_rows())))
    assert str(tmp_path / "a.csv") in str(error.value)


GOOD = {"x": np.ones((6, 4)), "y": np.arange(6) % 2}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": GOOD["x"]}, "lacks y; an npz has x"),
        ({**GOOD, "group": GOOD["y"]}, "has the unknown array group; an npz has x"),
        ({**GOOD, "x": np.ones((6, 4, 2, 2))}, r"x is float64 \(6, 4, 2, 2\)"),
        ({**GOOD, "x": np.full((6, 4), "a")}, "x is <U1"),
        ({**GOOD, "x": np.ones((6, 0))}, r"x is float64 \(6, 0\)"),
        ({"x": np.ones((0, 4)), "y": np.arange(0)}, r"x is float64 \(0, 4\)"),
        ({**GOOD, "x": 1e9 + np.arange(24.0).reshape(6, 4)}, "channel 0 has .*subtract an offset"),
        ({**GOOD, "x": np.array([[1], [1, 2]], object)}, "is damaged .*Object arrays"),
        ({**GOOD, "y": np.arange(5)}, r"y is \(5,\), for 6 signals"),
        ({**GOOD, "y": np.linspace(0, 1, 6)}, "the classes y are float64; make them integers"),
        ({**GOOD, "split": np.full(6, "trian")}, "row 0: split 'trian'; choose train"),
        ({**GOOD, "x": np.array([[1, np.nan]] * 6)}, "row 0: sample 2 of 2 is nan"),
        (
            {**GOOD, "groups": np.zeros(6, int), "split": np.array(["train", "test"] * 3)},
            "the group 0 is in two splits",
        ),
    ],
)
def test_a_bad_npz_is_named_with_the_remedy(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UsageError, match=message) as error:
        load_signals(tmp_path / "a.npz")
    assert str(tmp_path / "a.npz") in str(error.value)


def test_a_missing_file_and_one_that_is_no_npz_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"there is no file .*no\.csv"):
        load_signals(tmp_path / "no.csv")
    write_csv(tmp_path / "a.npz", make_rows())
    with pytest.raises(UsageError, match=r"a\.npz is damaged .*an npz has x"):
        load_signals(tmp_path / "a.npz")
