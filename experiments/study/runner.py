"""Trains the trials of a grid, each in a separate folder. Finished trials are skipped.

    <output>/trials/<hash>/trial.json        configuration
                           environment.json  where and when it was trained
                           result.json       written last: the trial is finished
                           metrics.jsonl, similarity.json, scores/, checkpoints/

The stages are those of `inmerge train`: `training.train.train_stage`.
"""

import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.study.stages import Paths, first_stage, images_of, plan_of, second_stage
from experiments.study.trials import Trial, with_dependencies
from inmerge_jax.errors import UsageError
from inmerge_jax.files import remove_entries, write_json
from inmerge_jax.locking import LOCK, FolderInUseError
from inmerge_jax.progress import Progress
from inmerge_jax.training.checkpointing import DamagedCheckpointError
from inmerge_jax.training.environment import diff_environments, environment
from inmerge_jax.training.experiment import initial_variables, make_context, restore_best
from inmerge_jax.training.stage_results import read_result
from inmerge_jax.training.train import NonFiniteLossError, train_stage
from inmerge_jax.training.workdir import lock


class Outcome(NamedTuple):
    """What `run_trials` left unfinished.

    Attributes:
      diverged: the trials whose training diverged, and why.
      trained: number of trials that were finished.
      busy: trials that another process was training, which share `paths` with this one.
    """

    diverged: dict[Trial, str]
    trained: int
    busy: list[Trial]


def run_trials(
    trials: Sequence[Trial],
    paths: Paths,
    *,
    keep: Callable[[Trial], Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    until: float = float("inf"),
) -> Outcome:
    """Trains the trials that are not finished, and the backbones that they need.

    A trial whose training diverges stays unfinished, with those that would start from it. Several
    processes may train the same trials: each passes over those that another one trains.

    Args:
      trials: to be finished.
      paths: of data and run folders.
      keep: called with each of `trials` once it is finished.
      should_stop: see `train.TrainContext`.
      until: time (`time.monotonic`) after which no trial is started.

    Raises:
      UsageError: missing data, or a file that cannot be written.
      TrainingInterrupted: `should_stop` returned True; the same call resumes.
    """

    def done(trial: Trial) -> None:
        if keep is not None and trial in trials:
            keep(trial)

    for trial in trials:
        if finished(trial, paths):
            done(trial)
    wanted = [trial for trial in trials if not finished(trial, paths)]
    left = [t for t in in_order(with_dependencies(wanted)) if not finished(t, paths)]
    count, found = len(left), Outcome({}, 0, [])
    with Progress(sum(map(images_of, left))) as progress:

        def leave(trial: Trial) -> list[Trial]:
            """What remains without those that start from a trial."""
            out = [other for other in left if other.first() == trial]
            progress.skip(sum(map(images_of, (trial, *out))))
            return [other for other in left if other not in out]

        while left and time.monotonic() < until:
            trial = left.pop(0)
            if finished(trial, paths):  # By another process, which stores it.
                progress.skip(images_of(trial))
                continue
            progress.say(f"trial {count - len(left)} of {count}: {trial.name}")
            try:
                run_trial(trial, paths, progress, should_stop)
            except FolderInUseError:
                progress.say("  another process trains it")
                found.busy.append(trial)
                left = leave(trial)
            except NonFiniteLossError as error:
                found.diverged[trial] = str(error)
                progress.say(f"WARNING: {trial.name}: {error}", style="bold yellow")
                left = leave(trial)
            else:
                done(trial)
                found = found._replace(trained=found.trained + 1)
            # The system limits a process to some 65,000 memory maps; the programs of each trial
            # take hundreds to a thousand of them. Later trials read theirs from the cache.
            jax.clear_caches()
            gc.collect()
    return found


def in_order(trials: Sequence[Trial]) -> list[Trial]:
    """By seed, then as given: all arms of one seed come before the next seed."""
    return sorted(trials, key=lambda trial: trial.backbone.seed)


def run_trial(
    trial: Trial,
    paths: Paths,
    progress: Progress,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains or resumes one trial, from its finished backbone; returns its result.

    Args:
      trial: to train.
      paths: of data and run folders.
      progress: of the grid.
      should_stop: see `train.TrainContext`.
    """
    plan = plan_of(trial, paths)
    setup = make_context(plan, should_stop)
    params, batch_stats = initial_variables(plan, trial.backbone.seed)
    stage = first = first_stage(trial, plan, setup, paths)
    if trial.first() != trial:
        result = read_result(first.folder)
        assert result is not None  # `run_trials` trains a backbone before what starts from it.
        try:
            params, batch_stats, _ = restore_best(setup, first, result, params, batch_stats)
        except DamagedCheckpointError as error:
            raise UsageError(
                f"{first.folder} holds no finished backbone for {trial.name}: {error}; delete "
                "that folder and repeat the command"
            ) from error
    if not trial.is_backbone:
        setup, stage = second_stage(trial, plan, setup, paths)
    with lock(stage.folder):
        _begin(trial, stage.folder)
        return train_stage(setup, stage, params, batch_stats, progress)


def finished(trial: Trial, paths: Paths) -> bool:
    """Whether the trial's folder holds its result."""
    return (paths.trial(trial) / "result.json").exists()


def _begin(trial: Trial, folder: Path) -> None:
    """Writes the configuration and environment; restarts a trial of another environment."""
    now, file = environment(), folder / "environment.json"
    if file.exists():
        if not diff_environments(json.loads(file.read_bytes()), now):
            return
        remove_entries(folder, LOCK)
    write_json(file, now)
    described = {"name": trial.name, "arm": trial.arm, **trial.described()}
    write_json(folder / "trial.json", json.loads(json.dumps(described)))
