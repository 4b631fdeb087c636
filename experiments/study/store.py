"""Finished cells as they are kept with the project: what each was, its figures, its test scores.

experiments/results/cells/<hash>.json        configuration, figures, where and when
<hash>.npz         test scores, float32 (images, classes)
labels-<data>.npz  labels of the test images, the task, and whose image each is where that is known
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.study import datasets
from experiments.study.cells import Cell
from experiments.study.stages import Places, plan_of
from inmerge_jax.errors import InputError
from inmerge_jax.files import write_arrays, write_text
from inmerge_jax.training.loop import read_result
from inmerge_jax.training.scores import read_scores

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
    run, folder = places.cell(cell), places.kept
    result = read_result(run)
    assert result is not None, cell
    around = json.loads((run / "environment.json").read_bytes())
    similar = json.loads((run / "similarity.json").read_bytes())
    record = {
        "name": cell.name,
        "arm": cell.arm,
        "cell": cell.described(),
        "result": {name: result[name] for name in _FIGURES.split()},
        # A second stage begins where its backbone ended, whose own record has that.
        "similarity": {
            when: [_rounded(layer) for layer in similar[when]]
            for when in (("before", "after") if cell.is_backbone else ("after",))
        },
        # A run begun by an earlier version has no processor.
        "trained": {name: around[name] for name in ("started", "git", "cpus", "packages")}
        | {"processor": around.get("processor")},
    }
    labels = folder / f"labels-{cell.backbone.data}.npz"
    if not labels.exists():
        plan = plan_of(cell, places)
        known = {"labels": plan.dataset.test.labels, "task": np.array(plan.dataset.task)}
        patients = plan.dataset.test.patients
        write_arrays(labels, known if patients is None else known | {"patients": patients})
    scores = read_scores(run / result["scores"]["test"]).astype(np.float32)
    write_arrays(folder / f"{cell.hash}.npz", {"scores": scores})
    # On one line: they are many, and nobody reads them one by one.
    text = json.dumps(record, separators=(",", ":"))
    write_text(folder / f"{cell.hash}.json", text + "\n")
    return record


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
      InputError: none is.
    """
    path = folder / f"labels-{data}.npz"
    if not path.exists():
        raise InputError(f"{path} is missing: no cell on {datasets.SOURCES[data].title} is kept")
    with np.load(path) as arrays:
        patients = arrays["patients"] if "patients" in arrays else None
        return Labels(arrays["labels"], str(arrays["task"]), patients)


def _rounded(layer: dict[str, Any]) -> dict[str, Any]:
    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: short(one) for name, one in value.items()}
        return round(value, _DIGITS) if isinstance(value, float) else value

    return short(layer)
