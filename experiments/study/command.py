"""The command line that every question of the study has."""

import inspect
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments.study.cells import Backbone, Cell, with_backbones
from experiments.study.question import Kept, Question
from inmerge_jax.errors import UsageError


@dataclass(frozen=True)
class StudyConfig:
    """Trains the cells of one question of the study, and stores and prints its answer.

    Every cell has a folder named by the hash of its configuration, in OUTPUT/cells. What is
    finished there, or kept in experiments/results/cells, is not trained again; what was cut short
    goes on. All questions share their backbones and equal cells.

    Attributes:
      data_dir: Folder that holds medmnist/ and nih/.
      output: Folder of the runs.
      data: Data sets to train on, such as breastmnist; all of the question's by default.
      models: Networks to train, such as resnet18; likewise.
      seeds: Train the first so many seeds alone.
      only: Train these cells alone, by hash, even if they are kept, and compare with what is kept.
      minutes: Begin no cell after so many; the answer is then that of the cells finished so far.
      dry_run: Train nothing: list the cells that are left with a time estimate, and the difference
        in AUC and ACC that each data set can resolve.
      analyse: Train nothing: compute the answer anew from the cells that are kept.
      results: Folder for cells/, what is kept of finished cells, and study/, the answers.
      parallel: What several devices share: each batch, or the seeds, one cell to a device.
    """

    data_dir: Path = Path("../shared/data")
    output: Path = Path("runs/study")
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    seeds: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="HASH ...")] = ()
    minutes: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    dry_run: bool = False
    analyse: bool = False
    results: Path = Path("experiments/results")
    parallel: Literal["batches", "seeds"] = "batches"


# The option, what is given for it, and what of a backbone it chooses by.
_CHOICES: tuple[tuple[str, Callable[..., tuple[str, ...]], Callable[[Backbone], str]], ...] = (
    ("data", lambda config: config.data, lambda start: start.data),
    ("models", lambda config: config.models, lambda start: start.model),
)
_DESCRIPTION = inspect.cleandoc(StudyConfig.__doc__ or "").split("\n\nAttributes:")[0]


