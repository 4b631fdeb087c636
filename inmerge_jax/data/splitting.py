"""Splits data into training, validation and test sets: deterministic, stratified, by group."""

import hashlib
import itertools
import warnings
from collections.abc import Sequence

import numpy as np

from inmerge_jax.errors import UsageError

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
"""What users call the splits, in lower case."""
SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
"""Shares of the groups; those of the splits that are missing are taken from the training set."""


def split_named(name: str, where: str) -> str:
    """The split that `name` stands for.

    Raises:
      UsageError: none; the message begins with `where`.
    """
    if name.lower() not in SPLIT_NAMES:
        raise UsageError(f"{where}: split {name!r}; choose train, val or test")
    return SPLIT_NAMES[name.lower()]


def add_splits(
    splits: np.ndarray, labels: np.ndarray, keys: Sequence[str], source: str
) -> np.ndarray:
    """Moves part of the training set to the splits that have no example.

    Groups stay together. Each counts for its rarest label. The groups of a label are ordered by a
    hash of their key, so the result depends neither on the examples' order nor on the machine.
    Each split gets at least one of three or more groups.

    Args:
      splits: n names of `SPLITS`.
      labels: int (n,) classes, or 0 and 1 (n, k).
      keys: n keys; examples with the same key are one group.
      source: origin of the examples, for errors.

    Returns:
      n names of splits.

    Raises:
      UsageError: a group is in two splits, or the examples are too few for all splits.
    """
    splits = np.asarray(splits, "<U5")
    names, group = np.unique(np.asarray(keys, str), return_inverse=True)
    _check_groups(splits, names, group, source)
    missing = [name for name in SPLITS if not np.any(splits == name)]
    if "train" in missing:
        raise UsageError(
            f"{source}: there is no training example; assign some to train. To score examples with "
            "a trained network, leave the split out and score all of them"
        )
    stratum = np.full(len(names), np.iinfo(np.int64).max)
    np.minimum.at(stratum, group, _rarity(labels))
    total = sum(SHARES[name] for name in ("train", *missing))
    movable = np.unique(group[splits == "train"]).tolist()
    digests = [hashlib.sha256(name.encode()).digest() for name in names.tolist()]
    movable.sort(key=lambda one: (stratum[one], digests[one]))
    chosen = np.full(len(names), "train", "<U5")
    for _, same in itertools.groupby(movable, key=lambda one: stratum[one]):
        members = list(same)
        count = len(members)
        for name in reversed(missing):
            moved = min(max(1, round(count * SHARES[name] / total)), len(members) - 1)
            chosen[members[:moved]] = name
            members = members[moved:]
    splits = np.where(splits == "train", chosen[group], splits)
    absent = [name for name in SPLITS if not np.any(splits == name)]
    if absent:
        raise UsageError(
            f"{source}: {len(splits)} examples in {len(names)} groups are too few to leave some "
            f"for {' and '.join(absent)}; give more examples, or assign them to splits"
        )
    return splits


def _rarity(labels: np.ndarray) -> np.ndarray:
    """The rank of each example's rarest label, int64 (n,): 0 for the rarest; k for no label."""
    counts = np.bincount(labels) if labels.ndim == 1 else labels.sum(0, dtype=np.int64)
    order = np.argsort(counts, kind="stable")
    if labels.ndim == 1:
        return np.argsort(order)[labels]
    ranked = labels[:, order] > 0
    return np.where(ranked.any(1), ranked.argmax(1), ranked.shape[1])


def _check_groups(splits: np.ndarray, names: np.ndarray, group: np.ndarray, source: str) -> None:
    first = np.empty(len(names), splits.dtype)
    first[group] = splits
    other = np.flatnonzero(splits != first[group])
    if len(other):
        row = other[0]
        raise UsageError(
            f"{source}: the group {names[group[row]]} is in two splits, {splits[row]} and "
            f"{first[group[row]]}; each group may be in one"
        )


def check_classes(classes: Sequence[str], labels: np.ndarray, source: str) -> None:
    """Checks that there are classes, an example of each, and no fewer examples than classes.

    Raises:
      UsageError: see above.
    """
    if labels.ndim == 1 and len(classes) < 2:
        raise UsageError(f"{source}: there is only the class {classes[0]}; give two or more")
    if len(labels) < len(classes):
        raise UsageError(
            f"{source}: {len(labels)} examples are fewer than the {len(classes)} classes"
        )
    if labels.ndim == 2 and not labels.any(0).all():
        empty = classes[int(labels.any(0).argmin())]
        raise UsageError(f"{source}: no example has the label {empty}; remove its column")


def check_training_classes(
    classes: Sequence[str], labels: np.ndarray, splits: np.ndarray, source: str
) -> None:
    """Checks that each class of a single label has a training example.

    Raises:
      UsageError: a class has none.
    """
    if labels.ndim == 2:
        return
    empty = sorted(set(range(len(classes))) - set(labels[splits == "train"].tolist()))
    if empty:
        raise UsageError(
            f"{source}: the class {classes[empty[0]]} has no training example; add one, or remove "
            "the class"
        )


def warn_of_incomplete_classes(
    classes: Sequence[str], labels: np.ndarray, splits: np.ndarray, source: str
) -> dict[str, str]:
    """Warns of classes that a split has no example of.

    Args:
      classes: names of the classes.
      labels: int (n,) classes, or 0 and 1 (n, k).
      splits: n names of `SPLITS`.
      source: origin of the examples, for the warning.

    Returns:
      The number of examples in each split, in words, by the name of such a class.
    """
    found = {}
    for number, name in enumerate(classes):
        own = splits[labels == number if labels.ndim == 1 else labels[:, number] > 0]
        counts = {split: int(np.sum(own == split)) for split in SPLITS}
        if 0 in counts.values():
            found[name] = ", ".join(f"{count} {split}" for split, count in counts.items())
            warnings.warn(
                f"{source}: the class {name} has too few examples for every split: {found[name]}. "
                "Its metrics are undefined where it has none",
                stacklevel=3,
            )
    return found
