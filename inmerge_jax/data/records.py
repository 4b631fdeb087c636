"""Data sets of TensorFlow Datasets in ArrayRecord files, opened without TensorFlow."""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# TFDS imports most of itself at first use, which deadlocks if two threads do so at once.
_OPENING = threading.Lock()


@dataclass(frozen=True)
class Records:
    """The records of one split.

    The object can be pickled for worker processes; each opens the shards itself.

    Attributes:
      folder: folder of TFDS's files.
      split: TFDS's name of the split.
      image: name of the image feature, which is not decoded.
    """

    folder: Path
    split: str
    image: str = "image"
    _opened: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def open(self) -> Any:
        """Opens TFDS's data source of the shards, once for all threads."""
        if "source" not in self._opened:
            with _OPENING:
                if "source" not in self._opened:
                    self._opened["source"] = self._source()
        return self._opened["source"]

    def _source(self) -> Any:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self.folder)
        skip = {self.image: tfds.decode.SkipDecoding()}
        return builder.as_data_source(self.split, decoders=skip)
