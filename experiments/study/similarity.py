"""Question 4: how alike are the kernels of a network, by depth, before and after training?"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.study import datasets, main_effect, telling
from experiments.study.cells import Backbone, Cell, Treatment
from experiments.study.command import main
from experiments.study.question import Kept, Question
from inmerge_jax.models import create_model
from inmerge_jax.reporting import plots
from inmerge_jax.reporting.plots import GUIDE, Plot, make_plot
from inmerge_jax.reporting.tables import Table
from inmerge_jax.training.init import conv_kernels

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
# At full width: with Adam question 1's trainings, one seed, and one network with SGD.
FULL_DATA = ("breastmnist", "retinamnist")
FULL_SGD = ("resnet18", 24, 8)
WHAT = ("merged", "selected")
LEARNED = 0.6
"""Test AUC of the backbone below which a network counts as one that hardly learned."""
SHOWN = (
    ("resnet18", "adam", 1.0),
    ("resnet18", "sgd", 1.0),
    ("vgg16", "adam", 1.0),
    ("vgg16", "sgd", WIDTH),
)
COLOURS = {"before training": GUIDE, **plots.COLOURS}


def grid() -> tuple[Cell, ...]:
    """Every network with both optimizers at a quarter of its width, and some whole; one seed."""
    starts = []
    for model in MODELS:
        for optimizer in OPTIMIZERS:
            rate = SGD_RATE.get(model) if optimizer == "sgd" else None
            starts.append((Backbone(DATA, model, 0, EPOCHS, WIDTH, optimizer, rate), MORE))
    model, epochs, more = FULL_SGD
    starts.append((Backbone(DATA, model, 0, epochs, optimizer="sgd"), more))
    found = []
    for start, more in starts:
        rate = 1e-4 if start.optimizer == "adam" else start.rate / 10
        found += [
            Cell(start),
            Cell(start, "finetune", more, rate),
            Cell(start, "inmerge", more, rate, Treatment("merge")),
        ]
    whole = [
        cell
        for cell in main_effect.grid()
        if cell.backbone.data in FULL_DATA and cell.backbone.seed == 0 and cell.arm in WHEN
    ]
    return (*found, *whole)


def named(start: Backbone) -> str:
    """The network for people."""
    name = f"{start.model}, {start.optimizer.upper()}"
    return f"{name}, full width, {datasets.SOURCES[start.data].title}" if start.width == 1 else name


def analyse(kept: Kept) -> dict[str, Any]:
    """Layers in the order of the forward pass, at each of `WHEN`; which of them are 1x1."""
    networks: dict[str, Any] = {}
    for cell in kept.cells:
        record, start = kept.record(cell), cell.backbone
        about = {"model": start.model, "optimizer": start.optimizer, "width": start.width}
        about |= {"epochs": start.epochs, "data": start.data, "when": {}}
        one = networks.setdefault(named(start), about)
        if "pointwise" not in one:
            one["pointwise"] = pointwise(start.model)
        if cell.is_backbone:
            one["when"]["before training"] = record["similarity"]["before"]
        one["when"][cell.arm] = record["similarity"]["after"]
        one.setdefault("test_auc", {})[cell.arm] = record["result"]["test"]["auc"]
        if cell.arm == "inmerge":
            result = record["result"]
            for what in ("merged", "selected"):
                one[what] = dict(zip(result["layers"], result[what], strict=True))
            one["skip"] = len(record["similarity"]["after"]) - len(result["layers"])
    return {"networks": networks}


def pointwise(model: str) -> list[str]:
    """The names of a network's 1x1 convolutions: shortcuts, bottlenecks and transitions."""
    network = create_model(model, 2, stem="small", width=WIDTH)
    return [k.name for k in conv_kernels(network, (28, 28, 1)) if k.shape[:2] == (1, 1)]


def above(layers: Sequence[Mapping[str, Any]]) -> float:
    """Share of the kernels' pairs above the paper's threshold, each kernel with one of its layer.

    It is the chance that a kernel of these layers and a random partner pass.
    """
    kernels = [layer["kernels"] for layer in layers]
    shares = [layer["above"][THRESHOLD] for layer in layers]
    return float(np.average(shares, weights=kernels))


