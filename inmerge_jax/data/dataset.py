"""One shape of data set for every source."""

from dataclasses import dataclass

import numpy as np

TASKS = ("multi-class", "binary-class", "ordinal-regression", "multi-label, binary-class")


@dataclass(frozen=True)
class Split:
    """Images and labels of one split, all in memory.

    Attributes:
      images: uint8, (n, height, width, channels).
      labels: int32 (n,), or uint8 (n, classes) of zeros and ones for multi-label tasks.
    """

    images: np.ndarray
    labels: np.ndarray

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

    def __len__(self) -> int:
        return len(self.images)


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
