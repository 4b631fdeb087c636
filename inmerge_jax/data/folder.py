"""A data set of the user's own image files: a folder per class, or a CSV."""

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from inmerge_jax.data.csv_rows import LINE, group_columns, natural, read_rows
from inmerge_jax.data.dataset import Dataset, Split, names_sha256, plain
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
    SPLIT_NAMES,
    SPLITS,
    add_splits,
    check_classes,
    check_training_classes,
    split_named,
)
from inmerge_jax.errors import UsageError

_OTHER_IMAGES = (".bmp", ".dcm", ".gif", ".jp2", ".nii", ".npy", ".tif", ".tiff", ".webp")
_SAMPLE = 64
"""Number of 16-bit images that are read to find the bits that they use."""
_THREADS = 8
_THUMBNAILS = ("@eaDir", "__MACOSX")
"""Folders that systems put next to images."""


@dataclass(frozen=True)
class _Listing:
    """The images of a data set.

    Attributes:
      source: the folder or CSV, for errors.
      root: folder that `names` are relative to.
      names: n paths, sorted.
      classes: names of the classes.
      labels: int32 (n,), or uint8 (n, classes) of 0 and 1.
      splits: n names of `SPLITS`.
      groups: n names of groups; None without.
      masks: n paths of masks, in place of classes and labels; None without.
    """

    source: Path
    root: Path
    names: tuple[str, ...]
    classes: tuple[str, ...]
    labels: np.ndarray
    splits: np.ndarray
    groups: tuple[str, ...] | None = None
    masks: tuple[str, ...] | None = None


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
      UserWarning: images in memory are in two splits, under different names.

    Raises:
      UsageError: an image cannot be read or has another mode, a class is empty, a label is missing,
        a path occurs twice, a group is in two splits; the message names the file.
    """
    listing = _from_csv(place) if place.is_file() else _from_folders(place)
    source = str(listing.source)
    masks = None
    if listing.masks is not None:
        decoder = _make_decoder(listing, size, channels, resize, bits)
        listing, masks = _with_masks(listing, listing.masks, decoder.size)
    check_classes(listing.classes, listing.labels, source)
    keys = _portable(listing.names) if listing.groups is None else listing.groups
    splits = add_splits(listing.splits, listing.labels, keys, source)
    check_training_classes(listing.classes, listing.labels, splits, source)
    if masks is not None and not (seen := listing.labels[splits == "train"].any(0)).all():
        raise UsageError(
            f"{source}: no training mask has {listing.classes[int(seen.argmin())]}; give one, or "
            "assign the images to other splits"
        )
    if masks is None:
        decoder = _make_decoder(listing, size, channels, resize, bits)
    rows = {name: np.flatnonzero(splits == name) for name in SPLITS}
    names = {name: tuple(listing.names[row] for row in rows[name].tolist()) for name in SPLITS}
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


def _with_masks(listing: _Listing, names: Sequence[str], size: int) -> tuple[_Listing, np.ndarray]:
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
    paths = _files(place) if place.is_dir() else [place]
    found = sorted(path for path in paths if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UsageError(f"{place}: no PNG or JPEG there; give an image file or a folder of them")
    names = tuple(path.relative_to(root).as_posix() for path in found)
    none = np.zeros(len(names), np.int32)
    listing = _Listing(place, root, names, (), none, none)
    return FileImages(root, names, _make_decoder(listing, size, channels, resize, bits))


def _fingerprint(
    listing: _Listing, splits: np.ndarray, images: Sequence[np.ndarray | RowImages]
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
    listing: _Listing,
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


def _from_folders(root: Path) -> _Listing:
    if not root.is_dir():
        raise UsageError(
            f"`data` folder:{root}: there is no such folder or CSV; give the path where it is now"
        )
    folders = _folders(root)
    if any(SPLIT_NAMES.get(name.lower()) == "train" for name in folders):
        found = list(_in_splits(root, folders))
    else:
        found = [("train", name, path) for name, path in _in_classes(root, folders)]
    found.sort(key=lambda one: one[2].relative_to(root).as_posix())
    classes = sorted({name for _, name, _ in found}, key=natural)
    index = {name: number for number, name in enumerate(classes)}
    return _Listing(
        root,
        root,
        tuple(path.relative_to(root).as_posix() for _, _, path in found),
        tuple(classes),
        np.array([index[name] for _, name, _ in found], np.int32),
        np.array([split for split, _, _ in found]),
    )


def _folders(root: Path) -> dict[str, Path]:
    found = sorted(path for path in root.iterdir() if path.is_dir())
    return {path.name: path for path in found if not path.name.startswith((".", *_THUMBNAILS))}


def _in_splits(root: Path, folders: dict[str, Path]) -> Iterator[tuple[str, str, Path]]:
    seen: dict[str, str] = {}
    for name, path in folders.items():
        split = SPLIT_NAMES.get(name.lower())
        if split is None:
            raise UsageError(f"{root} has the folders train and {name}; name it val or test")
        if split in seen:
            raise UsageError(f"{root} has the folders {seen[split]} and {name}; keep one")
        seen[split] = name
        for label, file in _in_classes(path, _folders(path)):
            yield split, label, file


def _in_classes(root: Path, folders: dict[str, Path]) -> Iterator[tuple[str, Path]]:
    if not folders:
        raise UsageError(
            f"{root} has no folders: give one folder of images per class, or name a CSV as "
            "folder:PATH/labels.csv"
        )
    loose = [path for path in root.iterdir() if path.suffix.lower() in SUFFIXES]
    if loose := [path for path in loose if path.is_file() and not path.name.startswith(".")]:
        raise UsageError(f"{min(loose)} is in no class folder, but next to them; move or remove it")
    for name, folder in folders.items():
        if inner := [one for one in _folders(folder) if one.lower() in SPLIT_NAMES]:
            raise UsageError(
                f"{folder / inner[0]}: a split inside a class; put the classes into the splits, as "
                f"{root / inner[0] / name}"
            )
        files = [path for path in _files(folder) if path.suffix.lower() in SUFFIXES]
        if not files:
            raise UsageError(
                f"the class folder {folder} has no PNG or JPEG; add some, or remove it"
            )
        yield from ((name, path) for path in files)


def _files(folder: Path) -> Iterator[Path]:
    """All visible files in a folder and below."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            raise UsageError(f"{place} is a link to a folder that is read too; remove the link")
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", *_THUMBNAILS))]
        for name in names:
            path = Path(place) / name
            if name.startswith("."):
                continue
            try:
                os.fspath(path).encode()
            except UnicodeEncodeError as error:
                raise UsageError(f"{str(path)!a}: the name is no UTF-8; rename the file") from error
            if path.suffix.lower() in _OTHER_IMAGES:
                raise UsageError(f"{path}: only PNG and JPEG are read; convert or remove it")
            yield path


