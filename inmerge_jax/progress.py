"""Progress of a long task: a live line on a terminal, sparse plain lines elsewhere."""

import time
from types import TracebackType
from typing import Self

import rich.progress
from rich.console import Console

_LIVE_SECONDS, _PLAIN_SECONDS = 0.5, 60.0


class Progress:
    """Shows what is running, how much of it is done, and the time left.

    On a terminal this is one line that is redrawn in place, with messages above it. Elsewhere, as
    in a log file or a pipe, a plain line is printed at most once a minute and at every milestone.
    The time left is extrapolated from the first `advance` on, so that compilation and other
    start-up time does not enter it.
    """

    def __init__(
        self,
        total: int,
        console: Console | None = None,
        *,
        description: str = "",
        done: int = 0,
        unit: str = "img",
    ) -> None:
        """Creates the line; enter the object as a context to show it.

        Args:
          total: number of images, or other examples, to process.
          console: where to print.
          description: what is running.
          done: images of the total that were processed by an earlier start.
          unit: what the rate counts.
        """
        self._unit = unit
        self._console = console or Console(highlight=False)
        self._total, self._done = total, done
        self._description, self._details = description, ""
        self._shown = time.monotonic()
        self._overall: tuple[float, int] | None = None
        self._current: tuple[float, int] | None = None
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TextColumn("{task.fields[details]}"),
            console=self._console,
            auto_refresh=False,
            expand=True,
        )
        self._task = self._bar.add_task(description, total=max(total, 1), details="", visible=False)

    def __enter__(self) -> Self:
        """Starts the line."""
        if self.live:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the line."""
        if self.live:
            self._bar.stop()

    @property
    def live(self) -> bool:
        """Whether the line is redrawn in place."""
        return self._console.is_terminal

    @property
    def rate(self) -> float:
        """Images per second since the first `advance` after `describe`; 0 before the second one."""
        return self._rate(self._current)

    def say(self, message: str, style: str | None = None) -> None:
        """Prints a message that stays."""
        self._console.print(
            message, style=style, markup=False, highlight=False, soft_wrap=not self.live
        )

    def skip(self, images: int) -> None:
        """Removes images from the total that an earlier start has processed."""
        self._total -= images

    def describe(self, description: str, details: str | None = None) -> None:
        """Sets what is running and, unless None, the details of the live line; redraws it."""
        self._description, self._current = description, None
        if details is not None:
            self._details = details
        self._redraw(self._details)

    def advance(self, images: int) -> None:
        """Counts processed images."""
        self._done += images
        now = (time.monotonic(), self._done)
        self._overall, self._current = self._overall or now, self._current or now

    def due(self) -> bool:
        """Whether it is time for the next `update`."""
        interval = _LIVE_SECONDS if self.live else _PLAIN_SECONDS
        return time.monotonic() - self._shown > interval

    def update(self, details: str) -> None:
        """Redraws the live line with `details`; elsewhere prints a plain line, if one is due."""
        if self.live:
            self._details = self._with_speed(details)
            self._redraw(self._details)
        elif self.due():
            self.milestone(details)

    def milestone(self, details: str | None = None, result: str = "") -> None:
        """Redraws the live line; elsewhere prints a plain line.

        Args:
          details: text to the right of the bar; by default the number of images.
          result: text that only the plain line shows.
        """
        if details is None:
            details = self._counts()
        if self.live:
            self.update(details)
        else:
            self._shown = time.monotonic()
            line = f"{self._description}  {self._with_speed(details)}"
            self.say(f"{line}  {result}" if result else line)

    def finish(self) -> None:
        """Prints the final number of images and their rate, where no live line shows them."""
        if self.live:
            self.update(self._counts())
        else:
            self.say(f"{self._description}  {self._counts()}{self._speed()}")

    def _counts(self) -> str:
        return f"{self._done:,} of {self._total:,}"

    def _speed(self) -> str:
        return f"  {self.rate:,.0f} {self._unit}/s" if self.rate else ""

    def _with_speed(self, details: str) -> str:
        left, rate = max(self._total - self._done, 0), self._rate(self._overall)
        eta = _clock(left / rate) if rate else "-"
        return f"{details}{self._speed()}  ETA {eta}"

    def _rate(self, since: tuple[float, int] | None) -> float:
        if since is None:
            return 0.0
        started, count = since
        return (self._done - count) / max(time.monotonic() - started, 1e-9)

    def _redraw(self, details: str) -> None:
        if not self.live:
            return
        self._shown = time.monotonic()
        self._bar.update(
            self._task,
            description=self._description,
            completed=self._done,
            total=max(self._total, 1),
            details=details,
            visible=True,
        )
        self._bar.refresh()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
