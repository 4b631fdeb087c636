"""Balanced error and calibration error of test scores, over drawn test images."""

import numpy as np


def balanced_error(labels: np.ndarray, classes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over classes of the share of wrong answers.

    Args:
      labels: int (n,).
      classes: (..., n), predicted.
      counts: (resamples, n), how often each image is drawn.

    Returns:
      (resamples, ...).
    """
    errors = []
    for label in np.unique(labels):
        mine = labels == label
        wrong = (classes[..., mine] != label).astype(float)
        drawn = counts[:, mine].astype(float)
        errors.append(np.einsum("rn,...n->r...", drawn, wrong) / _column(drawn, wrong.ndim))
    return np.nanmean(errors, axis=0)


def _column(drawn: np.ndarray, ndim: int) -> np.ndarray:
    total = drawn.sum(1)
    return np.where(total > 0, total, np.nan).reshape(-1, *[1] * (ndim - 1))


def calibration_error(
    labels: np.ndarray, scores: np.ndarray, counts: np.ndarray, bins: int
) -> np.ndarray:
    """Expected calibration error, (resamples,).

    Args:
      labels: int (n,).
      scores: (n, classes), probabilities.
      counts: (resamples, n), how often each image is drawn.
      bins: of confidence, equally wide.
    """
    confidence = scores.max(1)
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = (scores.argmax(1) == labels) - confidence
    return sum(
        np.abs(counts[:, mine] @ gaps[mine]) for mine in (index == one for one in range(bins))
    ) / counts.sum(1)
