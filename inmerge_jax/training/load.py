"""A finished run as a predictor: its network, weights, preprocessing and thresholds."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from sklearn.metrics import roc_curve

from inmerge_jax.buckets import as_path
from inmerge_jax.data.dataset import TASKS
from inmerge_jax.errors import UsageError
from inmerge_jax.files import read_arrays, read_json_object
from inmerge_jax.models import create_model
from inmerge_jax.training import checkpointing
from inmerge_jax.training.metrics import read_scores
from inmerge_jax.training.train import read_result, read_tested
from inmerge_jax.training.train_step import normalise, predictions

_RESTORE = "restore it, or train again"


class FinishedStage(NamedTuple):
    """A finished stage of a run.

    Attributes:
      run: folder of the run.
      arm: its arm.
      seed: its seed.
      config: content of the run's config.json.
      result: content of the stage's result.json.
    """

    run: Path
    arm: str
    seed: int
    config: dict[str, Any]
    result: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Folder of the stage."""
        return self.run / f"seed{self.seed}" / self.arm

    def variables(self) -> dict[str, Any]:
        """Parameters and batch statistics that the stage was tested with, as NumPy arrays.

        Raises:
          UsageError: a file with averaged weights or re-estimated statistics is damaged.
          DamagedCheckpointError: the checkpoint is missing or damaged.
        """
        path = self.folder / "checkpoints" / str(self.result["best_epoch"])
        arrays = checkpointing.read_arrays(path) | read_tested(self.folder)
        ours = ("params.", "batch_stats.")
        return unflatten_dict({k: v for k, v in arrays.items() if k.startswith(ours)}, sep=".")


def find_stage(run: Path | str, arm: str = "inmerge", seed: int | None = None) -> FinishedStage:
    """Finds an arm of a run.

    Args:
      run: folder of the run.
      arm: "backbone", "finetune" or "inmerge".
      seed: seed of the run; None for the first one.

    Raises:
      UsageError: there is no such run, arm or seed, or the arm is not finished.
    """
    run = as_path(run)
    path = run / "config.json"
    if not path.is_file():
        raise UsageError(f"{run} holds no run: there is no {path.name} in it")
    config = read_json_object(path, _RESTORE)
    chosen = {"seed": config["seeds"][0] if seed is None else seed, "arm": arm}
    for name, value in chosen.items():
        there = config[f"{name}s"]
        if value not in there:
            raise UsageError(
                f"`{name}` {value}: the run in {run} has the {name}s {', '.join(map(str, there))}"
            )
    stage = FinishedStage(run, arm, chosen["seed"], config, {})
    result = read_result(stage.folder)
    if result is None:
        raise UsageError(
            f"{stage.folder} is not finished: finish it with `resume` and the run's own options"
        )
    return stage._replace(result=result)


