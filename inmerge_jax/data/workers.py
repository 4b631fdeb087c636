"""What a worker process owes the process that started it."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker


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
