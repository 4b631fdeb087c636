"""AUC and accuracy as the MedMNIST benchmark computes them, and score files in its format.

A score file is named `{flag}{_size}_{split}_[AUC]{auc:.3f}_[ACC]{acc:.3f}@{run}.csv` (no size at
28 px). Each line holds an image's index in the split and its scores. There is no header.
"""

import math
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score

from inmerge_jax.data.dataset import TASKS, Dataset
from inmerge_jax.data.splitting import SPLITS
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_errors, write_text
from inmerge_jax.training.recipes import Recipe

METRICS = MappingProxyType({"auc": "AUC", "acc": "ACC", "dice": "Dice", "hd95": "HD95"})
"""Names of metrics in files, and in text."""


def metric_names(task: str) -> tuple[str, str]:
    """Keys of `METRICS` that results of a task have, the main one first."""
    return ("dice", "hd95") if task == "segmentation" else ("auc", "acc")


class Metrics(NamedTuple):
    """AUC and accuracy on one split.

    Attributes:
      auc: mean of the defined entries of `auc_per_class`; NaN if none is defined.
      acc: accuracy in [0, 1]: of the argmax for multi-class and ordinal tasks, at threshold 0.5 for
        binary tasks, averaged over labels for multi-label tasks.
      auc_per_class: one AUROC per class or label, in [0, 1]; NaN if the split has only positives or
        only negatives. Both classes of a binary task have the same value.
      undefined: number of NaN entries in `auc_per_class`.
    """

    auc: float
    acc: float
    auc_per_class: tuple[float, ...]
    undefined: int


def compute_metrics(labels: Any, scores: Any, task: str) -> Metrics:
    """AUC and accuracy of `scores`, equal to those of `medmnist.Evaluator` where defined.

    Args:
      labels: integers (n,) or (n, 1); for "multi-label, binary-class" 0 or 1, (n, labels).
      scores: finite floats (n, classes); for binary tasks the last column is used, and (n,) and
        (n, 1) are accepted; for multi-label tasks (n, labels). Ties count half.
      task: one of `TASKS` but "segmentation", see `mask_metrics`.

    Raises:
      ValueError: the task is unknown, the shapes do not match, there are no rows, or a score is not
        finite.

    Source: `medmnist.evaluator`. Its mean fails or is NaN if a class has only positives or only
    negatives; here such a class is excluded from the mean and counted.
    """
    if task not in TASKS or task == "segmentation":
        known = ", ".join(name for name in TASKS if name != "segmentation")
        raise ValueError(f"unknown task {task!r}; known: {known}")
    labels, scores = _two_dimensional(labels, scores, task)
    if task == "multi-label, binary-class":
        per_class = [_auroc(labels[:, k] == 1, scores[:, k]) for k in range(scores.shape[1])]
        right = [_share((scores[:, k] > 0.5) == labels[:, k]) for k in range(scores.shape[1])]
        acc = sum(right) / len(right)
    elif task == "binary-class":
        positive = scores[:, -1]
        per_class = [_auroc(labels[:, 0] == 1, positive)] * 2
        acc = _share((positive > 0.5) == labels[:, 0])
    else:
        per_class = [_auroc(labels[:, 0] == k, scores[:, k]) for k in range(scores.shape[1])]
        acc = _share(np.argmax(scores, axis=-1) == labels[:, 0])
    defined = [auc for auc in per_class if not math.isnan(auc)]
    auc = sum(defined) / len(defined) if defined else math.nan
    return Metrics(auc, acc, tuple(per_class), len(per_class) - len(defined))


def selection_notice(recipe: Recipe, dataset: Dataset) -> str:
    """Warning if no validation AUC is defined, so that `best_epoch` uses the loss; else ""."""
    if recipe.select != "val_auc":
        return ""
    labels = dataset.val.labels
    scores = np.zeros((len(labels), dataset.num_classes))
    if not math.isnan(compute_metrics(labels, scores, dataset.task).auc):
        return ""
    return (
        "the validation images have one class only, or one value of each label, so their AUC is "
        "undefined; the epoch with the lowest validation loss is tested"
    )


