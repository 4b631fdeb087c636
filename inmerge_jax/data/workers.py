"""What a worker process owes the process that started it."""

import multiprocessing
import os
import signal
import threading


def end_with_parent() -> None:
    """In a worker process: ends it as soon as the process that started it is gone."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave_signals_to_parent() -> None:
    """In a worker process: ignores SIGTERM and SIGINT, which terminals and schedulers send to all.

    The parent stops when it is ready to, and ends its workers then.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
