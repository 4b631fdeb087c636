"""Trains the cells of a grid, each in a folder of its own; what is finished is not done again.

    <output>/cells/<hash>/cell.json        what it is
                          environment.json where and when it was trained
                          result.json      written last: the cell is finished
                          metrics.jsonl, similarity.json, scores/, checkpoints/

The stages are those of `python -m experiments.train`: `training.loop.train_stage`.
"""

import dataclasses
import functools
import gc
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.study import datasets
from experiments.study.cells import Cell, with_backbones
from experiments.study.treatments import (
    average_weights,
    averaged,
    make_treatment,
    numbers,
    selection,
)
from inmerge_jax.data import Split, steps_per_epoch
from inmerge_jax.errors import InputError
from inmerge_jax.files import write_json
from inmerge_jax.training.arms import (
    Plan,
    best_weights,
    initial_weights,
    make_setup,
    plan_run,
    step_options,
)
from inmerge_jax.training.checkpoints import restore_checkpoint
from inmerge_jax.training.config import ModelConfig, RecipeConfig, RuleConfig, TrainConfig
from inmerge_jax.training.evaluation import evaluate
from inmerge_jax.training.loop import NonFiniteLossError, read_result, train_stage
from inmerge_jax.training.memory import keep_freed_memory
from inmerge_jax.training.parallel import replicate
from inmerge_jax.training.progress import ProgressLine
from inmerge_jax.training.runfolder import environment
from inmerge_jax.training.stage import Setup, Stage, same
from inmerge_jax.training.state import TrainState, make_optimizer, new_state
from inmerge_jax.training.steps import make_train_step
from inmerge_jax.training.stopping import never

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam"},
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4},
}


@dataclass(frozen=True)
class Places:
    """Where things are.

    Attributes:
      data: folder that holds medmnist/ and nih/.
      output: folder of the cells.
      results: folder of what is kept of them, and of the answers.
      devices: that share every batch, or fewer where they cannot share it evenly.
    """

    data: Path
    output: Path
    results: Path = Path("experiments/results")
    devices: int = 1

    def cell(self, cell: Cell) -> Path:
        """The folder of one cell."""
        return self.output / "cells" / cell.hash

    @property
    def kept(self) -> Path:
        """The folder of kept cells."""
        return self.results / "cells"

    @property
    def built(self) -> Path:
        """The folder of data that are made from others."""
        return self.output / "data"


def run_cells(
    cells: Sequence[Cell],
    places: Places,
    *,
    kept: Callable[[Cell], bool] = lambda cell: False,
    keep: Callable[[Cell], Any] = lambda cell: None,
    should_stop: Callable[[], bool] = never,
    until: float = float("inf"),
    parallel: bool = False,
) -> list[str]:
    """Trains what is not finished yet, and the backbones that it needs.

    A cell whose training diverges is left unfinished, with those that would start from it.

    Args:
      cells: the grid.
      places: of data and cells.
      kept: whether a cell's results are kept elsewhere, so that it need not be trained.
      keep: called with every cell that is finished and not kept.
      should_stop: see `stage.Setup`.
      until: time (`time.monotonic`) after which no further cell is begun.
      parallel: train cells that differ in their seeds alone together, one to a device.

    Returns:
      What is to be said of the trainings that diverged.

    Raises:
      InputError: data that are missing, or a file that cannot be written.
      Stopped: `should_stop` said so; the same call goes on.
    """
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    wanted = [cell for cell in with_backbones(cells) if not kept(cell)]
    for cell in wanted:
        if finished(cell, places):
            keep(cell)
    # A backbone that is kept is trained again where its checkpoint is gone but still needed.
    wanted = [cell for cell in wanted if not finished(cell, places)]
    left = [cell for cell in in_order(with_backbones(wanted)) if not finished(cell, places)]
    count, diverged = len(left), []
    with ProgressLine(sum(map(images_of, left))) as progress:
        while left and time.monotonic() < until:
            together = abreast(left) if parallel else left[:1]
            names = "; ".join(cell.name for cell in together)
            progress.say(f"cell {count - len(left) + 1} of {count}: {names}")
            for cell, error in run_together(together, places, progress, should_stop):
                diverged.append(f"{cell.name}: {error}")
                progress.say(f"WARNING: {diverged[-1]}", style="bold yellow")
            for cell in together:
                left.remove(cell)
                if not finished(cell, places):
                    left = [other for other in left if other.first() != cell]
                elif not kept(cell):
                    keep(cell)
            # A system gives a process some 65,000 maps of memory; the programs of each cell take
            # hundreds to a thousand of them. Another cell finds its own in the cache on disk.
            jax.clear_caches()
            gc.collect()
    return diverged


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """By seed and then as given, so that all arms of one seed come before the next seed."""
    return sorted(cells, key=lambda cell: cell.backbone.seed)


