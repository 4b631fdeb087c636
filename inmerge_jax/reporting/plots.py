"""A run's figures as inline SVG, one panel each."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from inmerge_jax.reporting.formatting import plain
from inmerge_jax.reporting.runs import Run, number
from inmerge_jax.reporting.summary import class_columns
from inmerge_jax.training.config import ARMS
from inmerge_jax.training.metrics import METRICS

# From the palette of Okabe and Ito, which is safe for colour-blind readers.
COLOURS = {"backbone": "#000000", "finetune": "#0072B2", "inmerge": "#D55E00"}
MARKS = {"backbone": "-", "finetune": "--", "inmerge": "-"}
BEFORE, GUIDE = "#009E73", "#767676"
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # Names of classes may hold dollar signs.
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "inmerge_jax",
}
SIZE = (4.8, 3.3)


@dataclass(frozen=True)
class Plot:
    """One figure.

    Attributes:
      svg: markup of one `<svg>` element.
      caption: what the marks and lines are.
      label: what the figure shows, in a few words.
    """

    svg: str
    caption: str
    label: str


def training_plots(run: Run) -> list[Plot]:
    """Losses and validation metrics of every arm and seed, the second stage after the backbone."""
    unit = "mean loss" if run.segmentation else "mean loss (nats)"
    measured = ("dice",) if run.segmentation else run.metrics
    panels = (
        ("train_loss", "Training loss", unit),
        ("val_loss", "Validation loss", unit),
        *((f"val_{x}", f"Validation {METRICS[x]}", METRICS[x]) for x in measured),
    )
    caption = "One line per seed. Dots: epoch of the tested checkpoint."
    if not run.single_stage:
        caption += " The second stage starts from the backbone's dot."
    if not run.history:
        return []
    return [
        make_plot(partial(_curves, run=run, name=name, title=title, unit=unit), caption, title)
        for name, title, unit in panels
    ]


def merge_plots(run: Run) -> list[Plot]:
    """Kernels merged per layer and epoch, and in all layers by seed; none without the arm."""
    lines = {s: h for (s, arm), h in run.history.items() if arm == "inmerge" and _merges(h).size}
    if not lines:
        return []
    shortest = min(len(history) for history in lines.values())
    mean = np.mean([_merges(history)[:shortest] for history in lines.values()], axis=0)
    result = next(iter(run.arm("inmerge").values()))
    names = result.get("layers") or [f"layer {i}" for i in range(mean.shape[1])]
    by_layer = make_plot(
        lambda axes: _merge_map(axes, mean, names),
        "Mean over seeds; logarithmic colours; layers by depth, the deepest at the bottom.",
        "Kernels merged per layer and epoch",
        (4.8, max(3.3, 1.2 + 0.24 * len(names))),
    )
    totals = make_plot(
        lambda axes: _merge_totals(axes, lines),
        "All layers, one line per seed.",
        "Kernels merged per epoch",
    )
    return [by_layer, totals]


def similarity_plots(run: Run) -> list[Plot]:
    """Similarity of each convolution's kernels before and after the second stage, by depth."""
    arms = [arm for arm in ("inmerge", "finetune") if any(a == arm for _, a in run.similarity)]
    if not arms:
        return []
    caption = (
        "Cosine similarity of the kernel pairs of a layer. Thick lines: median; bands: 5% to 95% "
        "quantile; thin lines: 99% quantile. Shaded: layers that may merge."
    )
    plots = [
        make_plot(partial(_bands, run=run, arm=arm), caption, f"Kernel similarity by depth: {arm}")
        for arm in arms
    ]
    levels = next(iter(run.similarity.values()))["before"][0]["above"]
    wanted = 0.3 if run.threshold is None else run.threshold
    level = min(levels, key=lambda x: abs(x - wanted))
    share = f"Share of a layer's kernel pairs with a cosine similarity above {level}."
    if level != run.threshold:
        own = "a quantile of each layer" if run.threshold is None else run.threshold
        share += f" The run's threshold, {own}, was not measured."
    nearest = "Mean over a layer's kernels of the similarity to the most similar other kernel."
    panels = (
        ("Nearest other kernel", "cosine to the nearest", lambda x: number(x["nearest"]), nearest),
        (f"Pairs above {level}", "% of kernel pairs", lambda x: 100 * x["above"][level], share),
    )
    for title, unit, value, caption in panels:
        draw = partial(_by_depth, run=run, arms=arms, value=value, title=title, unit=unit)
        plots.append(make_plot(draw, caption, title))
    return plots


