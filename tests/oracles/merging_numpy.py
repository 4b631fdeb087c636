"""The method in plain NumPy, float64, one kernel at a time (arXiv 2502.20516)."""

import numpy as np


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine similarity of two kernels of any shape; 0 where one is zero."""
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms > 0 else 0.0


def similarities(weight: np.ndarray, axis: int) -> np.ndarray:
    """All pairs' cosines, (kernels, kernels)."""
    kernels = np.moveaxis(weight, axis, 0)
    return np.array([[cosine(a, b) for b in kernels] for a in kernels])


def merge_layer(weight, axis, selected, partner, threshold, alpha):
    """Merges one layer, reading from the old weights; `partner=None` takes the most similar.

    Returns the new weight and which kernels were mixed.
    """
    old = np.moveaxis(weight, axis, 0)
    new = old.copy()
    mixed = np.zeros(len(old), bool)
    for i in np.flatnonzero(selected):
        others = [j for j in range(len(old)) if j != i]
        if partner is not None:
            j = int(partner[i])
        else:
            j = max(others, key=lambda j: np.nan_to_num(cosine(old[i], old[j]), nan=-2.0))
        if cosine(old[i], old[j]) > threshold:
            mixed[i] = True
            value = alpha * old[i].astype(np.float64) + (1 - alpha) * old[j].astype(np.float64)
            new[i] = value.astype(weight.dtype)
    return np.moveaxis(new, 0, axis), mixed
