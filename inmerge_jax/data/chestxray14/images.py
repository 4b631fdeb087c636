"""NIH's image files: finding them, and reducing one to a small grey PNG."""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from inmerge_jax.errors import UsageError

# Exceptions of Pillow on truncated or damaged files.
_DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
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
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_file())


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the file's header.

    Raises:
      UsageError: the file is not an image, or is damaged.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except _DAMAGED as error:
        raise UsageError(_message(path, error)) from error


def reduce_image(path: Path, size: int, expected: tuple[int, int]) -> bytes:
    """Reduces one image to an 8-bit grey PNG of `size` x `size` pixels.

    Colours are converted to luma, alpha is dropped, and 16 bits are scaled to 8. The reduction is
    bilinear with antialiasing, like torchvision's Resize. A grey image of that size is kept byte
    for byte.

    Args:
      path: path of a PNG; its checksums are verified.
      size: height and width of the result in pixels.
      expected: required width and height of the file in pixels.

    Raises:
      UsageError: the file is truncated, damaged, of another size, or smaller than `size`.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            grey, plain = to_grey(image), image.mode == "L" and image.format == "PNG"
    except _DAMAGED as error:
        raise UsageError(_message(path, error)) from error
    width, height = grey.size
    if (width, height) != expected:
        raise UsageError(
            f"{path} has {width} x {height} pixels, the others {expected[0]} x {expected[1]}; "
            "fetch it again"
        )
    if width != height or width < size:
        raise UsageError(
            f"{path} has {width} x {height} pixels; a square of at least {size} is needed"
        )
    if width == size and plain:
        return data
    return encode(grey if width == size else grey.resize((size, size), Image.Resampling.BILINEAR))


def to_grey(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit grey (mode L)."""
    if image.mode == "L":
        return image
    if image.mode.startswith(("I", "F")):  # 16-bit grey; Pillow's own conversion would clip.
        return Image.fromarray(((np.asarray(image, np.int64) + 128) // 257).astype(np.uint8))
    # Via RGB: a direct conversion of a palette or an alpha channel would not drop the alpha.
    return image.convert("RGB").convert("L")


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
    except _DAMAGED as error:
        raise ValueError(str(error)) from error
    if image.mode != "L" or image.width != image.height or image.width < size:
        raise ValueError(f"mode {image.mode}, {image.width} x {image.height} pixels")
    if image.width > size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _message(path: Path, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return f"{path} cannot be read: {error.strerror}; give rights to it"
    return f"{path} is cut short or damaged: {error}; fetch it again"