def run_cell(
    cell: Cell,
    places: Places,
    progress: ProgressLine,
    should_stop: Callable[[], bool] = never,
    device: jax.Device | None = None,
) -> dict[str, Any]:
    """Trains one cell, or the rest of it, from its finished backbone; returns its result.

    Args:
      cell: which one.
      places: of data and cells.
      progress: the grid's line.
      should_stop: see `stage.Setup`.
      device: to train on; the first local one by default.
    """
    plan = plan_of(cell, places)
    if device is not None:
        plan = dataclasses.replace(plan, devices=(device,))
    setup = make_setup(plan, should_stop)
    params, batch_stats = initial_weights(plan, cell.backbone.seed)
    stage = first = _first_stage(cell, plan, setup, places)
    if not cell.is_backbone:
        best = best_weights(setup, first, read_result(first.folder), params, batch_stats)
        if best is None:
            raise InputError(
                f"{first.folder} holds no finished backbone for {cell.name}; delete that folder "
                "and give the same command again"
            )
        params, batch_stats, _ = best
        setup, stage = second_stage(cell, plan, setup, places)
    _begin(cell, stage.folder)
    return train_stage(setup, stage, params, batch_stats, progress)


def abreast(left: Sequence[Cell]) -> list[Cell]:
    """The next cell, and those that differ from it in their seed alone, one for each device."""

    def alike(cell: Cell) -> Cell:
        return dataclasses.replace(cell, backbone=dataclasses.replace(cell.backbone, seed=0))

    found = [
        cell
        for cell in left
        if alike(cell) == alike(left[0]) and (cell.is_backbone or cell.first() not in left)
    ]
    return found[: jax.local_device_count()]


def run_together(
    cells: Sequence[Cell],
    places: Places,
    progress: ProgressLine,
    should_stop: Callable[[], bool] = never,
) -> list[tuple[Cell, NonFiniteLossError]]:
    """Trains several cells at the same time, each on a device of its own.

    A thread for each runs the same loop as ever; the devices work while the threads wait. So a cell
    comes out bit for bit as it would alone, and is checkpointed and resumed alike.

    Returns:
      The cells that diverged, each with its error.

    Raises:
      InputError, Stopped: of any of them, after all have ended.
    """
    if len(cells) == 1:
        try:
            run_cell(cells[0], places, progress, should_stop)
        except NonFiniteLossError as error:
            return [(cells[0], error)]
        return []
    plan_of(cells[0], places)

    def run(cell: Cell, device: jax.Device) -> None:
        with jax.default_device(device):
            run_cell(cell, places, progress, should_stop, device)

    with ThreadPoolExecutor(len(cells)) as pool:
        futures = [
            pool.submit(run, cell, device)
            for cell, device in zip(cells, jax.local_devices(), strict=False)
        ]
    errors = [future.exception() for future in futures]  # Every thread has ended by now.
    for error in errors:
        if error is not None and not isinstance(error, NonFiniteLossError):
            raise error
    return [
        (cell, error)
        for cell, error in zip(cells, errors, strict=True)
        if isinstance(error, NonFiniteLossError)
    ]


def best_state(cell: Cell, places: Places) -> tuple[Setup, Stage, TrainState]:
    """The state in a finished cell's best checkpoint, in NumPy arrays, and what it belongs to.

    Raises:
      InputError: the checkpoint is gone or damaged.
    """
    plan = plan_of(cell, places)
    setup = make_setup(plan)
    params, batch_stats = initial_weights(plan, cell.backbone.seed)
    stage = _first_stage(cell, plan, setup, places)
    if not cell.is_backbone:
        setup, stage = second_stage(cell, plan, setup, places)
    result = read_result(stage.folder)
    assert result is not None, cell
    state = new_state(params, batch_stats, setup.optimizer, stage.learning_rate)
    state, _ = restore_checkpoint(stage.checkpoints / str(result["best_epoch"]), state)
    return setup, stage, state


