"""Three named splits into training, validation and test, checked to share no patient."""

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

import numpy as np

from inmerge_jax.data.chestxray14.labels import FINDINGS, Labels, refuse_duplicates, some
from inmerge_jax.errors import UsageError
from inmerge_jax.files import read_text

SplitName = Literal["chexnet", "nih_official", "patient_hash"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
PARTS = ("train", "val", "test")


def assign(split: str, labels: Labels, lists: Path | None) -> dict[str, np.ndarray]:
    """Assigns the rows of `labels` to training, validation and test.

    Args:
      split: "chexnet": train_list.txt, val_list.txt and test_list.txt. "nih_official":
        train_val_list.txt and test_list.txt; an eighth of the former's patients validate.
        "patient_hash": 70, 10 and 20 % of the patients by a hash of their number.
      labels: labels of all images.
      lists: folder of the lists, plain or gzipped (.gz); None for patient_hash. A line names an
        image; a folder before the name and 14 labels after it are ignored.

    Returns:
      Ascending int64 rows by "train", "val" and "test". Images on no list are left out.

    Raises:
      UsageError: the split is unknown; a list is missing or damaged, names an image twice or an
        image without labels; a patient is in two parts; or `lists` is given for patient_hash.
    """
    if split == "patient_hash":
        if lists is not None:
            raise UsageError(f"`lists` {lists}: the split patient_hash reads no list; leave it out")
        place = hash_places(labels.patients)
        bounds = {"train": (0.0, 0.7), "val": (0.7, 0.8), "test": (0.8, 1.0)}
        return {
            part: np.flatnonzero((low <= place) & (place < high))
            for part, (low, high) in bounds.items()
        }
    if split not in SPLITS:
        raise UsageError(f"`split` {split}: unknown; choose one of {', '.join(SPLITS)}")
    if lists is None:
        raise UsageError(f"the split {split} needs `lists`, the folder of its lists of images")
    rows = {name: row for row, name in enumerate(labels.names)}
    if split == "chexnet":
        parts = {part: _read_list(Path(lists), f"{part}_list.txt", rows, labels) for part in PARTS}
    else:
        both = _read_list(Path(lists), "train_val_list.txt", rows, labels)
        validates = hash_places(labels.patients[both]) < 1 / 8
        test = _read_list(Path(lists), "test_list.txt", rows, labels)
        parts = {"train": both[~validates], "val": both[validates], "test": test}
    check_patients({part: labels.patients[found] for part, found in parts.items()}, str(lists))
    return parts


def hash_places(patients: np.ndarray) -> np.ndarray:
    """Maps patient numbers to [0, 1) by a hash, float64 (n,); platform-independent."""
    numbers, inverse = np.unique(patients, return_inverse=True)
    digests = (hashlib.sha256(str(number).encode()).digest() for number in numbers.tolist())
    places = [int.from_bytes(digest[:6], "big") / 2**48 for digest in digests]
    return np.array(places, np.float64)[inverse]


def check_patients(patients: dict[str, np.ndarray], source: str) -> None:
    """Raises UsageError if a patient is in two parts."""
    parts = list(patients)
    for index, first in enumerate(parts):
        for second in parts[index + 1 :]:
            shared = np.intersect1d(patients[first], patients[second])
            if shared.size:
                raise UsageError(
                    f"{source}: {some([str(p) for p in shared.tolist()], 'patient')} in both "
                    f"{first} and {second}; each patient may be in one part only"
                )


def _read_list(folder: Path, name: str, rows: dict[str, int], labels: Labels) -> np.ndarray:
    folder = folder.expanduser()
    found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if not found:
        raise UsageError(f"`lists` {folder}: there is neither {name} nor {name}.gz in it")
    names = [_listed(found[0], line) for line in read_text(found[0]).splitlines() if line.strip()]
    refuse_duplicates(found[0], names)
    unknown: Sequence[str] = [image for image in names if image not in rows]
    if unknown:
        raise UsageError(f"{found[0]} names {some(unknown, 'image')} that {labels.path} lacks")
    if not names:
        raise UsageError(f"{found[0]} names no image")
    return np.array(sorted(rows[image] for image in names), np.int64)


def _listed(path: Path, line: str) -> str:
    """The image that a line of a list names, without its folder and the labels that follow it."""
    name, *values = line.split()
    if set(values) - {"0", "1"} or len(values) not in (0, len(FINDINGS)):
        raise UsageError(
            f"{path}: the line {line.strip()[:80]!r} holds no image name, alone or followed by "
            f"{len(FINDINGS)} labels of 0 and 1; give NIH's lists or those of CheXNet"
        )
    return PurePosixPath(name).name
