"""Question 4: how alike are the kernels of a network, by depth, before and after training?"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.study import telling
from experiments.study.cells import Backbone, Cell, Treatment
from experiments.study.command import main
from experiments.study.question import Kept, Question
from inmerge_jax.reporting.plots import GUIDE, Plot, make_plot
from inmerge_jax.reporting.tables import Table

DATA, WIDTH, EPOCHS, MORE = "breastmnist", 0.25, 8, 3
MODELS = (
    *("vgg16", "resnet18", "vgg11", "vgg13", "vgg19", "vgg16_bn", "resnet34"),
    *("vgg11_bn", "vgg13_bn", "vgg19_bn", "resnet50", "densenet121"),
)
OPTIMIZERS = ("adam", "sgd")
# A VGG without batch normalisation diverges at the other networks' rate.
SGD_RATE = {"vgg11": 0.01, "vgg13": 0.01, "vgg16": 0.01, "vgg19": 0.01}
WHEN = ("before training", "backbone", "finetune", "inmerge")
BINS = 10
THRESHOLD = "0.3"
SHOWN = (("resnet18", "adam"), ("resnet18", "sgd"), ("vgg16", "adam"), ("vgg16", "sgd"))


def grid() -> tuple[Cell, ...]:
    """Every network with both optimizers, one seed."""
    found = []
    for model in MODELS:
        for optimizer in OPTIMIZERS:
            rate = SGD_RATE.get(model) if optimizer == "sgd" else None
            start = Backbone(DATA, model, 0, EPOCHS, WIDTH, optimizer, rate)
            more = 1e-4 if optimizer == "adam" else start.rate / 10
            found += [
                Cell(start),
                Cell(start, "finetune", MORE, more),
                Cell(start, "inmerge", MORE, more, Treatment("merge")),
            ]
    return tuple(found)


def analyse(kept: Kept) -> dict[str, Any]:
    """Layers in the order of the forward pass, at each of `WHEN`."""
    networks: dict[str, Any] = {}
    for cell in kept.cells:
        record = kept.record(cell)
        name = f"{cell.backbone.model}, {cell.backbone.optimizer.upper()}"
        one = networks.setdefault(name, {"model": cell.backbone.model, "when": {}})
        if cell.is_backbone:
            one["when"]["before training"] = record["similarity"]["before"]
        one["when"][cell.arm] = record["similarity"]["after"]
        one.setdefault("test_auc", {})[cell.arm] = record["result"]["test"]["auc"]
        if cell.arm == "inmerge":
            result = record["result"]
            one["merged"] = dict(zip(result["layers"], result["merged"], strict=True))
            one["selected"] = sum(result["selected"])
            one["skip"] = len(record["similarity"]["after"]) - len(result["layers"])
    return {"networks": networks}


def above(layers: Sequence[Mapping[str, Any]]) -> float:
    """Share of the kernels' pairs above the paper's threshold, each kernel with one of its layer.

    It is the chance that a kernel of these layers and a random partner pass.
    """
    kernels = [layer["kernels"] for layer in layers]
    shares = [layer["above"][THRESHOLD] for layer in layers]
    return float(np.average(shares, weights=kernels))


def spatial(layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without 1x1 shortcuts, whose few weights are alike by chance."""
    return [layer for layer in layers if "shortcut" not in layer["name"]]


