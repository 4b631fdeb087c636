"""Corruptions of test images at five severities, after MedMNIST-C (Di Salvo et al. 2024).

That benchmark corrupts images of 224 px with its own choice for each subset; these are defined
here, for 28 px and for all data sets alike, and their numbers don't compare with its own. On larger
images, lengths grow with the width.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

# What each severity, 1 to 5, means to the function of that name; lengths are pixels of `_WIDTH`.
SEVERITIES: dict[str, tuple[float, ...]] = {
    "noise": (0.04, 0.08, 0.12, 0.18, 0.26),
    "blur": (0.4, 0.6, 0.9, 1.2, 1.6),
    "brightness": (0.06, 0.12, 0.2, 0.3, 0.4),
    "contrast": (0.8, 0.65, 0.5, 0.35, 0.2),
    "gamma": (1.2, 1.5, 1.9, 2.4, 3.0),
    "pixelate": (24.0, 20.0, 16.0, 12.0, 8.0),
    "jpeg": (60.0, 40.0, 25.0, 15.0, 8.0),
}
_LENGTHS, _WIDTH = ("blur", "pixelate"), 28


def corrupt(images: np.ndarray, name: str, severity: int) -> np.ndarray:
    """The images, corrupted; the same every time.

    Args:
      images: uint8 (n, h, w, c).
      name: of `SEVERITIES`.
      severity: 1 to 5.

    Returns:
      uint8 of the same shape.
    """
    amount = SEVERITIES[name][severity - 1]
    if name in _LENGTHS:
        amount *= images.shape[2] / _WIDTH
    if name in ("pixelate", "jpeg"):
        return np.stack([_BY_PILLOW[name](image, amount) for image in images])
    values = _BY_NUMPY[name](images.astype(np.float64) / 255, amount)
    return np.clip(np.round(values * 255), 0, 255).astype(np.uint8)


def _noise(x: np.ndarray, sd: float) -> np.ndarray:
    return x + sd * np.random.default_rng(0).standard_normal(x.shape)


def _blur(x: np.ndarray, sigma: float) -> np.ndarray:
    return gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest")


def _brightness(x: np.ndarray, more: float) -> np.ndarray:
    return x + more


def _contrast(x: np.ndarray, factor: float) -> np.ndarray:
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    return mean + factor * (x - mean)


def _gamma(x: np.ndarray, exponent: float) -> np.ndarray:
    return x**exponent


def _pixelate(image: np.ndarray, size: float) -> np.ndarray:
    height, width = image.shape[:2]
    small = _picture(image).resize((round(size), round(size)), Image.Resampling.BOX)
    return _array(small.resize((width, height), Image.Resampling.NEAREST), image)


def _jpeg(image: np.ndarray, quality: float) -> np.ndarray:
    buffer = io.BytesIO()
    _picture(image).save(buffer, "JPEG", quality=int(quality))
    buffer.seek(0)
    return _array(Image.open(buffer), image)


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _array(picture: Image.Image, like: np.ndarray) -> np.ndarray:
    return np.asarray(picture).reshape(like.shape)


_BY_NUMPY: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "noise": _noise,
    "blur": _blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "gamma": _gamma,
}
_BY_PILLOW: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}
