"""Processes that read images: killed, sent signals, and whose."""

import contextlib
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

import pytest

from inmerge_jax.data import train_batch, train_batches
from inmerge_jax.data.workers import WorkerLostError, watched
from inmerge_jax.errors import UsageError
from tests.data.test_batches import Lazy, lazy, same
from tests.long import long_unless


@dataclasses.dataclass(frozen=True)
class Large(Lazy):
    """So large that a worker waits in the middle of a batch for its reader."""

    @property
    def shape(self):
        return (self.count, 256, 256, 3)


@pytest.mark.parametrize("images", [Lazy, Large])
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
    with pytest.raises(UsageError, match="(SIGKILL|exit code -9).*fewer `workers`"):
        list(train_batches(lazy(40), seed=1, batch_size=6, workers=2))
    assert killed.is_set()


@pytest.mark.parametrize("name", ["another", "grain-process-prefetch-1"])
def test_only_grains_processes_are_watched(name):
    class Rows:
        process = None

        def __next__(self):
            if self.process:
                self.process.kill()
                time.sleep(1.5)
                return 1
            context = multiprocessing.get_context("spawn")
            self.process = context.Process(target=time.sleep, args=(60,), name=name, daemon=True)
            self.process.start()
            time.sleep(0.2)
            return 0

        def close(self):
            pass

    rows = Rows()
    lost = pytest.raises(WorkerLostError, match="SIGKILL")
    with lost if name != "another" else contextlib.nullcontext(), watched(rows) as elements:
        assert [next(elements), next(elements)] == [0, 1]
    rows.process.join(10)


def test_signals_to_the_whole_group_do_not_reach_workers():
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
