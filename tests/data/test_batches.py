import dataclasses
import os
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inmerge_jax.data import (
    Split,
    eval_batches,
    steps_per_epoch,
    train_batch,
    train_batches,
)
from inmerge_jax.errors import UsageError
from tests.long import LONG, long_unless


def numbered(n: int, *, columns: int = 0) -> Split:
    """A split whose image i holds the number i."""
    images = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1) * np.ones((1, 2, 3, 1), np.uint8)
    if columns:
        return Split(images, (np.arange(n)[:, None] >> np.arange(columns) & 1).astype(np.uint8))
    return Split(images, np.arange(n, dtype=np.int32))


def shown(split: Split, steps: range, *, seed: int, batch_size: int) -> np.ndarray:
    batches = [train_batch(split, seed=seed, step=s, batch_size=batch_size) for s in steps]
    return np.concatenate([batch["index"] for batch in batches])


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    passes=st.integers(1, 4),
)
def test_each_pass_shows_every_example_once(n, batch_size, seed, passes):
    batch_size = min(n, batch_size)
    split = numbered(n)
    stream = shown(split, range(-(-passes * n // batch_size)), seed=seed, batch_size=batch_size)
    for start in range(0, passes * n, n):
        assert sorted(stream[start : start + n]) == list(range(n))


def test_passes_and_seeds_have_orders_of_their_own():
    split = numbered(50)
    first, second = np.split(shown(split, range(10), seed=0, batch_size=10), 2)
    other = shown(split, range(5), seed=1, batch_size=10)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)
    # A neighbouring seed must not be the same stream one pass later.
    assert not np.array_equal(second, other)


def test_a_batch_does_not_depend_on_earlier_batches():
    split = numbered(30)
    forward = [train_batch(split, seed=3, step=s, batch_size=8) for s in range(12)]
    for step in (11, 0, 7, 7, 3):
        again = train_batch(split, seed=3, step=step, batch_size=8)
        for key, value in forward[step].items():
            np.testing.assert_array_equal(again[key], value)


@pytest.mark.parametrize("columns", [0, 4])
def test_a_batch_holds_the_examples_its_index_names(columns):
    split = numbered(20, columns=columns)
    batch = train_batch(split, seed=1, step=2, batch_size=6)
    assert batch["image"].shape == (6, 2, 3, 1) and batch["image"].dtype == np.uint8
    assert batch["index"].dtype == np.int32
    assert batch["label"].dtype == (np.float32 if columns else np.int32)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
    np.testing.assert_array_equal(batch["label"], split.labels[batch["index"]])


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 50))
def test_evaluation_sees_every_example_once_in_order(n, batch_size):
    split = numbered(n)
    batches = list(eval_batches(split, batch_size))
    assert all(len(value) == batch_size for batch in batches for value in batch.values())
    joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    assert joined["mask"].dtype == np.float32
    real = joined["mask"] == 1
    np.testing.assert_array_equal(joined["mask"], np.arange(len(real)) < n)
    np.testing.assert_array_equal(joined["index"][real], np.arange(n))
    np.testing.assert_array_equal(joined["image"][real], split.images)
    np.testing.assert_array_equal(joined["label"][real], split.labels)


def test_steps_per_epoch_rounds_up():
    assert [steps_per_epoch(n, 128) for n in (128, 129, 256, 546)] == [1, 2, 2, 5]


def test_batch_size_that_does_not_fit_is_named():
    with pytest.raises(UsageError, match="`batch_size` 31 exceeds the training split of 30"):
        train_batch(numbered(30), seed=0, step=0, batch_size=31)
    with pytest.raises(UsageError, match="`batch_size` 0: choose 1 or more"):
        steps_per_epoch(30, 0)
    with pytest.raises(UsageError, match="`batch_size` 0"):
        eval_batches(numbered(30), 0)


def test_no_batch_comes_before_the_first():
    with pytest.raises(ValueError, match="step -1"):
        train_batch(numbered(30), seed=0, step=-1, batch_size=4)


