"""What a worker process owes the process that started it."""

import contextlib
import functools
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker, util
from typing import Any, TypeVar

T = TypeVar("T")

_STARTING = threading.Lock()
_WAIT, _WAIT_FOR_FIRST = 1.0, 0.02
_GRAIN = "grain-process-prefetch"  # What the names of its processes begin with.
_GRAIN_FOUND_IT = "terminated unexpectedly"  # In its error for one that ended too soon to be seen.
_END = object()


class WorkerLostError(RuntimeError):
    """A worker process ended without being told to; the message says how."""


def end_with_parent() -> None:
    """In a worker process: ends it as soon as the process that started it is gone."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def unsignalled_processes() -> Iterator[None]:
    """Processes that are started within never get SIGTERM or SIGINT, from their first moment on.

    Terminals and schedulers send these to a whole group of processes; the one that starts the
    others stops when it is ready to, and ends them then. It loses no signal itself: one that comes
    meanwhile waits for the end of the block, or for another thread.
    """
    resource_tracker.ensure_running()  # Started within, it would unblock the signals.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def watched(iterator: Any) -> Iterator[Iterator[Any]]:
    """An iterator's elements, for as long as the processes live that its first one starts.

    A worker that is killed as it writes to a pipe leaves its reader waiting for ever, so the
    iterator is read in a thread, and its processes are looked at while nothing comes.

    Args:
      iterator: one with `close`, which is called at the end if all processes lived.

    Raises:
      WorkerLostError: from the iterator given, where one of the processes died.
    """
    workers: set[Any] = set()

    def elements() -> Iterator[Any]:
        with _STARTING:  # So that no one else's processes are taken for these.
            others = set(multiprocessing.active_children())

            def started() -> set[Any]:
                new = set(multiprocessing.active_children()) - others
                workers.update(worker for worker in new if worker.name.startswith(_GRAIN))
                return workers

            # Once `active_children` has found a process dead it doesn't name it: look often.
            element = _wait(functools.partial(_first, iterator), started, _WAIT_FOR_FIRST)
            started()
        while element is not _END:
            yield element
            element = _wait(lambda: next(iterator, _END), lambda: workers, _WAIT)

    try:
        yield elements()
    except WorkerLostError:
        _abandon(workers)
        raise
    except BaseException:
        iterator.close()
        raise
    iterator.close()


def _abandon(workers: set[Any]) -> None:
    """Ends the processes, whose iterator isn't closed, now or at the end of Python.

    It would read what waits in its pipes, and wait for the rest of what the lost one began there;
    neither Grain nor multiprocessing has a public way to leave that out.
    """
    for worker in workers:
        worker.kill()
    for finalizer in list(util._finalizer_registry.values()):
        owner = finalizer._weakref and finalizer._weakref()
        if getattr(owner, "_prefetch_process", None) in workers:
            finalizer.cancel()


def _first(iterator: Iterator[Any]) -> Any:
    with unsignalled_processes():
        return next(iterator, _END)


def _wait(call: Callable[[], T], workers: Callable[[], set[Any]], pause: float) -> T:
    """What the call returns or raises, unless one of the workers dies meanwhile.

    They are looked at after each `pause`, in seconds, in which nothing comes.
    """
    answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def answer() -> None:
        try:
            answers.put((True, call()))
        except BaseException as error:
            answers.put((False, error))

    threading.Thread(target=answer, daemon=True).start()
    while True:
        try:
            good, value = answers.get(timeout=pause)
        except queue.Empty:
            _check(workers())
            continue
        if good:
            return value
        if isinstance(value, RuntimeError | OSError | EOFError):
            _check(workers())
        if isinstance(value, RuntimeError) and _GRAIN_FOUND_IT in str(value):
            raise WorkerLostError(str(value).partition(".")[0]) from value
        raise value


def _check(workers: set[Any]) -> None:
    for worker in workers:
        if worker.exitcode not in (None, 0):
            how = f"status {worker.exitcode}"
            if worker.exitcode < 0:
                how = f"signal {-worker.exitcode} ({signal.Signals(-worker.exitcode).name})"
            raise WorkerLostError(f"a worker process ended with {how}")