def signal_plots(run: Run) -> list[Plot]:
    """The sample signals of each class; none for other data."""
    if run.samples is None or run.modality != "signal":
        return []
    signals, names = run.samples["images"], run.samples["names"]
    plots = []
    for name in dict.fromkeys(names.tolist()):
        chosen = signals[names == name]
        many = f", {signals.shape[-1]} channels each" if signals.shape[-1] > 1 else ""
        draw = partial(_signals, signals=chosen, name=name)
        plots.append(make_plot(draw, f"{len(chosen)} of the class{many}.", f"Signals: {name}"))
    return plots


def roc_plots(run: Run) -> list[Plot]:
    """ROC curves of the arms on the test split, one panel per class and a line per seed."""
    labels, task = run.test_labels, run.dataset.get("task", "")
    if labels is None:
        return []
    fitting = {key: s for key, s in run.test_scores.items() if len(s) == len(labels)}
    columns = [class_columns(labels, scores, task) for scores in fitting.values()]
    names = run.dataset.get("classes") or []
    plots = []
    for of_class in zip(*columns, strict=True):
        index, positive, _ = of_class[0]
        name = str(names[index]) if index < len(names) else f"class {index}"
        caption = f"{positive.sum()} of {positive.size} test {run.examples} have this label."
        if not 0 < positive.sum() < positive.size:
            caption = f"No curve: {caption}"
        lines = {key: column[1:] for key, column in zip(fitting, of_class, strict=True)}
        draw = partial(_roc, name=name, columns=lines)
        plots.append(make_plot(draw, caption, f"ROC: {name}", (3.6, 3.6)))
    return plots


def outline_plots(run: Run) -> list[Plot]:
    """The first test images with true outlines and those that the last arm's first seed found."""
    seed, arm = run.seeds[0], run.arms[-1]
    found, true = run.test_masks.get((seed, arm)), run.test_labels
    if run.samples is None or true is None or found is None:
        return []
    names = (run.dataset.get("classes") or [])[1:]
    plots = []
    for row, image in enumerate(run.samples["test_images"]):
        dice = zip(names, found["dice"][row], strict=False)
        scores = ", ".join(f"{name} {plain(value)}" for name, value in dice)
        caption = f"Dice: {scores}. Solid: true outline; dashed: {arm}, seed {seed}."
        draw = partial(_outlines, image=image, true=true[row], found=found["masks"][row])
        plots.append(make_plot(draw, caption, f"Test image {row}", (3.6, 3.6)))
    return plots


