"""Training recipes, learning-rate schedules and checkpoint selection."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Recipe:
    """A training recipe for both stages.

    Attributes:
      optimizer: "adam" (eps 1e-8) or "sgd", as in PyTorch.
      learning_rate: initial learning rate of the backbone stage.
      batch_size: examples per update, over all devices.
      epochs: epochs of the backbone stage.
      merging_epochs: epochs of the second stage (arms finetune and inmerge).
      schedule: "milestones" multiplies the rate by `factor` at each of the fractions `milestones`
        of the stage. "plateau" multiplies it, and resets the optimizer, after every epoch that is
        `tolerance` or more epochs past the lowest validation loss; it fires again at every further
        epoch without a new lowest loss.
      select: criterion for the best checkpoint: highest "val_auc" or lowest "val_loss".
      merging_learning_rate: initial learning rate of the second stage; None for that of the
        backbone's best epoch.
      momentum: momentum of SGD.
      weight_decay: coefficient of coupled L2 regularization, added to the gradient before momentum
        or Adam's moments.
      flip: flip training images left to right with probability 1/2.
      pos_weight: None, or the upper bound on the weight of positive labels in a multi-label loss.
        The weight is negatives / positives, as in CheXNet (arXiv 1711.05225).
      recompute_batch_stats: arms whose batch statistics are re-estimated from training images
        before each evaluation: none, inmerge, or all. The training state keeps its running ones.
      batch_stats_batches: number of training batches for that; None for one pass.
      average_weights: None, or the decay of the exponential moving average of the weights that is
        evaluated in their place; every stage starts its own.
      mean: per-channel mean, subtracted from images in [0, 1]. Three values turn grey images into
        RGB.
      std: per-channel standard deviation, by which images are divided.
    """

    optimizer: Literal["adam", "sgd"]
    learning_rate: float
    batch_size: int
    epochs: int
    merging_epochs: int
    schedule: Literal["milestones", "plateau"]
    select: Literal["val_auc", "val_loss"]
    merging_learning_rate: float | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    flip: bool = False
    pos_weight: float | None = None
    recompute_batch_stats: Literal["off", "inmerge", "all"] = "off"
    batch_stats_batches: int | None = None
    average_weights: float | None = None
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    milestones: tuple[float, ...] = (0.5, 0.75)
    tolerance: int = 8
    factor: float = 0.1


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        # Yang et al. 2023 (MedMNIST v2); its experiments have no second stage.
        "medmnist": Recipe(
            optimizer="adam",
            learning_rate=1e-3,
            batch_size=128,
            epochs=100,
            merging_epochs=10,
            schedule="milestones",
            select="val_auc",
        ),
        # The code released with arXiv 2502.20516, except that it merges in training only.
        "released": Recipe(
            optimizer="sgd",
            learning_rate=0.1,
            momentum=0.9,
            weight_decay=1e-4,
            batch_size=324,
            epochs=30,
            merging_epochs=10,
            schedule="plateau",
            select="val_loss",
            flip=True,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
    }
)


def next_learning_rate(
    recipe: Recipe, start: float, epochs: int, history: Sequence[Mapping[str, Any]]
) -> tuple[float, bool]:
    """The learning rate of a stage's next epoch, and whether the optimizer is reset.

    Args:
      recipe: supplies the schedule.
      start: learning rate of the stage's first epoch.
      epochs: number of epochs of the stage.
      history: one mapping per finished epoch, with "learning_rate" and "val_loss".
    """
    if recipe.schedule == "milestones":
        passed = sum(len(history) >= share * epochs for share in recipe.milestones)
        return start * recipe.factor**passed, False
    if not history:
        return start, False
    rate = history[-1]["learning_rate"]
    if len(history) - best_epoch(history, "val_loss") >= recipe.tolerance:
        return rate * recipe.factor, True
    return rate, False


def label_pos_weights(recipe: Recipe, labels: np.ndarray) -> np.ndarray | None:
    """Weights of positive labels in the loss.

    Args:
      recipe: supplies the upper bound `pos_weight`.
      labels: labels of the training split, (n, k) of 0 and 1.

    Returns:
      float32 (k,): (n - m) / m for a label with m positives, at most the bound; 1 for a label
      without positives. None if the recipe has no `pos_weight`.
    """
    if recipe.pos_weight is None:
        return None
    ones = labels.sum(0, dtype=np.int64)
    weights = np.minimum((len(labels) - ones) / np.maximum(ones, 1), recipe.pos_weight)
    return np.where(ones > 0, weights, 1).astype(np.float32)


def best_epoch(history: Sequence[Mapping[str, Any]], select: str) -> int:
    """The 1-based epoch with the highest "val_auc" or the lowest "val_loss"; the first of ties.

    An undefined value (None or NaN) is worse than any number.
    """

    def worth(line: Mapping[str, Any]) -> float:
        value = line[select]
        if value is None or math.isnan(value):
            return -math.inf
        return value if select == "val_auc" else -value

    return 1 + max(range(len(history)), key=lambda index: worth(history[index]))
