"""Decoding of PNG and JPEG files, and images that are read on indexing."""

import abc
import io
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from inmerge_jax.errors import UsageError
from inmerge_jax.progress import Progress

DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
"""Exceptions of Pillow on truncated or damaged files."""


class UnsupportedImageError(ValueError):
    """An image that is sound, but that this package does not read."""


FORMATS = ("PNG", "JPEG")
SUFFIXES = (".png", ".jpg", ".jpeg")
IN_MEMORY = 1 << 30
"""Images of up to this many bytes, over all splits, are decoded once and kept in memory."""

Resize = Literal["nearest", "bilinear", "bicubic"]

_ENDS = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
"""Pillow calls a JPEG of several pictures, as cameras write it, MPO."""
_HEADER, _TAIL = 32, 4096
_THREADS = 8


class RowImages(abc.ABC):
    """Base of images that are read one by one on indexing: uint8 (n, height, width, channels).

    Subclasses define `shape` and `read(row)`, and can be pickled for worker processes.
    """

    shape: tuple[int, ...]
    dtype = np.dtype(np.uint8)
    ndim = 4

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """One image (height, width, channels) for an integer, else (k, height, width, channels).

        Raises:
          UsageError: an image cannot be read.
        """
        if isinstance(index, int | np.integer):
            return self.read(range(len(self))[index])
        rows = np.arange(len(self))[index]
        images = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for place, row in enumerate(rows.tolist()):
            images[place] = self.read(row)
        return images

    @abc.abstractmethod
    def read(self, row: int) -> np.ndarray:
        """Image number `row`, uint8 (height, width, channels)."""


def kept_in_memory(splits: Sequence[RowImages]) -> list[np.ndarray | RowImages]:
    """The images of all splits as arrays, or unchanged where they exceed `IN_MEMORY` bytes.

    Raises:
      UsageError: an image cannot be read.
    """
    if sum(int(np.prod(split.shape, dtype=np.int64)) for split in splits) > IN_MEMORY:
        return list(splits)
    arrays: list[np.ndarray | RowImages] = []
    progress = Progress(sum(map(len, splits)), description="reading images")
    with ThreadPoolExecutor(_THREADS) as threads, progress:
        for split in splits:
            images = np.empty(split.shape, np.uint8)
            for row, image in enumerate(threads.map(split.read, range(len(split)))):
                images[row] = image
                progress.advance(1)
                if progress.due():
                    progress.milestone()
            arrays.append(images)
    return arrays


class Kind(NamedTuple):
    """What the header of an image file tells.

    Attributes:
      name: "8-bit grey", "16-bit grey" or "colour".
      width: width in pixels.
      height: height in pixels.
    """

    name: str
    width: int
    height: int


def read_kind(path: Path) -> Kind:
    """Reads the header of a PNG or JPEG, and looks for its end.

    Raises:
      UsageError: the file is no PNG or JPEG, is cut short, or has 16 bits per colour.
    """
    try:
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            kind = Kind(_kind(image), *image.size)
            file.seek(0)
            header = file.read(_HEADER)
            if kind.name != "16-bit grey" and image.format == "PNG" and header[24] == 16:
                raise UnsupportedImageError(
                    f"a PNG of mode {image.mode} and 16 bits is not read; convert it to 8 bits"
                )
            file.seek(-min(_TAIL, file.seek(0, os.SEEK_END)), os.SEEK_END)
            if _ENDS[image.format or ""] not in file.read():
                image.load()  # The end may precede a trailer; a file that is cut short fails.
    except DAMAGED as error:
        raise unreadable(path, error) from error
    return kind


def _kind(image: Image.Image) -> str:
    if image.mode.startswith(("I", "F")):
        return "16-bit grey"
    return "8-bit grey" if image.mode in ("1", "L", "LA") else "colour"


