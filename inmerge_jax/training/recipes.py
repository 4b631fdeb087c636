"""Training recipes as data, and the rules that read a stage's history."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. Both stages follow it, each over its own epochs.

    Attributes:
      optimizer: "adam" (eps 1e-8) or "sgd", each as PyTorch computes it.
      learning_rate: rate of the backbone stage's first epoch.
      batch_size: examples of one update, over all devices.
      epochs: epochs of the backbone stage.
      merging_epochs: epochs of the second stage (the arms finetune and inmerge).
      schedule: "milestones" multiplies the rate by `factor` once each of the shares `milestones` of
        the stage's epochs is done. "plateau" multiplies it after every epoch that lies `tolerance`
        or more epochs behind the one of lowest validation loss, and starts a fresh optimizer each
        time: after the first cut it fires again at every further epoch without a new lowest loss.
      select: what the best checkpoint has most of ("val_auc") or least of ("val_loss").
      merging_learning_rate: rate of the second stage's first epoch; None for the rate that the
        backbone's best epoch was trained with.
      momentum: of sgd.
      weight_decay: coupled L2: added to the gradient, before momentum or Adam's moments.
      flip: mirror training images left to right with probability 1/2.
      pos_weight: None, or the most that a label of 1 may count in a multi-label loss: the
        training images without the label by those with it, as in CheXNet (arXiv 1711.05225), whose
        two weights have that ratio.
      mean: per channel, subtracted from images in [0, 1]. Three values make grey images RGB.
      std: per channel, by which images are then divided.
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
    """The rate of a stage's next epoch, and whether a fresh optimizer starts with it.

    Args:
      recipe: its `schedule` decides.
      start: rate of the stage's first epoch.
      epochs: how many epochs the stage has in all.
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
    """How often a label of 1 counts in the loss: float32 (k,), None where the recipe says nothing.

    Args:
      recipe: its `pos_weight` is the most.
      labels: of the training split, (n, k) of 0 and 1.

    Returns:
      (n - m) / m for a label that m of the n images have, at most the recipe's number; 1 for a
      label that no image has.
    """
    if recipe.pos_weight is None:
        return None
    ones = labels.sum(0, dtype=np.int64)
    weights = np.minimum((len(labels) - ones) / np.maximum(ones, 1), recipe.pos_weight)
    return np.where(ones > 0, weights, 1).astype(np.float32)


def best_epoch(history: Sequence[Mapping[str, Any]], select: str) -> int:
    """The 1-based epoch with the highest "val_auc" or the lowest "val_loss"; the first of equals.

    An undefined value (None or NaN) is worse than any number.
    """

    def worth(line: Mapping[str, Any]) -> float:
        value = line[select]
        if value is None or math.isnan(value):
            return -math.inf
        return value if select == "val_auc" else -value

    return 1 + max(range(len(history)), key=lambda index: worth(history[index]))
