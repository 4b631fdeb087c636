"""Timing several ways of doing one thing by turns, and telling what came out."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.table import Table

from inmerge_jax.training.environment import environment

_REST = 0.02
"""Seconds between two contenders, so that the threads of the last one have stopped spinning."""


def take_turns(
    contenders: Mapping[str, Callable[[], Any]], *, rounds: int, repeats: int = 1
) -> dict[str, list[float]]:
    """Seconds that each contender takes, by round; each runs twice beforehand, untimed.

    Every round runs all of them, in turn forwards and backwards, so that a machine that slows down
    or speeds up favours none.

    Args:
      contenders: name to a function that returns when its work is done.
      rounds: times per contender.
      repeats: runs whose mean makes one time, for what takes milliseconds. Above 1, each turn
        begins with one more, untimed run, which finds the caches and threads as it left them.
    """
    for run in contenders.values():
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        for name in order:
            time.sleep(_REST)
            if repeats > 1:
                contenders[name]()
            start = time.perf_counter()
            for _ in range(repeats):
                contenders[name]()
            seconds[name].append((time.perf_counter() - start) / repeats)
        order.reverse()
    return seconds


def machine() -> dict[str, Any]:
    """What was measured on, for results that are stored: `environment` without the command."""
    kept = ("started", "python", "platform", "cpus", "processor", "packages", "devices", "git")
    around = environment()
    return {name: around[name] for name in kept}


def measured_on(machines: Iterable[Mapping[str, Any]]) -> str:
    """The processors, dates and commits of stored results, for people.

    Args:
      machines: what `machine` gave when each was measured.
    """
    places: dict[str, list[Mapping[str, Any]]] = {}
    for around in machines:
        processor = around.get("processor") or "a processor that was not recorded"
        places.setdefault(f"{around['cpus']} cores of {processor}", []).append(around)
    told = []
    for place, some in places.items():
        commits = dict.fromkeys(
            f"{(around['git']['commit'] or 'unknown')[:10]}"
            f"{' with changes' if around['git']['dirty'] else ''}"
            for around in some
        )
        days = sorted({around["started"][:10] for around in some})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        told.append(f"{place} ({when}, commit {', '.join(commits)})")
    return "; ".join(told)


@dataclass(frozen=True)
class Target:
    """What a quantity is to be."""

    sense: Literal["at least", "at most"]
    value: float

    def met(self, value: float) -> bool:
        """Whether `value` is as it is to be."""
        return value >= self.value if self.sense == "at least" else value <= self.value

    def __str__(self) -> str:
        return f"{self.sense} {self.value:g}"


@dataclass(frozen=True)
class Row:
    """One result: a quantity, the times that it was computed from, and its target if it has one.

    Attributes:
      name: what was done.
      quantity: what `value` is, in words.
      value: the result.
      low: smallest of the paired values.
      high: largest of them.
      target: what `value` is to be, or None for a row that is there for information.
      seconds: contender to its times.
      note: how it was measured, for people.
    """

    name: str
    quantity: str
    value: float
    low: float
    high: float
    target: Target | None = None
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: times with their median, minimum and maximum; `met` is None without target."""
        target = self.target
        return {
            "name": self.name,
            "quantity": self.quantity,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "target": None if target is None else str(target),
            "met": None if target is None else target.met(self.value),
            "seconds": {name: summary(times) for name, times in self.seconds.items()},
            "note": self.note,
        }


def ratio_row(
    name: str,
    seconds: Mapping[str, Sequence[float]],
    above: str,
    below: str,
    target: Target | None = None,
    note: str = "",
) -> Row:
    """The median over the rounds of the ratio of two contenders' times in the same round."""
    ratios = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
    return Row(
        name=name,
        quantity=f"{above} / {below}",
        value=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        target=target,
        seconds={above: seconds[above], below: seconds[below]},
        note=note,
    )


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median, minimum and maximum of times, and all of them in order."""
    return {
        "median": statistics.median(times),
        "min": min(times),
        "max": max(times),
        "all": list(times),
    }


def to_table(name: str, section: dict[str, Any]) -> Table:
    """A section as the benchmark's JSON file holds it, for the terminal."""
    title = f"{name}, measured in {section['seconds']:.0f} s"
    table = Table(title=title, title_justify="left", show_lines=True)
    for heading in ("", "median times", "quantity", "value", "range", "target", "met"):
        table.add_column(heading)
    for row in section["rows"]:
        medians = [1000 * times["median"] for times in row["seconds"].values()]
        table.add_row(
            row["name"],
            " / ".join(f"{median:.4g}" for median in medians) + " ms",
            row["quantity"],
            f"{row['value']:.3f}",
            f"{row['low']:.3f} - {row['high']:.3f}",
            row["target"] or "",
            {True: "[green]yes", False: "[bold red]no", None: ""}[row["met"]],
        )
    return table
