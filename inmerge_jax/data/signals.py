"""Signals, such as heartbeats, from a CSV of the UCR archive's form or an npz."""

import csv
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from inmerge_jax.data.arrays import as_float32, dataset_from_arrays
from inmerge_jax.data.dataset import Dataset, plain
from inmerge_jax.data.splitting import split_named
from inmerge_jax.errors import UsageError
from inmerge_jax.files import read_arrays, read_text

_ARRAYS = ("x", "y", "groups", "split")
_FORM = (
    "an npz has x, float (n, time) or (n, time, channels); y, int (n,); and if you like groups "
    "(n,) and split (n,)"
)
_LARGEST = float(np.finfo(np.float32).max)


class _Signals(NamedTuple):
    """The signals of a file, float64 (n, time, channels), the class of each, and where it is."""

    values: np.ndarray
    classes: np.ndarray
    places: list[str]
    splits: np.ndarray | None = None
    groups: list[str] | None = None


def load_signals(path: Path) -> Dataset:
    """Loads signals of one length, each with a class.

    A CSV has no header and one channel: each row is the class, an integer, then the values
    (separated by commas or tabs; may be gzipped). This is the form of the UCR archive. An npz has
    the arrays x, float (n, time) or (n, time, channels), and y, int (n,). Its optional array
    groups (n,) keeps signals together, such as those of a patient; split (n,) assigns each to
    "train", "val" or "test". Splits that are missing are taken from the training signals, see
    `arrays.dataset_from_arrays`.

    Raises:
      UsageError: the file cannot be read or is empty, signals have different lengths, a value is
        not finite, a class is no integer; the message names the row.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    found = _from_npz(path) if path.suffix == ".npz" else _from_csv(path)
    if not found.values.size:
        raise UsageError(f"{path} holds no signals; each row is a class, then the values")
    wrong = ~(np.abs(found.values) <= _LARGEST)
    if wrong.any():
        row, time, _ = np.argwhere(wrong)[0].tolist()
        raise UsageError(
            f"{path}, {found.places[row]}: sample {time + 1} of {found.values.shape[1]} is "
            f"{found.values[wrong][0]}; fill it in, resample signals that were padded to one "
            "length, or remove the row"
        )
    channels = [f"channel {number}" for number in range(found.values.shape[2])]
    classes, labels = np.unique(found.classes, return_inverse=True)
    return dataset_from_arrays(
        f"signals-{plain(path.name.split('.')[0])}",
        str(path),
        as_float32(found.values, channels, str(path)),
        labels.astype(np.int32),
        [str(one) for one in classes.tolist()],
        names=found.places,
        splits=found.splits,
        groups=found.groups,
    )


def _from_csv(path: Path) -> _Signals:
    text = read_text(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in text else ",")
    classes, values, places, length = [], [], [], 0
    for row in reader:
        if not row:
            continue
        where = f"{path}, line {reader.line_num}"
        classes.append(_class(row[0], where))
        try:
            values.append(np.array(row[1:], np.float64))
        except ValueError as error:
            raise UsageError(f"{where}: {error}; after the class, all are numbers") from error
        length = length or len(values[0])
        if len(values[-1]) != length:
            raise UsageError(
                f"{where}: {len(values[-1])} samples, but {places[0]} has {length}; resample or "
                "cut the signals to one length"
            )
        places.append(f"line {reader.line_num}")
    return _Signals(np.array(values)[..., None], np.array(classes, np.int64), places)


def _class(text: str, where: str) -> int:
    try:
        value = float(text)
        if value == int(value) and abs(value) < 2**63:
            return int(value)
    except (ValueError, OverflowError):
        pass  # As of a number that is no integer.
    raise UsageError(
        f"{where}: the class {text!r} is no integer of 64 bits; there is no header, and "
        "each row is a class, then the values"
    )


def _from_npz(path: Path) -> _Signals:
    arrays = read_arrays(path, _FORM)
    absent = [name for name in ("x", "y") if name not in arrays]
    unknown = [name for name in arrays if name not in _ARRAYS]
    if absent or unknown:
        what = f"lacks {absent[0]}" if absent else f"has the unknown array {unknown[0]}"
        raise UsageError(f"{path} {what}; {_FORM}")
    x, y = arrays["x"], arrays["y"]
    if x.dtype.kind not in "fiu" or x.ndim not in (2, 3) or not x.size:
        raise UsageError(f"{path}: x is {x.dtype} {x.shape}; {_FORM}")
    for name, array in arrays.items():
        if name != "x" and array.shape != (len(x),):
            raise UsageError(f"{path}: {name} is {array.shape}, for {len(x)} signals; {_FORM}")
    if y.dtype.kind not in "iu":
        raise UsageError(f"{path}: the classes y are {y.dtype}; make them integers")
    places = [f"row {row}" for row in range(len(x))]
    splits, groups = arrays.get("split"), arrays.get("groups")
    if splits is not None:
        pairs = zip(splits.tolist(), places, strict=True)
        splits = np.array([split_named(str(split), f"{path}, {place}") for split, place in pairs])
    return _Signals(
        np.asarray(x, np.float64).reshape(*x.shape[:2], -1),
        y,
        places,
        splits,
        None if groups is None else [str(group) for group in groups],
    )
