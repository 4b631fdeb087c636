"""Tables in Markdown and figures of the pages of results."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from inmerge_jax.reporting.formatting import signed
from inmerge_jax.reporting.plots import GUIDE, Plot, make_plot
from inmerge_jax.reporting.tables import markdown_rows

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Okabe and Ito's colours."""


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all but the first column are aligned to the right."""
    return markdown_rows(columns, rows, "l" + "r" * (len(columns) - 1)) + "\n"


def difference(row: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A mean difference with its 95 % interval; blank without one."""
    if row is None:
        return ""
    if row.get("changed") == 0:
        return "nothing merged"
    mean = signed(row["mean"], digits)
    if "low" not in row:
        return mean
    return f"{mean} [{signed(row['low'], digits)}, {signed(row['high'], digits)}]"


def p_value(p: float) -> str:
    """P with two decimals."""
    return "< 0.01" if p < 0.005 else f"{p:.2f}"


def share(value: float | None, digits: int = 1) -> str:
    """A share as a percentage; blank for None."""
    return "" if value is None else f"{100 * value:.{digits}f} %"


def dot_plot(
    title: str,
    unit: str,
    series: Mapping[str, Mapping[str, Mapping[str, Any]]],
    *,
    zero: float = 0.0,
    margin: float | None = None,
) -> Plot:
    """Means with intervals: a row per label, a colour per series; hollow where nothing changed.

    Args:
      title: of the figure.
      unit: of the horizontal axis.
      series: name to label to a row with "mean", and "low" and "high" if known.
      zero: where the reference line is.
      margin: largest difference that counts as no effect, shaded; None for none.
    """
    labels = list(dict.fromkeys(label for rows in series.values() for label in rows))

    def draw(axes: Axes) -> None:
        for index, (name, rows) in enumerate(series.items()):
            colour, shift = PALETTE[index], 0.22 * (index - (len(series) - 1) / 2)
            for number, (label, row) in enumerate(rows.items()):
                y = labels.index(label) + shift
                ends = [row.get("low", row["mean"]), row.get("high", row["mean"])]
                axes.plot(ends, [y, y], color=colour, lw=2)
                face = "white" if row.get("changed") == 0 else colour
                mark = name if number == 0 else None
                axes.plot([row["mean"]], [y], "o", color=colour, mfc=face, ms=5, label=mark)
        axes.axvline(zero, color=GUIDE, lw=1, ls=":")
        if margin is not None:
            axes.axvspan(zero - margin, zero + margin, color=GUIDE, alpha=0.15, lw=0)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(max(len(labels), 1) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(unit)
        axes.figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        if len(series) > 1:
            axes.figure.legend(loc="outside lower center", ncols=1 if len(series) < 3 else 2)

    return make_plot(draw, "", title, (6.4, 1.5 + 0.3 * len(labels)))


def heat_map(title: str, rows: Sequence[str], values: np.ndarray, unit: str, x: str) -> Plot:
    """Numbers from 0 to 1 as colours, one row per label; NaN is white."""

    def draw(axes: Axes) -> None:
        image = axes.imshow(
            values, aspect="auto", cmap="cividis", interpolation="nearest", vmin=0, vmax=1
        )
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.grid(visible=False)
        axes.figure.colorbar(image, ax=axes, label=unit)

    return make_plot(draw, "", title, (7, 1.4 + 0.2 * len(rows)))
