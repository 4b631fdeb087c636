"""Part 4: trials of the study, as many as fit into the time.

A trial is what the study trains. Several seeds may train at once; see `several_seeds`.
"""

import functools
import time
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.accelerator.grids import GRIDS, Grid, PretrainedGrid
from experiments.benchmarks.accelerator.session import Session, say, to_json
from experiments.benchmarks.accelerator.several_seeds import (
    Program,
    choose_together,
    make_program,
    train_together,
)
from experiments.study import archive, datasets
from experiments.study.stages import EDGES, Paths, batch_size
from inmerge_jax.data import steps_per_epoch
from inmerge_jax.errors import UsageError
from inmerge_jax.files import read_arrays, write_arrays
from inmerge_jax.training.experiment import initial_variables

PART = "trials"
TOGETHER, TINY_TOGETHER = (1, 4), (1, 2)
"""Numbers of seeds that are tried."""
_COMPILE = 60
"""Seconds for one data set's step, estimated."""


def check_data(grid: Grid, folder: Path) -> None:
    """Checks that the files of a grid's data sets and weights exist below a folder.

    Raises:
      UsageError: one is missing, or the grid has no trials yet.
    """
    remedy = "choose another --grid, or leave the trials out with --parts correctness merge step"
    if isinstance(grid, PretrainedGrid) and not grid.is_chosen():
        raise UsageError(
            "--grid pretrained: its learning rates are not chosen yet, see docs/protocol.md; "
            + remedy
        )
    needed = []
    for name in grid.data:
        config = datasets.SOURCES[name].config
        if config.name == "chestxray14":
            needed.append(folder / datasets.CHESTXRAY14_LABELS)
        elif config.name != "phantom":
            needed.append(folder / (config.file or config.data_dir / f"{config.name}.npz"))
    if grid.backbone(grid.data[0], grid.first_seed).backbone.weights == "edges":
        needed.append(folder / EDGES)
    for path in needed:
        if not path.is_file():
            raise UsageError(
                f"--data-dir {folder}: {path} is missing; give the folder that holds it, " + remedy
            )


def paths_of(folder: Path, data_dir: Path) -> Paths:
    """Where data and results of a session are."""
    return Paths(data_dir, folder, devices=jax.local_device_count())


def measure(session: Session, grid: Grid, data_dir: Path) -> None:
    """Trains the trials of a grid that are not stored yet, until the time is used."""
    paths = paths_of(session.folder, data_dir)
    arrays = stored_arrays(session.folder)
    found = session.found[PART]
    programs: dict[tuple[str, int], Program] = {}

    def program(data: str, together: int) -> Program:
        if (data, together) not in programs:
            programs[data, together] = make_program(grid, data, together, paths)
        return programs[data, together]

    choice = "seeds at a time"
    # XLA's CPU backend has no fast convolution for several networks at once.
    cpu = jax.local_devices()[0].platform == "cpu"
    tries = TINY_TOGETHER if session.tiny else TOGETHER[:1] if cpu else TOGETHER
    session.attempt(
        PART,
        choice,
        0 if session.tiny else _COMPILE,
        lambda: choose_together(grid, program, tries),
    )
    if choice not in found["cases"]:
        return
    chosen = found["cases"][choice]
    together = chosen["together"]
    for data, seeds in grid.units(together):
        trials = [trial for stage in grid.stages(data, seeds) for trial in stage]
        if all(trial.hash in stored_records(found) for trial in trials):
            continue
        done = [case["seconds_per_update"] for case in found["cases"].values() if "records" in case]
        one = done[-1] if done else 2 * chosen["seconds_per_update"][str(together)]
        seconds = updates_of(grid, data) * len(seeds) * one + (
            0 if (data, together) in programs else _COMPILE
        )
        session.attempt(
            PART,
            f"{data}, seeds {seeds[0]} to {seeds[-1]}",
            0 if session.tiny else seconds,
            functools.partial(train_unit, session, grid, data, seeds, arrays, program),
        )


