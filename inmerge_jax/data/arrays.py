"""Data sets of float arrays: signals and tables."""

import hashlib
from collections.abc import Sequence

import numpy as np

from inmerge_jax.data.dataset import Dataset, Split
from inmerge_jax.data.splitting import (
    SPLITS,
    add_splits,
    check_classes,
    check_training_classes,
    warn_of_incomplete_classes,
)
from inmerge_jax.errors import UsageError

_LOST = 1e-3
"""Rounding error at which a feature is refused, in standard deviations of the feature."""


def dataset_from_arrays(
    name: str,
    source: str,
    examples: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    names: Sequence[str],
    splits: np.ndarray | None = None,
    groups: Sequence[str] | None = None,
    features: Sequence[str] = (),
) -> Dataset:
    """Splits signals or rows of a table, and describes them.

    Splits that are missing are taken from the training examples, see `splitting.add_splits`.
    Without groups, equal examples are one. A class too small for every split is kept; a warning
    and the data set's source say where its examples are.

    Args:
      name: name of the data set.
      source: origin of the examples, for errors and results.
      examples: float32 (n, time, channels) or (n, features), finite.
      labels: int32 (n,).
      classes: names of the classes.
      names: n names of the examples.
      splits: n names of `SPLITS`; None if no example is assigned.
      groups: n names of groups, which are not divided; None without.
      features: names of the features of a table.

    Raises:
      UsageError: there are too few examples or classes, or a group is in two splits.
    """
    check_classes(classes, labels, source)
    given = np.full(len(labels), "train") if splits is None else splits
    keys = groups
    if keys is None:
        # Equal examples of different splits would be one group in two.
        digests = [hashlib.sha256(example).hexdigest() for example in examples]
        keys = [f"{split} {digest}" for split, digest in zip(given, digests, strict=True)]
    chosen = add_splits(given, labels, keys, source)
    check_training_classes(classes, labels, chosen, source)
    digest = hashlib.sha256(repr((tuple(classes), tuple(features), examples.shape)).encode())
    for part in (examples, labels, chosen):
        digest.update(np.ascontiguousarray(part))
    origin = f"{source}, {len(labels):,} examples, SHA-256 {digest.hexdigest()}"
    for one, text in warn_of_incomplete_classes(classes, labels, chosen, source).items():
        origin += f"; class {one}: {text}"
    patients = None if groups is None else np.unique(np.array(groups), return_inverse=True)[1]
    parts = {}
    for split in SPLITS:
        rows = np.flatnonzero(chosen == split)
        parts[split] = Split(
            examples[rows],
            labels[rows],
            None if patients is None else patients[rows],
            [names[row] for row in rows.tolist()],
        )
    return Dataset(
        name=name,
        size=examples.shape[1],
        task="binary-class" if len(classes) == 2 else "multi-class",
        classes=tuple(classes),
        source=origin,
        fingerprint=digest.hexdigest(),
        features=tuple(features),
        **parts,
    )


def as_float32(values: np.ndarray, names: Sequence[str], source: str) -> np.ndarray:
    """The values in float32, in which networks compute.

    Args:
      values: float64 (..., features), finite.
      names: of the features, for errors.
      source: origin of the values, for errors.

    Raises:
      UsageError: a feature, such as a time in seconds since 1970, loses digits that distinguish
        its values.
    """
    rounded = values.astype(np.float32)
    rows = tuple(range(values.ndim - 1))
    error, low, high = np.abs(rounded - values).max(rows), values.min(rows), values.max(rows)
    lost = (low < high) & (error > _LOST * values.std(rows))
    if lost.any():
        first = int(lost.argmax())
        raise UsageError(
            f"{source}: {names[first]} has values from {low[first]:.12g} to {high[first]:.12g}, "
            "which float32 cannot tell apart well enough; subtract an offset, such as the first "
            "of these"
        )
    return rounded
