"""The training loop: one stage, from its first epoch to its test scores, readable top to bottom."""

import functools
import hashlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inmerge_jax.data import Dataset, Split, steps_per_epoch, train_batches
from inmerge_jax.files import json_sha256, write_json, write_json_with_checksum
from inmerge_jax.merging import Kernel, kernel_similarity
from inmerge_jax.merging.similarity import THRESHOLDS
from inmerge_jax.merging.units import group_weights
from inmerge_jax.progress import Progress
from inmerge_jax.training.checkpointing import (
    MID_EPOCH,
    prune,
    restore_checkpoint,
    restore_latest,
    save_checkpoint,
    save_preemption_checkpoint,
)
from inmerge_jax.training.evaluation import (
    evaluate,
    evaluate_merging,
    with_batch_stats_of,
)
from inmerge_jax.training.metrics import METRICS, json_number
from inmerge_jax.training.metrics_file import append_metrics, read_metrics, truncate_metrics
from inmerge_jax.training.monitoring import StageMonitor
from inmerge_jax.training.multihost import run_on_primary
from inmerge_jax.training.parallel import (
    broadcast_to_devices,
    prefetch_to_device,
    replicate,
    unreplicate,
)
from inmerge_jax.training.preemption import TrainingInterrupted
from inmerge_jax.training.recipes import Recipe, best_epoch, next_learning_rate
from inmerge_jax.training.stage_results import val_metrics, write_predictions, write_tested
from inmerge_jax.training.train_step import (
    Totals,
    TrainState,
    averaged,
    new_state,
    set_learning_rate,
    with_averages_of,
    zero_totals,
)

_CHECK_EVERY = 64
"""Dispatches between two checks of the loss within an epoch."""


class NonFiniteLossError(RuntimeError):
    """Training diverged; the message names the epoch and the last good checkpoint."""


def batch_seed(seed: int, number: int) -> int:
    """The seed of a stage's batch order, the same for all arms of a second stage.

    Args:
      seed: seed of the run.
      number: 0 for the backbone stage, 1 for the second stage.
    """
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def root_key(seed: int, number: int) -> jax.Array:
    """The key that every random draw of a stage is folded from; arguments as in `batch_seed`."""
    return jax.random.fold_in(jax.random.key(seed), number)


@dataclass(frozen=True)
class StageConfig:
    """One stage of one arm.

    Attributes:
      arm: "backbone", "finetune" or "inmerge".
      seed: seed of the run; determines the batch order and every random draw of the stage.
      number: 0 for a first stage, 1 for the second stage. Arms of the same seed and number
        see the same batches, flips and dropout masks.
      folder: the stage's folder within the run folder, local or in a bucket.
      epochs: number of epochs to train.
      learning_rate: learning rate of the first epoch.
      train_step: the result of `train_step.make_train_step`.
      deep: the units that `train_step` merges; () without merging.
      merging_eval_step: the result of `train_step.make_merging_eval_step`, if validation merges.
      notices: warnings to store in the stage's result.
      checksums: whether its checkpoints have checksums, see `save_checkpoint`.
      multi_step_fn: runs `steps_per_execution` updates in one dispatch; None if that is 1.
      steps_per_execution: updates per dispatch.
      merge_from_epoch: the first epoch that merges.
      recompute_batch_stats: whether batch statistics are re-estimated before each evaluation.
      monitor: writes what people watch.
    """

    arm: str
    seed: int
    number: int
    folder: Path
    epochs: int
    learning_rate: float
    train_step: Callable[..., tuple[TrainState, Totals]]
    deep: tuple[Kernel, ...] = ()
    merging_eval_step: Callable[..., Any] | None = None
    notices: tuple[str, ...] = ()
    checksums: bool = True
    multi_step_fn: Callable[..., tuple[TrainState, Totals]] | None = None
    steps_per_execution: int = 1
    merge_from_epoch: int = 1
    recompute_batch_stats: bool = False
    monitor: StageMonitor = field(default_factory=StageMonitor)

    @property
    def name(self) -> str:
        """Seed and arm, for messages."""
        return f"seed {self.seed} {self.arm}"

    @property
    def layers(self) -> list[tuple[str, int]]:
        """Name and number of units of each layer that merges."""
        groups = group_weights(self.deep) if self.deep else ()
        return [(layer[0].label, layer[0].count) for layer in groups]

    @property
    def checkpoints(self) -> Path:
        """Folder of the stage's checkpoints."""
        return self.folder / "checkpoints"


