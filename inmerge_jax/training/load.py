"""A finished run as a predictor: its network, weights, preprocessing and thresholds."""

import dataclasses
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
from inmerge_jax.data.images import Resize
from inmerge_jax.errors import UsageError
from inmerge_jax.files import read_arrays, read_json_object
from inmerge_jax.modality import SPATIAL_AXES, Modality
from inmerge_jax.models import create_model
from inmerge_jax.training import checkpointing
from inmerge_jax.training.metrics import read_scores
from inmerge_jax.training.stage_results import read_result, read_tested
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
    if not config.keys() >= {"seeds", "arms", "model"}:
        raise UsageError(f"{run} holds no run: its {path.name} has no seeds, arms or model")
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
    """What a network does to examples before its first layer.

    Attributes:
      size: height and width (and depth) in pixels, length of a signal in samples, or number of
        features of a table.
      channels: number of channels, 1 or 3; grey images are repeated for 3. Of a signal, any number;
        of a table, the number of features.
      mean: mean per channel or feature, or one for all; of images, in [0, 1].
      std: standard deviation per channel, or one for all.
      modality: what the examples are.
      resize: interpolation that image files are resized with; None for that of the data set.
      bits: bits of image files, see `Dataset.bits`; None if unknown.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    modality: Modality = "image"
    resize: Resize | None = None
    bits: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example, as the network reads it."""
        return (*(self.size,) * SPATIAL_AXES[self.modality], self.channels)

    def __call__(self, images: Any) -> jax.Array:
        """Maps examples (n, *`shape`) to float32 of this shape.

        Images and volumes are uint8, and those of one channel become `channels`; signals and tables
        are numbers.

        Raises:
          UsageError: the examples have another shape or dtype.
        """
        images = np.asarray(images)
        pixels = self.modality in ("image", "volume")
        right = images.dtype == np.uint8 if pixels else images.dtype.kind in "fiu"
        shapes = {self.shape, (*self.shape[:-1], 1)} if pixels else {self.shape}
        if not right or images.shape[1:] not in shapes:
            raise UsageError(
                f"`images` of {images.dtype} {images.shape}: the network needs "
                f"{'uint8' if pixels else 'float32'} (n, {', '.join(map(str, self.shape))})"
            )
        if images.shape[-1] != self.channels:
            images = np.repeat(images, self.channels, axis=-1)
        return normalise(jnp.asarray(images, None if pixels else jnp.float32), self)


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
      preprocessing: maps examples, such as uint8 images, to the network's input x.
      classes: one name per column of the scores.
      task: one of `data.dataset.TASKS`.
      stage: where the run, its options and its results are.
      features: names of a table's features, in their order; () for other data.
    """

    model: nn.Module
    variables: dict[str, Any]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    task: str
    stage: FinishedStage
    features: tuple[str, ...] = ()

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.task == TASKS[-1]

    def predict(self, images: Any, batch_size: int = 128) -> np.ndarray:
        """Probabilities of the classes or labels, float32 (n, classes); of a U-Net masks.

        Masks are uint8 (n, size, size), indices of `classes`.

        Args:
          images: the examples, see `Preprocessing`.
          batch_size: number of examples per call of the network.

        Raises:
          UsageError: the examples have another shape or dtype.
        """
        variables, scores = jax.device_put(self.variables), []
        for start in range(0, len(images), batch_size):
            x = self.preprocessing(images[start : start + batch_size])
            short = min(batch_size, len(images)) - len(x)
            x = jnp.pad(x, ((0, short), *[(0, 0)] * (x.ndim - 1)))  # one shape, one compilation
            found = _scores(self.model, self.multi_label, variables, x)
            scores.append(np.asarray(found)[: len(x) - short])
        return np.concatenate(scores) if scores else np.zeros((0, len(self.classes)), np.float32)

    def thresholds(self) -> dict[str, Threshold | None]:
        """A threshold for every label of a multi-label task, or for the second of two classes.

        It is calibrated on the scores of the run's validation examples. None for a label without
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
    modality = dataset.get("modality", "image")
    model = create_model(
        chosen["name"],
        len(classes),
        modality=modality,
        stem=chosen["stem"],
        width=chosen["width"],
        dtype=jnp.dtype(chosen["dtype"]),
    )
    preprocessing = Preprocessing(
        dataset["size"],
        len(recipe["mean"]),
        tuple(recipe["mean"]),
        tuple(recipe["std"]),
        modality,
        stage.config["data"].get("resize"),
        dataset.get("bits"),
    )
    if not _reads(model, variables, preprocessing.shape):
        # Colour images, which one mean and deviation normalise.
        preprocessing = dataclasses.replace(preprocessing, channels=3)
    features = tuple(dataset.get("features", ()))
    return LoadedRun(model, variables, preprocessing, classes, dataset["task"], stage, features)


def _reads(model: nn.Module, variables: Any, shape: tuple[int, ...]) -> bool:
    """Whether a network with these variables reads examples of this shape."""
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    needed = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)
    return jax.tree.map(jnp.shape, needed) == jax.tree.map(jnp.shape, variables)


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