def _deep(one: Mapping[str, Any], when: str) -> list[Mapping[str, Any]]:
    return one["when"][when][one.get("skip", len(one["when"][when]) // 2) :]


def came_out(found: dict[str, Any]) -> str:
    """How rarely deep kernels are above the threshold, and where they are alike."""
    parts = []
    for optimizer in OPTIMIZERS:
        chosen = {
            name: one
            for name, one in found["networks"].items()
            if name.endswith(optimizer.upper()) and "backbone" in one["when"]
        }
        if not chosen:
            continue
        deep = [above(_deep(one, "backbone")) for one in chosen.values()]
        start = [above(_deep(one, "before training")) for one in chosen.values()]
        none = sum(share == 0 for share in deep)
        parts.append(
            f"{optimizer.upper()}: after the backbone, {min(deep):.2%} to {max(deep):.2%} of the "
            f"pairs of deep kernels have a cosine above 0.3 (median of {len(deep)} networks "
            f"{np.median(deep):.3%}; none at all in {none}; before training "
            f"{np.median(start):.3%})"
        )
    return (
        "; ".join(parts) + ". This share is the chance that a selected kernel and a random "
        "partner pass the threshold of 0.3."
    )


def sure(found: dict[str, Any]) -> str:
    """What was measured, and on what."""
    return (
        "Shares count all pairs of the weights that were measured; but these are networks of "
        f"width {WIDTH}, trained for {EPOCHS} epochs on BreastMNIST with one seed (arms {MORE} "
        f"epochs), {len(found['networks'])} of {len(MODELS) * len(OPTIMIZERS)} networks and "
        "optimizers. Wider kernels have more weights, and so cosines nearer to zero, at the start."
    )


def tables(found: dict[str, Any]) -> list[Table]:
    """A row for each network and optimizer."""
    rows = []
    for name, one in found["networks"].items():
        cells = [f"{above(_deep(one, when)):.2%}" if when in one["when"] else "" for when in WHEN]
        shallow = one["when"].get("backbone", [])[: one.get("skip", 0)]
        top = ""
        if "backbone" in one["when"]:
            top = f"{max(layer['maximum'] for layer in spatial(_deep(one, 'backbone'))):.2f}"
        merged = ""
        if "merged" in one:
            merged = f"{sum(one['merged'].values()):,} of {one['selected']:,}"
        rows.append((name, *cells, f"{above(shallow):.2%}" if shallow else "", top, merged))
    columns = (
        *("network", *(f"deep: {when}" for when in WHEN), "shallow: backbone"),
        *("highest cosine, deep, without shortcuts", "merged of selected"),
    )
    title = "Share of kernel pairs with a cosine above 0.3"
    return [Table(title, columns, tuple(rows), tuple("arm" for _ in rows))]


def figures(found: dict[str, Any]) -> list[Plot]:
    """Heat map over depth, and quantiles of some networks."""
    names = [name for name, one in found["networks"].items() if "backbone" in one["when"]]
    values = np.array([_binned(found["networks"][name]["when"]["backbone"]) for name in names])
    heat = telling.heat_map(
        "99% quantile of kernel similarity, after the backbone",
        names,
        values,
        "cosine",
        "depth, from the first tenth of the convolutions to the last",
        "Each row is a network, from its first convolutions (left) to its last; 1x1 shortcuts left "
        "out. One pair of kernels in a hundred has more than this cosine. Where the colour is "
        "below 0.3, the paper's threshold, fewer than one pair in a hundred can merge.",
    )
    drawn = [heat]
    for model, optimizer in SHOWN:
        name = f"{model}, {optimizer.upper()}"
        one = found["networks"].get(name)
        if one is not None and "backbone" in one["when"]:
            drawn.append(_quantile_plot(name, one))
    return drawn


def _binned(layers: Sequence[Mapping[str, Any]]) -> list[float]:
    chosen = spatial(layers)
    bins: list[list[float]] = [[] for _ in range(BINS)]
    for index, layer in enumerate(chosen):
        bins[index * BINS // len(chosen)].append(layer["quantiles"]["0.99"])
    return [float(np.mean(one)) if one else float("nan") for one in bins]


def _quantile_plot(name: str, one: Mapping[str, Any]) -> Plot:
    def draw(axes: Any) -> None:
        shown = {"before training": GUIDE, "backbone": "#0072B2"}
        for when, colour in shown.items():
            layers = one["when"][when]
            x = np.arange(1, len(layers) + 1)
            column = [[layer["quantiles"][q] for layer in layers] for q in ("0.05", "0.5", "0.95")]
            axes.fill_between(x, column[0], column[2], color=colour, alpha=0.2, lw=0)
            axes.plot(x, column[1], color=colour, lw=1.5, label=when)
            high = [layer["quantiles"]["0.99"] for layer in layers]
            axes.plot(x, high, color=colour, lw=0.8, ls=":")
        axes.axhline(0.3, color="black", lw=1, ls=(0, (5, 3)))
        axes.annotate("threshold 0.3", (1, 0.3), (0, 3), textcoords="offset points", fontsize=8)
        axes.set_title(name)
        axes.set_xlabel("convolution, in the order of the forward pass")
        axes.set_ylabel("cosine between kernels of a layer")
        axes.figure.legend(loc="outside lower center", ncols=2)

    caption = (
        "Line: median; band: the middle 90% of pairs; dotted: the 99% quantile. Merging with a "
        "random partner needs pairs above the dashed line. Single peaks are 1x1 shortcuts."
    )
    return make_plot(draw, caption, f"Kernel similarity by depth: {name}")


QUESTION = Question(
    name="redundancy",
    number=4,
    title="How alike are kernels?",
    asked=(
        "How similar are the kernels within a layer, by depth, before training, after the "
        "backbone and after each arm, for every network here and both optimizers?"
    ),
    cells=grid(),
    analyse=analyse,
    came_out=came_out,
    sure=sure,
    tables=tables,
    figures=figures,
)

if __name__ == "__main__":
    sys.exit(main(QUESTION))
