"""Batches as pure functions of (seed, step, host): a resumed run needs no iterator state.

`train_batch` returns batch number `step`; `train_batches` yields the same batches in order, read in
advance by threads or worker processes.
"""

import functools
from collections.abc import Callable, Generator

import numpy as np

from inmerge_jax.data.dataset import Split
from inmerge_jax.data.workers import map_in_processes
from inmerge_jax.errors import UsageError

Batch = dict[str, np.ndarray]

_THREADS = 2
"""Number of threads that read files in a process, and of finished batches that wait."""
_END = 2**48
"""A number of batches beyond any training."""


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Updates per epoch, `ceil(examples / batch_size)`, as in PyTorch's DataLoader.

    Batches are always full, so an epoch may include up to `batch_size - 1` examples of the next
    pass. Over a run, the numbers of times that examples are used differ by at most one.

    Raises:
      UsageError: `batch_size` is below 1 or exceeds the number of examples.
    """
    if batch_size < 1:
        raise UsageError(f"`batch_size` {batch_size}: choose 1 or more")
    if batch_size > examples:
        raise UsageError(
            f"`batch_size` {batch_size} exceeds the training split of {examples} examples: choose "
            f"{examples} or fewer, or give more training examples"
        )
    return -(-examples // batch_size)


@functools.lru_cache(maxsize=16)
def _order(examples: int, seed: int, number: int) -> np.ndarray:
    """The order of the examples in pass `number`.

    Sorts random bits of a counter-based generator, whose stream NumPy guarantees to keep.
    """
    bits = np.random.Philox(key=np.array([seed, number], np.uint64)).random_raw(examples)
    return np.argsort(bits, kind="stable")


def _batch_index(examples: int, seed: int, batch_size: int, step: int) -> np.ndarray:
    """Indices of the examples of batch number `step`, int64 (batch_size,)."""
    place = np.arange(step * batch_size, (step + 1) * batch_size)
    first, last = place[0] // examples, place[-1] // examples
    passes = [_order(examples, seed, int(number)) for number in range(first, last + 1)]
    return np.concatenate(passes)[place - first * examples]


def train_batch(
    split: Split, *, seed: int, step: int, batch_size: int, host: int = 0, hosts: int = 1
) -> Batch:
    """Batch number `step` of an endless shuffled stream over `split`; a pure function.

    The stream consists of passes over the split, each in its own order, cut into full batches; a
    batch may span two passes. Each host gets its slice of every batch.

    Args:
      split: the training split, n >= batch_size examples.
      seed: selects the order; 0 <= seed < 2**32.
      step: 0-based number of the batch.
      batch_size: examples per batch over all hosts; B = batch_size / hosts.
      host: 0-based number of this host.
      hosts: number of hosts.

    Returns:
      "image" uint8 (B, h, w, c); "label" int32 (B,), or float32 (B, k) for multi-label, or masks
      uint8 (B, h, w); "index" int32 (B,), the examples' positions in the split.

    Raises:
      UsageError: `batch_size` exceeds the split or is no multiple of `hosts`.
    """
    _check(split, batch_size, step, host, hosts)
    return _train_rows(split, seed, batch_size, host, hosts, step)


def train_batches(
    split: Split,
    *,
    seed: int,
    batch_size: int,
    start: int = 0,
    stop: int | None = None,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
) -> Generator[Batch, None, None]:
    """Yields `train_batch` for the steps from `start` to `stop` (exclusive; None for no end).

    The batches do not depend on `workers`, the number of processes that read images in advance.
    With 0 workers, threads do so if the images are files. Closing the iterator ends the workers.

    Raises:
      UsageError: see `train_batch`; while iterating, if an image cannot be read or a worker ends.
    """
    _check(split, batch_size, start, host, hosts)
    take = functools.partial(_train_rows, split, seed, batch_size, host, hosts)
    return _read(range(start, _END if stop is None else stop), take, split, workers)


def _train_rows(
    split: Split, seed: int, batch_size: int, host: int, hosts: int, step: int
) -> Batch:
    index = _batch_index(len(split), seed, batch_size, step)
    return _take(split, _host_slice(index, host, hosts))


def eval_batches(
    split: Split, batch_size: int, *, host: int = 0, hosts: int = 1, workers: int = 0
) -> Generator[Batch, None, None]:
    """Yields the split once, in order, in batches of equal size.

    The last batch is padded with copies of the last example, so that one compiled step serves all
    batches. Each host gets its slice of every batch.

    Yields:
      The entries of `train_batch`, and "mask" float32 (B,): 1 for an example, 0 for padding.

    Raises:
      UsageError: `batch_size` is below 1 or no multiple of `hosts`; while iterating, if an image
        cannot be read or a worker ends.
    """
    if batch_size < 1:
        raise UsageError(f"`batch_size` {batch_size}: choose 1 or more")
    _check_hosts(batch_size, host, hosts)
    take = functools.partial(_eval_rows, split, batch_size, host, hosts)
    return _read(range(0, len(split), batch_size), take, split, workers)


def _eval_rows(split: Split, batch_size: int, host: int, hosts: int, start: int) -> Batch:
    rows = _host_slice(np.arange(start, start + batch_size), host, hosts)
    batch = _take(split, np.minimum(rows, len(split) - 1))
    return {**batch, "mask": (rows < len(split)).astype(np.float32)}


def _read(
    places: range, take: Callable[[int], Batch], split: Split, workers: int
) -> Generator[Batch, None, None]:
    """Yields `take(place)` for each place in order, in advance where images are read from files."""
    if workers:
        yield from map_in_processes(take, places, workers)
    elif split.in_memory:
        yield from map(take, places)
    else:
        import grain

        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS)
        yield from grain.MapDataset.source(places).map(take).to_iter_dataset(options)


def _check(split: Split, batch_size: int, step: int, host: int, hosts: int) -> None:
    steps_per_epoch(len(split), batch_size)
    if step < 0:
        raise ValueError(f"step {step}: batches are counted from 0")
    _check_hosts(batch_size, host, hosts)


def _check_hosts(batch_size: int, host: int, hosts: int) -> None:
    if not 0 <= host < hosts:
        raise ValueError(f"host {host} of {hosts}: hosts are counted from 0")
    if batch_size % hosts:
        raise UsageError(
            f"`batch_size` {batch_size} cannot be split over {hosts} hosts: choose a multiple of "
            f"{hosts}"
        )


def _host_slice(index: np.ndarray, host: int, hosts: int) -> np.ndarray:
    size = len(index) // hosts
    return index[host * size : (host + 1) * size]


def _take(split: Split, index: np.ndarray) -> Batch:
    labels = split.labels[index]
    return {
        "image": split.images[index],
        "label": labels.astype(np.float32) if labels.ndim == 2 else labels,
        "index": index.astype(np.int32),
    }
