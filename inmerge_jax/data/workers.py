"""Worker processes that compute batches in advance."""

import atexit
import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from inmerge_jax.errors import UsageError

BATCH_SECONDS = 600.0
"""Longest time to wait for one batch."""


def end_with_parent() -> None:
    """In a worker process: ends it as soon as its parent has ended."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def map_in_processes(
    function: Callable[[int], Any],
    items: Sequence[int],
    workers: int,
    seconds: float = BATCH_SECONDS,
) -> Iterator[Any]:
    """Yields `function(item)` for each item, in order, computed in advance by worker processes.

    Worker k computes the items k, k + workers, ... and keeps one result ready. Closing the iterator
    ends the workers.

    Args:
      function: picklable.
      items: its arguments.
      workers: number of processes, at least 1.
      seconds: longest time to wait for a result.

    Raises:
      UsageError: a worker was killed, or gave no result in time.
      Exception: as raised by `function`.
    """
    # Spawned, not forked: workers inherit no thread and no device.
    spawn = multiprocessing.get_context("spawn")
    processes: list[Any] = []
    kill = functools.partial(_kill, processes)
    # At exit multiprocessing would send SIGTERM, which the workers block, and wait for their end.
    atexit.register(kill)
    try:
        pipes = []
        for _ in range(min(workers, len(items))):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_work, args=(function, there), daemon=True)
            with _signals_blocked():
                process.start()
            processes.append(process)
            there.close()  # So that reading from a worker that was killed ends.
            pipes.append(here)
        # Two items per worker, so that it starts the next one while this process handles a result.
        ahead = min(2 * len(pipes), len(items))
        for index in range(ahead):
            _send(pipes[index % len(pipes)], items[index])
        for index in range(len(items)):
            turn = index % len(pipes)
            result = _receive(pipes[turn], processes[turn], seconds)
            if index + ahead < len(items):
                _send(pipes[turn], items[index + ahead])
            yield result
    finally:
        kill()
        atexit.unregister(kill)


def _work(function: Callable[[int], Any], pipe: Any) -> None:
    end_with_parent()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            item = pipe.recv()
            try:
                answer = True, function(item)
            except Exception as error:
                answer = False, error
            pipe.send(answer)


def _send(pipe: Any, item: int) -> None:
    # A worker that was killed meanwhile is noticed when its result is due.
    with contextlib.suppress(OSError):
        pipe.send(item)


def _receive(pipe: Any, process: Any, seconds: float) -> Any:
    if not multiprocessing.connection.wait([pipe, process.sentinel], seconds):
        raise UsageError(
            f"a worker process read no batch in {seconds:g} s; check the file system of the "
            "images, or give fewer `workers`, and continue the run with `resume`"
        )
    try:
        good, result = pipe.recv()
    except (EOFError, OSError) as error:
        process.join()
        code = process.exitcode
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"status {code}"
        raise UsageError(
            f"a worker process that reads images ended with {how}; if memory ran out, give fewer "
            "`workers` or a smaller `batch_size`, and continue the run with `resume`"
        ) from error
    if not good:
        raise result
    return result


def _kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    processes.clear()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started in this context never receive SIGTERM or SIGINT.

    Terminals and schedulers send these to all processes of a group; the parent decides when its
    workers end. Windows has no signal masks.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