@dataclasses.dataclass(frozen=True)
class Lazy:
    """Images that are made when they are read, as those in files are."""

    count: int
    parent: int = dataclasses.field(default_factory=os.getpid)
    dtype = np.dtype(np.uint8)
    ndim = 4

    @property
    def shape(self):
        return (self.count, 2, 3, 1)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if 99 in np.atleast_1d(index):
            raise UsageError("image 99 is damaged")
        # Workers must not take the accelerator: it belongs to the training process.
        assert not jax_has_devices() or os.getpid() == self.parent
        return (
            np.ones(self.shape, np.uint8)[index]
            * np.asarray(index, np.uint8)[..., None, None, None]
        )


def jax_has_devices():
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


def lazy(n):
    return Split(Lazy(n), (np.arange(n)[:, None] >> np.arange(5) & 1).astype(np.uint8))


def same(a, b):
    return a.keys() == b.keys() and all(
        np.array_equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a
    )


@pytest.mark.parametrize("make", [numbered, lazy])
@pytest.mark.parametrize(("start", "stop"), [(0, 9), (4, 6), (23, 30), (5, 5)])
def test_batches_in_a_row_are_those_by_number(make, start, stop):
    split = make(21)
    options = {"seed": 3, "batch_size": 6}
    row = list(train_batches(split, **options, start=start, stop=stop))
    assert len(row) == stop - start
    for step, batch in enumerate(row, start):
        assert same(batch, train_batch(split, **options, step=step))
    endless = train_batches(split, **options, start=start)
    assert same(next(endless), train_batch(split, **options, step=start))
    endless.close()


@LONG
@pytest.mark.parametrize("workers", long_unless(lambda workers: workers == 1, [1, 3]))
def test_worker_processes_change_nothing(workers):
    import multiprocessing

    split = lazy(21)
    row = train_batches(split, seed=1, batch_size=6, start=2, stop=9, workers=workers)
    for step, batch in enumerate(row, 2):
        assert same(batch, train_batch(split, seed=1, batch_size=6, step=step))
    assert step == 8
    plain, by_workers = (list(eval_batches(split, 4, workers=count)) for count in (0, workers))
    assert len(plain) == 6 and all(map(same, plain, by_workers))
    endless = train_batches(split, seed=1, batch_size=6, workers=workers)
    next(endless)
    assert len(multiprocessing.active_children()) == workers
    endless.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_every_batch(hosts):
    split = lazy(21)
    whole = list(train_batches(split, seed=2, batch_size=8, stop=7))
    parts = [
        list(train_batches(split, seed=2, batch_size=8, stop=7, host=host, hosts=hosts))
        for host in range(hosts)
    ]
    for step, batch in enumerate(whole):
        for name, value in batch.items():
            shares = [part[step][name] for part in parts]
            assert {len(share) for share in shares} == {8 // hosts}
            np.testing.assert_array_equal(np.concatenate(shares), value)
        again = train_batch(split, seed=2, batch_size=8, step=step, host=hosts - 1, hosts=hosts)
        assert same(again, parts[-1][step])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_an_evaluation(hosts):
    split = lazy(17)
    whole = list(eval_batches(split, 8))
    parts = [list(eval_batches(split, 8, host=host, hosts=hosts)) for host in range(hosts)]
    for step, batch in enumerate(whole):
        for name, value in batch.items():
            shares = [part[step][name] for part in parts]
            assert {len(share) for share in shares} == {8 // hosts}
            np.testing.assert_array_equal(np.concatenate(shares), value)
    assert not parts[-1][-1]["mask"].any(), "a host may have nothing but filling"


def test_hosts_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="`batch_size` 8 cannot be split over 3 hosts"):
        eval_batches(lazy(21), 8, hosts=3)
    with pytest.raises(UsageError, match="`batch_size` 8 cannot be split over 3 hosts"):
        next(train_batches(lazy(21), seed=0, batch_size=8, hosts=3))
    with pytest.raises(ValueError, match="host 2 of 2"):
        train_batch(lazy(21), seed=0, step=0, batch_size=8, host=2, hosts=2)
    with pytest.raises(UsageError, match="`batch_size` 22 exceeds"):
        train_batches(lazy(21), seed=0, batch_size=22)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=LONG)])
def test_an_image_that_cannot_be_read_stops_the_batches(workers):
    row = train_batches(lazy(120), seed=0, batch_size=8, stop=40, workers=workers)
    with pytest.raises(UsageError, match="image 99 is damaged"):
        list(row)
