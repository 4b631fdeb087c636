"""Trains the cells of a grid, each in a folder of its own; what is finished is not done again.

    <output>/cells/<hash>/cell.json        what it is
                          environment.json where and when it was trained
                          result.json      written last: the cell is finished
                          metrics.jsonl, similarity.json, scores/, checkpoints/

The stages are those of `inmerge train`: `training.loop.train_stage`.
"""

import dataclasses
import gc
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from experiments.study.cells import Cell, with_backbones
from experiments.study.lockstep import Lockstep, Seat
from experiments.study.stages import (
    Places,
    first_stage,
    images_of,
    joint_steps,
    plan_of,
    second_stage,
)
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_json
from inmerge_jax.progress import Progress
from inmerge_jax.training.environment import configure_malloc, environment
from inmerge_jax.training.experiment import initial_variables, make_context, restore_best
from inmerge_jax.training.train import NonFiniteLossError, read_result, train_stage
from inmerge_jax.training.workdir import lock


def run_cells(
    cells: Sequence[Cell],
    places: Places,
    *,
    kept: Callable[[Cell], bool] = lambda cell: False,
    keep: Callable[[Cell], Any] = lambda cell: None,
    should_stop: Callable[[], bool] = lambda: False,
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
      UsageError: data that are missing, or a file that cannot be written.
      Stopped: `should_stop` said so; the same call goes on.
    """
    if jax.default_backend() == "cpu":
        configure_malloc()
    wanted = [cell for cell in with_backbones(cells) if not kept(cell)]
    for cell in wanted:
        if finished(cell, places):
            keep(cell)
    # A backbone that is kept is trained again where its checkpoint is gone but still needed.
    wanted = [cell for cell in wanted if not finished(cell, places)]
    left = [cell for cell in in_order(with_backbones(wanted)) if not finished(cell, places)]
    count, diverged = len(left), []
    with Progress(sum(map(images_of, left))) as progress:
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
    progress: Progress,
    should_stop: Callable[[], bool] = lambda: False,
    seat: Seat | None = None,
) -> dict[str, Any]:
    """Trains one cell, or the rest of it, from its finished backbone; returns its result.

    Args:
      cell: which one.
      places: of data and cells.
      progress: the grid's line.
      should_stop: see `stage.Setup`.
      seat: the device to train on, beside other cells; by default those of the plan.
    """
    plan = plan_of(cell, places)
    if seat is not None:
        plan = dataclasses.replace(plan, devices=(seat.device,))
        should_stop = seat.should_stop
    setup = make_context(plan, should_stop)
    params, batch_stats = initial_variables(plan, cell.backbone.seed)
    stage = first = first_stage(cell, plan, setup, places)
    if not cell.is_backbone:
        best = restore_best(setup, first, read_result(first.folder), params, batch_stats)
        if best is None:
            raise UsageError(
                f"{first.folder} holds no finished backbone for {cell.name}; delete that folder "
                "and give the same command again"
            )
        params, batch_stats, _ = best
        setup, stage = second_stage(cell, plan, setup, places)
    if seat is not None:
        setup = dataclasses.replace(setup, eval_step=seat.step("eval", setup.eval_step))
        stage = dataclasses.replace(stage, train_step=seat.step("train", stage.train_step))
    with lock(stage.folder):
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
    progress: Progress,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[tuple[Cell, NonFiniteLossError]]:
    """Trains several cells at the same time, each on a device of its own.

    A thread for each runs the same loop as ever, and their steps are one `jax.pmap` over the cells,
    see `lockstep`. A cell comes out bit for bit as it would alone, and is checkpointed and resumed
    alike.

    Returns:
      The cells that diverged, each with its error.

    Raises:
      UsageError, Stopped: of any of them, after all have ended.
    """
    if len(cells) == 1:
        try:
            run_cell(cells[0], places, progress, should_stop)
        except NonFiniteLossError as error:
            return [(cells[0], error)]
        return []
    devices = jax.local_devices()[: len(cells)]
    lockstep = Lockstep(devices, joint_steps(cells, places), should_stop)

    def run(cell: Cell, seat: Seat) -> None:
        with seat, jax.default_device(seat.device):
            run_cell(cell, places, progress, seat=seat)

    with ThreadPoolExecutor(len(cells)) as pool:
        futures = []
        try:
            for cell, seat in zip(cells, lockstep.seats, strict=True):
                futures.append(pool.submit(run, cell, seat))
        except BaseException:
            for seat in lockstep.seats[len(futures) :]:
                lockstep.leave(seat)  # Those that have begun would wait for it for ever.
            raise
    errors = [future.exception() for future in futures]  # Every thread has ended by now.
    for error in errors:
        if error is not None and not isinstance(error, NonFiniteLossError):
            raise error
    return [
        (cell, error)
        for cell, error in zip(cells, errors, strict=True)
        if isinstance(error, NonFiniteLossError)
    ]


def finished(cell: Cell, places: Places) -> bool:
    """Whether the cell's folder holds its result."""
    return (places.cell(cell) / "result.json").exists()


def _begin(cell: Cell, folder: Path) -> None:
    if not (folder / "environment.json").exists():
        write_json(folder / "environment.json", environment())
    described = {"name": cell.name, "arm": cell.arm, **cell.described()}
    write_json(folder / "cell.json", json.loads(json.dumps(described)))
