"""Bootstrap resamples of test images, by patient where patients are known."""

import numpy as np


def patient_index(images: int, patients: np.ndarray | None) -> np.ndarray:
    """Index of each image's patient, int (images,), from 0; None: each image is a patient."""
    if patients is None:
        return np.arange(images)
    return np.unique(patients, return_inverse=True)[1]


def draw_counts(
    images: int, resamples: int, rng: np.random.Generator, patients: np.ndarray | None = None
) -> np.ndarray:
    """Number of times that each image is in each bootstrap resample: int (resamples, images).

    Args:
      images: number of images.
      resamples: number of resamples.
      rng: random number generator.
      patients: patient of each image, (images,). A patient's images are correlated, so a patient is
        drawn with all of its images. None: each image is a patient.
    """
    index = patient_index(images, patients)
    count = int(index.max()) + 1
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples)[:, index]


def bootstrap_auroc(positive: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """AUROC in resamples of the images; ties count half.

    Args:
      positive: bool (n,).
      scores: float (n,).
      counts: int (resamples, n), number of times that each image is in each resample.

    Returns:
      float64 (resamples,), NaN where a resample lacks positive or negative images.
    """
    by_image = np.ascontiguousarray(counts.T)
    order = np.argsort(scores[positive], kind="stable")
    ascending = scores[positive][order]
    ones, zeros = by_image[positive][order], by_image[~positive]
    below = np.cumsum(ones, axis=0, dtype=counts.dtype)
    below = np.concatenate([np.zeros_like(by_image[:1]), below])
    start, end = (np.searchsorted(ascending, scores[~positive], side) for side in ("left", "right"))
    total = ones.sum(0)
    wins = (zeros * (2 * total - below[start] - below[end])).sum(0) / 2
    pairs = total * zeros.sum(0)
    return np.where(pairs > 0, wins / np.maximum(pairs, 1), np.nan)
