"""Evaluation of a split: with fixed weights, re-estimated statistics, or a merge per image."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from inmerge_jax.batch_stats import recompute_batch_stats
from inmerge_jax.data import Split, eval_batches, steps_per_epoch, train_batches
from inmerge_jax.training.multihost import gather_rows
from inmerge_jax.training.parallel import replicate, shard_batch, unreplicate
from inmerge_jax.training.preemption import TrainingInterrupted
from inmerge_jax.training.train_step import Totals, TrainState


def evaluate(
    eval_step: Callable[..., tuple[jax.Array, jax.Array]],
    state: TrainState,
    images: Split,
    *,
    batch_size: int,
    devices: tuple[jax.Device, ...],
    workers: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[np.ndarray, float]:
    """Scores of all images of a split and its mean loss.

    Scores are float32 (n, classes); of a segmenter masks, uint8 (n, height, width) or with a depth.
    Each process evaluates its rows of every batch, and gets the results of all processes.

    Args:
      eval_step: the result of `train_step.make_eval_step`.
      state: replicated train state.
      images: the split.
      batch_size: examples per batch, over all devices.
      devices: the devices that the step runs on.
      workers: number of processes that read images; 0 for none.
      should_stop: called before every batch.

    Raises:
      TrainingInterrupted: `should_stop` returned True.
    """
    scores, losses, in_flight = [], [], deque()

    def fetch() -> None:
        batch_scores, batch_losses = in_flight.popleft()
        scores.append(np.asarray(batch_scores).reshape(-1, *batch_scores.shape[2:]))
        losses.append(np.asarray(batch_losses).reshape(-1))

    batches = eval_batches(
        images,
        batch_size,
        host=jax.process_index(),
        hosts=jax.process_count(),
        workers=workers,
    )
    for batch in batches:
        if should_stop():
            raise TrainingInterrupted("stopped in an evaluation")
        batch = shard_batch(batch, devices)
        in_flight.append(eval_step(state.params, state.batch_stats, batch))
        if len(in_flight) > 2:
            fetch()
    while in_flight:
        fetch()
    all_scores, all_losses = gather_rows(np.stack(scores)), gather_rows(np.stack(losses))
    loss = all_losses.astype(np.float64).sum(1).sum() / len(images)
    return all_scores.reshape(-1, *all_scores.shape[2:])[: len(images)], float(loss)


def with_batch_stats_of(
    images: Split,
    step: Callable[..., Any],
    state: TrainState,
    *,
    seed: int,
    batch_size: int,
    batches: int | None,
    devices: tuple[jax.Device, ...],
    workers: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainState:
    """The state with the batch statistics that its weights have on the training images.

    Args:
      images: the training split.
      step: the result of `train_step.make_batch_stats_step`.
      state: replicated train state.
      seed: selects the order of the images, which is the same at each call.
      batch_size: examples per batch, over all devices.
      batches: number of batches; None for one pass.
      devices: the devices that the step runs on.
      workers: number of processes that read images; 0 for none.
      should_stop: called before every batch.

    Raises:
      TrainingInterrupted: `should_stop` returned True.
    """

    def sharded() -> Iterator[dict[str, jax.Array]]:
        for batch in train_batches(
            images,
            seed=seed,
            batch_size=batch_size,
            stop=batches or steps_per_epoch(len(images), batch_size),
            host=jax.process_index(),
            hosts=jax.process_count(),
            workers=workers,
        ):
            if should_stop():
                raise TrainingInterrupted("stopped in an evaluation")
            yield shard_batch(batch, devices)

    def update(batch_stats: Any, batch: Any) -> Any:
        return step(state.params, batch_stats, batch)

    found = recompute_batch_stats(update, state.batch_stats, sharded())
    return state._replace(batch_stats=found)


def evaluate_merging(
    step: Callable[..., Any],
    state: TrainState,
    totals: Totals,
    images: Split,
    root: jax.Array,
    devices: tuple[jax.Device, ...],
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[TrainState, Totals, np.ndarray, float]:
    """Merges before every image, then evaluates it: image k sees the weights after k merges.

    Args:
      step: the result of `train_step.make_merging_eval_step`.
      state: replicated train state; it is donated.
      totals: replicated zeros.
      images: the split; every device of every process evaluates every image.
      root: the stage's key.
      devices: the devices that the step runs on.
      should_stop: called before every image.

    Returns:
      The state with the merged weights; the totals, as NumPy arrays; the scores, float32
      (n, classes), or masks, see `evaluate`; the mean loss.

    Raises:
      TrainingInterrupted: `should_stop` returned True.
    """
    kept: list[tuple[jax.Array, jax.Array]] = []
    for batch in eval_batches(images, 1):
        if should_stop():
            raise TrainingInterrupted("stopped in an evaluation")
        state, totals, scored = step(state, totals, replicate(batch, devices), root)
        kept.append(scored)
        if len(kept) > 2:  # Bounds the queue; no device waits for the host.
            jax.block_until_ready(kept[-3])
    scores, losses = (
        np.concatenate(column) for column in zip(*map(unreplicate, kept), strict=True)
    )
    return state, unreplicate(totals), scores, float(losses.astype(np.float64).mean())
