"""Dice and Hausdorff distance of masks, and the files of predicted masks."""

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.ndimage import distance_transform_edt

from inmerge_jax.files import read_arrays, write_arrays, write_errors

_H, _R = 3**0.5 / 8, 0.5**0.5
_VALUES = (
    *(0, _H, 2 * _H, 3 * _H, _R, 4 * _H, _R + _H, 1, 0.5 + 3 * _H, 6 * _H),
    *(0.5 + 4 * _H, 2 * _R, _R + 4 * _H),
)
# Length or area of the surface in a window of 2 x 2 pixels or 2 x 2 x 2 voxels. Its content is the
# index, as a binary number; a digit is an index of _VALUES. The numbers are those of the tables in
# surface-distance.
_DIGITS = {
    2: "044747b44b747440",
    3: (
        "011414281248488714282839266c6ca81248266c23896ac848876ca86ac8b664"
        "1226486c236a89c8486c87a86ab6c864236a6ab635a3a36289c8c864a3626221"
        "1226263a468c8c98263a3a536ba6a632468c6ba68a78c6848c98a632c6846221"
        "466b8ca68ac678848ca69832c66284218ac6c662938282417884842182414110"
    ),
}
_AREAS = {
    ndim: np.array([_VALUES[int(digit, 16)] for digit in digits])
    for ndim, digits in _DIGITS.items()
}


class ImageMetrics(NamedTuple):
    """Dice and HD95 of each image and each class but the background.

    Attributes:
      dice: float64 (n, k), `dice_scores`.
      hd95: float64 (n, k) in pixels, `hausdorff95`.
    """

    dice: np.ndarray
    hd95: np.ndarray


class MaskMetrics(NamedTuple):
    """Dice and HD95 on one split.

    Attributes:
      dice: mean of the defined entries of `dice_per_class`; NaN if none is defined.
      hd95: that of `hd95_per_class`, in pixels.
      dice_per_class: mean over the images, for each class but the background; images where neither
        mask has the class are left out; NaN if no image is left.
      hd95_per_class: likewise.
      undefined: number of NaN entries in `dice_per_class`.
      absent: number of pairs of an image and a class that are left out.
    """

    dice: float
    hd95: float
    dice_per_class: tuple[float, ...]
    hd95_per_class: tuple[float, ...]
    undefined: int
    absent: int


def dice_scores(true: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    """Dice of each image and class, 2 |A and B| / (|A| + |B|) over its pixels.

    Args:
      true: masks of class indices, uint8 (n, height, width) or (n, depth, height, width).
      found: predicted masks, of the same shape.
      classes: number of classes, with the background.

    Returns:
      float64 (n, classes - 1), without the background; NaN where both masks lack the class.
    """
    axes = tuple(range(1, true.ndim))
    columns = []
    for index in range(1, classes):
        a, b = true == index, found == index
        both, total = (a & b).sum(axes), a.sum(axes) + b.sum(axes)
        columns.append(np.where(total > 0, 2 * both / np.maximum(total, 1), np.nan))
    return np.stack(columns, -1)


def mean_over_classes(values: np.ndarray) -> float:
    """Mean over the images, then over the classes, of the defined values (n, k); or NaN."""
    return _defined_mean(np.array([_defined_mean(column) for column in values.T]))


def hausdorff95(a: np.ndarray, b: np.ndarray) -> float:
    """The 95th percentile of the Hausdorff distance between two masks, in pixels.

    The larger of two percentiles: of the distances from the surface of `a` to that of `b`, and from
    `b` to `a`, each piece of surface weighted by its length or area, as `compute_robust_hausdorff`
    of surface-distance does (Nikolov et al. 2018, arXiv 1809.04430).

    Args:
      a: bool (height, width) or (depth, height, width).
      b: bool, of the same shape.

    Returns:
      NaN if both masks are empty. If one is, the diagonal of the image, which no distance exceeds.
    """
    if not (a.any() and b.any()):
        return math.hypot(*a.shape) if a.any() or b.any() else math.nan
    box = tuple(slice(i.min(), i.max() + 1) for i in np.nonzero(a | b))
    (edge_a, area_a), (edge_b, area_b) = _surface(a[box]), _surface(b[box])
    return max(_percentile(edge_a, area_a, edge_b), _percentile(edge_b, area_b, edge_a))


def _surface(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Windows of 2 pixels a side that the mask fills in part, and the surface in each."""
    padded = np.pad(mask, 1)
    code = np.zeros([length + 1 for length in mask.shape], np.int64)
    for corner in itertools.product((0, 1), repeat=mask.ndim):
        place = (slice(i, i + length + 1) for i, length in zip(corner, mask.shape, strict=True))
        code = 2 * code + padded[tuple(place)]
    areas = _AREAS[mask.ndim]
    return (code > 0) & (code < len(areas) - 1), areas[code]


def _percentile(edge: np.ndarray, area: np.ndarray, other: np.ndarray) -> float:
    """The 95th percentile of the distances from one surface to the other."""
    distances = distance_transform_edt(~other)[edge]
    order = np.argsort(distances, kind="stable")
    share = np.cumsum(area[edge][order])
    place = np.searchsorted(share / share[-1], 0.95)
    return float(distances[order][min(place, len(order) - 1)])


def image_metrics(true: np.ndarray, found: np.ndarray, classes: int) -> ImageMetrics:
    """Dice and HD95 of each image; arguments as for `dice_scores`."""
    distances = [
        [hausdorff95(a == index, b == index) for index in range(1, classes)]
        for a, b in zip(true, found, strict=True)
    ]
    return ImageMetrics(dice_scores(true, found, classes), np.array(distances))


def mask_metrics(images: ImageMetrics) -> MaskMetrics:
    """Means over images, then over classes, of the defined values."""
    dice, hd95 = (tuple(_defined_mean(column) for column in one.T) for one in images)
    return MaskMetrics(
        dice=mean_over_classes(images.dice),
        hd95=mean_over_classes(images.hd95),
        dice_per_class=dice,
        hd95_per_class=hd95,
        undefined=sum(map(math.isnan, dice)),
        absent=int(np.isnan(images.dice).sum()),
    )


def _defined_mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def write_masks(path: Path, masks: np.ndarray, images: ImageMetrics) -> Path:
    """Writes predicted masks and their metrics, compressed, and returns the path.

    Raises:
      UsageError: the file cannot be written.
    """
    with write_errors(path):
        write_arrays(path, {"masks": masks, **images._asdict()})
    return path


def read_masks(path: Path) -> dict[str, np.ndarray]:
    """The arrays "masks", "dice" and "hd95" that `write_masks` wrote.

    Raises:
      UsageError: the file is damaged.
    """
    remedy = (
        "delete it, result.json and the run's results.json, and give `resume`, which writes it "
        "again"
    )
    return read_arrays(path, remedy)
