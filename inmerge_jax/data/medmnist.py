"""The twelve 2-D and six 3-D MedMNIST subsets, from files with verified MD5."""

import difflib
import functools
import hashlib
import json
import os
import tempfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inmerge_jax.data.dataset import Dataset, Split
from inmerge_jax.data.images import Resize, RowImages, kept_in_memory, resized
from inmerge_jax.data.splitting import SPLITS
from inmerge_jax.errors import UsageError
from inmerge_jax.files import DAMAGED_ARCHIVE

MEDMNIST_DIR = Path("~/.medmnist")
_ADDRESS = "https://zenodo.org/records/10519652/files"
SIZES, SIZES_3D = (28, 64, 128, 224), (28, 64)
_OTHERS = ("phantom", "phantom_masks", "phantom3d", "breast_cancer", "chestxray14")


def load_medmnist(
    name: str,
    *,
    size: int = 28,
    data_dir: Path = MEDMNIST_DIR,
    file: Path | None = None,
    download: bool = True,
    allow_unverified: bool = False,
    resize: Resize | None = None,
) -> Dataset:
    """Loads a MedMNIST subset.

    Args:
      name: name of the subset, see `medmnist_names`.
      size: image height and width in pixels, one of `SIZES`; depth too for a 3-D subset, one of
        `SIZES_3D`. Any size with `resize`.
      data_dir: folder of medmnist's npz files ("breastmnist.npz", "breastmnist_64.npz"); a leading
        ~ is expanded.
      file: npz file to read instead; nothing is downloaded.
      download: download a missing file into `data_dir` through the medmnist package.
      allow_unverified: load a file with another MD5 than medmnist's, with a warning and a note in
        the data set's title.
      resize: Pillow's interpolation from the stored size to `size`; the file of 28 px is read,
        unless `file` names another. The data set's title says so.

    Returns:
      The data set, with images uint8 (n, size, size, channels), or (n, size, size, size, 1) for a
      3-D subset; task, class names and channels are those of medmnist's table.

    Raises:
      UsageError: the name or size is unknown; the file is missing, truncated or has another MD5;
        an array is missing or has a wrong shape, dtype or range.

    Source: Yang et al., MedMNIST v2 (Scientific Data 2023); the table is `medmnist.INFO`.
    """
    info = _subset_info(name)
    sizes = SIZES_3D if is_3d(name) else SIZES
    if resize is not None and is_3d(name):
        raise UsageError(f"`resize` {resize}: the volumes of {name} are not resized; leave it out")
    if size not in sizes and resize is None:
        raise UsageError(
            f"`size` {size}: {name} has {', '.join(map(str, sizes))} px; `resize` makes other "
            "sizes of one of them"
        )
    suffixes = {pixels: "" if pixels == 28 else f"_{pixels}" for pixels in sizes}
    stored = size if resize is None else 28
    if file is None:
        path = Path(data_dir).expanduser() / f"{name}{suffixes[stored]}.npz"
        remedy = "delete it to download it again, or name another with `file`"
        if not path.exists():
            _download(info, stored, path, allowed=download)
    else:
        path = Path(file).expanduser()
        remedy = "name another with `file`"
    md5 = _checked_md5(path, remedy)
    known = {info[f"MD5{suffix}"]: pixels for pixels, suffix in suffixes.items()}
    if file is not None and resize is not None:
        stored = known.get(md5, stored)
    if known.get(md5, stored) != stored:
        raise UsageError(
            f"{path} is the file of {name} at {known[md5]} px, but `size` is {stored}: give `size` "
            f"{known[md5]}, or `resize` too"
        )
    expected = info[f"MD5{suffixes[stored]}"]
    note = "" if md5 == expected else f"unverified file {path.name}"
    if note and not allow_unverified:
        raise UsageError(
            f"{path} has MD5 {md5}, but medmnist's table gives {expected} for {name} at "
            f"{stored} px: {remedy}, or load it as it is with `allow_unverified`"
        )
    arrays = _read_arrays(path, remedy, verified=not note)
    if note and resize is not None:
        stored = arrays["train_images"].shape[1]
    classes = tuple(info["label"][str(k)] for k in range(len(info["label"])))
    splits = {s: _make_split(path, s, arrays, info, name, stored) for s in SPLITS}
    if note:
        warnings.warn(
            f"{path} is not {info['python_class']} at {stored} px as published (MD5 {md5} instead "
            f"of {expected}); loaded because of allow_unverified, and named in every result",
            stacklevel=2,
        )
    unverified = bool(note)
    if resize is not None and stored != size:
        splits = _resized(splits, size, resize)
        note = ", ".join(filter(None, [note, f"resized from {stored} px, {resize}"]))
    return Dataset(
        name=name,
        size=size,
        task=info["task"],
        classes=classes,
        source=f"{path.name}, MD5 {md5}",
        note=note,
        # Of a published size, the options and the MD5 determine the content.
        fingerprint=_digest(path, "sha256") if unverified or resize is not None else "",
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
    )


