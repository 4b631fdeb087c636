"""A data set of the user's own image files: a folder per class, or a CSV."""

import hashlib
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from inmerge_jax.data.dataset import Dataset, Split, names_sha256, plain
from inmerge_jax.data.image_listing import Listing, list_csv, list_files, list_folders
from inmerge_jax.data.images import (
    SUFFIXES,
    Decoder,
    Resize,
    RowImages,
    kept_in_memory,
    read_kind,
    used_bits,
)
from inmerge_jax.data.masks import read_masks
from inmerge_jax.data.splitting import (
    SPLITS,
    add_splits,
    check_classes,
    check_training_classes,
    warn_of_incomplete_classes,
)
from inmerge_jax.errors import UsageError

_SAMPLE = 64
"""Number of 16-bit images that are read to find the bits that they use."""
_THREADS = 8


@dataclass(frozen=True)
class FileImages(RowImages):
    """Image files, decoded on indexing.

    Attributes:
      root: folder that `names` are relative to.
      names: paths of the files.
      decoder: decodes a file.
    """

    root: Path
    names: tuple[str, ...]
    decoder: Decoder

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return (len(self.names), *self.decoder.shape)

    def read(self, row: int) -> np.ndarray:
        """Image number `row`.

        Raises:
          UsageError: the file cannot be read.
        """
        return self.decoder.read(self.root / self.names[row])


def load_folder(
    place: Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    resize: Resize | None,
    bits: int | None = None,
) -> Dataset:
    """Opens the PNG and JPEG files of a folder or a CSV.

    A folder has one folder of images per class. It may have these in folders train, val and test.
    A CSV has a column "path", relative to its folder, and either "label" (the class), one column of
    0 and 1 per label, or "mask" (a PNG of class indices, see `masks.read_masks`). A column "group"
    keeps the images of a patient together; a column "split" assigns images to train, val or test.
    Splits that are missing are taken from the training images, see `splitting.add_splits`.

    Images are resized to squares. Up to `images.IN_MEMORY` bytes they are decoded here; of more
    images, only the headers are read here, and files that are cut short are found.

    Args:
      place: the folder or the CSV.
      size: height and width in pixels; None if all images are squares of one size.
      channels: 1 or 3; None for that of the images.
      resize: interpolation; None for bilinear.
      bits: bits that 16-bit images use, as in `Dataset.bits`; None to find them.

    Warns:
      UserWarning: images in memory are in two splits, under different names; a class is not in all
        splits.

    Raises:
      UsageError: an image cannot be read or has another mode, a class is empty, a label is missing,
        a path occurs twice, a group is in two splits; the message names the file.
    """
    listing = list_csv(place) if place.is_file() else list_folders(place)
    source = str(listing.source)
    masks = None
    if listing.masks is not None:
        decoder = _make_decoder(listing, size, channels, resize, bits)
        listing, masks = _with_masks(listing, listing.masks, decoder.size)
    check_classes(listing.classes, listing.labels, source)
    keys = _portable(listing.names) if listing.groups is None else listing.groups
    splits = add_splits(listing.splits, listing.labels, keys, source)
    check_training_classes(listing.classes, listing.labels, splits, source)
    if masks is not None:
        train = masks[splits == "train"]
        for number, name in enumerate(listing.classes):
            if not (train == number).any():
                raise UsageError(
                    f"{source}: no training mask has {name} at `size` {decoder.size}; choose a "
                    "larger size, give a mask with it, or assign the images to other splits"
                )
    if masks is None:
        decoder = _make_decoder(listing, size, channels, resize, bits)
    rows = {name: np.flatnonzero(splits == name) for name in SPLITS}
    names = {name: tuple(listing.names[row] for row in rows[name].tolist()) for name in SPLITS}
    warn_of_incomplete_classes(listing.classes, listing.labels, splits, source)
    images = kept_in_memory([FileImages(listing.root, names[name], decoder) for name in SPLITS])
    _warn_of_copies(str(listing.source), names, images)
    patients = None
    if listing.groups is not None:
        patients = np.unique(np.array(listing.groups), return_inverse=True)[1]
    parts = {
        name: Split(
            array,
            (listing.labels if masks is None else masks)[rows[name]],
            None if patients is None else patients[rows[name]],
            names[name],
        )
        for name, array in zip(SPLITS, images, strict=True)
    }
    task = "multi-class" if len(listing.classes) > 2 else "binary-class"
    if listing.labels.ndim == 2:
        task = "multi-label, binary-class" if masks is None else "segmentation"
    fingerprint = _fingerprint(listing, splits, [*images, *(() if masks is None else (masks,))])
    return Dataset(
        name=f"folder-{plain(place.stem if place.is_file() else place.resolve().name)}",
        size=decoder.size,
        task=task,
        classes=listing.classes,
        **parts,
        source=f"{place}, {len(listing.names):,} files, SHA-256 {fingerprint}",
        test_names_sha256=names_sha256(names["test"]),
        fingerprint=fingerprint,
        bits=decoder.bits,
    )