@dataclass(frozen=True)
class TrainContext:
    """Everything that the stages of a run share.

    Attributes:
      dataset: the training, validation and test splits.
      recipe: the training recipe.
      devices: the devices that the steps run on.
      optimizer: the result of `train_step.make_optimizer`.
      eval_step: the result of `train_step.make_eval_step`.
      kernels: every unit of the network of the kinds that merge, in execution order.
      batch_stats_step: the result of `train_step.make_batch_stats_step`, if a stage needs it.
      workers: number of processes that read images; 0 for none.
      thresholds: cosine similarities at which similarity.json gives the share of pairs above.
      should_stop: returns True once the run is to stop. It is called before each dispatch of a
        training step and each batch of an evaluation. All processes must get the same answers.
    """

    dataset: Dataset
    recipe: Recipe
    devices: tuple[jax.Device, ...]
    optimizer: Any
    eval_step: Callable[..., tuple[jax.Array, jax.Array]]
    kernels: tuple[Kernel, ...]
    batch_stats_step: Callable[..., Any] | None = None
    workers: int = 0
    thresholds: tuple[float, ...] = THRESHOLDS
    should_stop: Callable[[], bool] = lambda: False

    def evaluate(self, state: TrainState, images: Split) -> tuple[np.ndarray, float]:
        """Scores or masks of a split and its mean loss, see `evaluation.evaluate`."""
        return evaluate(
            self.eval_step,
            state,
            images,
            batch_size=self.recipe.batch_size,
            devices=self.devices,
            workers=self.workers,
            should_stop=self.should_stop,
        )

    def evaluation_state(self, stage: StageConfig, state: TrainState) -> TrainState:
        """The state that a stage evaluates: with averaged weights and re-estimated statistics."""
        state = state if self.recipe.average_weights is None else averaged(state)
        if not stage.recompute_batch_stats:
            return state
        assert self.batch_stats_step is not None
        return with_batch_stats_of(
            self.dataset.train,
            self.batch_stats_step,
            state,
            seed=batch_seed(stage.seed, stage.number),
            batch_size=self.recipe.batch_size,
            batches=self.recipe.batch_stats_batches,
            devices=self.devices,
            workers=self.workers,
            should_stop=self.should_stop,
        )