@dataclass(frozen=True)
class Preprocessing:
    """What a network does to images before its first layer.

    Attributes:
      size: height and width in pixels.
      channels: number of channels, 1 or 3; grey images are repeated for 3.
      mean: mean per channel, or one for all, of images in [0, 1].
      std: standard deviation per channel, or one for all.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Any) -> jax.Array:
        """Maps uint8 (n, size, size, 1 or `channels`) to float32 (n, size, size, `channels`).

        Raises:
          UsageError: the images have another shape or dtype.
        """
        images = np.asarray(images)
        fits = images.ndim == 4 and images.shape[1:3] == (self.size, self.size)
        if not fits or images.shape[-1] not in (1, self.channels) or images.dtype != np.uint8:
            raise UsageError(
                f"`images` of {images.dtype} {images.shape}: the network needs uint8 "
                f"(n, {self.size}, {self.size}, {self.channels})"
            )
        if images.shape[-1] != self.channels:
            images = np.repeat(images, self.channels, axis=-1)
        return normalise(jnp.asarray(images), self)


class Threshold(NamedTuple):
    """A decision threshold on a score: at or above it, the label is positive.

    Attributes:
      value: the threshold with the highest Youden index, sensitivity + specificity - 1.
      sensitivity: share of the positive validation images at or above it.
      specificity: share of the negative validation images below it.
    """

    value: float
    sensitivity: float
    specificity: float


@dataclass(frozen=True)
class LoadedRun:
    """The best checkpoint of an arm.

    Attributes:
      model: the network; call it as `model.apply(variables, x, train=False)` for logits.
      variables: {"params": ..., "batch_stats": ...} of NumPy arrays; no "batch_stats" without
        batch normalisation.
      preprocessing: maps uint8 images to the network's input x.
      classes: one name per column of the scores.
      task: one of `data.dataset.TASKS`.
      stage: where the run, its options and its results are.
    """

    model: nn.Module
    variables: dict[str, Any]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    task: str
    stage: FinishedStage

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.task == TASKS[-1]

    def predict(self, images: Any, batch_size: int = 128) -> np.ndarray:
        """Probabilities of the classes or labels, float32 (n, classes); of a U-Net masks.

        Masks are uint8 (n, size, size), indices of `classes`.

        Args:
          images: see `Preprocessing`.
          batch_size: number of images per call of the network.

        Raises:
          UsageError: the images have another shape or dtype.
        """
        variables, scores = jax.device_put(self.variables), []
        for start in range(0, len(images), batch_size):
            x = self.preprocessing(images[start : start + batch_size])
            short = min(batch_size, len(images)) - len(x)
            x = jnp.pad(x, ((0, short), (0, 0), (0, 0), (0, 0)))  # one shape, one compilation
            found = _scores(self.model, self.multi_label, variables, x)
            scores.append(np.asarray(found)[: len(x) - short])
        return np.concatenate(scores) if scores else np.zeros((0, len(self.classes)), np.float32)

    def thresholds(self) -> dict[str, Threshold | None]:
        """A threshold for every label of a multi-label task, or for the second of two classes.

        It is calibrated on the scores of the run's validation images. None for a label without
        positive or without negative ones. Empty for more than two classes, where the class with the
        highest score is predicted.

        Raises:
          UsageError: the scores or labels are missing or damaged.
        """
        if not self.multi_label and self.task != "binary-class":
            return {}
        scores = read_scores(self.stage.folder / self.stage.result["scores"]["val"])
        labels = read_arrays(self.stage.run / "labels.npz", _RESTORE)["val"]
        columns = range(len(self.classes)) if self.multi_label else [1]
        return {
            self.classes[column]: youden_threshold(
                labels[:, column] if self.multi_label else labels, scores[:, column]
            )
            for column in columns
        }


def load_run(run: Path | str, arm: str = "inmerge", seed: int | None = None) -> LoadedRun:
    """Loads the best checkpoint of an arm of a finished run.

        run = load_run("runs/breastmnist")
        scores = run.predict(images)

    Args:
      run: folder of the run.
      arm: "backbone", "finetune" or "inmerge".
      seed: seed of the run; None for the first one.

    Raises:
      UsageError: there is no such run, arm or seed; the run is not finished; or a file is damaged.
    """
    stage = find_stage(run, arm, seed)
    path = stage.run / "results.json"
    if not path.is_file():
        raise UsageError(
            f"{stage.run} is not finished: finish it with `resume` and the run's own options"
        )
    dataset = read_json_object(path, _RESTORE)["dataset"]
    chosen, recipe = stage.config["model"], stage.config["recipe"]
    classes, variables = tuple(dataset["classes"]), stage.variables()
    model = create_model(
        chosen["name"],
        len(classes),
        stem=chosen["stem"],
        width=chosen["width"],
        dtype=jnp.dtype(chosen["dtype"]),
    )
    # Only the first convolution reads images.
    kernels = [leaf for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim == 4]
    channels = min(kernel.shape[2] for kernel in kernels)
    preprocessing = Preprocessing(
        dataset["size"], channels, tuple(recipe["mean"]), tuple(recipe["std"])
    )
    return LoadedRun(model, variables, preprocessing, classes, dataset["task"], stage)


def youden_threshold(labels: np.ndarray, scores: np.ndarray) -> Threshold | None:
    """The threshold with the highest Youden index.

    It is halfway between two neighbouring scores, so that rounding changes no decision.

    Args:
      labels: 0 or 1, (n,).
      scores: floats (n,).

    Returns:
      The threshold; None without positive or without negative labels.
    """
    if len(np.unique(labels)) < 2:
        return None
    false_positives, true_positives, values = roc_curve(labels, scores, drop_intermediate=False)
    best = 1 + int(np.argmax(true_positives[1:] - false_positives[1:]))  # the first is infinite
    value, below = values[best], scores[scores < values[best]]
    if len(below):
        value = (value + below.max()) / 2
    return Threshold(float(value), float(true_positives[best]), float(1 - false_positives[best]))


@functools.partial(jax.jit, static_argnames=("model", "multi_label"))
def _scores(model: nn.Module, multi_label: bool, variables: Any, x: jax.Array) -> jax.Array:
    return predictions(model.apply(variables, x, train=False), multi_label)