def spatial(one: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> list[Any]:
    """A network's layers without 1x1 convolutions, whose few weights are alike by chance."""
    return [layer for layer in layers if layer["name"] not in one["pointwise"]]


def _deep(one: Mapping[str, Any], when: str) -> list[Mapping[str, Any]]:
    return one["when"][when][one.get("skip", len(one["when"][when]) // 2) :]


def _share(one: Mapping[str, Any], when: str) -> float:
    """Share of pairs above the threshold, of the deep kernels larger than 1x1."""
    return above(spatial(one, _deep(one, when)))


def _counts(one: Mapping[str, Any], what: str) -> tuple[int, int]:
    """Of kernels larger than 1x1, and of those of 1x1."""
    small = sum(n for layer, n in one[what].items() if layer in one["pointwise"])
    return sum(one[what].values()) - small, small


def came_out(found: dict[str, Any]) -> str:
    """How rarely deep kernels are above the threshold, and how often the nearest one is."""
    parts = []
    for optimizer in OPTIMIZERS:
        narrow = [
            one
            for one in found["networks"].values()
            if one["optimizer"] == optimizer and one["width"] != 1 and "backbone" in one["when"]
        ]
        chosen = [one for one in narrow if one["test_auc"]["backbone"] >= LEARNED]
        if not chosen:
            continue
        deep = [_share(one, "backbone") for one in chosen]
        none = sum(share == 0 for share in deep)
        left = len(narrow) - len(chosen)
        parts.append(
            f"{optimizer.upper()}: none at all in {none} of {len(deep)} narrow networks"
            + (f", at most {max(deep):.3%} in the others" if none < len(deep) else "")
            + (f" ({left} more hardly learned and are not counted)" if left else "")
        )
    whole = [
        f"{name} {_share(one, 'backbone'):.3%}"
        for name, one in found["networks"].items()
        if one["width"] == 1 and "backbone" in one["when"]
    ]
    text = (
        "Deep kernels larger than 1x1 are hardly alike. Of their pairs, the share with a cosine "
        "above 0.3 after the backbone, which is the chance that a selected kernel and a random "
        f"partner pass: {'; '.join([*parts, *whole])}."
    )
    return f"{text}{_nearest(found)}"


def _nearest(found: dict[str, Any]) -> str:
    """What the arm inmerge merged, whose partner is the most similar kernel, and what that did."""
    merging = {name: one for name, one in found["networks"].items() if "merged" in one}
    if not merging:
        return ""
    large, small = (
        tuple(sum(_counts(one, what)[size] for one in merging.values()) for what in WHAT)
        for size in (0, 1)
    )
    text = (
        f" With the most similar partner, as in the arm inmerge, {large[0]:,} of {large[1]:,} "
        f"selected kernels larger than 1x1 merged ({_rate(*large)}), and {small[0]:,} of "
        f"{small[1]:,} of 1x1 ({_rate(*small)})"
    )
    layer, name, merged = max(
        (
            (layer, name, count)
            for name, one in merging.items()
            for layer, count in one["merged"].items()
            if layer not in one["pointwise"]
        ),
        key=lambda row: row[2],
        default=("", "", 0),
    )
    if not merged:
        return f"{text}."
    rows = {
        when: next(row for row in layers if row["name"] == layer)
        for when, layers in merging[name]["when"].items()
    }
    quantiles = ", ".join(
        f"{rows[when]['quantiles']['0.99']:.2f} after {when}" for when in WHEN[1:] if when in rows
    )
    return (
        f"{text}; most of the former, {merged:,}, in one layer, {layer} of {name}, whose "
        f"kernels grow alike as they merge (99% quantile: {quantiles})."
    )


def _rate(merged: int, selected: int) -> str:
    return f"{merged / selected:.1%}" if selected else "none"


def sure(found: dict[str, Any]) -> str:
    """What was measured, and on what."""
    whole = sum(one["width"] == 1 for one in found["networks"].values())
    narrow = len(found["networks"]) - whole
    return (
        "Shares count all pairs of the weights that were measured; but most of these are networks "
        f"of width {WIDTH}, trained for {EPOCHS} epochs on BreastMNIST with one seed (arms {MORE} "
        f"epochs), {narrow} of {len(MODELS) * len(OPTIMIZERS)} networks and optimizers; {whole} "
        "are of full width and trained for longer, with one seed too. Wider kernels have more "
        "weights, and so cosines nearer to zero, at the start."
    )


def tables(found: dict[str, Any]) -> list[Table]:
    """A row for each network and optimizer."""
    rows = []
    for name, one in found["networks"].items():
        cells = [f"{above(_deep(one, when)):.2%}" if when in one["when"] else "" for when in WHEN]
        alone = highest = auc = shallow = merged = ""
        if "backbone" in one["when"]:
            deep = spatial(one, _deep(one, "backbone"))
            alone, highest = f"{above(deep):.2%}", f"{max(x['maximum'] for x in deep):.2f}"
            auc = f"{one['test_auc']['backbone']:.3f}"
            first = one["when"]["backbone"][: one.get("skip", 0)]
            shallow = f"{above(first):.2%}" if first else ""
        if "merged" in one:
            pairs = zip(*(_counts(one, what) for what in WHAT), strict=True)
            merged = "; ".join(f"{some:,} of {chosen:,}" for some, chosen in pairs if chosen)
        rows.append((name, str(one["epochs"]), auc, *cells, alone, highest, shallow, merged))
    columns = (
        *("network", "epochs", "backbone's test AUC", *(f"deep: {when}" for when in WHEN)),
        *("deep, larger than 1x1: backbone", "highest cosine there", "shallow: backbone"),
        "merged of selected, larger than 1x1; 1x1",
    )
    title = "Share of kernel pairs with a cosine above 0.3"
    return [Table(title, columns, tuple(rows), tuple("arm" for _ in rows))]


def figures(found: dict[str, Any]) -> list[Plot]:
    """Heat maps over depth, and quantiles of some networks."""
    drawn = [
        _heat(found, when)
        for when in WHEN
        if any(when in one["when"] for one in found["networks"].values())
    ]
    for model, optimizer, width in SHOWN:
        for name, one in found["networks"].items():
            chosen = (one["model"], one["optimizer"], one["width"], one["data"])
            if chosen == (model, optimizer, width, DATA) and "backbone" in one["when"]:
                drawn.append(_quantile_plot(name, one))
    return drawn


def _heat(found: dict[str, Any], when: str) -> Plot:
    networks = {name: one for name, one in found["networks"].items() if when in one["when"]}
    values = np.array([_binned(spatial(one, one["when"][when])) for one in networks.values()])
    places = {"before training": when, "backbone": f"after the {when}"}
    deep = values[:, BINS // 2 :]
    alike = int((np.nan_to_num(deep) > float(THRESHOLD)).any(axis=1).sum())
    return telling.heat_map(
        f"99% quantile of kernel similarity, {places.get(when, f'after {when}')}",
        list(networks),
        values,
        "cosine",
        "depth, in tenths of the convolutions larger than 1x1",
        "Each row is a network, from its first convolutions (left) to its last; 1x1 convolutions "
        "left out; white: a tenth without a convolution. One pair of kernels in a hundred has more "
        "than this cosine. To see: the bright first tenths, and the dark second half, where "
        f"{alike} of {len(networks)} networks have a tenth above 0.3, the paper's threshold.",
        1.0,
    )


def _binned(layers: Sequence[Mapping[str, Any]]) -> list[float]:
    bins: list[list[float]] = [[] for _ in range(BINS)]
    for index, layer in enumerate(layers):
        bins[index * BINS // len(layers)].append(layer["quantiles"]["0.99"])
    return [float(np.mean(one)) if one else float("nan") for one in bins]


def _quantile_plot(name: str, one: Mapping[str, Any]) -> Plot:
    def draw(axes: Any) -> None:
        for when, colour in COLOURS.items():
            layers = one["when"].get(when)
            if layers is None:
                continue
            x = np.arange(1, len(layers) + 1)
            low, middle, high, top = (
                [layer["quantiles"][q] for layer in layers] for q in ("0.05", "0.5", "0.95", "0.99")
            )
            if when == "backbone":
                axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
            axes.plot(x, middle, color=colour, lw=1.5, label=when)
            axes.plot(x, top, color=colour, lw=1, ls=":")
        axes.axhline(0.3, color="black", lw=1, ls=(0, (5, 3)))
        axes.annotate("threshold 0.3", (1, 0.3), (0, 3), textcoords="offset points", fontsize=8)
        axes.set_title(name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("convolution, in the order of the forward pass")
        axes.set_ylabel("cosine between kernels of a layer")
        axes.figure.legend(loc="outside lower center", ncols=2)

    small = [
        str(number)
        for number, layer in enumerate(one["when"]["backbone"], 1)
        if layer["name"] in one["pointwise"]
    ]
    caption = (
        "Lines: median; dotted: the 99% quantile; band: the middle 90% of pairs after the "
        "backbone. Merging with a random partner needs pairs above the dashed line. "
        + _to_see(one)
        + (f" Of 1x1 are convolutions {', '.join(small)}." if small else "")
    )
    return make_plot(draw, caption, f"Kernel similarity by depth: {name}")


def _to_see(one: Mapping[str, Any]) -> str:
    """Where among the deep kernels the dotted line is highest, after the backbone and the arm."""
    parts = []
    for when in ("backbone", "inmerge"):
        if when in one["when"]:
            layers = one["when"][when]
            skip = len(layers) - len(_deep(one, when))
            number = max(range(skip, len(layers)), key=lambda i: layers[i]["quantiles"]["0.99"])
            value = layers[number]["quantiles"]["0.99"]
            parts.append(f"{value:.2f} after {when} (convolution {number + 1})")
    return f"To see: beyond the first {skip} it reaches {', and '.join(parts)}."


QUESTION = Question(
    name="similarity",
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
