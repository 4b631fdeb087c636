"""Reads a built data set: labels in memory, images from the shards on demand."""

import io
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from inmerge_jax.data.chestxray14.images import decode
from inmerge_jax.data.chestxray14.labels import ALL_IMAGES, FINDINGS
from inmerge_jax.data.chestxray14.manifest import (
    MANIFEST,
    check_metadata,
    check_shards,
    read_index,
    read_manifest,
)
from inmerge_jax.data.chestxray14.splits import PARTS
from inmerge_jax.data.dataset import Dataset, Split, names_sha256
from inmerge_jax.errors import UsageError

# TFDS imports most of itself at first use, which deadlocks if two threads do so at once.
_OPENING = threading.Lock()


def load_chestxray14(folder: Path, *, size: int | None = None) -> Dataset:
    """Opens a built data set.

    Args:
      folder: output folder of the build.
      size: height and width in pixels to which images are reduced on reading; None for the size of
        the build.

    Raises:
      UsageError: the folder is not a finished build; the manifest, the index or TFDS's JSON files
        were changed; a shard is truncated; or `size` exceeds that of the build.
    """
    folder = Path(folder).expanduser()
    manifest = _read_manifest(folder)
    check_shards(folder, manifest)
    with np.load(io.BytesIO(read_index(folder, manifest)), allow_pickle=False) as index:
        arrays = {name: index[name] for name in index.files}
    size = manifest["size"] if size is None else size
    if not 1 <= size <= manifest["size"]:
        raise UsageError(
            f"`size` {size}: {folder} was built at {manifest['size']} px; choose 1 to "
            f"{manifest['size']}, or build another folder with a larger size"
        )
    splits = {
        part: Split(
            RecordImages(folder / manifest["records"], part, arrays[f"{part}_names"], size),
            arrays[f"{part}_labels"],
            arrays[f"{part}_patients"],
            arrays[f"{part}_names"].tolist(),
        )
        for part in PARTS
    }
    for split in splits.values():
        split.images.open()  # Here, before threads that read in advance import anything.
    here = sum(manifest["counts"].values())
    subset = f", a subset: {here:,} of its {ALL_IMAGES:,} images" if here < ALL_IMAGES else ""
    return Dataset(
        name="chestxray14",
        size=size,
        task="multi-label, binary-class",
        classes=FINDINGS,
        **splits,
        source=f"{folder.name}, content SHA-256 {manifest['content_sha256']}",
        note=f"split {manifest['split']}{subset}",
        split_name=manifest["split"],
        full_counts=manifest["full_counts"],
        test_names_sha256=names_sha256(arrays["test_names"].tolist()),
        fingerprint=manifest["content_sha256"],
    )


@dataclass(frozen=True)
class RecordImages:
    """The images of one split, uint8 (n, size, size, 1), read on indexing.

    The object can be pickled for worker processes; each opens the shards itself.

    Attributes:
      folder: folder of TFDS's files.
      split: "train", "val" or "test".
      names: names of the images, in the order of the records.
      size: height and width in pixels.
    """

    folder: Path
    split: str
    names: np.ndarray
    size: int
    _opened: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    dtype = np.dtype(np.uint8)
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the array."""
        return (len(self.names), self.size, self.size, 1)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> np.ndarray:
        """One image (size, size, 1) for an integer, else (k, size, size, 1).

        Raises:
          UsageError: a record cannot be read, or holds another image.
        """
        if isinstance(index, int | np.integer):
            return self._read(range(len(self))[index])
        rows = np.arange(len(self))[index]
        images = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for place, row in enumerate(rows.tolist()):
            images[place] = self._read(row)
        return images

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def _read(self, row: int) -> np.ndarray:
        where = f"{self.folder}: record {row} of {self.split}, {self.names[row]},"
        try:
            example = self.open()[row]
        except RuntimeError as error:
            raise UsageError(f"{where} is damaged: {error}; build the data set again") from error
        found = example["name"].decode()
        if found != self.names[row]:
            raise UsageError(f"{where} is {found} instead; build the data set again")
        try:
            return decode(example["image"], self.size)[..., None]
        except ValueError as error:
            raise UsageError(f"{where} is damaged: {error}; build the data set again") from error

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
        skip = {"image": tfds.decode.SkipDecoding()}
        return builder.as_data_source(self.split, decoders=skip)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(
            f"`data_dir` {folder} holds no finished ChestX-ray14 ({MANIFEST} is missing); build it "
            "with the command inmerge data build, which continues an interrupted build"
        )
    manifest = read_manifest(folder)
    check_metadata(folder, manifest)
    return manifest
