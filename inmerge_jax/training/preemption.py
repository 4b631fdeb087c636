"""Stopping when the system asks (SIGTERM) or the user does (Ctrl-C), at the end of an update."""

import contextlib
import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self


class TrainingInterrupted(Exception):
    """Training has stopped because it was asked to; the message says what is kept, and where."""


class PreemptionHandler:
    """Whether SIGTERM or SIGINT has come since the `with` block began: call it to know.

    Inside the block the signals do nothing else, so whatever is under way ends whole, and further
    SIGTERMs change nothing; a second SIGINT raises KeyboardInterrupt, for those who cannot wait.
    Only the main thread can enter the block.

    Attributes:
      signal: the first one that came; None before.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """True from the first signal on."""
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
        hint = "; Ctrl-C again stops at once, and loses it" if number == signal.SIGINT else ""
        message = f"{self.signal.name}: stopping after this update, which is kept{hint}\n"
        # Not print, in the middle of which the signal may have come. That nobody reads it, as when
        # the terminal is gone, is no reason to lose the update.
        with contextlib.suppress(OSError):
            os.write(2, message.encode())