def json_metrics(metrics: Any) -> dict[str, Any]:
    """`Metrics` or `MaskMetrics` as a JSON-serializable dict, with None for NaN."""
    return {
        name: [json_number(one) for one in value]
        if isinstance(value, tuple)
        else json_number(value)
        for name, value in metrics._asdict().items()
    }


def json_number(value: float) -> float | None:
    """`value`, or None if it is NaN, which JSON cannot represent."""
    return None if math.isnan(value) else value


def _two_dimensional(labels: Any, scores: Any, task: str) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels), np.asarray(scores)
    given = f"labels {labels.shape}, scores {scores.shape}, task {task!r}"
    labels = labels[:, None] if labels.ndim == 1 else labels
    scores = scores[:, None] if scores.ndim == 1 else scores
    if labels.ndim != 2 or scores.ndim != 2 or len(labels) != len(scores) or not labels.size:
        raise ValueError(f"labels and scores need the same number of rows, at least one: {given}")
    if labels.shape[1] != (scores.shape[1] if task.startswith("multi-label") else 1):
        raise ValueError(f"labels have the wrong number of columns for this task: {given}")
    if task in ("multi-class", "ordinal-regression") and scores.shape[1] < 2:
        raise ValueError(f"scores need one column per class: {given}")
    highest = scores.shape[1] - 1 if task in ("multi-class", "ordinal-regression") else 1
    if labels.min() < 0 or labels.max() > highest:
        raise ValueError(f"labels outside 0..{highest}: {labels.min()}..{labels.max()}; {given}")
    if bad := np.count_nonzero(~np.isfinite(scores.astype(np.float64))):
        raise ValueError(f"{bad} scores are not finite: {given}")
    return labels, scores


def _auroc(positive: np.ndarray, scores: np.ndarray) -> float:
    if positive.all() or not positive.any():
        return math.nan
    return float(roc_auc_score(positive, scores))


def _share(right: np.ndarray) -> float:
    return float(np.mean(right))


def write_scores(
    folder: Path, flag: str, size: int, split: str, scores: Any, metrics: Metrics, run: str
) -> Path:
    """Writes the scores of one split and returns the file's path.

    Numbers have enough digits to be read back exactly, so `medmnist.Evaluator.parse_and_evaluate`
    reproduces `metrics` from the file.

    Args:
      folder: folder of the file; created if missing.
      flag: name of the data set, without "_", "@" and "/".
      size: image size in pixels.
      split: "train", "val" or "test".
      scores: floats (n,) or (n, columns), in the order of the split.
      metrics: metrics of these scores, which are part of the file name.
      run: name of the run, without "@", "." and "/".

    Raises:
      UsageError: the file cannot be written.
      ValueError: medmnist could not parse the file name, or the scores have another shape.
    """
    scores = np.asarray(scores)
    scores = scores[:, None] if scores.ndim == 1 else scores
    if scores.ndim != 2:
        raise ValueError(f"scores of shape {scores.shape}; needed: (n,) or (n, columns)")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if not flag or set(flag) & set("_@/"):
        raise ValueError(f"the data set's name must be non-empty, without '_', '@', '/': {flag!r}")
    if not run or set(run) & set("@./"):
        raise ValueError(f"the run's name must be non-empty, without '@', '.', '/': {run!r}")
    pixels = "" if size == 28 else f"_{size}"
    figures = f"[AUC]{metrics.auc:.3f}_[ACC]{metrics.acc:.3f}"
    path = folder / f"{flag}{pixels}_{split}_{figures}@{run}.csv"
    lines = (",".join([str(index), *map(str, row)]) for index, row in enumerate(scores))
    with write_errors(path):
        write_text(path, "\n".join(lines) + "\n")
    return path


def read_scores(path: Path) -> np.ndarray:
    """The scores of one file, float64 (n, columns), in the order of their indices.

    Raises:
      UsageError: the file is missing, or its lines are not an index and scores.
    """
    try:
        lines = path.read_text().splitlines() or ["empty"]
        table = np.loadtxt(lines, delimiter=",", ndmin=2, dtype=np.float64)
    except FileNotFoundError as error:
        raise UsageError(f"there is no score file {path}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not a score file: {error}") from error
    if table.shape[1] < 2:
        raise UsageError(f"{path} is not a score file: an index and scores per line are needed")
    return table[np.argsort(table[:, 0], kind="stable"), 1:]
