"""The TPU compiler's counts as tables: one for docs/tpu.md, and narrow ones for a terminal."""

from collections.abc import Iterable, Iterator, Mapping

from rich.box import SIMPLE
from rich.table import Table

from experiments.benchmarks.tpu.limits import Row, chip_gib, comparisons
from inmerge_jax.reporting.tables import markdown_rows

HEADINGS = (
    "step",
    "memory of a chip",
    "GFLOP",
    "GB accessed",
    "collectives",
    "more FLOPs",
    "more bytes",
    "more peak memory",
)


def cells(rows: Mapping[str, Row]) -> Iterator[list[str]]:
    """One line for each row; the columns of what merging adds are empty for a plain step."""
    pairs = comparisons(rows)
    for name, row in rows.items():
        if not row["compiles"]:
            yield [name, f"does not compile: {row['reason']}", *[""] * (len(HEADINGS) - 2)]
            continue
        kinds = row["collectives"].values()
        count, size = (sum(kind[what] for kind in kinds) for what in ("count", "bytes"))
        added = ["", "", ""]
        if pair := pairs.get(name):
            added = [
                f"{pair.flops:+.2%}",
                f"{pair.bytes_accessed:+.2%}",
                f"{pair.peak / 1e6:+.2f} MB",
            ]
        yield [
            name,
            f"{row['memory']['total'] / 2**30:.2f} of {chip_gib(row)} GiB",
            f"{row['flops'] / 1e9:,.1f}",
            f"{row['bytes_moved'] / 1e9:.2f}",
            f"{count}, {size / 1e6:.2f} MB",
            *added,
        ]


def markdown(rows: Mapping[str, Row], expected: Iterable[str] = ()) -> str:
    """The table for docs/tpu.md, and the names of `expected` rows that are missing."""
    text = markdown_rows(HEADINGS, cells(rows)) + "\n"
    missing = [name for name in expected if name not in rows]
    return f"{text}\nNot compiled yet: {'; '.join(missing)}.\n" if missing else text


def tables(rows: Mapping[str, Row], chosen: Iterable[str]) -> Iterator[Table]:
    """A table for each network and topology that has a chosen row, with a column per step."""
    lines = {line[0]: line[1:] for line in cells(rows)}
    for base in dict.fromkeys(_base(name) for name in chosen):
        steps = {name: values for name, values in lines.items() if _base(name) == base}
        table = Table("", title=base, title_justify="left", box=SIMPLE)
        for name in steps:
            table.add_column(name.removeprefix(f"{base}, "), justify="right")
        for heading, values in zip(HEADINGS[1:], zip(*steps.values(), strict=True), strict=True):
            if any(values):
                table.add_row(heading, *values)
        yield table


def _base(name: str) -> str:
    """A row's name without its step."""
    return name.rpartition(", ")[0]