def make_plot(
    draw: Callable[[Axes], None], caption: str, label: str, size: tuple[float, float] = SIZE
) -> Plot:
    """Draws a figure as inline SVG.

    Args:
      draw: function that draws on the axes.
      caption: caption of the figure.
      label: short label of the figure.
      size: width and height in inches.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    return Plot(_inline(buffer.getvalue()), caption, label)


def _inline(svg: str) -> str:
    """The <svg> element without size, style sheet and unused ids, for use inside a page."""
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]+"', head)
    box = view.group(0) if view else ""
    body = re.sub(r"<style.*?</style>", "", body, count=1, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", body))
    body = re.sub(r' id="([^"]+)"', lambda match: match.group(0) if match[1] in used else "", body)
    return f'<svg {box} role="img" aria-hidden="true">{body}'.replace("xlink:href", "href")


def _curves(axes: Axes, run: Run, name: str, title: str, unit: str) -> None:
    backbones = (h for (_, arm), h in run.history.items() if arm == "backbone")
    start = 0 if run.single_stage else max(map(len, backbones), default=0)
    defined = False
    for arm in ARMS:
        shift = 0 if arm == "backbone" else start
        for rank, seed in enumerate(run.arm(arm)):
            history = run.history.get((seed, arm))
            if not history:
                continue
            x = np.array([line["epoch"] for line in history]) + shift
            y = np.array([number(line.get(name)) for line in history])
            defined |= bool(np.isfinite(y).any())
            axes.plot(
                x, y, MARKS[arm], color=COLOURS[arm], lw=1.3, alpha=0.85,
                marker="." if len(x) == 1 else None, label=None if rank else arm,
            )  # fmt: skip
            best = run.arm(arm)[seed].get("best_epoch")
            chosen = np.flatnonzero(x - shift == best)
            if chosen.size:
                axes.plot(x[chosen], y[chosen], "o", color=COLOURS[arm], ms=5, mec="white")
    if start and any(arm != "backbone" for arm in run.arms):
        axes.axvline(start + 0.5, color=GUIDE, lw=1, ls=":")
    if not defined:
        _overlay(axes, "undefined in every epoch")
    stages = "" if run.single_stage else " (second stage right of the dotted line)"
    _finish(axes, title, f"epoch{stages}", unit)


def _merges(history: Sequence[dict[str, Any]]) -> np.ndarray:
    lines = [line["merged"] for line in history if line.get("merged")]
    return np.array(lines) if lines else np.zeros((0, 0))


def _merge_map(axes: Axes, mean: np.ndarray, names: Sequence[str]) -> None:
    if not mean.any():
        _overlay(axes, "nothing was merged in training")
    epochs, layers = mean.shape
    axes.grid(False)
    norm = SymLogNorm(linthresh=1, vmin=0, vmax=max(mean.max(), 1))
    image = axes.imshow(
        mean.T, aspect="auto", cmap="cividis", norm=norm, interpolation="nearest",
        extent=(0.5, epochs + 0.5, layers - 0.5, -0.5),
    )  # fmt: skip
    if epochs <= 10:
        for (epoch, layer), count in np.ndenumerate(mean):
            colour = "black" if norm(count) > 0.45 else "white"
            text = f"{count:.0f}" if count >= 1 or not count else f"{count:.1f}"
            axes.text(epoch + 1, layer, text, color=colour, ha="center", va="center", fontsize=8)
    axes.set_yticks(range(layers), [name.removesuffix("/kernel") for name in names], fontsize=8)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("kernels per epoch")
    bar.ax.yaxis.set_major_formatter(ScalarFormatter())
    bar.outline.set_visible(False)
    _finish(axes, "Kernels merged in training", "epoch of the merging stage", "", legend=False)


def _merge_totals(axes: Axes, lines: dict[int, list[dict[str, Any]]]) -> None:
    styles = ("-", "--", ":", "-.")
    for rank, (seed, history) in enumerate(lines.items()):
        totals = _merges(history).sum(axis=1)
        axes.plot(
            np.arange(1, len(totals) + 1), totals, styles[rank % 4], color=COLOURS["inmerge"],
            marker="o", ms=4, label=f"seed {seed}",
        )  # fmt: skip
    axes.set_xlim(0.5, len(totals) + 0.5)
    axes.set_ylim(0, max(1.05 * axes.get_ylim()[1], 1))
    _finish(axes, "All layers", "epoch of the merging stage", "kernels merged per epoch")


def _mean_over_seeds(
    run: Run, arm: str, when: str, value: Callable[[dict[str, Any]], float]
) -> np.ndarray:
    """`value` of each layer "before" or "after" the stage, mean over seeds: float (layers,)."""
    stages = [found[when] for (_, a), found in run.similarity.items() if a == arm]
    return np.mean([[value(layer) for layer in layers] for layers in stages], axis=0)


def _signals(axes: Axes, signals: np.ndarray, name: str) -> None:
    for signal in signals:
        axes.plot(signal, color=COLOURS["finetune"], lw=1, alpha=0.6)
    _finish(axes, name, "sample", "value", legend=False)


def _bands(axes: Axes, run: Run, arm: str) -> None:
    for when, colour, style in (("before", BEFORE, "--"), ("after", COLOURS[arm], "-")):
        low, middle, high, top = (
            _mean_over_seeds(run, arm, when, lambda layer, q=q: layer["quantiles"][q])
            for q in (0.05, 0.5, 0.95, 0.99)
        )
        x = np.arange(1, len(middle) + 1)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
        axes.plot(x, middle, style, color=colour, lw=1.8, label=f"median {when}")
        axes.plot(x, top, style, color=colour, lw=0.8, label=f"99% {when}")
    if run.threshold is not None:
        label = f"threshold {run.threshold}"
        axes.axhline(run.threshold, color="black", lw=1, ls=(0, (5, 3)), label=label)
    _depth_axis(axes, run)
    _finish(axes, f"Before and after {arm}", "layer, by depth", "cosine of kernel pairs")


def _by_depth(
    axes: Axes,
    run: Run,
    arms: Sequence[str],
    value: Callable[[dict[str, Any]], float],
    title: str,
    unit: str,
) -> None:
    before = _mean_over_seeds(run, arms[0], "before", value)
    x = np.arange(1, len(before) + 1)
    axes.plot(x, before, "--", color=BEFORE, lw=1.8, label="before")
    for arm in reversed(arms):
        after = _mean_over_seeds(run, arm, "after", value)
        axes.plot(x, after, color=COLOURS[arm], lw=1.8, marker=".", label=arm)
    _depth_axis(axes, run)
    _finish(axes, title, "layer, by depth", unit)


def _depth_axis(axes: Axes, run: Run) -> None:
    """Shades the layers that may merge."""
    merging = next(iter(run.arm("inmerge").values()), {}).get("layers", ())
    layers = next(iter(run.similarity.values()))["before"]
    for place, layer in enumerate(layers, 1):
        if layer["name"] in merging:
            axes.axvspan(place - 0.5, place + 0.5, color=GUIDE, alpha=0.15, lw=0)


def _roc(axes: Axes, name: str, columns: dict[tuple[int, str], tuple[Any, Any]]) -> None:
    from sklearn.metrics import roc_auc_score, roc_curve

    axes.plot([0, 1], [0, 1], color=GUIDE, lw=1, ls=":")
    for arm in ARMS:
        lines = [(y, s) for (_, a), (y, s) in sorted(columns.items()) if a == arm]
        lines = [(y, s) for y, s in lines if 0 < y.sum() < y.size and np.isfinite(s).all()]
        areas = [roc_auc_score(y, s) for y, s in lines]
        for rank, (y, s) in enumerate(lines):
            false, true, _ = roc_curve(y, s)
            keep = np.unique(np.linspace(0, len(false) - 1, min(len(false), 200)).astype(int))
            axes.plot(
                false[keep], true[keep], MARKS[arm], color=COLOURS[arm], lw=1.2, alpha=0.85,
                label=None if rank else f"{arm} {np.mean(areas):.3f}",
            )  # fmt: skip
    if len(axes.get_lines()) == 1:
        _overlay(axes, "one label only: no curve")
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    axes.set_aspect("equal")
    if len(axes.get_lines()) > 1:
        axes.legend(title="mean AUC", loc="lower right")
    _finish(axes, name, "false positive rate", "true positive rate", legend=False)


def _outlines(axes: Axes, image: np.ndarray, true: np.ndarray, found: np.ndarray) -> None:
    axes.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255)
    lines = ((true, BEFORE, "solid"), (found, COLOURS["inmerge"], "dashed"))
    for mask, colour, style in lines:
        mask = mask[len(mask) // 2] if mask.ndim == 3 else mask  # Of volumes, the middle slice.
        for index in set(mask.ravel().tolist()) - {0}:
            axes.contour(mask == index, [0.5], colors=colour, linestyles=style, linewidths=1.6)
    axes.set_axis_off()


def _overlay(axes: Axes, text: str) -> None:
    axes.text(
        0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center",
        fontsize=12, weight="bold", color="white", zorder=9,
        bbox={"facecolor": "#a33", "edgecolor": "none", "pad": 6},
    )  # fmt: skip


def _finish(axes: Axes, title: str, x: str, y: str, legend: bool = True) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if axes.get_xlim()[1] >= 1.5:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    handles, labels = axes.get_legend_handles_labels()
    if legend and labels:
        axes.figure.legend(
            handles, labels, loc="outside lower center", ncols=2 if len(labels) == 4 else 3
        )
