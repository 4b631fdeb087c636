"""The classes that a finished trial predicts for corrupted test images."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from experiments.study import archive, datasets
from experiments.study.archive import Archive
from experiments.study.corruptions import SEVERITIES, corrupt
from experiments.study.stages import Paths, plan_of, weights_of
from experiments.study.trials import Trial

LEVELS, IMAGES = (1, 3, 5), 1000
"""Severities, and the most test images, of docs/protocol.md, section 5."""


def measure(
    trial: Trial, paths: Paths, levels: tuple[int, ...] = LEVELS, most: int | None = IMAGES
) -> None:
    """Stores the classes that a finished trial's best weights predict.

    Args:
      trial: on a data set with one label per image.
      paths: of data, run folders and results.
      levels: severities.
      most: number of test images, the first ones; None for all.

    Raises:
      UsageError: its checkpoint is gone.
    """
    classes = predicted(trial, paths, weights_of(trial, paths), levels, most)
    archive.add(paths.results, {}, {f"corrupted/{trial.hash}": classes})


def predicted(
    trial: Trial,
    paths: Paths,
    predict: Callable[[np.ndarray], np.ndarray],
    levels: tuple[int, ...] = LEVELS,
    most: int | None = IMAGES,
) -> np.ndarray:
    """The classes that a network predicts, uint8 (corruptions, severities, images).

    Args:
      trial: see `measure`, as all else.
      paths: of the data.
      predict: from uint8 images to scores.
      levels: severities.
      most: number of test images.
    """
    any_seed = Trial(dataclasses.replace(trial.backbone, seed=0))
    images = _corrupted(any_seed, paths, levels, most)
    classes = np.stack([predict(some).argmax(1).astype(np.uint8) for some in images])
    return classes.reshape(len(SEVERITIES), len(levels), -1)


def are_stored(trial: Trial, archive: Archive) -> bool:
    """Whether predictions of corrupted images are stored."""
    return f"corrupted/{trial.hash}" in archive.arrays


def measured(trial: Trial, archive: Archive) -> bool:
    """Whether they are stored, where the protocol asks for them."""
    return not is_wanted(trial) or are_stored(trial, archive)


def is_wanted(trial: Trial) -> bool:
    """Whether the protocol asks for them: a second stage on images that have one label each."""
    source = datasets.SOURCES[trial.backbone.data]
    return not trial.is_backbone and source.config.name != "chestxray14"


@functools.cache
def _corrupted(
    trial: Trial, paths: Paths, levels: tuple[int, ...], most: int | None
) -> list[np.ndarray]:
    images = plan_of(trial, paths).dataset.test.images[:most]
    return [corrupt(images, name, level) for name in SEVERITIES for level in levels]
