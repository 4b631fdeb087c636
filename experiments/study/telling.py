"""How a question and its answer are shown: in a terminal, in Markdown, and as figures."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from rich.console import Group
from rich.text import Text

from experiments.study.question import Question, differing, minus
from experiments.study.statistics import METRICS, detectable
from inmerge_jax.reporting import tables, wording
from inmerge_jax.reporting.plots import GUIDE, Plot, make_plot
from inmerge_jax.reporting.tables import Table

ONE_SEED = (
    "Where there is one seed, intervals cover the choice of test images alone, so there is no p "
    "and nothing is concluded: another training could come out otherwise."
)
AGAINST_FINETUNE = (
    "Test AUC and ACC minus finetune's [95% interval over seeds and test images]; p over both, "
    "Holm's correction over the table, AUC and ACC together; p, images: of permuting test images "
    "alone; detectable: the difference that one comparison distinguishes from zero about four "
    "times out of five"
)
STUCK = 0.99
NEEDED = 0.01
"""The difference in AUC or ACC that the study would like to see."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours."""


def lines(question: Question, stored: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What every page of results says, in a line each."""
    around = stored["trained"]
    what = "cells" if question.cells else "processes"
    cells = f"{stored['finished']} {what}"
    if stored["finished"] < stored["planned"]:
        cells += f" of {stored['planned']} that are planned: this answer is not complete"
    commits = around["commits"]
    code = f"commit {commits[0]}"
    if len(commits) > 1:
        code = f"the code of {len(commits)} commits"
        code += ", each named in its cell's file" if question.cells else ""
    run = (
        f"{stored['command']}; {' or '.join(map(str, around['cpus']))} CPU cores, jax "
        f"{' and '.join(around['jax'])}, from {around['first'][:10]} to {around['last'][:10]}, "
        f"{code}; {stored['seconds'] / 3600:.1f} h in {cells}"
    )
    return (
        ("What was asked", question.asked),
        ("What was run", run + "."),
        ("What came out", question.came_out(stored["analysis"])),
        ("How sure", question.sure(stored["analysis"])),
    )


def report(question: Question, stored: Mapping[str, Any]) -> tables.Report:
    """The answer in the form of a run's report."""
    told = tuple(f"{name}: {text}" for name, text in lines(question, stored))
    found = question.tables(stored["analysis"])
    return tables.Report(question.title, tuple(found), told + notes(question, stored))


def notes(question: Question, stored: Mapping[str, Any]) -> tuple[str, ...]:
    """What stands below the tables."""
    return tuple(note for note in question.notes(stored["analysis"]) if note)


def to_rich(question: Question, stored: Mapping[str, Any]) -> Group:
    """For the terminal."""
    return Group(tables.to_rich(report(question, stored)), Text())


def to_markdown(question: Question, stored: Mapping[str, Any], figures: str) -> str:
    """For docs/results.md; `figures` is the folder of its figures, relative to the page."""
    said = "\n".join(f"- **{name}:** {text}" for name, text in lines(question, stored))
    parts = [said]
    for table in question.tables(stored["analysis"]):
        parts.append(tables.markdown_table(table))
    parts.append("\n".join(f"- {note}" for note in notes(question, stored)))
    for index, plot in enumerate(question.figures(stored["analysis"])):
        parts.append(
            f"![{plot.label}]({figures}/{figure_name(question, index)})\n\n*{plot.caption}*"
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def figure_name(question: Question, index: int) -> str:
    """File of a question's figure."""
    return f"{question.name}-{index + 1}.svg"


def could_tell(groups: Mapping[str, Any], *pairs: str) -> str:
    """How small a difference could have been seen, and a warning where there is one seed."""
    few = any(
        len(row["auc"]["seeds"]) == 1
        for group in groups.values()
        for row in group["differences"].values()
    )
    alone = ONE_SEED if few else ""
    compared = {
        name: [
            group["differences"][pair]
            for pair in pairs
            if pair in group["differences"] and differing(group, pair) > 1
        ]
        for name, group in groups.items()
    }
    compared = {name: rows for name, rows in compared.items() if rows}
    if not compared:
        return f"Nothing differs in two seeds, so far. {alone}".strip()
    sizes, larger, missed = [], [], []
    for metric in METRICS:
        found = {name: [row[metric] for row in rows] for name, rows in compared.items()}
        all_rows = [row for rows in found.values() for row in rows]
        each = [detectable(row) for row in all_rows]
        sizes.append(f"{min(each):.3f} to {max(each):.3f} in {metric.upper()}")
        corrected = [detectable(r, r["comparisons"]) for r in all_rows if "comparisons" in r]
        if corrected:
            most = max(corrected)
            larger.append(
                f"up to {most:.3f} in {metric.upper()}"
                if most < 1
                else f"in some rows more than there can be in {metric.upper()}"
            )
        coarse = [name for name, rows in found.items() if max(map(detectable, rows)) > NEEDED]
        if coarse:
            where = "; ".join(coarse) if len(coarse) < len(found) else "every data set here"
            missed.append(f"in {metric.upper()} on {where}")
    text = (
        "The difference that a single comparison distinguishes from zero about four times out of "
        f"five is {' and '.join(sizes)}, by row"
    )
    if larger:
        text += f"; the first of the table's after Holm's correction needs {' and '.join(larger)}"
    if missed:
        text += f". So one of {NEEDED:g} may well have been missed {', and '.join(missed)}"
    return f"{text}. {alone}".strip()


def mean_sd(row: Mapping[str, Any]) -> str:
    """Mean and standard deviation over seeds."""
    spread = "" if row["sd"] is None else f" \u00b1 {row['sd']:.3f}"
    return f"{row['mean']:.3f}{spread}"


def difference(row: Mapping[str, Any], digits: int = 3) -> str:
    """A mean difference with its interval, which the mean over a single training does not have."""
    mean = wording.signed(row["mean"], digits)
    if "low" not in row:
        return mean
    return f"{mean} [{wording.signed(row['low'], digits)}, {wording.signed(row['high'], digits)}]"


def p_value(p: float) -> str:
    """Two digits, or what it is below."""
    return "< 0.01" if p < 0.01 else f"{p:.2f}"


def difference_table(title: str, groups: Mapping[str, Any], against: str) -> Table:
    """One row for each arm of each group: its difference from the arm `against`.

    Args:
      title: of the table.
      groups: what `question.compare_groups` gave.
      against: the arm that is subtracted.
    """
    rows, kinds = [], []
    for group, found in groups.items():
        if against not in found["arms"]:
            continue
        base = found["arms"][against]
        blank = ("",) * 6
        count = str(len(base["auc"]["seeds"]))
        words = f"{group} ({found['images']:,} images): {against} itself"
        rows.append((words, count, "", mean_sd(base["auc"]), mean_sd(base["acc"]), *blank))
        kinds.append("total")
        for arm, values in minus(found, against).items():
            share = found["merged"].get(arm)
            count, own = len(values["auc"]["seeds"]), differing(found, f"{arm} - {against}")
            sizes = (f"{detectable(values[m]):.3f}" if own > 1 else "" for m in METRICS)
            rows.append(
                (
                    arm,
                    str(count) if own in (0, count) else f"{count}, {count - own} same",
                    "" if share is None else f"{share:.2%}",
                    difference(values["auc"]),
                    difference(values["acc"]),
                    *sizes,
                    *_three(values["auc"], own),
                    _three(values["acc"], own)[1],
                )
            )
            kinds.append("difference")
    columns = (
        f"arm, minus {against}",
        "seeds",
        "merged",
        "test AUC",
        "test ACC",
        "detectable, AUC",
        "detectable, ACC",
        "p, AUC",
        "Holm",
        "p, images",
        "ACC, Holm",
    )
    return Table(title, columns, tuple(rows), tuple(kinds))


def _three(row: Mapping[str, Any], differ: int) -> tuple[str, str, str]:
    """P over seeds and images, Holm's correction of it, and that of permuting images.

    Args:
      row: of one metric.
      differ: seeds in which the two networks are not the same one.
    """
    if differ == 0:
        return ("same", "", "")
    if differ == 1:
        return ("one seed", "", p_value(row["p_images"]))
    corrected = row.get("p_holm")
    holm = "" if corrected is None else p_value(corrected)
    return p_value(row["p"]), holm, p_value(row["p_images"])


def one_answer(groups: Mapping[str, Any]) -> str:
    """Names the networks that give nearly every image the same answer; "" for none."""
    found = []
    for name, group in groups.items():
        stuck = {
            arm: sum(share >= STUCK for share in shares) for arm, shares in group["same"].items()
        }
        arms = [
            f"{arm} ({count} of {len(group['same'][arm])})" for arm, count in stuck.items() if count
        ]
        if arms:
            found.append(f"{name}: {', '.join(arms)}")
    if not found:
        return ""
    return (
        f"Networks that give at least {STUCK:.0%} of the test images the same answer, whose ACC is "
        f"that answer's share and tells nothing else (seeds): {'; '.join(found)}."
    )


def never_merged(groups: Mapping[str, Any], arms: Sequence[str]) -> str:
    """Names the arms that were to merge and did not, once; "" where there are none."""
    found = []
    for arm in arms:
        idle = [name for name, group in groups.items() if group["merged"].get(arm) == 0]
        if idle:
            found.append(f"{arm} on {'; '.join(idle)}")
    if not found:
        return ""
    return (
        f"NOTHING WAS MERGED by {'; by '.join(found)}: no pair that was compared passed the "
        "threshold, so that arm is finetune itself."
    )


def in_shortcuts(groups: Mapping[str, Any], arms: Sequence[str]) -> str:
    """Says how many merges were in 1x1 shortcuts; "" where no network has them."""
    found = []
    for arm in arms:
        rows = {name: group["shortcuts"].get(arm) for name, group in groups.items()}
        shares = [
            f"{name} {row['merged']:.0%} of {row['kernels']:.0%}"
            for name, row in rows.items()
            if row and row["kernels"]
        ]
        if shares:
            found.append(f"{arm}: {', '.join(shares)}")
    if not found:
        return ""
    return (
        "Share of all merges that was in 1x1 shortcuts, whose kernels have few weights, of the "
        f"kernels' share that they have. {'. '.join(found)}."
    )


def interval_plot(
    title: str,
    groups: Mapping[str, Sequence[tuple[str, Mapping[str, float]]]],
    unit: str,
    caption: str,
) -> Plot:
    """Differences as dots with intervals, one line for each, a colour for each group.

    A row that says that its networks are the "same" has a hollow dot.
    """
    count = sum(len(rows) for rows in groups.values())
    draw = partial(_intervals, title=title, groups=groups, unit=unit)
    return make_plot(draw, caption, title, (5.4, 1.3 + 0.26 * count + 0.2 * len(groups)))


def _intervals(axes: Axes, title: str, groups: Mapping[str, Any], unit: str) -> None:
    place, ticks, names = 0.0, [], []
    for colour, (group, rows) in zip(PALETTE, groups.items(), strict=False):
        for index, (name, row) in enumerate(rows):
            axes.plot([row["low"], row["high"]], [place, place], color=colour, lw=2)
            label = group if index == 0 else None
            face = "white" if row.get("same") else colour
            axes.plot([row["mean"]], [place], "o", color=colour, mfc=face, ms=5, label=label)
            ticks.append(place)
            names.append(name)
            place += 1
        place += 0.7
    axes.axvline(0, color=GUIDE, lw=1, ls=":")
    axes.set_yticks(ticks, names)
    axes.set_ylim(place - 0.5, -0.8)
    axes.grid(axis="y", visible=False)
    # Above the names too, which take half of the width.
    axes.figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(unit)
    if len(groups) > 1:
        axes.figure.legend(loc="outside lower center", ncols=1 if len(groups) < 3 else 2)


def sweep_plot(
    title: str,
    unit: str,
    series: Mapping[str, Sequence[tuple[Any, Any, float | None]]],
    caption: str,
    default: Any,
    labels: Mapping[Any, str],
) -> Plot:
    """A difference against a parameter, with the share of kernels merged on a second axis.

    Args:
      title: of the figure.
      unit: what the parameter is.
      series: group to (value, row with mean, low and high, share merged or None).
      caption: under the figure.
      default: value that is marked.
      labels: words for all values, which stand at equal distances in their order.
    """

    def draw(axes: Axes) -> None:
        at = list(labels).index
        second = axes.twinx()
        for colour, (group, points) in zip(PALETTE, series.items(), strict=False):
            xs = [at(x) for x, _, _ in points]
            means = [row["mean"] for _, row, _ in points]
            axes.plot(xs, means, "-o", color=colour, ms=4, lw=1.4, label=group)
            low, high = ([row[end] for _, row, _ in points] for end in ("low", "high"))
            axes.fill_between(xs, low, high, color=colour, alpha=0.15, lw=0)
            shares = [math.nan if share is None else 100 * share for _, _, share in points]
            second.plot(xs, shares, ":s", color=colour, ms=3, lw=1)
        axes.axhline(0, color=GUIDE, lw=1)
        axes.axvline(at(default), color=GUIDE, lw=1, ls="--")
        axes.set_xticks(range(len(labels)), list(labels.values()))
        axes.set_title(title)
        axes.set_xlabel(unit)
        axes.set_ylabel("test AUC minus finetune")
        second.set_ylabel("kernels merged at an update, % (dotted)")
        second.set_ylim(bottom=0)
        second.grid(visible=False)
        second.spines["right"].set_visible(True)
        axes.figure.legend(loc="outside lower center", ncols=1)

    return make_plot(draw, caption, title, (5.2, 3.8))


def heat_map(
    title: str,
    rows: Sequence[str],
    values: np.ndarray,
    unit: str,
    x: str,
    caption: str,
    highest: float,
) -> Plot:
    """A number from 0 to `highest` for each row and column as a colour; NaN is left white."""

    def draw(axes: Axes) -> None:
        image = axes.imshow(
            values, aspect="auto", cmap="cividis", interpolation="nearest", vmin=0, vmax=highest
        )
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.grid(visible=False)
        axes.figure.colorbar(image, ax=axes, label=unit)

    width = 4.6 + 0.06 * max(map(len, rows))
    return make_plot(draw, caption, title, (width, 1.4 + 0.2 * len(rows)))
