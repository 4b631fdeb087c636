"""What a finished stage leaves in its folder: its result, predictions and tested variables."""

from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from inmerge_jax.data import Dataset, Split
from inmerge_jax.files import (
    read_arrays,
    read_json_with_checksum,
    write_arrays,
    write_errors,
)
from inmerge_jax.training.mask_metrics import (
    dice_scores,
    image_metrics,
    mask_metrics,
    mean_over_classes,
    write_masks,
)
from inmerge_jax.training.metrics import compute_metrics, json_metrics, write_scores
from inmerge_jax.training.multihost import run_on_primary

TESTED = "tested.npz"
"""In a stage's folder: averaged weights and re-estimated statistics of its best checkpoint."""


def val_metrics(dataset: Dataset, scores: np.ndarray) -> dict[str, float]:
    """The metrics of an epoch by name, without HD95, which takes longer.

    Args:
      dataset: the data set, whose validation split has the labels.
      scores: scores or masks of the validation split.
    """
    labels = dataset.val.labels
    if dataset.segmentation:
        return {"dice": mean_over_classes(dice_scores(labels, scores, dataset.num_classes))}
    metrics = compute_metrics(labels, scores, dataset.task)
    return {"auc": metrics.auc, "acc": metrics.acc}


def write_predictions(
    folder: Path, dataset: Dataset, split: str, images: Split, scores: np.ndarray, run: str
) -> tuple[dict[str, Any], str]:
    """Writes the scores or masks of a split; every process calls it, and process 0 writes.

    Args:
      folder: the stage's folder.
      dataset: the data set.
      split: "val" or "test".
      images: the split, which has the labels.
      scores: scores or masks of the split.
      run: arm and seed, for the name of a file of scores.

    Returns:
      The metrics for result.json, and the path of the file within `folder`.

    Raises:
      UsageError: the file cannot be written.
    """
    if dataset.segmentation:
        found = image_metrics(images.labels, scores, dataset.num_classes)
        metrics = json_metrics(mask_metrics(found))
        path = run_on_primary(write_masks, folder / "masks" / f"{split}.npz", scores, found)
    else:
        computed = compute_metrics(images.labels, scores, dataset.task)
        metrics = json_metrics(computed)
        path = run_on_primary(
            write_scores,
            folder / "scores",
            dataset.name,
            dataset.size,
            split,
            scores,
            computed,
            run,
        )
    return metrics, str(path.relative_to(folder))


def write_tested(folder: Path, variables: dict[str, Any]) -> None:
    """Writes the variables that a stage is tested with where its checkpoint has others.

    Args:
      folder: the stage's folder.
      variables: averaged "params" or re-estimated "batch_stats", trees of NumPy arrays.

    Raises:
      UsageError: the file cannot be written.
    """
    with write_errors(folder / TESTED):
        write_arrays(folder / TESTED, flatten_dict(variables, sep="."))


def read_tested(folder: Path) -> dict[str, np.ndarray]:
    """Reads what `write_tested` wrote, by dotted path such as "params.conv1.kernel"; {} without it.

    Raises:
      UsageError: the file is damaged.
    """
    path = folder / TESTED
    remedy = (
        "delete it, result.json and the run's results.json, and give `resume`, which evaluates the "
        "stage again"
    )
    return read_arrays(path, remedy) if path.exists() else {}


def read_result(folder: Path) -> dict[str, Any] | None:
    """Reads result.json of a stage; None if the stage is not finished.

    Raises:
      UsageError: the file is damaged.
    """
    path = folder / "result.json"
    remedy = (
        "restore it, or delete it and the run's results.json, and give `resume`, which evaluates "
        "the stage's best checkpoint again"
    )
    return read_json_with_checksum(path, remedy) if path.exists() else None
