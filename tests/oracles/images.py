"""An image file's pixels as torchvision's Resize and CenterCrop make them, in Pillow alone."""

from pathlib import Path

import numpy as np
from PIL import Image

from inmerge_jax.errors import UsageError


def load_image(path: Path | str, size: int, *, resize: int | None = None) -> np.ndarray:
    """Decodes an image, resizes its shorter side and cuts out the centre.

    The same as torchvision's Resize(resize) and CenterCrop(size) on a Pillow image: bilinear with
    antialiasing, the longer side rounded down.

    Args:
      path: of a file that Pillow reads.
      size: height and width of the result in pixels.
      resize: length of the shorter side before the crop, at least `size`; None for `size`.

    Returns:
      uint8 (size, size, 3).

    Raises:
      UsageError: `path` is missing or no image.
      ValueError: `resize` is smaller than `size`, or `size` below 1.
    """
    shorter = size if resize is None else resize
    if not 1 <= size <= shorter:
        raise ValueError(f"size {size}, resize {shorter}: 1 <= size <= resize is needed")
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise UsageError(f"{path} cannot be read as an image: {error}") from error
    width, height = image.size
    if width <= height:
        scaled = (shorter, int(shorter * height / width))
    else:
        scaled = (int(shorter * width / height), shorter)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    left, top = (round((length - size) / 2) for length in scaled)
    return np.asarray(image.crop((left, top, left + size, top + size)))
