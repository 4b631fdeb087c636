"""Reads a built data set: labels in memory, images from the shards on demand."""

import io
from dataclasses import dataclass
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
from inmerge_jax.data.images import RowImages
from inmerge_jax.data.records import Records
from inmerge_jax.errors import UsageError


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
    records = folder / manifest["records"]
    splits = {
        part: Split(
            RecordImages(Records(records, part), arrays[f"{part}_names"], size),
            arrays[f"{part}_labels"],
            arrays[f"{part}_patients"],
            arrays[f"{part}_names"].tolist(),
        )
        for part in PARTS
    }
    for split in splits.values():
        split.images.records.open()  # Here, before threads that read in advance import anything.
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
class RecordImages(RowImages):
    """The images of one split, uint8 (n, size, size, 1), read on indexing.

    Attributes:
      records: the records of the split.
      names: names of the images, in the order of the records.
      size: height and width in pixels.
    """

    records: Records
    names: np.ndarray
    size: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the array."""
        return (len(self.names), self.size, self.size, 1)

    def read(self, row: int) -> np.ndarray:
        """Image number `row`.

        Raises:
          UsageError: the record cannot be read, or holds another image.
        """
        records = self.records
        where = f"{records.folder}: record {row} of {records.split}, {self.names[row]},"
        try:
            example = records.open()[row]
        except RuntimeError as error:
            raise UsageError(f"{where} is damaged: {error}; build the data set again") from error
        found = example["name"].decode()
        if found != self.names[row]:
            raise UsageError(f"{where} is {found} instead; build the data set again")
        try:
            return decode(example["image"], self.size)[..., None]
        except ValueError as error:
            raise UsageError(f"{where} is damaged: {error}; build the data set again") from error


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
