"""Processes that read images: killed, sent signals, and whose."""

import dataclasses
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from inmerge_jax.data import train_batch, train_batches, workers
from inmerge_jax.errors import UsageError
from tests.data.test_batches import Lazy, lazy, same
from tests.long import LONG, long_unless


@dataclasses.dataclass(frozen=True)
class Large(Lazy):
    """So large that a worker waits in the middle of a batch for its reader."""

    @property
    def shape(self):
        return (self.count, 256, 256, 3)


@pytest.mark.parametrize("images", [pytest.param(Lazy, marks=LONG), Large])
@pytest.mark.parametrize("workers", long_unless(lambda workers: workers == 2, [1, 2]))
def test_a_killed_worker_ends_the_batches(images, workers):
    split = dataclasses.replace(lazy(40), images=images(40))
    row = train_batches(split, seed=1, batch_size=6, workers=workers)
    next(row)
    victim = multiprocessing.active_children()[-1]
    time.sleep(1)  # By now it has begun to write what nobody reads.
    victim.kill()
    with pytest.raises(UsageError, match=r"signal 9 \(SIGKILL\).*fewer `workers`"):
        list(row)
    for worker in multiprocessing.active_children():
        worker.join(10)
    assert not multiprocessing.active_children()
    again = train_batches(split, seed=1, batch_size=6, start=1, stop=2, workers=workers)
    assert same(next(again), train_batch(split, seed=1, batch_size=6, step=1))
    again.close()


DYING = """
import dataclasses, multiprocessing, sys, time
from tests.data.test_batches import lazy
from tests.data.test_workers import Large
from inmerge_jax.data import train_batches
from inmerge_jax.errors import UsageError

if __name__ == "__main__":
    split = dataclasses.replace(lazy(40), images=Large(40))
    row = train_batches(split, seed=1, batch_size=6, workers=2)
    next(row)
    time.sleep(1)
    multiprocessing.active_children()[-1].kill()
    try:
        list(row)
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
"""


@LONG
def test_a_command_that_lost_a_worker_comes_to_its_end(tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, script], env=here, timeout=200, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert re.search(r"signal 9 \(SIGKILL\).*fewer `workers`.*`resume`", done.stderr)


def test_a_worker_killed_as_it_starts_ends_the_batches():
    killed = threading.Event()

    def kill():
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.001)
        workers[0].kill()
        killed.set()

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(UsageError, match="SIGKILL.*fewer `workers`"):
        list(train_batches(lazy(40), seed=1, batch_size=6, workers=2))
    assert killed.is_set()


def test_a_worker_that_hangs_is_not_waited_for():
    (reading, _writing), (alive, _other) = multiprocessing.Pipe(), multiprocessing.Pipe()
    with pytest.raises(UsageError, match="a worker process read no batch in 0.1 s.*`workers`"):
        workers._receive(reading, SimpleNamespace(sentinel=alive), 0.1)


ABANDONED = """
import sys

from tests.data.test_batches import lazy
from inmerge_jax.data import train_batches

if __name__ == "__main__":
    row = train_batches(lazy(40), seed=1, batch_size=6, workers=2)
    next(row)
    sys.exit("an error elsewhere")
"""


@LONG
def test_workers_end_with_a_command_that_leaves_them_alone(tmp_path):
    script = tmp_path / "leaving.py"
    script.write_text(ABANDONED)
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, script], env=here, timeout=100, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr == "an error elsewhere\n"


def test_signals_to_the_process_group_do_not_reach_workers():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    split = lazy(21)
    row = train_batches(split, seed=1, batch_size=6, stop=9, workers=1)
    assert same(next(row), train_batch(split, seed=1, batch_size=6, step=0))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    (worker,) = multiprocessing.active_children()
    status = Path(f"/proc/{worker.pid}/status").read_text()
    blocked = int(re.search(r"SigBlk:\s+(\w+)", status)[1], 16)
    for number in (signal.SIGTERM, signal.SIGINT):
        assert blocked >> (number - 1) & 1, "from the start, before the worker runs any code"
        os.kill(worker.pid, number)
    assert len(list(row)) == 8
    assert not multiprocessing.active_children()
