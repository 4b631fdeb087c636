"""Masks of the user's own images: 8-bit PNG files of class indices."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from inmerge_jax.data.images import DAMAGED, resized, unreadable
from inmerge_jax.errors import UsageError

_MODES = ("L", "P", "1")
_THREADS = 8


def read_masks(
    images: Sequence[Path], masks: Sequence[Path], size: int, source: str
) -> tuple[np.ndarray, np.ndarray]:
    """Reads the masks of images, resized to squares by the nearest pixel.

    Args:
      images: n image files.
      masks: n mask files.
      size: height and width in pixels.
      source: origin of the files, for errors.

    Returns:
      Masks, uint8 (n, size, size), and which of the k classes each file has, uint8 (n, k).

    Raises:
      UsageError: a mask is no 8-bit PNG of one channel, or has another size than its image; the
        values are not 0, 1, ... without gaps.
    """

    def read(image: Path, mask: Path) -> tuple[np.ndarray, np.ndarray]:
        values = _read(image, mask)
        return resized(values, size, "nearest"), np.bincount(values.ravel(), minlength=256) > 0

    arrays = np.empty((len(masks), size, size), np.uint8)
    present = np.empty((len(masks), 256), bool)
    with ThreadPoolExecutor(_THREADS) as threads:
        for row, found in enumerate(threads.map(read, images, masks)):
            arrays[row], present[row] = found
    values = np.flatnonzero(present.any(0)).tolist()
    if values != list(range(len(values))) or len(values) < 2:
        top = masks[int(present[:, values[-1]].argmax())]
        remedy = "number the classes 0 (background), 1, 2, ... without gaps"
        if len(values) < 2:
            remedy = "mark at least one class by the value 1; 0 is the background"
        elif values == [0, 255]:
            remedy = "write 1 in place of 255"
        shown = ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "")
        raise UsageError(
            f"{source}: the masks have the values {shown}, the highest in {top}: {remedy}"
        )
    return arrays, present[:, : len(values)].astype(np.uint8)


def _read(image: Path, mask: Path) -> np.ndarray:
    """One mask, uint8 (height, width), of the size of its image."""
    try:
        with Image.open(image) as opened:
            expected = opened.size
        with Image.open(mask, formats=("PNG", "JPEG")) as opened:
            form, mode, found = opened.format, opened.mode, opened.size
            values = np.asarray(opened)
    except DAMAGED as error:
        raise unreadable(mask, error) from error
    if form != "PNG":
        raise UsageError(
            f"{mask} is a {form} file, whose compression changes class indices; write masks as PNG"
        )
    if mode not in _MODES:
        raise UsageError(
            f"{mask}: a PNG of mode {mode} is no mask; write class indices into one 8-bit channel"
        )
    if found != expected:
        raise UsageError(
            f"{mask} has {found[0]} x {found[1]} pixels, and its image {image} has "
            f"{expected[0]} x {expected[1]}: give a mask of the image's size"
        )
    return values.astype(np.uint8)