def updates_of(grid: Grid, data: str) -> int:
    """Updates of one seed's trials."""
    stages = [stage[0] for stage in grid.stages(data, [grid.first_seed])]
    epochs = sum(trial.epochs or trial.backbone.epochs for trial in stages)
    return steps_per_epoch(datasets.SOURCES[data].images[0], batch_size(data)) * epochs


def stored_records(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All trials' records among the results of this part, by hash."""
    records = {}
    for case in found["cases"].values():
        records |= case.get("records", {})
    return records


def import_records(
    records: Mapping[str, dict[str, Any]],
    arrays: Mapping[str, np.ndarray],
    commit: str,
    results: Path,
) -> int:
    """Adds trials to the study's archive; those that are stored already stay.

    Args:
      records: of `stored_records`.
      arrays: of the npz next to them.
      commit: at which they were trained.
      results: folder of the archive.

    Returns:
      The number of new trials.

    Raises:
      UsageError: a trial is in no grid of this version, or its data set's labels differ.
    """
    known = {trial.hash: trial for grid in GRIDS.values() for trial in grid.trials()}
    if unknown := sorted(set(records) - set(known)):
        raise UsageError(f"the trials {', '.join(unknown)} are of no grid of this version")
    stored = archive.read(results).records
    new = {one: record for one, record in records.items() if one not in stored}
    if not new:
        return 0
    for one, record in new.items():
        origin = record["trained"] | {"git": {"commit": commit, "dirty": False}}
        new[one] = {**record, "trained": origin}
    labels = {
        data: archive.Labels(
            arrays[f"labels-{data}"], str(arrays[f"task-{data}"]), arrays.get(f"patients-{data}")
        )
        for data in {known[one].backbone.data for one in new}
    }
    found = {f"scores/{one}": arrays[f"scores-{one}"] for one in new}
    found |= {
        f"{kind}/{one}": arrays[name]
        for kind, one in product(("renewed", "corrupted"), new)
        if (name := f"{kind}-{one}") in arrays
    }
    archive.add(results, new, found, labels)
    return len(new)


def stored_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Scores and labels that the folder holds."""
    path = folder / f"{PART}.npz"
    return read_arrays(path, "remove it and trials.json") if path.exists() else {}


def train_unit(
    session: Session,
    grid: Grid,
    data: str,
    seeds: tuple[int, ...],
    arrays: dict[str, np.ndarray],
    program: Callable[[str, int], Program],
) -> dict[str, Any]:
    """Trains the backbone and all second stages of some seeds, and stores their test scores.

    Returns:
      "records": by hash, the record of `study.archive`; "seconds_per_update" of one seed.
    """
    before = time.monotonic()
    chosen = program(data, len(seeds))
    starts = [initial_variables(chosen.plan, seed) for seed in seeds]
    records = {}
    best = starts
    for trials in grid.stages(data, seeds):
        is_backbone = trials[0].is_backbone
        trained = train_together(chosen, trials, starts if is_backbone else best)
        if is_backbone:
            best = [one.weights for one in trained]
        for trial, one in zip(trials, trained, strict=True):
            around = session.around["environment"] | {
                name: session.around[name] for name in ("device", "driver")
            }
            records[trial.hash] = archive.make_record(trial, one.result, one.similarity, around)
            arrays[f"scores-{trial.hash}"] = one.scores.astype(np.float32)
            for name, predictions in one.further.items():
                arrays[f"{name}-{trial.hash}"] = predictions
        auc = np.mean([one.result["test"]["auc"] for one in trained])
        say(f"  {trials[0].arm}: mean test AUC {auc:.3f}; {time.monotonic() - before:.0f} s so far")
    labels = archive.labels_of(chosen.plan.dataset)
    arrays[f"labels-{data}"] = labels.labels
    arrays[f"task-{data}"] = np.array(labels.task)
    if labels.patients is not None:
        arrays[f"patients-{data}"] = labels.patients
    write_arrays(session.folder / f"{PART}.npz", arrays)
    seconds = time.monotonic() - before
    return {
        "records": to_json(records),
        "seconds_per_update": seconds / (updates_of(grid, data) * len(seeds)),
    }
