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


def unit_slices(kernel):
    """For each problem, the index expressions of its units in the viewed weight, one by one."""
    dims, units = kernel.dims, kernel.dims[kernel.out_axis] // kernel.groups
    problems = []
    for place in np.ndindex(*(dims[axis] for axis in kernel.batch_axes)):
        for group in range(kernel.groups):
            found = []
            for unit in range(units):
                index = [slice(None)] * len(dims)
                for axis, at in zip(kernel.batch_axes, place, strict=True):
                    index[axis] = at
                index[kernel.out_axis] = group * units + unit
                found.append(tuple(index))
            problems.append(found)
    return problems


def merge_units(weights, kernels, selected, partner, threshold, alpha):
    """Merges one layer, a weight or several that belong together, unit by unit.

    `selected` and `partner` are flat over problems and units, as the library draws them; with
    `partner=None` each takes the most similar unit of its problem. Returns the new weights and
    which units were mixed.
    """
    old = [np.asarray(w).reshape(k.dims) for w, k in zip(weights, kernels, strict=True)]
    new = [w.copy() for w in old]
    places = [unit_slices(kernel) for kernel in kernels]
    mixed = []
    for problem in range(len(places[0])):
        count = len(places[0][problem])

        def vector(unit, problem=problem):
            return np.concatenate(
                [
                    old[k][places[k][problem][unit]].astype(np.float64).ravel()
                    for k, kernel in enumerate(kernels)
                    if kernel.compared
                ]
            )

        for unit in range(count):
            number = problem * count + unit
            mixed.append(False)
            if not selected[number]:
                continue
            others = [j for j in range(count) if j != unit]
            if partner is None:
                j = max(others, key=lambda j, unit=unit: cosine(vector(unit), vector(j)))
            else:
                j = int(partner[number])
            if cosine(vector(unit), vector(j)) > threshold:
                mixed[-1] = True
                for k in range(len(kernels)):
                    mine, other = (old[k][places[k][problem][i]] for i in (unit, j))
                    value = alpha * mine.astype(np.float64) + (1 - alpha) * other
                    new[k][places[k][problem][unit]] = value.astype(mine.dtype)
    shaped = [w.reshape(k.shape) for w, k in zip(new, kernels, strict=True)]
    return shaped, np.array(mixed)
