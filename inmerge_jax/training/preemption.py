"""Preemption: SIGTERM and Ctrl-C stop a run at the end of an update."""

import contextlib
import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self


class TrainingInterrupted(Exception):
    """A run was interrupted; the message names the saved checkpoint."""


class PreemptionHandler:
    """Records SIGTERM and SIGINT while its context is open; call it to ask for them.

    The signals have no other effect, except that a second SIGINT raises KeyboardInterrupt. Only the
    main thread can open the context.

    Attributes:
      signal: the first signal received, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Whether a signal was received."""
        return self.signal is not None

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signal = signal.Signals(number)
        hint = " (Ctrl-C again: at once, without it)" if number == signal.SIGINT else ""
        message = f"{self.signal.name}: stopping after this update, with a checkpoint{hint}\n"
        # Not print, which the signal may have interrupted. A closed terminal must not lose the
        # update.
        with contextlib.suppress(OSError):
            os.write(2, message.encode())