@dataclass(frozen=True)
class ResizedImages(RowImages):
    """Images that are resized on indexing.

    Attributes:
      images: uint8 (n, h, w, channels).
      size: height and width of the results in pixels.
      method: interpolation, see `images.resized`.
    """

    images: np.ndarray
    size: int
    method: Resize

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return (len(self.images), self.size, self.size, self.images.shape[-1])

    def read(self, row: int) -> np.ndarray:
        """Image number `row`."""
        return resized(self.images[row], self.size, self.method)


def _resized(splits: dict[str, Split], size: int, method: Resize) -> dict[str, Split]:
    images = [ResizedImages(np.asarray(split.images), size, method) for split in splits.values()]
    return {
        name: Split(array, split.labels)
        for array, (name, split) in zip(kept_in_memory(images), splits.items(), strict=True)
    }


def medmnist_names() -> tuple[str, ...]:
    """The names of the subsets, in the order of medmnist's table: 2-D, then 3-D."""
    return tuple(medmnist_info())


def is_3d(name: str) -> bool:
    """Whether the images of a subset are volumes."""
    return name.endswith("3d")


@functools.cache
def medmnist_info() -> dict[str, dict[str, Any]]:
    """Task, class names, channels, counts, URLs and MD5 of all subsets.

    Equal to these entries of `medmnist.INFO` (medmnist 3.0.2). The package itself, which imports
    torch, is needed only for downloads.
    """
    table = json.loads(Path(__file__).with_name("medmnist.json").read_bytes())
    for name, info in table.items():
        for key in [key for key in info if key.startswith("MD5")]:
            suffix = key.removeprefix("MD5")
            info[f"url{suffix}"] = f"{_ADDRESS}/{name}{suffix}.npz?download=1"
    return table


def _subset_info(name: str) -> dict[str, Any]:
    names = medmnist_names()
    if name in names:
        return medmnist_info()[name]
    close = difflib.get_close_matches(name.lower(), (*names, *_OTHERS), n=1, cutoff=0.5)
    guess = f"did you mean {close[0]}? " if close else ""
    raise UsageError(
        f"unknown data set {name!r}: {guess}There are {', '.join((*_OTHERS, *names))}, "
        "folder:PATH, tfds:NAME, signals:FILE and table:FILE"
    )