def main(question: Question, arguments: Sequence[str] | None = None) -> int:
    """Runs a question's command line; returns the status, as `inmerge train` has it."""
    config = tyro.cli(
        StudyConfig,
        prog=f"python -m experiments.study.{question.name}",
        description=f"{question.title} {question.asked}\n\n{_DESCRIPTION}",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        return _run(question, config)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(question: Question, config: StudyConfig) -> int:
    import jax

    from experiments.study import estimate, runner, stages, store
    from inmerge_jax.training.environment import enable_compilation_cache
    from inmerge_jax.training.preemption import PreemptionHandler, TrainingInterrupted

    shared = config.parallel == "batches" and not (config.dry_run or config.analyse)
    devices = jax.local_device_count() if shared else 1
    places = stages.Places(config.data_dir, config.output, config.results, devices)
    cells = chosen(question, config)

    def is_kept(cell: Cell) -> bool:
        # Figures of a kept cell are no use where its weights are asked for, or another training.
        known = store.read(cell, places.kept) is not None
        return known and not config.only and question.measured(cell, places)

    def keep(cell: Cell) -> None:
        if config.only:
            return
        if store.read(cell, places.kept) is None:
            store.keep(cell, places)
        elif differs(cell, places):
            print(
                f"WARNING: {cell.hash} {cell.name} is another training than the one that is kept; "
                "nothing is measured of its weights",
                file=sys.stderr,
            )

    if config.dry_run:
        estimate.show(question, cells, places, is_kept)
        return 0
    if config.analyse:
        answer(question, config.results)
        return 0
    enable_compilation_cache()
    until = time.monotonic() + 60 * (float("inf") if config.minutes is None else config.minutes)
    stop = PreemptionHandler()
    try:
        with stop:
            diverged = runner.run_cells(
                cells,
                places,
                kept=is_kept,
                keep=keep,
                should_stop=stop,
                until=until,
                parallel=config.parallel == "seeds",
            )
    except TrainingInterrupted as stopped:
        print(f"{stopped}; the same command goes on", file=sys.stderr)
        assert stop.signal is not None
        return 128 + stop.signal
    if config.only:
        return compare(cells, places)
    if question.measure is not None:
        # Another training's weights do not belong to the kept scores.
        those = [c for c in with_backbones(cells) if runner.finished(c, places)]
        question.measure([cell for cell in those if not differs(cell, places)], places)
    answer(question, config.results)
    for message in diverged:
        print(f"diverged, and not in the answer: {message}", file=sys.stderr)
    return int(bool(diverged))


def chosen(question: Question, config: StudyConfig) -> tuple[Cell, ...]:
    """The cells that the options name; the whole grid without any.

    Raises:
      UsageError: the question has no cell of such a hash, data set or network.
    """
    for option, wanted, of in _CHOICES:
        has = dict.fromkeys(of(cell.backbone) for cell in question.cells)
        for name in wanted(config):
            if name not in has:
                raise UsageError(
                    f"--{option} {name}: {question.name} has none of these; it has {', '.join(has)}"
                )
    known = {cell.hash: cell for cell in with_backbones(question.cells)}
    for one in config.only:
        if one not in known:
            raise UsageError(
                f"--only {one}: {question.name} has no cell of that hash; --dry-run lists them"
            )
    if config.only:
        return tuple(known[one] for one in config.only)
    return tuple(
        cell
        for cell in question.cells
        if (config.seeds is None or cell.backbone.seed < config.seeds)
        and all(
            not wanted(config) or of(cell.backbone) in wanted(config) for _, wanted, of in _CHOICES
        )
    )


def answer(question: Question, results: Path) -> dict[str, Any]:
    """Computes the answer from the kept cells, stores it, and prints it."""
    grid = with_backbones(question.cells)
    kept = Kept.of(grid, results / "cells")
    if not kept.cells:
        raise UsageError(f"{question.name}: no cell is finished yet, so there is no answer")
    assert question.analyse is not None
    records = [kept.record(cell) for cell in kept.cells]
    return store_answer(
        question,
        results,
        arguments=(),
        around=[record["trained"] for record in records],
        planned=len(grid),
        finished=len(kept.cells),
        seconds=sum(record["result"]["seconds"] for record in records),
        analysis=question.analyse(kept),
    )


def store_answer(
    question: Question,
    results: Path,
    *,
    arguments: Sequence[str],
    around: Sequence[dict[str, Any]],
    planned: int,
    finished: int,
    seconds: float,
    analysis: dict[str, Any],
) -> dict[str, Any]:
    """Writes an answer where the pages find it, and prints it.

    Args:
      question: that is answered.
      results: the folder of results.
      arguments: of the question's command.
      around: of each training, or measurement, what `environment.environment` gave.
      planned: how many of these there are to be.
      finished: how many there are.
      seconds: that they took.
      analysis: what came out, JSON-ready.
    """
    from rich import print as rich_print

    from experiments.benchmarks.timing import machine
    from experiments.study import telling
    from inmerge_jax.files import write_json

    stored = {
        "question": question.name,
        "command": shlex.join(["python", "-m", f"experiments.study.{question.name}", *arguments]),
        "machine": machine(),
        "trained": trained(around),
        "planned": planned,
        "finished": finished,
        "seconds": seconds,
        "analysis": analysis,
    }
    stored = json.loads(json.dumps(stored))
    write_json(question.path(results), stored)
    rich_print(telling.to_rich(question, stored))
    return stored


def trained(around: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Where and by what it was trained, which the analysis may be far from."""
    gits = [one["git"] for one in around]
    commits = {f"{(g['commit'] or 'unknown')[:10]}{'+' if g['dirty'] else ''}" for g in gits}
    return {
        "cpus": sorted({one["cpus"] for one in around}),
        "jax": sorted({one["packages"]["jax"] for one in around}),
        "commits": sorted(commits),
        "first": min(one["started"] for one in around),
        "last": max(one["started"] for one in around),
    }


def differs(cell: Cell, places: Any) -> bool:
    """Whether a finished cell's test AUC or ACC is not what is kept of it, or it diverged."""
    from experiments.study import store
    from inmerge_jax.training.train import read_result

    result, record = read_result(places.cell(cell)), store.read(cell, places.kept)
    if result is None or record is None:
        return result is None
    return any(result["test"][name] != record["result"]["test"][name] for name in ("auc", "acc"))


def compare(cells: Sequence[Cell], places: Any) -> int:
    """Prints the figures of cells that were trained anew beside those kept; 1 where they differ."""
    from experiments.study import store
    from inmerge_jax.training.train import read_result

    for cell in cells:
        result, record = read_result(places.cell(cell)), store.read(cell, places.kept)
        print(f"{cell.hash} {cell.name}")
        if result is None:
            print("  its training diverged, see the warning above")
            continue
        for metric in ("auc", "acc"):
            kept = "none is kept"
            if record is not None:
                kept = f"{record['result']['test'][metric]:.6f} is kept"
            print(f"  test {metric.upper()} {result['test'][metric]:.6f}; {kept}")
    return int(any(differs(cell, places) for cell in cells))