def train_stage(
    context: TrainContext, stage: StageConfig, params: Any, batch_stats: Any, progress: Progress
) -> dict[str, Any]:
    """Trains one stage, from its latest checkpoint on, and returns the content of result.json.

    Args:
      context: shared by all stages.
      stage: the stage.
      params: initial parameters, float32 tree of NumPy arrays.
      batch_stats: initial batch statistics, float32 tree of NumPy arrays.
      progress: the progress line of the run.

    Raises:
      NonFiniteLossError: the training or validation loss became NaN or infinite.
      UsageError: a file cannot be written, or metrics.jsonl was changed.
      TrainingInterrupted: `context.should_stop` returned True; all finished updates are saved.
    """
    recipe, devices, train = context.recipe, context.devices, context.dataset.train
    metrics_file = stage.folder / "metrics.jsonl"
    steps = steps_per_epoch(len(train), recipe.batch_size)
    order = batch_seed(stage.seed, stage.number)
    root = broadcast_to_devices(root_key(stage.seed, stage.number), devices)
    no_totals = zero_totals(len(stage.layers))
    zeros = replicate(no_totals, devices)
    before = _similarity(params, context)

    # ---- restore the latest checkpoint, or start
    fresh = new_state(params, batch_stats, context.optimizer, stage.learning_rate)
    state, totals, meta, damaged = run_on_primary(restore_latest, stage.folder, fresh, no_totals)
    done, taken, seconds = meta["epoch"], int(totals.steps), meta["seconds"]
    for message in damaged:
        progress.say(f"WARNING: {message}", style="bold yellow")
    if damaged or done or taken:
        updates = f", update {taken} of the next" if taken else ""
        progress.say(f"{stage.name}: resumes from epoch {done} of {stage.epochs}{updates}")
    warnings = [*meta["warnings"], *damaged]
    warnings += [notice for notice in stage.notices if notice not in warnings]
    run_on_primary(truncate_metrics, metrics_file, done, meta["history_sha256"])
    history = run_on_primary(read_metrics, metrics_file)
    run_on_primary(stage.monitor.stage_started, [name for name, _ in stage.layers], history, before)
    state, totals = replicate(state, devices), replicate(totals, devices)
    progress.skip((done * steps + taken) * recipe.batch_size)
    batches = train_batches(
        train,
        seed=order,
        batch_size=recipe.batch_size,
        start=done * steps + taken,
        stop=stage.epochs * steps,
        host=jax.process_index(),
        hosts=jax.process_count(),
        workers=context.workers,
    )
    batches = prefetch_to_device(batches, devices)
    del params, batch_stats, fresh

    for epoch in range(done + 1, stage.epochs + 1):
        # ---- learning rate of this epoch
        rate, restart = next_learning_rate(recipe, stage.learning_rate, stage.epochs, history)
        if restart and not taken:
            host = unreplicate(state)
            new = new_state(host.params, host.batch_stats, context.optimizer, rate)
            new = with_averages_of(new, host)
            state = replicate(new._replace(step=np.int32((epoch - 1) * steps)), devices)
            del host, new
        state = set_learning_rate(state, rate)

        # ---- train; two dispatches stay in flight, so that no device waits for the host
        details = "compiling" if epoch == done + 1 else None
        progress.describe(f"{stage.name} {epoch}/{stage.epochs}", details)
        started, in_flight = time.monotonic() - seconds, deque()
        rest = itertools.islice(batches, steps - taken)
        stage.monitor.epoch_started(steps - taken)
        executions = _executions(stage, rest, context.should_stop)
        for number, (count, train_step, batch) in enumerate(executions, 1):
            state, totals = train_step(state, totals, batch, root)
            in_flight.append((count, totals))
            stage.monitor.dispatched(totals)
            if len(in_flight) > 2:
                count, finished = jax.block_until_ready(in_flight.popleft())
                progress.advance(count * recipe.batch_size)
                if number % _CHECK_EVERY == 0:  # The same in all processes: so all stop.
                    loss = float(unreplicate(finished).loss)
                    _require_finite("training", loss, stage, epoch, rate, history)
                if progress.due():
                    sums = unreplicate(finished)
                    progress.update(_figures(stage, sums))
        sums = unreplicate(totals)
        progress.advance(recipe.batch_size * sum(count for count, _ in in_flight))
        keep = functools.partial(_interrupted, stage, epoch, sums, started, warnings)
        train_loss = float(sums.loss) / steps
        _require_finite("training", train_loss, stage, epoch, rate, history)
        if context.should_stop():
            raise keep(unreplicate(state))
        figures = _figures(stage, sums)
        images_per_second = steps * recipe.batch_size / (time.monotonic() - started)
        totals, taken, seconds = zeros, 0, 0.0
        del in_flight

        # ---- evaluate; merging donates the state, so an interruption needs a copy of it
        val_sums, copy = None, None
        try:
            if stage.merging_eval_step is None:
                evaluated = context.evaluation_state(stage, state)
                scores, val_loss = context.evaluate(evaluated, context.dataset.val)
            else:
                copy = jax.tree.map(np.array, unreplicate(state))
                state, val_sums, scores, val_loss = evaluate_merging(
                    stage.merging_eval_step,
                    state,
                    zeros,
                    context.dataset.val,
                    root,
                    devices,
                    context.should_stop,
                )
        except TrainingInterrupted as stopped:
            raise keep(unreplicate(state) if copy is None else copy) from stopped
        del copy
        _require_finite("validation", val_loss, stage, epoch, rate, history)
        val = val_metrics(context.dataset, scores)

        # ---- metrics, one line per epoch
        line = {
            "epoch": epoch,
            "step": epoch * steps,
            "learning_rate": rate,
            "train_loss": train_loss,
            "val_loss": val_loss,
            **{f"val_{name}": json_number(value) for name, value in val.items()},
            "seconds": time.monotonic() - started,
            "images_per_second": images_per_second,
        }
        if stage.deep:
            line["kernels"] = [count for _, count in stage.layers]
            line["selected"] = sums.selected.tolist()
            line["merged"] = sums.merged.tolist()
            line["similarity"] = (sums.similarity / np.maximum(sums.merged, 1)).tolist()
        if val_sums is not None:
            line["val_passes"] = int(val_sums.steps)
            line["val_selected"] = val_sums.selected.tolist()
            line["val_merged"] = val_sums.merged.tolist()
        run_on_primary(append_metrics, metrics_file, line)
        run_on_primary(stage.monitor.epoch_finished, line)
        history.append(line)
        found = " ".join(f"{METRICS[name]} {value:.3f}" for name, value in val.items())
        progress.milestone(figures, f"val loss {val_loss:.4f} {found}")

        # ---- warn if a merging stage merges nothing
        any_merged = sums.merged.any() or (val_sums is not None and val_sums.merged.any())
        if stage.deep and epoch == stage.merge_from_epoch and not any_merged:
            warnings.append(_merged_nothing(stage, state, epoch, int(sums.selected.sum())))
            progress.say(f"WARNING: {warnings[-1]}", style="bold yellow")

        # ---- checkpoint; keep the latest two, and the best epoch as of each of them
        best = best_epoch(history, recipe.select)
        meta = {"epoch": epoch, "best_epoch": best, "learning_rate": rate, "warnings": warnings}
        meta["history_sha256"] = json_sha256(history)
        earlier = best_epoch(history[:-1], recipe.select) if history[:-1] else best
        run_on_primary(
            save_checkpoint,
            stage.checkpoints,
            epoch,
            unreplicate(state),
            meta,
            keep={epoch, epoch - 1, best, earlier},
            checksums=stage.checksums,
        )
        run_on_primary(prune, stage.folder / MID_EPOCH, ())

    # ---- evaluate the best checkpoint on the test images, once
    best = best_epoch(history, recipe.select)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state)
    host_state, _ = run_on_primary(restore_checkpoint, stage.checkpoints / str(best), template)
    state = context.evaluation_state(stage, replicate(host_state, devices))
    tested = {} if recipe.average_weights is None else {"params": unreplicate(state.params)}
    if stage.recompute_batch_stats:
        tested["batch_stats"] = unreplicate(state.batch_stats)
    if tested:
        run_on_primary(write_tested, stage.folder, tested)
    counts = [np.sum([*line.get("merged", ()), *line.get("val_merged", ())]) for line in history]
    if stage.deep and any(counts) and not any(counts[:best]):
        warnings.append(
            f"{stage.name}: epoch {best}, which is tested, comes before the first merge, so the "
            "test metrics are those of training without merging"
        )
        progress.say(f"WARNING: {warnings[-1]}", style="bold yellow")
    result: dict[str, Any] = {"seed": stage.seed, "arm": stage.arm, "val": None, "test": None}
    files = {}
    for name, images in (("val", context.dataset.val), ("test", context.dataset.test)):
        scores, _ = context.evaluate(state, images)
        run = f"{stage.arm}-seed{stage.seed}"
        result[name], files[name] = write_predictions(
            stage.folder, context.dataset, name, images, scores, run
        )

    # ---- result.json is written last: it marks the stage as finished
    after = _similarity(unreplicate(state.params), context)
    run_on_primary(write_json, stage.folder / "similarity.json", {"before": before, "after": after})
    run_on_primary(stage.monitor.stage_finished, best * steps, after)
    result |= {
        "best_epoch": best,
        "epochs": stage.epochs,
        "steps": stage.epochs * steps,
        "seconds": sum(line["seconds"] for line in history),
        "layers": [name for name, _ in stage.layers],
        "kernels": [count for _, count in stage.layers],
        "selected": _column_sums(history, "selected"),
        "merged": _column_sums(history, "merged"),
        "val_passes": sum(line.get("val_passes", 0) for line in history),
        "val_selected": _column_sums(history, "val_selected"),
        "val_merged": _column_sums(history, "val_merged"),
        "warnings": warnings,
        "masks" if context.dataset.segmentation else "scores": files,
    }
    run_on_primary(prune, stage.checkpoints, {best, stage.epochs})
    run_on_primary(write_json_with_checksum, stage.folder / "result.json", result)
    progress.say(_summary(stage, result))
    return result