def _download(info: dict[str, Any], size: int, path: Path, *, allowed: bool) -> None:
    """Downloads the subset's file to `path` atomically."""
    suffix = "" if size == 28 else f"_{size}"
    url = info[f"url{suffix}"]
    by_hand = (
        f"To place it by hand, download {url} and save it as {path} "
        f"(MD5 {info[f'MD5{suffix}']}); `data_dir` names another folder"
    )
    if not allowed:
        raise UsageError(f"{path} is missing and downloading is off. {by_hand}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In a temporary folder, so that a partial download never has the file's name.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder:
            import medmnist

            subset = getattr(medmnist, info["python_class"])
            subset(split="val", download=True, root=folder, size=size)
            os.replace(Path(folder) / path.name, path)
    except (ImportError, OSError, RuntimeError) as error:
        # medmnist turns every exception into a RuntimeError, including KeyboardInterrupt.
        cause = error.__context__ or error
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise UsageError(
            f"{path} is missing, and downloading {url} through the medmnist package failed "
            f"({type(cause).__name__}: {cause}). {by_hand}"
        ) from error


def _checked_md5(path: Path, remedy: str) -> str:
    """MD5 of an existing file that is a complete zip archive."""
    if not path.is_file():
        raise UsageError(f"{path} is missing or is no file: {remedy}")
    md5 = _digest(path, "md5")
    if not zipfile.is_zipfile(path):
        raise UsageError(
            f"{path} is truncated or is no npz ({path.stat().st_size} bytes, MD5 {md5}): {remedy}"
        )
    return md5


def _digest(path: Path, kind: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, kind).hexdigest()


def _read_arrays(path: Path, remedy: str, *, verified: bool) -> dict[str, np.ndarray]:
    """Reads all six arrays; raises if any part of the file is damaged."""
    wanted = [f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels")]
    try:
        if not verified:
            # NumPy stops reading before zipfile would verify the checksum.
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        with np.load(path, allow_pickle=False) as archive:
            absent = [key for key in wanted if key not in archive]
            if absent:
                raise UsageError(
                    f"{path} lacks the arrays {', '.join(absent)}; it holds "
                    f"{', '.join(archive.files) or 'none'}: {remedy}"
                )
            return {key: archive[key] for key in wanted}
    except UsageError:
        raise
    except DAMAGED_ARCHIVE as error:
        raise UsageError(
            f"{path} is damaged and was not loaded ({type(error).__name__}: {error}): {remedy}"
        ) from error


def _make_split(
    path: Path,
    split: str,
    arrays: dict[str, np.ndarray],
    info: dict[str, Any],
    name: str,
    size: int,
) -> Split:
    images = _checked_images(f"{path}, {split}_images", arrays[f"{split}_images"], info, name, size)
    labels = _checked_labels(f"{path}, {split}_labels", arrays[f"{split}_labels"], info, name)
    if len(images) != len(labels):
        raise UsageError(
            f"{path}: {split}_images holds {len(images)} images but {split}_labels "
            f"{len(labels)} labels; give a complete MedMNIST npz as `file` or in `data_dir`"
        )
    if len(images) == 0:
        raise UsageError(f"{path}: {split}_images is empty; name a MedMNIST npz with examples")
    return Split(images, labels)


def _checked_images(
    where: str, images: np.ndarray, info: dict[str, Any], name: str, size: int
) -> np.ndarray:
    channels, axes = info["n_channels"], 3 if is_3d(name) else 2
    sides = (size,) * axes
    expected = sides if channels == 1 else (*sides, channels)
    if images.dtype != np.uint8:
        raise UsageError(f"{where}: type {images.dtype}; MedMNIST images are uint8, 0 to 255")
    shape = images.shape
    if images.ndim == 1 + axes:
        images = images[..., None]
    if images.ndim != 2 + axes or images.shape[-1] != channels:
        raise UsageError(f"{where}: shape {shape}; {name} has n images of {expected}")
    if images.shape[1:-1] != sides:
        raise UsageError(
            f"{where}: images of {' x '.join(map(str, images.shape[1:-1]))} px, but `size` is "
            f"{size}: give the file's own size, or a file of that size"
        )
    return images


def _checked_labels(where: str, labels: np.ndarray, info: dict[str, Any], name: str) -> np.ndarray:
    classes = len(info["label"])
    multi_label = info["task"] == "multi-label, binary-class"
    if not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(f"{where}: type {labels.dtype}; labels must be integers")
    columns = classes if multi_label else 1
    if not multi_label and labels.ndim == 1:
        labels = labels[:, None]
    if labels.ndim != 2 or labels.shape[1] != columns:
        raise UsageError(f"{where}: shape {labels.shape}; {name} needs (n, {columns})")
    top = 1 if multi_label else classes - 1
    outside = labels[(labels < 0) | (labels > top)]
    if outside.size:
        raise UsageError(
            f"{where}: {outside.size} labels outside 0 to {top}, the first of them {outside[0]}; "
            f"{name} has {classes} classes, so this is another subset's file or a damaged one"
        )
    return labels.astype(np.uint8) if multi_label else labels[:, 0].astype(np.int32)
