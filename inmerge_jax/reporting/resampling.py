"""Drawing test images anew, and their patients where these are known."""

import numpy as np


def patient_index(images: int, patients: np.ndarray | None) -> np.ndarray:
    """The patient of each image, from 0: int (images,). None: each image is a patient."""
    if patients is None:
        return np.arange(images)
    return np.unique(patients, return_inverse=True)[1]


def draw_counts(
    images: int, resamples: int, rng: np.random.Generator, patients: np.ndarray | None = None
) -> np.ndarray:
    """How often each image is drawn in each bootstrap resample: int (resamples, images).

    Args:
      images: how many there are.
      resamples: likewise.
      rng: draws.
      patients: whose image each is, (images,). A patient is drawn with all of its images, which
        are more alike than those of others. None: each image is a patient.
    """
    index = patient_index(images, patients)
    count = int(index.max()) + 1
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples)[:, index]
