"""One shape of data set for every source."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

TASKS = ("multi-class", "binary-class", "ordinal-regression", "multi-label, binary-class")


class Images(Protocol):
    """What a split asks of its images: a NumPy array has it, and so has one that reads files."""

    dtype: np.dtype
    ndim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, height, width, channels)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> np.ndarray: ...


@dataclass(frozen=True)
class Split:
    """Images and labels of one split.

    Attributes:
      images: uint8, (n, height, width, channels); a NumPy array where all are in memory, or an
        object that reads the rows it is indexed with (`chestxray14.records.RecordImages`).
      labels: int32 (n,), or uint8 (n, classes) of zeros and ones for multi-label tasks.
      patients: int (n,), whose image each is, where that is known; None where not.
    """

    images: np.ndarray | Images
    labels: np.ndarray
    patients: np.ndarray | None = None

    def __post_init__(self):
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise ValueError(
                "images must be uint8 (n, height, width, channels), "
                f"found {self.images.dtype} {self.images.shape}"
            )
        expected = {1: np.int32, 2: np.uint8}.get(self.labels.ndim)
        if expected is None or self.labels.dtype != expected:
            raise ValueError(
                "labels must be int32 (n,) or uint8 (n, classes), "
                f"found {self.labels.dtype} {self.labels.shape}"
            )
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels")
        if self.patients is not None and self.patients.shape != (len(self.images),):
            raise ValueError(
                f"patients must be (n,), one of each of the {len(self.images)} images, found "
                f"{self.patients.shape}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def in_memory(self) -> bool:
        """Whether all images are at hand, so that no batch waits for files."""
        return isinstance(self.images, np.ndarray)


def names_sha256(names: Iterable[str]) -> str:
    """SHA-256 of the sorted names, one a line: the same images give the same one."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


@dataclass(frozen=True)
class Dataset:
    """A classification data set of three splits.

    Attributes:
      name: as the command line knows it, "breastmnist" or "phantom".
      size: height and width of the images in pixels.
      task: one of `TASKS`, in MedMNIST's words.
      classes: a name per column of the network's scores.
      train: what gradients are computed on.
      val: what checkpoints are chosen on.
      test: what results are reported on.
      source: where the data came from: a file and its MD5, or a generator and its settings.
      note: what every reader of a result must know about the data; empty where nothing.
      split_name: of the way the images were divided, where a data set knows several.
      full_counts: images of each split in the whole data set; None where nothing can be missing.
      test_names_sha256: `names_sha256` of the test images; empty where they have no names.
      fingerprint: SHA-256 of the content, which a resumed run must find again; empty where the
        options decide it.
    """

    name: str
    size: int
    task: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    source: str
    note: str = ""
    split_name: str = ""
    full_counts: Mapping[str, int] | None = None
    test_names_sha256: str = ""
    fingerprint: str = ""

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r} is none of {TASKS}")
        if self.task == "binary-class" and len(self.classes) != 2:
            raise ValueError(f"a binary-class task has 2 classes, not {len(self.classes)}")

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for RGB."""
        return self.train.images.shape[-1]

    @property
    def num_classes(self) -> int:
        """Columns of the network's scores; 2 for a binary-class task."""
        return len(self.classes)

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several findings at once, or none."""
        return self.task == "multi-label, binary-class"

    @property
    def title(self) -> str:
        """What to print above a result: the name, and the note where there is one."""
        return f"{self.name} ({self.note})" if self.note else self.name