def _executions(
    stage: StageConfig, batches: Iterator[Any], should_stop: Callable[[], bool]
) -> Iterator[tuple[int, Callable[..., Any], Any]]:
    """Groups an epoch's batches into dispatches: number of updates, step function, batch.

    The remaining batches of an epoch are run as single steps.
    """
    # Checked before a batch is read: after a signal no further one is needed.
    while not should_stop() and (
        group := list(itertools.islice(batches, stage.steps_per_execution))
    ):
        if stage.multi_step_fn is not None and len(group) == stage.steps_per_execution:
            together = jax.tree.map(lambda *arrays: jnp.stack(arrays, axis=1), *group)
            yield len(group), stage.multi_step_fn, together
        else:
            yield from ((1, stage.train_step, batch) for batch in group)


def _interrupted(
    stage: StageConfig,
    epoch: int,
    totals: Totals,
    started: float,
    warnings: list[str],
    state: TrainState,
) -> TrainingInterrupted:
    """Saves the state within an epoch and returns the exception that ends the stage."""
    seconds = time.monotonic() - started
    meta = {"epoch": epoch - 1, "seconds": seconds, "warnings": warnings}
    path = run_on_primary(
        save_preemption_checkpoint, stage.folder, state, totals, meta, stage.checksums
    )
    saved = "" if path is None else f", saved in {path}"
    return TrainingInterrupted(
        f"{stage.name}: stopped after update {totals.steps} of epoch {epoch}{saved}"
    )


