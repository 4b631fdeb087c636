"""A question of the study: its grid of cells, what is computed from them, and how it is told."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.study import datasets, statistics, store
from experiments.study.cells import Cell
from inmerge_jax.reporting.plots import Plot
from inmerge_jax.reporting.tables import Table

RESULTS = Path(__file__).parents[1] / "results"
Pair = tuple[str, str]
"""Two arms: the first one minus the second."""


@dataclass(frozen=True)
class Question:
    """One of the study's questions; each has a module of its name in `experiments`.

    Attributes:
      name: of the module.
      number: in the study.
      title: for a heading.
      asked: the question in one line.
      cells: the whole grid.
      analyse: from the kept cells to what is stored, JSON-ready; None where nothing is trained.
      came_out: one line, from what is stored.
      sure: one line, likewise.
      tables: likewise.
      figures: likewise.
      notes: sentences below the tables, likewise: what a reader of these must know.
      measure: what is done with the trained networks, before the analysis; None for nothing. It
        needs their weights, so cells are trained for it even if their figures are kept.
      measured: whether that has been done with a cell, of which the places are given too.
    """

    name: str
    number: int
    title: str
    asked: str
    cells: tuple[Cell, ...]
    analyse: Callable[["Kept"], dict[str, Any]] | None
    came_out: Callable[[dict[str, Any]], str]
    sure: Callable[[dict[str, Any]], str]
    tables: Callable[[dict[str, Any]], list[Table]]
    figures: Callable[[dict[str, Any]], list[Plot]]
    notes: Callable[[dict[str, Any]], Sequence[str]] = lambda found: ()
    measure: Callable[[Sequence[Cell], Any], None] | None = None
    measured: Callable[[Cell, Any], bool] = lambda cell, places: True

    def path(self, results: Path = RESULTS) -> Path:
        """Of what is stored."""
        return results / "study" / f"{self.name}.json"

    def stored(self) -> dict[str, Any] | None:
        """What is stored; None before the first answer."""
        return json.loads(self.path().read_bytes()) if self.path().exists() else None


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
        self, pairs: Sequence[Pair], *, resamples: int = 1000, permutations: int = 1000
    ) -> dict[str, Any]:
        """`statistics.compare` of one group.

        Adds "images"; "labels" (see `_of_labels`); by pair "identical" (the seeds whose networks
        give the test images the very same scores: nothing merged, or only after the epoch that is
        scored); and by arm "merged" (mean share of the kernels merged at an update, None where it
        has no kernels to merge), "shortcuts" (share of its merges in 1x1 shortcuts, and of its
        kernels that are theirs; None where it merged nothing), "same" (of every seed, the share of
        the test images that get the most frequent answer: with several labels an image, the same
        set of them), "val" (validation AUC of every seed), "steps" (updates of each training),
        "over" (the seeds) and "cells" (the hashes).
        """
        arms = self.by_arm()
        known = store.read_labels(self.cells[0].backbone.data, self.folder)
        scores = {
            arm: {s: store.read_test_scores(cell, self.folder) for s, cell in seeds.items()}
            for arm, seeds in arms.items()
        }
        found = statistics.compare(
            known.labels,
            scores,
            known.task,
            pairs,
            resamples=resamples,
            permutations=permutations,
            patients=known.patients,
        )
        both = {
            pair: sorted(set(arms.get(pair[0], {})) & set(arms.get(pair[1], {}))) for pair in pairs
        }
        identical = {
            f"{one} - {two}": [s for s in seeds if np.array_equal(scores[one][s], scores[two][s])]
            for (one, two), seeds in both.items()
            if seeds
        }
        results = {
            arm: [self.record(seeds[s])["result"] for s in sorted(seeds)]
            for arm, seeds in arms.items()
        }
        return {
            "images": len(known.labels),
            "labels": _of_labels(known),
            **found,
            "identical": identical,
            "merged": {arm: _merged_share(rows) for arm, rows in results.items()},
            "shortcuts": {arm: _in_shortcuts(rows) for arm, rows in results.items()},
            "same": {
                arm: [_most_frequent(scores[arm][s], known.task) for s in sorted(seeds)]
                for arm, seeds in arms.items()
            },
            "val": {arm: [row["val"]["auc"] for row in rows] for arm, rows in results.items()},
            "steps": {arm: rows[0]["steps"] for arm, rows in results.items()},
            "over": {arm: sorted(seeds) for arm, seeds in arms.items()},
            "cells": {arm: [seeds[s].hash for s in sorted(seeds)] for arm, seeds in arms.items()},
        }


def _of_labels(known: store.Labels) -> dict[str, Any]:
    """What test labels say: patients, classes, those with an AUC, ACC of the commonest answer."""
    labels = known.labels
    if labels.ndim == 2:
        ones = labels.mean(0)
        constant = float(np.maximum(ones, 1 - ones).mean())
        classes, defined = labels.shape[1], int(((ones > 0) & (ones < 1)).sum())
    else:
        counts = np.bincount(labels)
        constant, classes = float(counts.max() / len(labels)), len(counts)
        defined = int((counts > 0).sum())
    patients = None if known.patients is None else len(np.unique(known.patients))
    return {"patients": patients, "classes": classes, "defined": defined, "constant": constant}


def _merged_share(results: Sequence[Mapping[str, Any]]) -> float | None:
    """Kernels merged in an update, as a share of those that could be, mean over seeds."""
    shares = [
        sum(row["merged"]) / (sum(row["kernels"]) * row["steps"])
        for row in results
        if row["layers"]
    ]
    return float(np.mean(shares)) if shares else None


def _in_shortcuts(results: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Of the merges of all seeds, and of the kernels that could merge, the share in shortcuts."""
    shares = {}
    for what in ("merged", "kernels"):
        counts = [pair for row in results for pair in zip(row["layers"], row[what], strict=True)]
        total = sum(n for _, n in counts)
        if not total:
            return None
        shares[what] = sum(n for name, n in counts if "shortcut" in name) / total
    return shares


