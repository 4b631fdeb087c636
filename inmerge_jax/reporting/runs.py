"""Reads the files of a run folder that the tables, figures and report are made from."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from inmerge_jax.buckets import as_path
from inmerge_jax.errors import UsageError
from inmerge_jax.files import read_arrays, read_json_object
from inmerge_jax.modality import EXAMPLES, Modality
from inmerge_jax.training.config import ARMS
from inmerge_jax.training.mask_metrics import read_masks
from inmerge_jax.training.metrics import metric_names, read_scores


@dataclass(frozen=True)
class Run:
    """One finished run, read from its folder.

    Attributes:
      folder: the run folder.
      results: contents of `results.json`.
    """

    folder: Path
    results: dict[str, Any]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Contents of `config.json`; {} where it is missing."""
        return self._optional("config.json", _read_json) or {}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Contents of `environment.json`, or the copy in the results."""
        found = self._optional("environment.json", _read_json)
        return found or self.results.get("environment") or {}

    @property
    def missing(self) -> list[str]:
        """Arms and files that the folder lacks, as phrases for the report."""
        expected = {arm for pair in self.pairs for arm in pair}
        found = [f"arm {arm} was not run" for arm in ARMS if arm in expected - {*self.arms}]
        files = ("config.json", "environment.json")
        found += [f"the file {x} is missing" for x in files if not (self.folder / x).exists()]
        scores = self._score_files().items()
        lost = [f"{arm}, seed {seed}" for (seed, arm), path in scores if not path.is_file()]
        if lost:
            kind = "predicted test masks" if self.segmentation else "test scores"
            found.append(f"no {kind} of {'; '.join(lost)}, so no margin over test {self.examples}")
        return found

    @property
    def single_stage(self) -> bool:
        """Whether inmerge started from the backbone's first weights and has the same epochs."""
        return "merge_from_epoch" in (self.results.get("rule") or {})

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Pairs of arms to compare, the main one first."""
        if self.single_stage:
            return (("inmerge", "backbone"),)
        return (("inmerge", "finetune"), ("finetune", "backbone"))

    @property
    def dataset(self) -> dict[str, Any]:
        """Name, size, task, classes, title, source and counts of the data set."""
        return self.results["dataset"]

    @property
    def segmentation(self) -> bool:
        """Whether the labels are masks."""
        return self.dataset.get("task") == "segmentation"

    @property
    def metrics(self) -> tuple[str, str]:
        """Names of the metrics of the results, the main one first."""
        return metric_names(self.dataset.get("task", ""))

    @property
    def modality(self) -> Modality:
        """What the examples are."""
        return self.dataset.get("modality", "image")

    @property
    def examples(self) -> str:
        """What several examples are called, such as "images"."""
        return EXAMPLES[self.modality]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of all arms, ascending."""
        return tuple(sorted({r["seed"] for arm in ARMS for r in self.arm(arm).values()}))

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms with at least one result, in the order of `ARMS`."""
        return tuple(arm for arm in ARMS if self.arm(arm))

    def arm(self, arm: str) -> dict[int, dict[str, Any]]:
        """The results of one arm by seed; empty if it was not run."""
        return {r["seed"]: r for r in self.results["arms"].get(arm) or ()}

    @property
    def threshold(self) -> float | None:
        """The merge rule's threshold; None for a rule with a quantile, or without a rule."""
        rule = self.results.get("rule") or {}
        return None if "quantile" in rule else rule.get("threshold")

    @cached_property
    def history(self) -> dict[tuple[int, str], list[dict[str, Any]]]:
        """Lines of `metrics.jsonl` by (seed, arm)."""
        return self._gather("metrics.jsonl", _read_lines)

    @cached_property
    def similarity(self) -> dict[tuple[int, str], dict[str, list[dict[str, Any]]]]:
        """`similarity.json` by (seed, arm): "before" and "after" -> one entry per layer.

        An entry's "quantiles" and "above" have floats as keys. Its numbers are NaN without pairs.
        """
        found = self._gather("similarity.json", _read_json)
        for layer in (x for stages in found.values() for layers in stages.values() for x in layers):
            for name in ("quantiles", "above"):
                layer[name] = {float(key): number(value) for key, value in layer[name].items()}
            for name in ("mean", "minimum", "maximum", "nearest"):
                layer[name] = number(layer[name])
        return found

    @cached_property
    def test_labels(self) -> np.ndarray | None:
        """Labels of the test split, (n,), or (n, labels) of several labels, or masks.

        None where there are none.
        """
        if self._labels is None:
            return None
        labels = self._labels["test"]
        column = labels.ndim == 2 and not self.dataset.get("task", "").startswith("multi-label")
        return labels[:, 0] if column and labels.shape[1] == 1 else labels

    @cached_property
    def test_patients(self) -> np.ndarray | None:
        """Patient of each test image, int (n,); None where the folder does not name them."""
        return None if self._labels is None else self._labels.get("test_patients")

    @cached_property
    def _labels(self) -> dict[str, np.ndarray] | None:
        return self._optional("labels.npz", self._read_arrays)

    @cached_property
    def test_scores(self) -> dict[tuple[int, str], np.ndarray]:
        """Test scores, float (n, classes), by (seed, arm)."""
        paths = self._score_files()
        return {key: read_scores(path) for key, path in paths.items() if path.is_file()}

    @cached_property
    def test_masks(self) -> dict[tuple[int, str], dict[str, np.ndarray]]:
        """Predicted test masks and their metrics by (seed, arm), see `read_masks`."""
        paths = self._score_files()
        return {key: read_masks(path) for key, path in paths.items() if path.is_file()}

    @property
    def scored(self) -> bool:
        """Whether the folder has test labels and finite test scores of every seed and arm."""
        labels = self.test_labels
        if self.segmentation:
            masks = self.test_masks
            return labels is not None and all(
                key in masks and masks[key]["masks"].shape == labels.shape
                for key in self._score_files()
            )
        scores = self.test_scores
        return labels is not None and all(
            key in scores and len(scores[key]) == len(labels) and np.isfinite(scores[key]).all()
            for key in self._score_files()
        )

    def _score_files(self) -> dict[tuple[int, str], Path]:
        kind = "masks" if self.segmentation else "scores"
        return {
            (seed, arm): self._stage(seed, arm) / (result.get(kind) or {}).get("test", "")
            for arm in self.arms
            for seed, result in self.arm(arm).items()
        }

    def _stage(self, seed: int, arm: str) -> Path:
        return self.folder / f"seed{seed}" / arm

    @cached_property
    def samples(self) -> dict[str, np.ndarray] | None:
        """Examples ("images"), labels and names of `samples.npz`; None where it is missing.

        Of volumes, the middle slice; a table has none.
        """
        return self._optional("samples.npz", self._read_arrays)

    def _read_arrays(self, path: Path) -> dict[str, np.ndarray]:
        return read_arrays(
            path,
            f"restore the original file, or delete {self.folder / 'results.json'} and run the "
            "command with --resume, which writes both again without training",
        )

    def _optional(self, name: str, read: Callable[[Path], Any]) -> Any:
        path = self.folder / name
        return read(path) if path.exists() else None

    def _gather(self, name: str, read: Callable[[Path], Any]) -> dict[tuple[int, str], Any]:
        keys = [(seed, arm) for arm in self.arms for seed in self.arm(arm)]
        paths = {key: self._stage(*key) / name for key in keys}
        return {key: read(path) for key, path in paths.items() if path.exists()}


def read_run(folder: Path | str) -> Run:
    """Reads a finished run's folder.

    Raises:
      UsageError: the folder holds no `results.json` (the run is not finished), or one that cannot
        be read.
    """
    folder = as_path(folder)
    path = folder / "results.json"
    if not path.exists():
        raise UsageError(
            f"{folder} holds no results.json, so it is not a finished run; finish it with "
            "`inmerge train --resume` and the same options, or name another folder"
        )
    results = _read_json(path)
    if not {"dataset", "arms"} <= results.keys():
        raise UsageError(f"{path} is not a run's results: it lacks 'dataset' or 'arms'")
    return Run(folder, results)


def number(value: Any) -> float:
    """A JSON number as float; null is read as NaN."""
    return math.nan if value is None else float(value)


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, "restore the original file")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise UsageError(
            f"{path} is damaged ({error}): restore the original file, or delete it, and the "
            "report omits its curves"
        ) from error
