"""The user's own image files, before they are opened: by a folder per class, or by a CSV."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inmerge_jax.data.csv_rows import LINE, group_columns, natural, read_rows
from inmerge_jax.data.images import SUFFIXES
from inmerge_jax.data.splitting import SPLIT_NAMES, split_named
from inmerge_jax.errors import UsageError

_OTHER_IMAGES = (".bmp", ".dcm", ".gif", ".jp2", ".nii", ".npy", ".tif", ".tiff", ".webp")
_THUMBNAILS = ("@eaDir", "__MACOSX")
"""Folders that systems put next to images."""


@dataclass(frozen=True)
class Listing:
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


def list_folders(root: Path) -> Listing:
    """The images of a folder that has a folder per class, or these in folders of splits.

    Raises:
      UsageError: there is no such folder, a class is empty, or the layout is ambiguous.
    """
    if not root.is_dir():
        raise UsageError(
            f"`data` folder:{root}: there is no such folder or CSV; give the path where it is now"
        )
    folders = _folders(root)
    if any(SPLIT_NAMES.get(name.lower()) == "train" for name in folders):
        found = list(_in_splits(root, folders))
    else:
        for name in folders:
            if name.lower() in SPLIT_NAMES and _folders(folders[name]):
                raise UsageError(
                    f"{root} has folders in {name}, but no folder train: name the folder of the "
                    "training images train, or move the folders of the classes up"
                )
        found = [("train", name, path) for name, path in _in_classes(root, folders)]
    found.sort(key=lambda one: one[2].relative_to(root).as_posix())
    classes = sorted({name for _, name, _ in found}, key=natural)
    index = {name: number for number, name in enumerate(classes)}
    return Listing(
        root,
        root,
        tuple(path.relative_to(root).as_posix() for _, _, path in found),
        tuple(classes),
        np.array([index[name] for _, name, _ in found], np.int32),
        np.array([split for split, _, _ in found]),
    )


def _folders(root: Path) -> dict[str, Path]:
    try:
        found = sorted(path for path in root.iterdir() if path.is_dir())
    except OSError as error:
        raise _unlistable(error) from error
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
        files = [path for path in list_files(folder) if path.suffix.lower() in SUFFIXES]
        if not files:
            raise UsageError(
                f"the class folder {folder} has no PNG or JPEG; add some, or remove it"
            )
        yield from ((name, path) for path in files)


def list_files(folder: Path) -> Iterator[Path]:
    """All visible files in a folder and below.

    Raises:
      UsageError: a link in a circle, a folder or a format that is not read, or a name that is no
        UTF-8.
    """

    def refuse(error: OSError) -> None:
        raise _unlistable(error) from error

    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
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


def _unlistable(error: OSError) -> UsageError:
    return UsageError(
        f"the folder {error.filename} cannot be read: {error.strerror}; allow it, or move it away"
    )


def list_csv(path: Path) -> Listing:
    """The images that a CSV names, see `folder.load_folder`.

    Raises:
      UsageError: a column, a cell or a file is missing, or a path is given twice.
    """
    columns, rows = read_rows(path)
    if "path" not in columns:
        raise UsageError(
            f"{path} has no column path; its header is {', '.join(columns) or 'empty'}. Name the "
            "columns path, label, mask or one per label, and if you like group and split"
        )
    groups = group_columns(path, columns)
    _check_paths(path, rows)
    rows.sort(key=lambda row: row["path"])
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
    return Listing(
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
        row["path"] = os.path.normpath(row["path"])


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