def _from_csv(path: Path) -> _Listing:
    columns, rows = read_rows(path)
    if "path" not in columns:
        raise UsageError(
            f"{path} has no column path; its header is {', '.join(columns) or 'empty'}. Name the "
            "columns path, label, mask or one per label, and if you like group and split"
        )
    groups = group_columns(path, columns)
    rows.sort(key=lambda row: row["path"])
    _check_paths(path, rows)
    masks = None
    if "mask" in columns:
        masks = _mask_paths(path, columns, rows)
        classes, labels = (), np.zeros(len(rows), np.int32)
    elif "label" in columns:
        found = [_cell(path, row, "label") for row in rows]
        classes = tuple(sorted(set(found), key=natural))
        index = {name: number for number, name in enumerate(classes)}
        labels = np.array([index[name] for name in found], np.int32)
    else:
        classes = tuple(name for name in columns if name not in ("path", "split", *groups))
        if not classes:
            raise UsageError(f"{path} has no column label, nor one of 0 and 1 for each label")
        labels = np.array([[_flag(path, row, name) for name in classes] for row in rows], np.uint8)
    splits = ["train"] * len(rows)
    if "split" in columns:
        splits = [
            split_named(_cell(path, row, "split"), f"{path}, line {row[LINE]}") for row in rows
        ]
    return _Listing(
        path,
        path.parent,
        tuple(row["path"] for row in rows),
        classes,
        labels,
        np.array(splits),
        tuple(_cell(path, row, groups[0]) for row in rows) if groups else None,
        masks,
    )


def _mask_paths(
    path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]
) -> tuple[str, ...]:
    """The cells of the column mask; each file must be there."""
    if "label" in columns:
        raise UsageError(
            f"{path} has the columns label and mask: keep label to classify images, or mask to "
            "segment them"
        )
    for row in rows:
        if not (path.parent / _cell(path, row, "mask")).is_file():
            raise UsageError(
                f"{path}, line {row[LINE]}: there is no mask {path.parent / row['mask']}"
            )
    return tuple(row["mask"] for row in rows)


def _check_paths(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Normalises the paths; each must be there, and once."""
    seen: dict[str, int] = {}
    for row in rows:
        name = os.path.normpath(path.parent / _cell(path, row, "path"))
        if name in seen:
            raise UsageError(
                f"{path}, line {row[LINE]}: {row['path']} is in line {seen[name]} too; remove one"
            )
        seen[name] = row[LINE]
        if not Path(name).is_file():
            raise UsageError(f"{path}, line {row[LINE]}: there is no image {name}")


def _cell(path: Path, row: dict[str, Any], column: str) -> str:
    if not row[column]:
        raise UsageError(f"{path}, line {row[LINE]}: the {column} of {row['path']} is missing")
    return row[column]


def _flag(path: Path, row: dict[str, Any], column: str) -> int:
    value = _cell(path, row, column)
    if value not in ("0", "1", "0.0", "1.0"):
        raise UsageError(
            f"{path}, line {row[LINE]}: {column} is {value!r}; without a column label, every "
            "column but path, group and split holds 0 or 1. Correct or remove it"
        )
    return int(value[0])
