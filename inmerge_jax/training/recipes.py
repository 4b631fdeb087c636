"""Training recipes, learning-rate schedules and checkpoint selection."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from inmerge_jax.data.dataset import Dataset
from inmerge_jax.errors import UsageError
from inmerge_jax.training.augment import NO_AUGMENTATION, AugmentConfig


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
      select: criterion for the best checkpoint: highest "val_auc" (of a segmenter "val_dice", see
        `fit_recipe`) or lowest "val_loss".
      merging_learning_rate: initial learning rate of the second stage; None for that of the
        backbone's best epoch.
      momentum: momentum of SGD.
      weight_decay: coefficient of coupled L2 regularization, added to the gradient before momentum
        or Adam's moments.
      flip: flip training images left to right with probability 1/2.
      pos_weight: None, or the upper bound on the weight of positive labels in a multi-label loss.
        The weight is negatives / positives, as in CheXNet (arXiv 1711.05225).
      class_weights: "balanced" weights the loss of single-label data by class, see `loss_weights`.
      augment: random changes of training images.
      recompute_batch_stats: arms whose batch statistics are re-estimated from training images
        before each evaluation: none, inmerge, or all. The training state keeps its running ones.
      batch_stats_batches: number of training batches for that; None for one pass.
      average_weights: None, or the decay of the exponential moving average of the weights that is
        evaluated in their place; every stage starts its own.
      mean: per-channel mean, subtracted from images in [0, 1]. Three values turn grey images into
        RGB. Of signals and tables, in their own unit.
      std: per-channel standard deviation, by which images are divided.
    """

    optimizer: Literal["adam", "sgd"]
    learning_rate: float
    batch_size: int
    epochs: int
    merging_epochs: int
    schedule: Literal["milestones", "plateau"]
    select: Literal["val_auc", "val_dice", "val_loss"]
    merging_learning_rate: float | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    flip: bool = False
    pos_weight: float | None = None
    class_weights: Literal["balanced"] | None = None
    augment: AugmentConfig = NO_AUGMENTATION
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


def fit_recipe(recipe: Recipe, dataset: Dataset, channels: int | None) -> Recipe:
    """The recipe for a data set: its normalisation has one value per input channel.

    Grey images enter the network with as many channels as `mean` has values. If `channels` differs
    from that, one value is repeated, and three become their average. The channels of signals and
    the features of tables are standardised by the training split, and are not flipped. Where the
    data set has masks, `select` uses the validation Dice instead of the AUC.

    Args:
      recipe: the recipe.
      dataset: the data set.
      channels: 1 or 3 for grey images; None keeps the recipe.

    Raises:
      UsageError: weights of the loss are for other labels, or the crop exceeds the images.
    """
    if recipe.pos_weight is not None and not dataset.multi_label:
        raise UsageError(
            f"`pos_weight` {recipe.pos_weight} is for multi-label data; {dataset.name} is "
            f"{dataset.task}: leave it out"
        )
    if recipe.class_weights is not None and dataset.segmentation:
        raise UsageError(
            f"`class_weights` {recipe.class_weights} is for labels of images; {dataset.name} has "
            "masks, and the Dice loss gives all classes the same weight: leave it out"
        )
    if recipe.class_weights is not None and dataset.multi_label:
        raise UsageError(
            f"`class_weights` {recipe.class_weights}: the images of {dataset.name} may have "
            "several labels; give `pos_weight` instead"
        )
    if dataset.segmentation and recipe.select == "val_auc":
        recipe = dataclasses.replace(recipe, select="val_dice")
    if dataset.modality in ("signal", "table"):
        return _standardised(recipe, dataset.train.images)
    if recipe.augment.crop >= dataset.size:
        raise UsageError(
            f"`crop` {recipe.augment.crop}: the images have {dataset.size} px; choose less"
        )
    if dataset.channels == 1 and channels is not None and channels != len(recipe.mean):
        mean, std = (
            (sum(values) / len(values),) * channels for values in (recipe.mean, recipe.std)
        )
        return dataclasses.replace(recipe, mean=mean, std=std)
    return recipe


def _standardised(recipe: Recipe, examples: Any) -> Recipe:
    """The recipe with mean and standard deviation of each channel; 1 for a constant one."""
    values = np.asarray(examples, np.float64).reshape(-1, examples.shape[-1])
    std = values.std(0)
    std[std == 0] = 1
    mean, std = (tuple(map(float, row.astype(np.float32))) for row in (values.mean(0), std))
    return dataclasses.replace(recipe, mean=mean, std=std, flip=False)


def loss_weights(recipe: Recipe, labels: np.ndarray, classes: int) -> np.ndarray | None:
    """Weights of positive labels, or of classes, in the loss.

    Args:
      recipe: supplies the upper bound `pos_weight`, or `class_weights`.
      labels: labels of the training split: (n, k) of 0 and 1, or (n,).
      classes: number of classes, k.

    Returns:
      float32 (k,). With `pos_weight`: (n - m) / m for a label with m positives, at most the bound.
      With "balanced": n / (c m) for a class of m images, where c classes have images; the mean over
      the images is 1. 1 for a class without images. None if the recipe has neither.
    """
    if recipe.pos_weight is None and recipe.class_weights is None:
        return None
    if labels.ndim == 1:
        ones = np.bincount(labels, minlength=classes)
        weights = len(labels) / (np.count_nonzero(ones) * np.maximum(ones, 1))
    else:
        ones = labels.sum(0, dtype=np.int64)
        weights = np.minimum((len(labels) - ones) / np.maximum(ones, 1), recipe.pos_weight)
    return np.where(ones > 0, weights, 1).astype(np.float32)


def best_epoch(history: Sequence[Mapping[str, Any]], select: str) -> int:
    """The 1-based epoch with the highest metric or the lowest "val_loss"; the first of ties.

    Metrics are "val_auc" and "val_dice". An undefined value (None or NaN) is worse than any number.
    If the metric is undefined in every epoch, the validation loss decides.
    """

    def undefined(line: Mapping[str, Any], name: str) -> bool:
        return line[name] is None or math.isnan(line[name])

    if select != "val_loss" and all(undefined(line, select) for line in history):
        select = "val_loss"
    sign = -1 if select == "val_loss" else 1

    def worth(index: int) -> float:
        line = history[index]
        return -math.inf if undefined(line, select) else sign * line[select]

    return 1 + max(range(len(history)), key=worth)
