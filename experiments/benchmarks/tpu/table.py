"""The TPU compiler's counts as tables: one for docs/tpu.md, and narrow ones for a terminal."""

from collections.abc import Iterable, Iterator, Mapping

from rich.box import SIMPLE
from rich.table import Table

from experiments.benchmarks.tpu.limits import (
    BYTES,
    CHIP_GIB,
    FLOPS,
    LAYERS,
    Row,
    amount,
    chip_of,
    comparisons,
)

HEADINGS = (
    "step",
    "chips",
    "compiles",
    "memory of a chip",
    "GFLOP",
    "GB moved",
    "of main memory",
    "collectives",
    "their MB",
    "more FLOPs",
    "more bytes",
    "of main memory, more",
    "more temporary",
    "more at its fullest",
    "of a layer",
)


def cells(rows: Mapping[str, Row]) -> Iterator[list[str]]:
    """One line of the table for each row; what merging adds is empty for a plain step."""
    pairs = {id(pair.row): pair for pair in comparisons(rows)}
    for name, row in rows.items():
        if not row["compiles"]:
            yield [name, str(row["chips"]), f"no: {row['reason']}", *[""] * (len(HEADINGS) - 3)]
            continue
        gib = CHIP_GIB[chip_of(row)]
        kinds = row["collectives"].values()
        line = [
            name,
            str(row["chips"]),
            "yes",
            f"{row['memory']['total'] / 2**30:.2f} of {gib} GiB",
            f"{row['flops'] / 1e9:,.1f}",
            f"{row['bytes_moved'] / 1e9:.2f}",
            f"{row['main_memory_bytes'] / 1e9:.2f}",
            f"{sum(kind['count'] for kind in kinds)}",
            f"{sum(kind['bytes'] for kind in kinds) / 1e6:.2f}",
        ]
        pair = pairs.get(id(row))
        if pair is None:
            yield [*line, *[""] * 6]
            continue
        layer = row["largest_merged_layer_bytes"]
        passes = (row["main_memory_bytes"] - pair.plain["main_memory_bytes"]) / row["merged_bytes"]
        yield [
            *line,
            f"{100 * pair.flops:+.2f} %{'*' if pair.flops > FLOPS else ''}",
            f"{100 * pair.bytes_moved:+.2f} %{'*' if pair.bytes_moved > BYTES else ''}",
            f"{100 * pair.main_memory:+.2f} %{'*' if pair.main_memory > BYTES else ''}, "
            f"{passes:.1f} passes",
            f"{pair.temporary / 1e6:+.2f} MB{'*' if pair.temporary > LAYERS * layer else ''}",
            f"{pair.peak / 1e6:+.2f} MB{'*' if pair.peak > LAYERS * layer else ''}",
            f"{layer / 1e6:.2f} MB",
        ]


def markdown(rows: Mapping[str, Row], expected: Iterable[str] = ()) -> str:
    """The table for docs/tpu.md, with what the stars stand for and which `expected` rows lack."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "| --- |" + " ---: |" * (len(HEADINGS) - 1)]
    lines += ["| " + " | ".join(line) + " |" for line in cells(rows)]
    why = dict.fromkeys(
        f"{known[0]}, {pair.row['step']}, {quantity}: {known[1].why}; held to "
        f"{amount(quantity, known[1].limit)}."
        for pair in comparisons(rows)
        for quantity, more, limit in pair.added()
        if more > limit and (known := pair.known(quantity)) is not None
    )
    if why:
        lines += ["", "`*` above the usual limit:", "", *(f"- {text}" for text in why)]
    missing = [name for name in expected if name not in rows]
    if missing:
        lines += ["", f"Not compiled yet: {'; '.join(missing)}."]
    return "\n".join(lines) + "\n"


def tables(rows: Mapping[str, Row], chosen: Iterable[str]) -> Iterator[Table]:
    """A table for each network and topology that has a chosen row, its steps side by side."""
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
