"""A question of the study: its grid of cells, what is computed from them, and how it is told."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.study import statistics, store
from experiments.study.cells import Cell
from inmerge_jax.reporting.plots import Plot
from inmerge_jax.reporting.tables import Table

RESULTS = Path(__file__).parents[1] / "results" / "study"


@dataclass(frozen=True)
class Question:
    """One of the study's questions; each has a module of its name in `experiments`.

    Attributes:
      name: of the module.
      number: in the study.
      title: for a heading.
      asked: the question in one line.
      cells: the whole grid.
      analyse: from the kept cells to what is stored, JSON-ready.
      came_out: one line, from what is stored.
      sure: one line, likewise.
      tables: likewise.
      figures: likewise.
      measure: what is done with the trained networks, before the analysis; None for nothing. It
        needs their weights, so such cells are trained even if their figures are kept.
    """

    name: str
    number: int
    title: str
    asked: str
    cells: tuple[Cell, ...]
    analyse: Callable[["Kept"], dict[str, Any]]
    came_out: Callable[[dict[str, Any]], str]
    sure: Callable[[dict[str, Any]], str]
    tables: Callable[[dict[str, Any]], list[Table]]
    figures: Callable[[dict[str, Any]], list[Plot]]
    measure: Callable[[Sequence[Cell], Any], None] | None = None

    @property
    def path(self) -> Path:
        """Of what is stored."""
        return RESULTS / f"{self.name}.json"

    def stored(self) -> dict[str, Any] | None:
        """What is stored; None before the first answer."""
        return json.loads(self.path.read_bytes()) if self.path.exists() else None


@dataclass(frozen=True)
class Kept:
    """Those cells of a grid that are finished and kept.

    Attributes:
      cells: of the grid, in its order.
      folder: where they are kept.
    """

    cells: tuple[Cell, ...]
    folder: Path = store.CELLS

    @classmethod
    def of(cls, cells: Iterable[Cell], folder: Path = store.CELLS) -> "Kept":
        """Those of `cells` that are kept."""
        return cls(tuple(c for c in cells if store.read(c, folder) is not None), folder)

    def record(self, cell: Cell) -> dict[str, Any]:
        """What is kept of a cell."""
        found = store.read(cell, self.folder)
        assert found is not None, cell
        return found

    def groups(self) -> dict[tuple[str, str, float, str], "Kept"]:
        """By data set, network, width and optimizer, in the order of the grid."""
        found: dict[tuple[str, str, float, str], list[Cell]] = {}
        for cell in self.cells:
            b = cell.backbone
            found.setdefault((b.data, b.model, b.width, b.optimizer), []).append(cell)
        return {key: Kept(tuple(cells), self.folder) for key, cells in found.items()}

    def by_arm(self) -> dict[str, dict[int, Cell]]:
        """Arm to seed to cell."""
        found: dict[str, dict[int, Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.arm, {})[cell.backbone.seed] = cell
        return found

    def compare(
        self, pairs: Sequence[tuple[str, str]], *, resamples: int = 1000, permutations: int = 1000
    ) -> dict[str, Any]:
        """`statistics.compare` of one group, over the seeds that every arm has.

        Adds "images", "seeds", "merged" (arm to the mean share of a layer's kernels merged at an
        update, or None), and "val" (arm to the mean validation AUC).
        """
        arms = self.by_arm()
        # An arm of which a seed is still missing is left out, so that all rows have the same seeds.
        most = max((len(seeds) for seeds in arms.values()), default=0)
        whole = {arm: seeds for arm, seeds in arms.items() if len(seeds) == most}
        common = sorted(set.intersection(*(set(seeds) for seeds in whole.values())))
        known = store.read_labels(self.cells[0].backbone.data, self.folder)
        scores = {
            arm: np.stack([store.read_test_scores(seeds[s], self.folder) for s in common])
            for arm, seeds in whole.items()
        }
        found = statistics.compare(
            known.labels,
            scores,
            known.task,
            pairs,
            resamples=resamples,
            permutations=permutations,
        )
        results = {
            arm: [self.record(seeds[s])["result"] for s in common] for arm, seeds in whole.items()
        }
        return {
            "images": len(known.labels),
            "seeds": common,
            **found,
            "merged": {arm: _merged_share(rows) for arm, rows in results.items()},
            "val": {
                arm: float(np.mean([row["val"]["auc"] for row in rows]))
                for arm, rows in results.items()
            },
            "cells": {arm: [seeds[s].hash for s in common] for arm, seeds in whole.items()},
        }


def _merged_share(results: Sequence[Mapping[str, Any]]) -> float | None:
    """Kernels merged in an update, as a share of those that could be, mean over seeds."""
    shares = [
        sum(row["merged"]) / (sum(row["kernels"]) * row["steps"])
        for row in results
        if row["layers"]
    ]
    return float(np.mean(shares)) if shares else None


def add_holm(rows: Sequence[dict[str, Any]], name: str = "p_images") -> None:
    """Writes Holm's correction of `rows[...][name]` beside it, over all the rows together."""
    corrected = statistics.holm([row[name] for row in rows])
    for row, value in zip(rows, corrected, strict=True):
        row[f"{name}_holm"] = value


def seeds_of(cells: Iterable[Cell], count: int | None) -> tuple[Cell, ...]:
    """Those of the first `count` seeds of each data set; all for None."""
    if count is None:
        return tuple(cells)
    return tuple(cell for cell in cells if cell.backbone.seed < count)


def only_data(cells: Iterable[Cell], names: Sequence[str]) -> tuple[Cell, ...]:
    """Those on the data sets named; all where none is."""
    return tuple(cell for cell in cells if not names or cell.backbone.data in names)
