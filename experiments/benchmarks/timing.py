"""Interleaved timing of several implementations, and tables of the results."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.table import Table

from inmerge_jax.training.environment import environment

_REST = 0.02
"""Seconds of rest between two contenders, in which spinning threads go to sleep."""


def take_turns(
    contenders: Mapping[str, Callable[[], Any]], *, rounds: int, repeats: int = 1
) -> dict[str, list[float]]:
    """Times several contenders in interleaved rounds, after two warm-up runs of each.

    Every round runs all contenders, in alternating order, so that a drift of the machine's speed
    affects all of them.

    Args:
      contenders: name -> function that returns when its work is done.
      rounds: number of times per contender.
      repeats: number of runs averaged for one time, for runs of milliseconds. Above 1, each turn
        starts with an untimed run, which warms caches and threads.

    Returns:
      Name -> seconds per run, one value for each round.
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


def machine(around: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The machine and versions stored with a result: `environment` without the command.

    Args:
      around: a stored `environment`; None for that of this process.
    """
    kept = ("started", "python", "platform", "cpus", "processor", "packages", "devices", "git")
    around = environment() if around is None else around
    return {name: around[name] for name in kept}


def measured_on(machines: Iterable[Mapping[str, Any]]) -> str:
    """Describes the processors, dates and commits of stored results.

    Args:
      machines: the stored results of `machine`.
    """
    places: dict[str, list[Mapping[str, Any]]] = {}
    for around in machines:
        processor = around.get("processor") or "a processor that was not recorded"
        places.setdefault(f"{around['cpus']} cores of {processor}", []).append(around)
    found = []
    for place, some in places.items():
        commits = dict.fromkeys(
            f"{(around['git']['commit'] or 'unknown')[:10]}"
            f"{' with changes' if around['git']['dirty'] else ''}"
            for around in some
        )
        days = sorted({around["started"][:10] for around in some})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        found.append(f"{place} ({when}, commit {', '.join(commits)})")
    return "; ".join(found)


@dataclass(frozen=True)
class Target:
    """A lower or upper limit on a quantity."""

    sense: Literal["at least", "at most"]
    value: float

    def met(self, value: float) -> bool:
        """Whether `value` meets the target."""
        return value >= self.value if self.sense == "at least" else value <= self.value

    def __str__(self) -> str:
        return f"{self.sense} {self.value:g}"


@dataclass(frozen=True)
class Row:
    """One result, with the times that it was computed from.

    Attributes:
      name: name of the measurement.
      quantity: description of `value`.
      value: the result, a median over rounds.
      low: smallest value of a round.
      high: largest value of a round.
      target: limit on `value`; None for a row without one.
      seconds: contender -> times.
      note: description of the method.
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
        """The row for JSON; "met" is None without a target."""
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
    """Median over rounds of the ratio of two contenders' times."""
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
    """Median, minimum, maximum and all times."""
    return {
        "median": statistics.median(times),
        "min": min(times),
        "max": max(times),
        "all": list(times),
    }


def to_table(name: str, section: dict[str, Any]) -> Table:
    """A section of the benchmark's JSON file as a table for the terminal."""
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