@dataclass(frozen=True)
class Decoder:
    """Turns the bytes of image files into arrays of one shape.

    Attributes:
      size: height and width in pixels.
      channels: 1 (colours become luma) or 3 (grey is repeated).
      resize: interpolation; "bilinear" and "bicubic" are antialiased when an image shrinks.
      bits: bits that the values of 16-bit grey images use; they are scaled to 8. 8 where the images
        have 8 bits.
    """

    size: int
    channels: int
    resize: Resize = "bilinear"
    bits: int = 16

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a decoded image."""
        return (self.size, self.size, self.channels)

    def __call__(self, data: bytes) -> np.ndarray:
        """Decodes an image, uint8 (size, size, channels); alpha is dropped.

        Raises:
          ValueError: the data is damaged, or its values exceed `bits`.
        """
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                image.verify()
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                image.load()
        except DAMAGED as error:
            raise ValueError(str(error)) from error
        if self.channels == 1 or _kind(image) == "16-bit grey":
            image = to_grey(image, self.bits)
        if self.channels == 3:
            image = image.convert("RGB")
        return resized(np.asarray(image), self.size, self.resize).reshape(self.shape)

    def read(self, path: Path) -> np.ndarray:
        """Reads and decodes a file.

        Raises:
          UsageError: the file cannot be read or decoded.
        """
        try:
            return self(path.read_bytes())
        except DAMAGED as error:
            raise unreadable(path, error) from error


def resized(image: np.ndarray, size: int, method: Resize) -> np.ndarray:
    """Pillow's resizing to `size` x `size`: uint8 (h, w), (h, w, 1) or (h, w, 3)."""
    if image.shape[:2] == (size, size):
        return image
    grey = image.ndim == 3 and image.shape[-1] == 1
    opened = Image.fromarray(image[..., 0] if grey else image)
    small = np.asarray(opened.resize((size, size), Image.Resampling[method.upper()]))
    return small[..., None] if grey else small


def to_grey(image: Image.Image, bits: int = 16) -> Image.Image:
    """An image of any mode as 8-bit grey (mode L).

    Args:
      image: the image.
      bits: bits that the values of 16-bit images use; they are scaled to 8.

    Raises:
      UnsupportedImageError: a value exceeds `bits`.
    """
    if image.mode == "L":
        return image
    if _kind(image) == "16-bit grey":  # Pillow's own conversion would clip.
        values, top = np.asarray(image, np.int64), 2**bits - 1
        if values.min() < 0 or values.max() > top:
            raise UnsupportedImageError(
                f"it has values from {values.min()} to {values.max()}, other images 0 to {top} "
                f"({bits} bits); convert all to the same range"
            )
        return Image.fromarray(((values * 255 + top // 2) // top).astype(np.uint8))
    # Via RGB: a direct conversion of a palette or an alpha channel would not drop the alpha.
    return image.convert("RGB").convert("L")


def used_bits(paths: Sequence[Path]) -> int:
    """The bits that 16-bit grey images use: the first of 8, 10, 12, 14, 16 that holds all values.

    Raises:
      UsageError: an image cannot be read.
    """
    top = 0
    for path in paths:
        try:
            with Image.open(path, formats=FORMATS) as image:
                top = max(top, int(np.asarray(image, np.int64).max()))
        except DAMAGED as error:
            raise unreadable(path, error) from error
    return next((bits for bits in (8, 10, 12, 14) if top < 2**bits), 16)


def unreadable(path: Path, error: Exception) -> UsageError:
    """The error for an image file that cannot be used."""
    if isinstance(error, UsageError):
        return error
    if isinstance(error, UnsupportedImageError):
        return UsageError(f"{path}: {error}")
    if isinstance(error, FileNotFoundError):
        return UsageError(f"there is no image {path}")
    if isinstance(error, PermissionError):
        return UsageError(f"{path} cannot be read: {error.strerror}; give rights to it")
    if isinstance(error, UnidentifiedImageError):
        return UsageError(
            f"{path} is cut short or damaged, or no PNG or JPEG; replace or remove it"
        )
    return UsageError(f"{path} is cut short or damaged: {error}; replace or remove it")
