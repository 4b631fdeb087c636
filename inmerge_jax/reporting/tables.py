"""A run's tables, for the terminal, for Markdown and for the report.

`python -m inmerge_jax.reporting.tables RUN_FOLDER` prints them as Markdown.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import nan
from pathlib import Path

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from inmerge_jax.errors import UsageError
from inmerge_jax.reporting import wording
from inmerge_jax.reporting.findings import Findings, rank_findings
from inmerge_jax.reporting.runs import ARMS, Run, read_run
from inmerge_jax.reporting.summary import METRICS, Spread, Summary, summarize


@dataclass(frozen=True)
class Table:
    """A table of finished cells, the same for every output.

    Attributes:
      kinds: one per row: "arm", "difference", "published", "layer", "finding" or "total".
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """The tables of a run, and the sentences that belong to them."""

    headline: str
    tables: tuple[Table, ...]
    notes: tuple[str, ...]


def make_report(run: Run, summary: Summary | None = None) -> Report:
    """The tables and sentences of a run."""
    summary = summary or summarize(run)
    tables = [comparison_table(run, summary), seed_table(run, summary)]
    findings = rank_findings(run)
    if findings is not None:
        tables.append(findings_table(run, findings))
    if summary.layers:
        tables.append(layer_table(summary))
    notes = (
        wording.interval_note(summary),
        wording.resolution_note(summary),
        wording.undefined_note(summary),
        wording.merges_note(summary),
        wording.rule_note(run),
        f"Published row: {summary.published.source}." if summary.published else "",
        *(wording.findings_notes(run, findings) if findings is not None else ()),
    )
    return Report(wording.headline(run, summary), tuple(tables), tuple(filter(None, notes)))


def comparison_table(run: Run, summary: Summary) -> Table:
    """Test AUC and ACC of the arms, their paired differences, and the published number."""
    rows, kinds = [], []
    for arm in ARMS:
        cells = ("not run", "not run")
        if arm in summary.arms:
            cells = tuple(wording.mean_sd(summary.arms[arm][metric]) for metric in METRICS)
        rows.append((arm, *cells))
        kinds.append("arm")
    for pair, values in summary.differences.items():
        rows.append((_pair_name(pair), *(wording.difference(values[m]) for m in METRICS)))
        kinds.append("difference")
    if summary.published is not None:
        known = summary.published
        rows.append((known.label, wording.plain(known.auc), wording.plain(known.acc)))
        kinds.append("published")
    title = (
        f"{run.dataset.get('title') or run.dataset['name']}: mean \u00b1 sd over seeds; "
        "differences with 95% intervals"
    )
    return Table(title, ("arm", "test AUC", "test ACC"), tuple(rows), tuple(kinds))


def seed_table(run: Run, summary: Summary) -> Table:
    """Every seed's test AUC and ACC, and their paired differences."""

    def cells(values: dict[str, Spread], show: Callable[[float], str]) -> list[str]:
        by_seed = [dict(zip(values[m].seeds, values[m].values, strict=True)) for m in METRICS]
        return [" / ".join(show(found.get(seed, nan)) for found in by_seed) for seed in run.seeds]

    rows = [(arm, *cells(values, wording.plain)) for arm, values in summary.arms.items()]
    kinds = ["arm"] * len(rows)
    for pair, values in summary.differences.items():
        rows.append((_pair_name(pair), *cells(values, wording.signed)))
        kinds.append("difference")
    columns = ("arm", *(f"seed {seed}" for seed in run.seeds))
    return Table("Each seed's test AUC / ACC", columns, tuple(rows), tuple(kinds))


def findings_table(run: Run, findings: Findings) -> Table:
    """The 14 AUROCs and their mean, each arm with its interval and rank, beside published ones."""
    rows = []
    for index, name in enumerate(findings.names):
        cells = (wording.ranked(findings.arms[arm][index]) for arm in findings.arms)
        published = (wording.plain(row.values[index], 4) for row in findings.published)
        rows.append((name, *cells, *published))
    firsts = [sum(cell.rank == 1 for cell in cells) for cells in findings.arms.values()]
    blank = ("" for _ in findings.published)
    total = (f"first of {len(findings.names)}", *(str(count) for count in firsts), *blank)
    columns = (
        "test AUROC",
        *findings.arms,
        *(f"{row.label} ({row.split})" for row in findings.published),
    )
    return Table(
        f"{run.dataset['name']}, {len(findings.names)} ranks: mean over seeds [bootstrap 95% "
        "interval] (rank)",
        columns,
        (*rows, total),
        (*("finding" for _ in rows), "total"),
    )


def _pair_name(pair: tuple[str, str]) -> str:
    return f" {wording.MINUS} ".join(pair)


def layer_table(summary: Summary) -> Table:
    """Kernels merged per layer over the whole stage, mean over seeds."""
    seeds = len(summary.layers[0].merged)
    rows = [
        (
            layer.name.removesuffix("/kernel"),
            f"{layer.kernels:,}",
            f"{sum(layer.selected) / seeds:,.0f}",
            f"{sum(layer.merged) / seeds:,.0f}",
            f"{layer.share:.2%}",
        )
        for layer in summary.layers
    ]
    chances, merged = (
        sum(sum(getattr(layer, name)) for layer in summary.layers)
        for name in ("selected", "merged")
    )
    total = (
        "all layers",
        f"{sum(layer.kernels for layer in summary.layers):,}",
        f"{chances / seeds:,.0f}",
        f"{merged / seeds:,.0f}",
        f"{merged / max(chances, 1):.2%}",
    )
    return Table(
        "Kernels merged per layer (mean over seeds of the whole stage)",
        ("layer, by depth", "kernels", "selected", "merged", "merged of selected"),
        (*rows, total),
        (*("layer" for _ in rows), "total"),
    )


def to_markdown(report: Report) -> str:
    """Markdown for a README: headline, tables, notes."""
    parts = [report.headline, *map(markdown_table, report.tables)]
    parts.append("\n".join(f"- {note}" for note in report.notes))
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """One table, with its title above."""
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    lines = [table.columns, rule, *(map(_escape, row) for row in table.rows)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table.title}:\n\n{text}"


def to_rich(report: Report) -> Group:
    """The same for a terminal."""
    parts: list[RichTable | Text] = []
    for table in report.tables:
        drawn = RichTable(title=Text(table.title), title_justify="left", title_style="bold")
        for index, column in enumerate(table.columns):
            drawn.add_column(Text(column), justify="left" if index == 0 else "right")
        for index, (row, kind) in enumerate(zip(table.rows, table.kinds, strict=True)):
            last = index + 1 == len(table.rows) or table.kinds[index + 1] != kind
            style = "italic" if kind == "published" else None
            drawn.add_row(*map(Text, row), style=style, end_section=last)
        parts += [drawn, Text()]
    parts += [Text(note) for note in report.notes]
    return Group(*parts, Text(), Text(report.headline, style="bold"))


def markdown(folder: Path | str) -> str:
    """The Markdown of a run folder; see `to_markdown`."""
    return to_markdown(make_report(read_run(folder)))


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Prints a run folder's tables as Markdown; status 2 for bad input."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m inmerge_jax.reporting.tables RUN_FOLDER", file=sys.stderr)
        return 2
    try:
        print(markdown(arguments[0]), end="")
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
