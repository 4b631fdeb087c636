"""NIH's image files: finding them, and reducing one to a small grey PNG."""

import io
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from inmerge_jax.data.images import DAMAGED, read_kind, to_grey, unreadable, used_bits
from inmerge_jax.errors import UsageError

_PATTERNS = ("*.png", "images/*.png", "images_*/*.png", "images_*/images/*.png")


def find_images(folder: Path) -> dict[str, Path]:
    """All PNGs of NIH's layout `images_*/images/*.png`, or of a flat folder, by name.

    Raises:
      UsageError: there is no such folder or no PNG in it, or a name occurs twice.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UsageError(f"`images` {folder}: there is no such folder")
    found: dict[str, Path] = {}
    for path in _files(folder):
        if path.name in found:
            raise UsageError(
                f"{path.name} is there twice, as {found[path.name]} and {path}; remove one"
            )
        found[path.name] = path
    if not found:
        raise UsageError(
            f"`images` {folder}: there is no PNG in it; looked for {', '.join(_PATTERNS)}"
        )
    return found


def _files(folder: Path) -> Iterator[Path]:
    for pattern in _PATTERNS:
        # Not the "._" files that macOS adds to archives.
        found = (path for path in sorted(folder.glob(pattern)) if not path.name.startswith("."))
        yield from (path for path in found if path.is_file())


class Usual(NamedTuple):
    """What the images of a data set have in common.

    Attributes:
      width: width in pixels.
      height: height in pixels.
      bits: bits that the values of 16-bit images use; 16 if there are none.
    """

    width: int
    height: int
    bits: int = 16


def usual(paths: Sequence[Path]) -> Usual:
    """The most frequent size of nine images, robust to a wrong one, and the bits that they use.

    Raises:
      UsageError: a file is not an image, or is damaged.
    """
    some = paths[:: -(-len(paths) // 9)]
    kinds = [read_kind(path) for path in some]
    deep = [path for path, kind in zip(some, kinds, strict=True) if kind.name == "16-bit grey"]
    size = statistics.mode((kind.width, kind.height) for kind in kinds)
    return Usual(*size, used_bits(deep) if deep else 16)


def reduce_image(path: Path, size: int, expected: Usual) -> bytes:
    """Reduces one image to an 8-bit grey PNG of `size` x `size` pixels.

    Colours are converted to luma, alpha is dropped, and 16-bit values are scaled to 8 bits from
    the bits that they use. The reduction is bilinear with antialiasing, like torchvision's Resize.
    A grey image of that size is kept byte for byte.

    Args:
      path: path of a PNG; its checksums are verified.
      size: height and width of the result in pixels.
      expected: required width and height of the file, and bits of a 16-bit one.

    Raises:
      UsageError: the file is truncated, damaged, of another size, or smaller than `size`.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            grey = to_grey(image, expected.bits)
            plain = image.mode == "L" and image.format == "PNG"
    except DAMAGED as error:
        raise unreadable(path, error) from error
    width, height = grey.size
    if (width, height) != expected[:2]:
        raise UsageError(
            f"{path} has {width} x {height} pixels, the others {expected.width} x "
            f"{expected.height}; "
            "fetch it again"
        )
    if width != height or width < size:
        raise UsageError(
            f"{path} has {width} x {height} pixels; a square of at least {size} is needed"
        )
    if width == size and plain:
        return data
    return encode(grey if width == size else grey.resize((size, size), Image.Resampling.BILINEAR))


def encode(image: Image.Image) -> bytes:
    """Encodes the image as a PNG, deterministically."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def decode(data: bytes, size: int) -> np.ndarray:
    """Decodes a grey PNG and reduces it to `size` if it is larger: uint8 (size, size).

    Raises:
      ValueError: the PNG is damaged, not square, not 8-bit grey, or smaller than `size`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except DAMAGED as error:
        raise ValueError(str(error)) from error
    if image.mode != "L" or image.width != image.height or image.width < size:
        raise ValueError(f"mode {image.mode}, {image.width} x {image.height} pixels")
    if image.width > size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)
