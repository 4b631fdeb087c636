"""Writes the tables and figures of README.md and docs anew, from experiments/results."""

import functools
import json
import re
import sys
from pathlib import Path

from experiments import trainer_runs
from experiments.benchmarks.accelerator import page as accelerator
from experiments.benchmarks.timing import measured_on
from experiments.benchmarks.tpu import check as tpu_check
from experiments.benchmarks.tpu import forms as tpu_forms
from experiments.benchmarks.tpu import table as tpu_table
from experiments.reliability import fault_injection
from experiments.study import pages, presets, reproduce
from experiments.study.all_questions import QUESTIONS
from inmerge_jax.cli import input_speed
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
FIGURES = ROOT / "docs" / pages.FIGURES


def benchmark_table(path: Path, earlier: Path) -> str:
    """The benchmark's rows as Markdown; those without a target are there for information.

    Args:
      path: what the benchmark stored.
      earlier: what it stored on another machine, whose values stand in the last two columns.
    """
    stored, before = (json.loads(one.read_bytes()) for one in (path, earlier))
    old = {(row["name"], row["quantity"]): row for part in before.values() for row in part["rows"]}
    met = {True: "yes", False: "**no**", None: ""}
    lines = [
        "| measured | median times | quantity | value | target | met | earlier | met |",
        "| --- " * 8 + "|",
    ]
    for section in stored.values():
        for row in section["rows"]:
            medians = " / ".join(_time(times["median"]) for times in row["seconds"].values())
            same = old.get((row["name"], row["quantity"]))
            beside = "|  |  |" if same is None else f"| {same['value']:.3g} | {met[same['met']]} |"
            lines.append(
                f"| {row['name']} | {medians} | {row['quantity']} | {row['value']:.3g} "
                f"| {row['target'] or ''} | {met[row['met']]} {beside}"
            )
    where = [
        f"{what}: {measured_on(part['environment'] for part in sections.values())}."
        for what, sections in (("Measured on", stored), ("Earlier", before))
    ]
    return "\n".join(lines) + "\n\n" + " ".join(where) + "\n"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def chestxray14_input(path: Path) -> str:
    """Images per second of ChestX-ray14's input, as Markdown."""
    rows = [input_speed.COLUMNS, *input_speed.rows(json.loads(path.read_bytes()))]
    rows.insert(1, ("---", *["---:"] * (len(rows[0]) - 1)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


SOURCES = {
    "trainer_runs": lambda: trainer_runs.markdown(RESULTS),
    "benchmark": lambda: benchmark_table(
        RESULTS / "benchmark.json", RESULTS / "benchmark_earlier.json"
    ),
    "fidelity": lambda: presets.table(json.loads((RESULTS / "fidelity.json").read_bytes())),
    "kills": lambda: fault_injection.markdown(json.loads((RESULTS / "kills.json").read_bytes())),
    "chestxray14_input": lambda: chestxray14_input(RESULTS / "chestxray14_input.json"),
    "tpu_check": lambda: tpu_table.markdown(
        tpu_check.read(RESULTS / "tpu_check.json"), [case.name for case in tpu_check.CASES]
    ),
    "tpu_forms": tpu_forms.markdown,
    "accelerator": accelerator.markdown,
    "main": pages.main_table,
    "total": pages.total,
    "again": lambda: reproduce.markdown(json.loads((RESULTS / "again.json").read_bytes())),
    "cells": pages.cells,
    **{f"study {one.name}": functools.partial(pages.section, one) for one in QUESTIONS},
}
PAGES = {
    "README.md": ("main",),
    "docs/trainer.md": ("trainer_runs",),
    "docs/interruptions.md": ("kills",),
    "docs/chestxray14.md": ("chestxray14_input",),
    "docs/tpu.md": ("tpu_check", "tpu_forms"),
    accelerator.PAGE: ("accelerator", "benchmark"),
    "docs/results.md": ("total", *(f"study {one.name}" for one in QUESTIONS)),
    "docs/cells.md": ("again", "cells"),
}


def render(text: str, page: str = "README.md") -> str:
    """`text` with what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` made anew.

    Raises:
      UsageError: `text` has no such place for one of the tables.
    """
    for name in PAGES[page]:
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        if begin not in text or end not in text:
            raise UsageError(f"{page} has no lines {begin.strip()} and {end}; add them")
        place = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        before, after = place.split(text)
        text = f"{before}{begin}\n{SOURCES[name]()}\n{end}{after}"
    return text


def write_figures() -> None:
    """Writes the figures, and deletes those that nothing shows any more."""
    wanted = pages.figures()
    for path in FIGURES.glob("*.svg"):
        if path.name not in wanted:
            path.unlink()
    for name, svg in wanted.items():
        write_text(FIGURES / name, svg)


def main() -> int:
    """Rewrites the pages; returns 0, or 2 on bad input."""
    try:
        for page in PAGES:
            path = ROOT / page
            write_text(path, render(path.read_text(), page))
        write_figures()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
