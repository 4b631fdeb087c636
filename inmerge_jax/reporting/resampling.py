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
