"""Where a stage goes on, and what it keeps when it is told to stop in the middle of an epoch.

Beside the checkpoints of whole epochs, `<stage>/mid_epoch/<updates>` may hold one of an epoch that
was stopped: the state, and the epoch's totals so far. It goes when the epoch's own is written.
"""

import time
from pathlib import Path
from typing import NamedTuple

from inmerge_jax.training.checkpoints import (
    DamagedError,
    newest_whole,
    prune,
    read_meta,
    restore_checkpoint,
    save_checkpoint,
)
from inmerge_jax.training.progress import ProgressLine
from inmerge_jax.training.stage import Stage
from inmerge_jax.training.state import TrainState
from inmerge_jax.training.steps import Totals
from inmerge_jax.training.stopping import Stopped


class Start(NamedTuple):
    """Where a stage begins.

    Attributes:
      state: in NumPy arrays.
      epochs: that are behind it.
      totals: of the updates that the next epoch has behind it; `totals.steps` is their number.
      seconds: that these took.
      warnings: of the stage so far.
      history_sha256: of the lines of metrics.jsonl at the last of these epochs; None where there is
        none, or the checkpoint is of a version that did not note it.
    """

    state: TrainState
    epochs: int
    totals: Totals
    seconds: float
    warnings: list[str]
    history_sha256: str | None = None


def find_start(stage: Stage, fresh: TrainState, zeros: Totals, progress: ProgressLine) -> Start:
    """The newest whole checkpoint of the stage, or its beginning; says so, and what is damaged.

    Args:
      stage: its folder holds the checkpoints.
      fresh: the state of a stage's beginning.
      zeros: the totals of no step.
      progress: the run's line.
    """
    path, damaged = newest_whole(stage.checkpoints)
    found, start = list(damaged), Start(fresh, 0, zeros, 0.0, [])
    if path is not None:
        state, meta = restore_checkpoint(path, fresh)
        try:
            restore_checkpoint(stage.checkpoints / str(meta["best_epoch"]), fresh)
            noted = meta.get("history_sha256")
            start = Start(state, meta["epoch"], zeros, 0.0, meta["warnings"], noted)
        except DamagedError as error:
            found.append(str(error))

    path, damaged = newest_whole(_mid_epoch(stage))
    found += damaged
    if path is not None and read_meta(path)["epoch"] == start.epochs + 1:
        (state, totals), meta = restore_checkpoint(path, (fresh, zeros))
        start = start._replace(
            state=state, totals=totals, seconds=meta["seconds"], warnings=meta["warnings"]
        )

    for message in found:
        progress.say(f"WARNING: {message}", style="bold yellow")
    if found or path is not None or start.epochs:
        updates = f", update {start.totals.steps} of the next" if start.totals.steps else ""
        progress.say(f"{stage.name}: goes on from epoch {start.epochs} of {stage.epochs}{updates}")
    return start._replace(warnings=start.warnings + found)


def keep_updates(
    stage: Stage,
    epoch: int,
    totals: Totals,
    started: float,
    warnings: list[str],
    state: TrainState,
) -> Stopped:
    """Writes the state within an epoch, and returns the exception that ends the stage.

    Args:
      stage: that is stopped.
      epoch: 1-based, the one under way.
      totals: of its updates so far, in NumPy arrays.
      started: when it began, by `time.monotonic`.
      warnings: of the stage so far.
      state: after the last of these updates, in NumPy arrays.

    Raises:
      InputError: the files cannot be written.
    """
    folder, updates = _mid_epoch(stage), int(state.step)
    where = f"{stage.name}: stopped after update {totals.steps} of epoch {epoch}"
    # One that is there is that of this very state: a stage that was stopped again at once.
    if totals.steps and newest_whole(folder)[0] != folder / str(updates):
        seconds = time.monotonic() - started
        meta = {"epoch": epoch, "seconds": seconds, "warnings": warnings}
        path = save_checkpoint(folder, updates, (state, totals), meta)
        prune(folder, {updates})
        where += f", kept in {path}"
    return Stopped(where)


def drop_updates(stage: Stage) -> None:
    """Deletes what `keep_updates` has written: the epoch's own checkpoint is there."""
    prune(_mid_epoch(stage), ())


def _mid_epoch(stage: Stage) -> Path:
    return stage.folder / "mid_epoch"