def _portable(names: Sequence[str]) -> Sequence[str]:
    """Paths without the folder that absolute ones have in common, so that moved files keep keys."""
    if not all(os.path.isabs(name) for name in names):
        return names
    common = os.path.commonpath([os.path.dirname(name) for name in names])
    return [os.path.relpath(name, common) for name in names]


def _warn_of_copies(
    source: str, names: dict[str, tuple[str, ...]], images: Sequence[np.ndarray | RowImages]
) -> None:
    """Warns of equal images in two splits; of those that are in memory."""
    seen: dict[bytes, tuple[str, str]] = {}
    copies = []
    for split, array in zip(SPLITS, images, strict=True):
        if not isinstance(array, np.ndarray):
            return
        for name, image in zip(names[split], array, strict=True):
            first = seen.setdefault(hashlib.sha256(image).digest(), (split, name))
            if first[0] != split:
                copies.append((*first, split, name))
    if copies:
        there, one, here, other = copies[0]
        warnings.warn(
            f"{source}: {len(copies)} images equal one of another split, such as {other} ({here}) "
            f"and {one} ({there}); remove copies, or give equal images one group in a CSV",
            stacklevel=3,
        )


def _with_masks(listing: Listing, names: Sequence[str], size: int) -> tuple[Listing, np.ndarray]:
    """The listing with its masks' classes, which images have which, and the masks."""
    images, files = ([listing.root / name for name in some] for some in (listing.names, names))
    masks, present = read_masks(images, files, size, str(listing.source))
    classes = ("background", *(f"class_{index}" for index in range(1, present.shape[1])))
    return replace(listing, classes=classes, labels=present), masks


def open_files(
    place: Path,
    *,
    size: int,
    channels: int | None = None,
    resize: Resize | None = None,
    bits: int | None = None,
) -> FileImages:
    """Opens PNG and JPEG files without labels, sorted by name, as `load_folder` does.

    Args:
      place: a file, or a folder of files at any depth.
      size: height and width in pixels that the images are resized to.
      channels: 1 or 3; None for that of the images.
      resize: interpolation; None for bilinear.
      bits: bits that 16-bit images use, as in `Dataset.bits` of the training images; None to find
        them.

    Raises:
      UsageError: there is no image, or one cannot be read or has another mode.
    """
    if not place.exists():
        raise UsageError(f"there is no file or folder {place}")
    root = place if place.is_dir() else place.parent
    paths = list_files(place) if place.is_dir() else [place]
    found = sorted(path for path in paths if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UsageError(f"{place}: no PNG or JPEG there; give an image file or a folder of them")
    names = tuple(path.relative_to(root).as_posix() for path in found)
    none = np.zeros(len(names), np.int32)
    listing = Listing(place, root, names, (), none, none)
    return FileImages(root, names, _make_decoder(listing, size, channels, resize, bits))


def _fingerprint(
    listing: Listing, splits: np.ndarray, images: Sequence[np.ndarray | RowImages]
) -> str:
    """SHA-256 of names, lengths, labels and splits, and of the pixels that are in memory."""
    digest = hashlib.sha256(repr(listing.classes).encode())
    for row, (path, name) in enumerate(zip(listing.names, _portable(listing.names), strict=True)):
        length = (listing.root / path).stat().st_size
        digest.update(f"{name}\n{length} {splits[row]} {listing.labels[row].tolist()}\n".encode())
    for part in images:
        if isinstance(part, np.ndarray):
            digest.update(part)
    return digest.hexdigest()


def _make_decoder(
    listing: Listing,
    size: int | None,
    channels: int | None,
    resize: Resize | None,
    bits: int | None,
) -> Decoder:
    """A decoder for all files, whose headers must agree; grey images keep one channel."""
    paths = [listing.root / name for name in listing.names]
    with ThreadPoolExecutor(_THREADS) as threads:
        kinds = list(threads.map(read_kind, paths))
    first = kinds[0]
    for path, kind in zip(paths, kinds, strict=True):
        deep = "16-bit grey" in (kind.name, first.name)
        if kind.name != first.name and (channels is None or deep):
            remedy = "convert one of them" if deep else "give `channels` 1 or 3 to convert all"
            raise UsageError(f"{path} is {kind.name}, {paths[0]} is {first.name}: {remedy}")
        if size is None and kind[1:] != (first.width, first.width):
            raise UsageError(
                f"{path} has {kind.width} x {kind.height} pixels, and not all images are squares "
                "of one size: give the `size` that they are resized to"
            )
    if bits is None:
        bits = 8
        if first.name == "16-bit grey":
            bits = used_bits(paths[:: -(-len(paths) // _SAMPLE)])
    grey = all(kind.name != "colour" for kind in kinds)
    size = first.width if size is None else size
    return Decoder(size, 1 if grey else channels or 3, resize or "bilinear", bits)