def _figures(stage: StageConfig, sums: Totals) -> str:
    """Mean loss and number of merged kernels in the epoch so far, as text."""
    merged = f"  merged {int(sums.merged.sum()):,}" if stage.deep else ""
    return f"loss {float(sums.loss) / int(sums.steps):.4f}{merged}"


def _require_finite(
    kind: str,
    loss: float,
    stage: StageConfig,
    epoch: int,
    rate: float,
    history: list[dict[str, Any]],
) -> None:
    if math.isfinite(loss):
        return
    last = stage.checkpoints / str(len(history))
    kept = f"the last good checkpoint is {last}" if history else "no epoch was finished before"
    option = "`merging_learning_rate`" if stage.number else "`learning_rate`"
    raise NonFiniteLossError(
        f"{stage.name}: the {kind} loss became {loss} in epoch {epoch}, at learning rate {rate:g}; "
        f"{kept}. Choose a lower {option} and start again in another folder."
    )


def _merged_nothing(stage: StageConfig, state: TrainState, epoch: int, selected: int) -> str:
    """Warning with the layers' similarity quantiles, which show what threshold would merge."""
    lines = []
    for layer in kernel_similarity(unreplicate(state.params), stage.deep, quantiles=(0.5, 0.99)):
        median, high = layer.quantiles.values()
        lines.append(f"\n  {layer.name}: {median:.3f}, {high:.3f}, {layer.maximum:.3f}")
    return (
        f"{stage.name}: epoch {epoch} merged none of the {selected:,} selected kernels; so far "
        "this arm trains without merging. Median, 99% quantile and maximum similarity per layer:"
        f"{''.join(lines)}\n"
        "A lower threshold or quantile, the partner nearest, or a smaller skip would merge more."
    )


def _similarity(params: Any, context: TrainContext) -> list[dict[str, Any]]:
    layers = kernel_similarity(params, context.kernels, thresholds=context.thresholds)
    return [layer.to_dict() for layer in layers]


def _column_sums(history: list[dict[str, Any]], name: str) -> list[int]:
    return [sum(column) for column in zip(*(line.get(name, []) for line in history), strict=True)]


def _summary(stage: StageConfig, result: dict[str, Any]) -> str:
    merged = f", {sum(result['merged']):,} kernels merged" if stage.deep else ""
    if stage.merging_eval_step is not None:
        merged += f" in training, {sum(result['val_merged']):,} in validation"
    values = {name: result["test"][name] for name in METRICS if name in result["test"]}
    found = ", ".join(
        f"{METRICS[name]} {'undefined' if value is None else f'{value:.3f}'}"
        for name, value in values.items()
    )
    return (
        f"{stage.name}: test {found} at epoch {result['best_epoch']} of {stage.epochs}, "
        f"{result['seconds']:.0f} s{merged}"
    )
