"""A run's tables and notes, for the terminal, for Markdown and for the HTML report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isnan, nan

import numpy as np
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from inmerge_jax.merging import MergeRule
from inmerge_jax.reporting.formatting import (
    MINUS,
    counts,
    describe_test,
    interval,
    mean_sd,
    plain,
    signed,
)
from inmerge_jax.reporting.published import (
    CHESTXRAY14,
    PublishedFindings,
    published_reference,
)
from inmerge_jax.reporting.ranking import Ranking, rank_findings
from inmerge_jax.reporting.runs import Run
from inmerge_jax.reporting.summary import (
    LayerMerges,
    Summary,
    pairs_above,
    single_image_classes,
    summarize,
)
from inmerge_jax.training.config import ARMS, DEFAULT_SKIP
from inmerge_jax.training.metrics import METRICS

RELEASED_RULE = {**vars(MergeRule()), "skip": DEFAULT_SKIP}
"""The merge rule of the released code, the reference of every run's rule."""


@dataclass(frozen=True)
class Table:
    """A table of formatted cells, the same for every output.

    Attributes:
      kinds: one per row: "arm", "difference", "seed", "published", "finding", "rule", "layer"
        or "total".
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """The tables of a run, the main result above them and the notes below."""

    headline: str
    tables: tuple[Table, ...]
    notes: tuple[str, ...]


def make_report(run: Run) -> Report:
    """The tables and notes of a run."""
    summary, ranking = summarize(run), rank_findings(run)
    tables = [comparison_table(run, summary)]
    if summary.differences:
        tables.append(difference_table(summary))
    tables.append(seed_table(run, summary))
    if ranking is not None:
        tables += ranking_tables(ranking)
    if run.results.get("rule"):
        tables.append(rule_table(run))
    if summary.layers:
        tables.append(layer_table(run, summary))
    notes = (*summary_notes(run, summary), *(ranking.notes if ranking is not None else ()))
    return Report(headline(run, summary), tuple(tables), notes)


def headline(run: Run, summary: Summary) -> str:
    """The main result: mean paired difference, interval, number of seeds, kernels merged."""
    title = run.dataset.get("title") or run.dataset["name"]
    pair = summary.differences.get(run.pairs[0])
    text = f"{title}: no paired difference, arms that were run: {', '.join(run.arms) or 'none'}"
    if pair is not None:
        main = run.metrics[0]
        text = (
            f"{title}: test {METRICS[main]} of {_pair_name(run.pairs[0])}, mean paired difference "
            f"{signed(pair[main].mean)}, 95% interval {interval(pair[main])}; "
            f"seeds: {pair[main].count}"
        )
    if any(summary.all_merged):
        return f"{text}; kernels merged by seed: {counts(summary.all_merged)}"
    return f"{text}. {merges_note(summary)}" if "inmerge" in summary.arms else text


def merges_note(summary: Summary) -> str:
    """Number of kernels merged, or that there were none."""
    if not summary.layers:
        return "NOTHING WAS MERGED: there was no layer to merge in."
    if not any(summary.all_merged):
        return "NOTHING WAS MERGED: no selected kernel had a partner above the threshold."
    text = f"Kernels merged in training, by seed: {counts(summary.merged)}."
    if summary.val_merged is not None:
        text += f" Kernels merged in validation, by seed: {counts(summary.val_merged)}."
    return text


def summary_notes(run: Run, summary: Summary) -> list[str]:
    """How the intervals were made, what was merged, and the source of the published row."""
    notes, sampling, main = [], summary.sampling, run.metrics[0]
    if summary.differences:
        notes.append("95% interval: t-interval over seeds of the differences paired by seed.")
        files = "predicted masks" if run.segmentation else "score files"
        margin = f"n/a, the run folder lacks test labels or {files}."
        if sampling is not None:
            tested = describe_test(len(run.test_labels), run.examples, run.test_patients)
            source = "" if run.segmentation else " (AUC: DeLong et al. 1988)"
            margin = (
                f"1.96 paired standard errors over the {tested}{source}; the standard error of one "
                f"arm's {METRICS[main]} is {plain(sampling.standard_error[main])}."
            )
            if few := single_image_classes(run):
                margin += (
                    f" AUC has none, since one test image alone has or lacks {', '.join(few)}."
                )
        notes.append(f"Margin: {margin}")
    if run.segmentation:
        notes.append(
            "Dice and HD95: mean over the test images, then over the classes but the background. "
            "HD95, the 95th percentile of the Hausdorff distance, is in pixels; lower is better."
        )
    if summary.undefined:
        why = "in no test mask" if run.segmentation else "with one label only in the test split"
        notes.append(f"Classes left out of the mean {METRICS[main]}, {why}: {summary.undefined}.")
    if "inmerge" in summary.arms:
        notes.append(merges_note(summary))
        units = run.results.get("rule", {}).get("units")
        if units or run.segmentation or run.modality != "image":
            merged = ", ".join(units or ["kernels"])
            notes.append(
                f"Units that merge: {merged}. This extends the paper, which merges convolution "
                "kernels of image classifiers."
            )
    if summary.shortcut_share > 0.5:
        notes.append(
            f"Share of the merges in 1x1 shortcut convolutions: {summary.shortcut_share:.0%}."
        )
    published = published_reference(run.dataset, run.results.get("model", {}))
    if published is not None:
        notes.append(f"Published row: {published.source}.")
    return notes


def comparison_table(run: Run, summary: Summary) -> Table:
    """The test metrics of the arms, and the published result."""
    rows = []
    for arm in ARMS:
        cells = ["not run"] * len(run.metrics)
        if arm in summary.arms:
            cells = [mean_sd(summary.arms[arm][metric]) for metric in run.metrics]
        rows.append((arm, *cells))
    kinds = ["arm"] * len(rows)
    known = published_reference(run.dataset, run.results.get("model", {}))
    if known is not None:
        rows.append((known.label, plain(known.auc), plain(known.acc)))
        kinds.append("published")
    title = f"{run.dataset.get('title') or run.dataset['name']}: mean \u00b1 sd over seeds"
    columns = ("arm", *(f"test {METRICS[metric]}" for metric in run.metrics))
    return Table(title, columns, tuple(rows), tuple(kinds))


def difference_table(summary: Summary) -> Table:
    """Paired differences with the interval over seeds and the margin over test images."""
    margins = summary.sampling.margin if summary.sampling is not None else {}
    rows = tuple(
        (
            f"{_pair_name(pair)}, {METRICS[metric]}",
            signed(values.mean),
            interval(values),
            plain(margins.get(pair, {}).get(metric, nan)),
        )
        for pair, by_metric in summary.differences.items()
        for metric, values in by_metric.items()
    )
    columns = ("paired difference", "mean", "95% interval", "margin (\u00b1)")
    return Table("Paired differences", columns, rows, ("difference",) * len(rows))


def seed_table(run: Run, summary: Summary) -> Table:
    """The test metrics of every seed, and the differences between the arms of the main pair."""
    shown = [(arm, found, plain) for arm, found in summary.arms.items()]
    pair = summary.differences.get(run.pairs[0])
    if pair is not None:
        shown.append((_pair_name(run.pairs[0]), pair, signed))
    rows = tuple(
        (
            str(seed),
            *(
                " / ".join(show(found[metric].values.get(seed, nan)) for metric in run.metrics)
                for _, found, show in shown
            ),
        )
        for seed in run.seeds
    )
    columns = ("seed", *(name for name, *_ in shown))
    names = " / ".join(METRICS[metric] for metric in run.metrics)
    return Table(f"Test {names} by seed", columns, rows, ("seed",) * len(rows))


def _pair_name(pair: tuple[str, str]) -> str:
    return f" {MINUS} ".join(pair)


def ranking_tables(ranking: Ranking) -> list[Table]:
    """AUROC by finding: the arms and comparable published rows, then the other published rows."""

    def published(rows: Sequence[PublishedFindings], index: int) -> Iterable[str]:
        return (plain(row.values[index], 4) for row in rows)

    same, arms = ranking.comparable, ranking.arms
    rows: list[tuple[str, ...]] = []
    for index, name in enumerate(ranking.names):
        cells = (
            f"{plain(x.auc)} [{plain(x.low)}, {plain(x.high)}] ({x.rank})" if x.rank else "n/a"
            for x in (cells[index] for cells in arms.values())
        )
        rows.append((name, *cells, *published(same, index)))
    firsts = (str(sum(x.rank == 1 for x in cells)) for cells in arms.values())
    rows.append((f"first of {len(ranking.names)}", *firsts, *[""] * len(same)))
    kinds = ("finding",) * len(ranking.names)
    title = "AUROC by finding: mean over seeds [bootstrap 95% interval] (rank)"
    columns = ("finding", *arms, *(row.label for row in same))
    tables = [Table(title, columns, tuple(rows), (*kinds, "total"))]
    if others := [row for row in CHESTXRAY14 if row not in same]:
        columns = ("finding", *(f"{row.label} ({row.split})" for row in others))
        rows = [(name, *published(others, index)) for index, name in enumerate(ranking.names)]
        tables.append(Table("Published AUROC on other test images", columns, tuple(rows), kinds))
    return tables


def rule_table(run: Run) -> Table:
    """The merge rules of the run and of the released code, side by side."""
    rule = dict(run.results["rule"])
    if "quantile" in rule:
        rule["threshold"] = f"quantile {rule.pop('quantile')} of each layer"
    names = [name for name in dict.fromkeys((*RELEASED_RULE, *rule)) if name in rule]
    if not isinstance(rule.get("units", ""), str):
        rule["units"] = ", ".join(rule["units"])
    rows = tuple((n, str(rule[n]), str(RELEASED_RULE.get(n, "none"))) for n in names)
    columns = ("setting", "this run", "released code")
    return Table("Merge rule", columns, rows, ("rule",) * len(rows))


def _percentage(value: float) -> str:
    return "n/a" if isnan(value) else f"{value:.2%}"


def layer_table(run: Run, summary: Summary) -> Table:
    """Kernels merged per layer over the merging stage, mean over seeds."""
    seeds, above = len(summary.merged), pairs_above(run)
    columns = ["layer, by depth", "kernels", "selected", "merged", "merged of selected"]
    if above:
        columns.append(f"pairs above {run.threshold} before")

    def row(name: str, layers: Sequence[LayerMerges], *more: str) -> tuple[str, ...]:
        kernels, selected, merged = (
            sum(np.sum(getattr(layer, field)) for layer in layers)
            for field in ("kernels", "selected", "merged")
        )
        # Rounded to integers, the rows would not add up to the total.
        means = (f"{x / seeds:,.{int(x % seeds > 0)}f}" for x in (selected, merged))
        return name, f"{kernels:,}", *means, f"{merged / max(selected, 1):.2%}", *more

    rows = [
        row(x.name.removesuffix("/kernel"), [x], *([_percentage(above[x.name])] if above else ()))
        for x in summary.layers
    ]
    rows.append(row("all layers", summary.layers, *([""] if above else ())))
    kinds = ("layer",) * len(summary.layers) + ("total",)
    title = "Kernels merged per layer in training, mean over seeds"
    return Table(title, tuple(columns), tuple(rows), kinds)


def to_markdown(report: Report) -> str:
    """Markdown: headline, tables, notes."""
    parts = [report.headline, *map(markdown_table, report.tables)]
    parts.append("\n".join(f"- {note}" for note in report.notes))
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table in Markdown, with its title above."""
    return f"{table.title}:\n\n{markdown_rows(table.columns, table.rows)}"


def markdown_rows(
    columns: Sequence[str], rows: Iterable[Sequence[str]], align: str | None = None
) -> str:
    """A table in Markdown.

    Args:
      columns: headings.
      rows: cells, as many per row as there are headings. A "|" in a cell is escaped.
      align: "l" or "r" for each column. None: the first to the left, the others to the right.
    """
    align = align or "l" + "r" * (len(columns) - 1)
    rule = ["---:" if one == "r" else "---" for one in align]
    cells = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *cells))


def to_rich(report: Report) -> Group:
    """The report for a terminal."""
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