def _most_frequent(scores: np.ndarray, task: str) -> float:
    """The share of the images that get the most frequent answer: a class, or a set of findings."""
    if task.startswith("multi-label"):
        _, counts = np.unique(scores > 0.5, axis=0, return_counts=True)
    else:
        counts = np.bincount(scores.argmax(axis=1))
    return float(counts.max() / len(scores))


def add_holm(groups: Iterable[Mapping[str, Any]], pairs: Sequence[Pair]) -> None:
    """Writes Holm's correction of p beside it, over these pairs in all groups and both metrics.

    A pair counts with two seeds or more that are not the same network twice: one training's p says
    nothing of another.
    """
    found = [
        rows[metric]
        for group in groups
        for name in (f"{first} - {second}" for first, second in pairs)
        if (rows := group["differences"].get(name)) is not None and differing(group, name) > 1
        for metric in statistics.METRICS
    ]
    corrected = statistics.holm([row["p"] for row in found])
    for row, value in zip(found, corrected, strict=True):
        row |= {"p_holm": value, "comparisons": len(found)}


def compare_groups(
    kept: Kept, *families: Sequence[Pair], alone: Sequence[Pair] = ()
) -> dict[str, dict[str, Any]]:
    """`Kept.compare` of every group, with Holm's correction over each family of pairs.

    Args:
      kept: cells of one question.
      families: pairs that are corrected together.
      alone: more pairs, whose p is not corrected.

    Returns:
      The group's name for people to its "key" and what `Kept.compare` gave.
    """
    pairs = [pair for family in (*families, alone) for pair in family]
    groups = {
        where(key): {"key": list(key), **cells.compare(pairs)}
        for key, cells in kept.groups().items()
    }
    for family in families:
        add_holm(groups.values(), family)
    return groups


def where(key: Sequence[Any]) -> str:
    """Data set and network of a group, for people; `key` as in `Kept.groups`."""
    data, model, width, optimizer = key
    factor = "" if float(width) == 1 else f" \u00d7{float(width):g}"
    sgd = ", SGD" if optimizer == "sgd" else ""
    return f"{datasets.SOURCES[data].title}, {model}{factor}{sgd}"


def minus(group: Mapping[str, Any], against: str) -> dict[str, dict[str, Any]]:
    """What was found of each arm minus the arm `against`, by arm."""
    pairs = {tuple(pair.split(" - ")): rows for pair, rows in group["differences"].items()}
    return {first: rows for (first, second), rows in pairs.items() if second == against}


def differing(group: Mapping[str, Any], pair: str) -> int:
    """The number of seeds in which a pair's two networks are not the same one."""
    return len(group["differences"][pair]["auc"]["seeds"]) - len(group["identical"][pair])


def told(row: Mapping[str, Any]) -> bool:
    """Whether a difference is distinguished from zero after Holm's correction."""
    return row.get("p_holm", 1.0) < 1 - statistics.CONFIDENCE
