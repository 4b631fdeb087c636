"""Batches as pure functions of (seed, step), so that a resumed run needs no iterator state."""

import functools
from collections.abc import Iterator

import grain
import numpy as np

from inmerge_jax.data.dataset import Split
from inmerge_jax.errors import InputError

Batch = dict[str, np.ndarray]


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Updates in one epoch, `ceil(examples / batch_size)`: as many as PyTorch's loader makes.

    Batches here are always full, so an epoch may show up to `batch_size - 1` examples of the
    next pass; over the run every example is shown equally often, to within one.

    Raises:
      InputError: where `batch_size` is below 1 or exceeds the number of examples.
    """
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: --batch-size must be at least 1")
    if batch_size > examples:
        raise InputError(
            f"batch size {batch_size} is larger than the training split of {examples} examples: "
            f"give a --batch-size of at most {examples}, or more training examples"
        )
    return -(-examples // batch_size)


@functools.lru_cache(maxsize=16)
def _index_stream(examples: int, seed: int, batch_size: int) -> grain.MapDataset:
    """Batches of example indices, shuffled anew in each pass, without end."""
    stream = grain.MapDataset.source(range(examples)).seed(seed).shuffle().repeat()
    return stream.batch(batch_size)


def train_batch(split: Split, *, seed: int, step: int, batch_size: int) -> Batch:
    """Batch number `step` of the endless shuffled stream over `split`; depends on nothing else.

    The stream is pass after pass over the split, each in an order of its own and each holding
    every example exactly once, cut into full batches; a batch may span two passes.

    Args:
      split: the training split, n >= batch_size examples.
      seed: selects the order; 0 <= seed < 2**32.
      step: 0-based count of batches since the stream's beginning, in any order of asking.
      batch_size: B.

    Returns:
      "image" uint8 (B, h, w, c); "label" int32 (B,), or float32 (B, k) for multi-label;
      "index" int32 (B,), the examples' positions in the split.

    Raises:
      InputError: where `batch_size` does not fit the split.
    """
    steps_per_epoch(len(split), batch_size)
    if step < 0:
        raise ValueError(f"step {step}: batches are counted from 0")
    return _take(split, np.asarray(_index_stream(len(split), seed, batch_size)[step]))


def eval_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """The split once, in order; the last batch is filled up with masked copies of its last example.

    Yields:
      As `train_batch`, and "mask" float32 (B,): 1 for an example, 0 for filling. Every batch has
      `batch_size` rows, so that one compiled step serves all of them.

    Raises:
      InputError: where `batch_size` is below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: --batch-size must be at least 1")
    return _masked_batches(split, batch_size)


def _masked_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    for start in range(0, len(split), batch_size):
        rows = np.arange(start, start + batch_size)
        batch = _take(split, np.minimum(rows, len(split) - 1))
        yield {**batch, "mask": (rows < len(split)).astype(np.float32)}


def _take(split: Split, index: np.ndarray) -> Batch:
    labels = split.labels[index]
    return {
        "image": split.images[index],
        "label": labels.astype(np.float32) if labels.ndim == 2 else labels,
        "index": index.astype(np.int32),
    }
