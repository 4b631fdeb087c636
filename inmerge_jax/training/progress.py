"""What a run shows while it runs: one line that stays in place, or a plain line now and then."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_REFRESH_SECONDS = 0.5
_PLAIN_SECONDS = 10.0


class ProgressLine:
    """Shows stage, epoch, loss, kernels merged, images per second and the time left of a run.

    On a terminal that is one line that stays in place, with messages printed above it; elsewhere it
    is a plain line when an epoch has ended and 10 s have passed since the last one.
    """

    def __init__(self, images: int, console: Console | None = None) -> None:
        """Prepares for a run that shows `images` images to the network in training, all in all."""
        self._console = console or Console(highlight=False)
        self._images = images
        self._seen = 0
        self._started = time.monotonic()
        self._shown = 0.0
        self._description = ""
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            auto_refresh=False,
            expand=True,
        )
        self._task = self._bar.add_task("", total=max(images, 1), figures="")

    def __enter__(self) -> Self:
        """Starts the line."""
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the line."""
        if self._console.is_terminal:
            self._bar.stop()

    def say(self, message: str, style: str | None = None) -> None:
        """Prints a message that stays."""
        plain = not self._console.is_terminal
        self._console.print(message, style=style, markup=False, soft_wrap=plain)

    def skip(self, images: int) -> None:
        """Takes images off the total that an earlier start of the run has already shown."""
        self._images -= images

    def start_epoch(self, stage: str, epoch: int, epochs: int) -> None:
        """Names what the next updates are about."""
        self._description = f"{stage} {epoch}/{epochs}"

    def due(self) -> bool:
        """Whether the terminal's line is old enough for the caller to fetch its figures."""
        return self._console.is_terminal and time.monotonic() - self._shown > _REFRESH_SECONDS

    def advance(self, images: int) -> None:
        """Counts images that the network has been shown."""
        self._seen += images

    def show(self, loss: float, merged: int | None, rate: float) -> None:
        """Rewrites the terminal's line: loss and kernels merged this epoch, images per second."""
        self._shown = time.monotonic()
        self._bar.update(
            self._task,
            description=self._description,
            completed=self._seen,
            total=max(self._images, 1),
            figures=self._figures(loss, merged, rate),
        )
        self._bar.refresh()

    def end_epoch(self, loss: float, merged: int | None, rate: float, validation: str) -> None:
        """The same at the end of an epoch, or a plain line, if it is time, with `validation`."""
        if self._console.is_terminal:
            self.show(loss, merged, rate)
        elif time.monotonic() - self._shown > _PLAIN_SECONDS:
            self._shown = time.monotonic()
            self.say(f"{self._description}  {self._figures(loss, merged, rate)}  {validation}")

    def _figures(self, loss: float, merged: int | None, rate: float) -> str:
        left = max(self._images - self._seen, 0)
        elapsed = time.monotonic() - self._started
        eta = _clock(elapsed / self._seen * left) if self._seen else "-"
        counts = "" if merged is None else f"  merged {merged:,}"
        return f"loss {loss:.4f}{counts}  {rate:,.0f} img/s  ETA {eta}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
