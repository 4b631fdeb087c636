"""Finished cells as they are kept with the project: what each was, its figures, its test scores.

experiments/results/cells/<hash>.json        configuration, figures, where and when
<hash>.npz         test scores, float32 (images, classes)
labels-<data>.npz  labels of the test images, the task, and whose image each is where that is known
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.study import datasets
from experiments.study.cells import Cell
from experiments.study.stages import Places, plan_of
from inmerge_jax.data import Dataset
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_arrays, write_text
from inmerge_jax.training.metrics import read_scores
from inmerge_jax.training.train import read_result

CELLS = Path(__file__).parents[1] / "results" / "cells"
_FIGURES = "best_epoch epochs steps seconds val test layers kernels selected merged warnings"
_DIGITS = 4


class Labels(NamedTuple):
    """Of a data set's test images, medmnist's word for the task, and the patient of each image."""

    labels: np.ndarray
    task: str
    patients: np.ndarray | None


def keep(cell: Cell, places: Places) -> dict[str, Any]:
    """Copies a finished cell's figures and test scores from its run folder; returns the record."""
    run = places.cell(cell)
    result = read_result(run)
    assert result is not None, cell
    record = make_record(
        cell,
        result,
        json.loads((run / "similarity.json").read_bytes()),
        json.loads((run / "environment.json").read_bytes()),
    )
    known = None
    if not labels_path(cell.backbone.data, places.kept).exists():
        known = labels_of(plan_of(cell, places).dataset)
    scores = read_scores(run / result["scores"]["test"])
    write(cell, record, scores, known, places.kept)
    return record


def make_record(
    cell: Cell, result: Mapping[str, Any], similar: Mapping[str, Any], around: Mapping[str, Any]
) -> dict[str, Any]:
    """What is kept of a training, JSON-ready.

    Args:
      cell: what was trained.
      result: of `loop.train_stage`.
      similar: its similarities, "before" and "after".
      around: of `environment`; may also name the device and its driver.
    """
    trained = {name: around[name] for name in ("started", "git", "cpus", "packages")}
    # A run begun by an earlier version has no processor.
    trained["processor"] = around.get("processor")
    trained |= {name: around[name] for name in ("device", "driver") if name in around}
    return {
        "name": cell.name,
        "arm": cell.arm,
        "cell": cell.described(),
        "result": {name: result[name] for name in _FIGURES.split()},
        # A second stage begins where its backbone ended, whose own record has that.
        "similarity": {
            when: [_rounded(layer) for layer in similar[when]]
            for when in (("before", "after") if cell.is_backbone else ("after",))
        },
        "trained": trained,
    }


def write(
    cell: Cell, record: Mapping[str, Any], scores: np.ndarray, known: Labels | None, folder: Path
) -> None:
    """Writes a record, its test scores and, where no cell of the data set is kept, the labels.

    Raises:
      UsageError: the labels that are kept of this data set are others.
    """
    labels = labels_path(cell.backbone.data, folder)
    if known is not None and labels.exists():
        kept = read_labels(cell.backbone.data, folder)
        if not np.array_equal(kept.labels, known.labels):
            raise UsageError(f"{labels} holds other test labels than those of {cell.name}")
    elif known is not None:
        arrays = {"labels": known.labels, "task": np.array(known.task)}
        patients = {} if known.patients is None else {"patients": known.patients}
        write_arrays(labels, arrays | patients)
    write_arrays(folder / f"{cell.hash}.npz", {"scores": scores.astype(np.float32)})
    # On one line: they are many, and nobody reads them one by one.
    text = json.dumps(record, separators=(",", ":"))
    write_text(folder / f"{cell.hash}.json", text + "\n")


def labels_of(dataset: Dataset) -> Labels:
    """Those of a data set's test images."""
    return Labels(dataset.test.labels, dataset.task, dataset.test.patients)


def labels_path(data: str, folder: Path) -> Path:
    """Where the test labels of a data set are kept."""
    return folder / f"labels-{data}.npz"


def read(cell: Cell, folder: Path = CELLS) -> dict[str, Any] | None:
    """The record of a cell; None where none is kept."""
    path = folder / f"{cell.hash}.json"
    return json.loads(path.read_bytes()) if path.exists() else None


def read_test_scores(cell: Cell, folder: Path = CELLS) -> np.ndarray:
    """Its test scores, float32 (images, classes)."""
    with np.load(folder / f"{cell.hash}.npz") as arrays:
        return arrays["scores"]


def read_labels(data: str, folder: Path = CELLS) -> Labels:
    """Of the test images of a data set of which a cell is kept.

    Raises:
      UsageError: none is.
    """
    path = labels_path(data, folder)
    if not path.exists():
        raise UsageError(f"{path} is missing: no cell on {datasets.SOURCES[data].title} is kept")
    with np.load(path) as arrays:
        patients = arrays["patients"] if "patients" in arrays else None
        return Labels(arrays["labels"], str(arrays["task"]), patients)


def _rounded(layer: dict[str, Any]) -> dict[str, Any]:
    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: short(one) for name, one in value.items()}
        return round(value, _DIGITS) if isinstance(value, float) else value

    return short(layer)
