"""How far a build is: a moving line on a terminal, a plain line now and then elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_SECONDS = 30.0


class Meter:
    """Counts images towards a total, and shows how many, how fast and how long yet."""

    def __init__(self, what: str, total: int, done: int, console: Console) -> None:
        self._what, self._total, self._done, self._now = what, total, done, 0
        self._console = console
        self._started = self._shown = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total, completed=done, rate="")

    def __enter__(self) -> Self:
        self._bar.start()
        if self._done:
            self._say(f"{self._what}: {self._done:,} of {self._total:,} are there already")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()
        if error is None and not self._console.is_terminal:
            self._say(f"{self._what}: {self._figures()}")

    def advance(self, images: int) -> None:
        """Counts images that are done."""
        self._now += images
        self._bar.update(self._task, advance=images, rate=f"{self._rate():,.0f} img/s")

    def show(self) -> None:
        """Prints a plain line, if it is time and nobody sees the moving one."""
        if not self._console.is_terminal and time.monotonic() - self._shown > _PLAIN_SECONDS:
            self._shown = time.monotonic()
            self._say(f"{self._what}: {self._figures()}")

    def _say(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _figures(self) -> str:
        return f"{self._done + self._now:,} of {self._total:,}, {self._rate():,.0f} img/s"

    def _rate(self) -> float:
        return self._now / max(time.monotonic() - self._started, 1e-9)
