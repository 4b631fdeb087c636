"""The common format of all data sets."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from inmerge_jax.data.images import RowImages
from inmerge_jax.modality import SIZE_UNITS, Modality

TASKS = (
    *("multi-class", "binary-class", "ordinal-regression", "segmentation"),
    "multi-label, binary-class",
)

_UINT8, _FLOAT32 = np.dtype(np.uint8), np.dtype(np.float32)
_MODALITY: Mapping[tuple[np.dtype, int], Modality] = MappingProxyType(
    {(_UINT8, 4): "image", (_UINT8, 5): "volume", (_FLOAT32, 3): "signal", (_FLOAT32, 2): "table"}
)
"""Modality of a split by dtype and number of axes of its examples."""


@dataclass(frozen=True)
class Split:
    """Examples and labels of one split.

    Attributes:
      images: the examples. Images are uint8 (n, height, width, channels), volumes uint8
        (n, depth, height, width, channels); signals are float32 (n, time, channels), rows of a
        table float32 (n, features). A NumPy array, or an object that reads rows on indexing
        (`images.RowImages`).
      labels: int32 (n,), or uint8 (n, classes) of 0 and 1 for multi-label tasks, or masks of class
        indices, uint8 (n, height, width) or (n, depth, height, width).
      patients: int (n,), patient number of each image; None if unknown.
      names: n names of the images; None if they have none.
    """

    images: np.ndarray | RowImages
    labels: np.ndarray
    patients: np.ndarray | None = None
    names: Sequence[str] | None = None

    def __post_init__(self):
        if (self.images.dtype, self.images.ndim) not in _MODALITY:
            raise ValueError(
                "images must be uint8 (n, height, width, channels), or with a depth before them; "
                "signals float32 (n, time, channels); tables float32 (n, features); found "
                f"{self.images.dtype} {self.images.shape}"
            )
        if self.labels.dtype != (np.int32 if self.labels.ndim == 1 else np.uint8):
            raise ValueError(
                "labels must be int32 (n,) or uint8 (n, classes), masks uint8 (n, height, width) "
                f"or with a depth before them; found {self.labels.dtype} {self.labels.shape}"
            )
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels")
        if self.labels.ndim > 2 and self.labels.shape != self.images.shape[:-1]:
            raise ValueError(
                f"masks of size {self.labels.shape[1:]} for images of size "
                f"{self.images.shape[1:-1]}"
            )
        if self.patients is not None and self.patients.shape != (len(self.images),):
            raise ValueError(
                f"patients must be (n,), one for each of the {len(self.images)} images, found "
                f"{self.patients.shape}"
            )

        if self.names is not None and len(self.names) != len(self.images):
            raise ValueError(f"{len(self.images)} images but {len(self.names)} names")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def modality(self) -> Modality:
        """What the examples are: images, volumes, signals or rows of a table."""
        return _MODALITY[self.images.dtype, self.images.ndim]

    @property
    def in_memory(self) -> bool:
        """Whether the images are in memory."""
        return isinstance(self.images, np.ndarray)


def plain(name: str) -> str:
    """The name with dashes for all but letters and digits, so that it can name a data set."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "images"


def names_sha256(names: Iterable[str]) -> str:
    """SHA-256 of the sorted names, one per line."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


@dataclass(frozen=True)
class Dataset:
    """A data set of three splits, for classification or segmentation.

    Attributes:
      name: name of the data set, such as "breastmnist" or "phantom"; part of the names of score
        files.
      size: height and width of an image or volume in pixels, length of a signal in samples, or
        number of features of a table.
      task: one of `TASKS` (MedMNIST's names, and "segmentation").
      classes: one name per column of the network's scores; of masks, the first is "background".
      train: training split.
      val: validation split, for the choice of checkpoints.
      test: test split, for results.
      source: origin of the data: a file and its MD5, or a generator and its settings.
      note: remark for every reader of a result, or "".
      split_name: name of the split, if the data set has several, or "".
      full_counts: images per split in the complete data set; None if none can be missing.
      test_names_sha256: `names_sha256` of the test images, or "" if they have no names.
      fingerprint: SHA-256 of the content, which must be equal when a run resumes; "" if the options
        determine the content.
      features: names of the features of a table; () for other data.
      bits: bits that the values of grey image files of 16 bits use, 8 for files of 8 bits; None for
        data that are no image files.
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
    features: tuple[str, ...] = ()
    bits: int | None = None

    def __post_init__(self):
        if not self.name or set(self.name) & set("_@/"):  # They separate parts of file names.
            raise ValueError(
                f"a data set's name is not empty, without '_', '@', '/': {self.name!r}"
            )
        if self.task not in TASKS:
            raise ValueError(f"unknown task {self.task!r}; known: {TASKS}")
        if self.task == "binary-class" and len(self.classes) != 2:
            raise ValueError(f"a binary-class task has 2 classes, not {len(self.classes)}")
        if self.segmentation != (self.train.labels.ndim > 2):
            raise ValueError(f"{self.task}: labels of shape {self.train.labels.shape}")

    @property
    def modality(self) -> Modality:
        """What the examples are: images, volumes, signals or rows of a table."""
        return self.train.modality

    @property
    def channels(self) -> int:
        """Number of channels: 1 for grey images, 3 for RGB; of a table, number of features."""
        return self.train.images.shape[-1]

    @property
    def size_text(self) -> str:
        """The size with its unit, such as "28 px"."""
        return f"{self.size} {SIZE_UNITS[self.modality]}"

    @property
    def num_classes(self) -> int:
        """Number of columns of the network's scores; 2 for a binary-class task."""
        return len(self.classes)

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.task == "multi-label, binary-class"

    @property
    def segmentation(self) -> bool:
        """Whether the labels are masks."""
        return self.task == "segmentation"

    @property
    def title(self) -> str:
        """Title of results: the name, and the note if there is one."""
        return f"{self.name} ({self.note})" if self.note else self.name