def weights_of(cell: Cell, places: Places) -> Callable[[np.ndarray], np.ndarray]:
    """The network of a finished cell's best checkpoint: from uint8 images to scores.

    Raises:
      InputError: see `best_state`.
    """
    setup, stage, state = best_state(cell, places)
    state = replicate(stage.evaluated(state), setup.devices)
    labels = setup.dataset.test.labels

    def predict(images: np.ndarray) -> np.ndarray:
        return evaluate(setup, state, Split(images, labels))[0]

    return predict


def _first_stage(cell: Cell, plan: Plan, setup: Setup, places: Places) -> Stage:
    return Stage(
        arm="backbone",
        seed=cell.backbone.seed,
        number=0,
        folder=places.cell(cell.first()),
        epochs=cell.backbone.epochs,
        learning_rate=cell.backbone.rate,
        train_step=make_train_step(plan.model, setup.optimizer, plan.recipe, **step_options(plan)),
    )


def second_stage(cell: Cell, plan: Plan, setup: Setup, places: Places) -> tuple[Setup, Stage]:
    """The second stage of a cell; its optimizer and recipe may differ from the backbone's."""
    treatment, recipe = cell.treatment, plan.recipe
    steps = steps_per_epoch(len(plan.dataset.train), recipe.batch_size)
    if treatment.kind == "decay":
        recipe = dataclasses.replace(recipe, weight_decay=treatment.decay)
    last = [average_weights(treatment.decay)] if treatment.kind == "ema" else []
    setup = dataclasses.replace(setup, recipe=recipe, optimizer=make_optimizer(recipe, *last))
    deep = ()
    given: dict[str, Any] = {}
    if treatment.kind not in ("none", "ema", "decay"):
        deep = selection(treatment, plan.kernels)
        given["treatment"] = make_treatment(treatment.kind, deep)
        given["numbers"] = numbers(treatment, steps)
        given["kernels"] = deep
    step = make_train_step(plan.model, setup.optimizer, recipe, **given, **step_options(plan))
    stage = Stage(
        arm=re.sub("[@./]", "_", cell.arm),  # It goes into the name of the score files.
        seed=cell.backbone.seed,
        number=1,
        folder=places.cell(cell),
        epochs=cell.epochs,
        learning_rate=cell.learning_rate,
        train_step=step,
        deep=deep,
        evaluated=averaged if treatment.kind == "ema" else same,
    )
    return setup, stage


def plan_of(cell: Cell, places: Places) -> Plan:
    """The checked plan of a cell's backbone; the same object for all cells that share it."""
    return _plan(dataclasses.replace(cell.backbone, seed=0), places)


@functools.lru_cache(maxsize=2)
def _plan(backbone: Any, places: Places) -> Plan:
    options = OPTIMIZERS[backbone.optimizer]
    config = TrainConfig(
        data=datasets.config_of(backbone.data, places.data, places.built),
        model=ModelConfig(name=backbone.model, stem=backbone.stem, width=backbone.width),
        recipe=RecipeConfig(
            name="medmnist",
            epochs=backbone.epochs,
            learning_rate=backbone.rate,
            batch_size=batch_size(backbone.data),
            **options,
        ),
        rule=RuleConfig(skip=0),
        output=places.output,
        devices=math.gcd(batch_size(backbone.data), places.devices),
        workers=0,
    )
    return plan_run(config)


def batch_size(data: str) -> int:
    """The benchmark's 128; less for the little data set of tests."""
    return min(128, datasets.SOURCES[data].images[0] // 4)


def finished(cell: Cell, places: Places) -> bool:
    """Whether the cell's folder holds its result."""
    return (places.cell(cell) / "result.json").exists()


def images_of(cell: Cell) -> int:
    """Images that the network is shown in a cell's training."""
    epochs = cell.epochs or cell.backbone.epochs
    size = batch_size(cell.backbone.data)
    return steps_per_epoch(datasets.SOURCES[cell.backbone.data].images[0], size) * size * epochs


def _begin(cell: Cell, folder: Path) -> None:
    if not (folder / "environment.json").exists():
        write_json(folder / "environment.json", environment())
    described = {"name": cell.name, "arm": cell.arm, **cell.described()}
    write_json(folder / "cell.json", json.loads(json.dumps(described)))
