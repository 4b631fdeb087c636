"""How similar are the kernels of a layer, by depth, before and after training?"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.study import datasets
from experiments.study.archive import Archive
from experiments.study.questions import main_effect
from experiments.study.questions.question import Found, Overview, Question
from experiments.study.render import heat_map, markdown, share
from experiments.study.trials import Backbone, Treatment, Trial
from inmerge_jax.models import create_model
from inmerge_jax.models.units import find_units
from inmerge_jax.reporting.plots import Plot

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
# At full width: with Adam the trainings of the main effect, one seed, and one network with SGD.
FULL_DATA = ("breastmnist", "retinamnist")
FULL_SGD = ("resnet18", 24, 8)
LEARNED = 0.6
"""Test AUC of the backbone below which a network has learned too little to count."""


def grid() -> tuple[Trial, ...]:
    """Every network with both optimizers at quarter width, and some at full width; one seed."""
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
            Trial(start),
            Trial(start, "finetune", more, rate),
            Trial(start, "inmerge", more, rate, Treatment("merge")),
        ]
    full = [
        trial
        for trial in main_effect.grid()
        if trial.backbone.data in FULL_DATA and trial.backbone.seed == 0 and trial.arm in WHEN
    ]
    return (*found, *full)


@functools.cache
def pointwise(model: str) -> frozenset[str]:
    """Names of a network's 1x1 convolutions: shortcuts, bottlenecks and transitions."""
    if model.startswith("vgg"):
        return frozenset()
    network = create_model(model, 2, stem="small", width=WIDTH)
    kernels = find_units(network, (28, 28, 1), ("kernels",))
    return frozenset(kernel.name for kernel in kernels if kernel.shape[:2] == (1, 1))


def spatial(model: str, layers: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The layers with kernels larger than 1x1, whose few weights make them alike by chance."""
    return [layer for layer in layers if layer["name"] not in pointwise(model)]


def above(layers: Sequence[Mapping[str, Any]]) -> float:
    """Share of the pairs above the paper's threshold: a random partner's chance to pass."""
    shares = [layer["above"][THRESHOLD] for layer in layers]
    return float(np.average(shares, weights=[layer["kernels"] for layer in layers]))


def analyse(archive: Archive) -> Found:
    """By network: similarity of the deep kernels larger than 1x1, and how many merged."""
    networks: dict[str, Any] = {}
    for trial in QUESTION.stored(archive):
        record, start = archive.records[trial.hash], trial.backbone
        name = f"{start.model}, {start.optimizer.upper()}"
        if start.width == 1:
            name += f", full width, {datasets.SOURCES[start.data].title}"
        one = networks.setdefault(name, {"model": start.model, "width": start.width, "when": {}})
        one["optimizer"] = start.optimizer
        if trial.is_backbone:
            one["auc"] = record["result"]["test"]["auc"]
            one["when"]["before training"] = record["similarity"]["before"]
        one["when"][trial.arm] = record["similarity"]["after"]
        if trial.arm == "inmerge":
            one["result"] = record["result"]
    found: dict[str, Any] = {"networks": {}, "merged": {}}
    counts = {size: np.zeros(2, int) for size in ("larger", "1x1")}
    by_layer: dict[tuple[str, str], int] = {}
    for name, one in networks.items():
        result, model = one["result"], one["model"]
        skip = len(one["when"]["backbone"]) - len(result["layers"])
        deep = {when: spatial(model, layers[skip:]) for when, layers in one["when"].items()}
        found["networks"][name] = {
            **{key: one[key] for key in ("width", "optimizer", "auc")},
            "above": {when: above(layers) for when, layers in deep.items()},
            "shallow": above(one["when"]["backbone"][:skip]) if skip else None,
            "highest": max(layer["maximum"] for layer in deep["backbone"]),
            "bins": {when: _binned(spatial(model, x)) for when, x in one["when"].items()},
        }
        for layer, *pair in zip(
            result["layers"], result["merged"], result["selected"], strict=True
        ):
            small = layer in pointwise(model)
            counts["1x1" if small else "larger"] += pair
            if not small:
                by_layer[name, layer] = pair[0]
    for size, (merged, selected) in counts.items():
        shares = {
            "merged": int(merged),
            "selected": int(selected),
            "share": float(merged / selected),
        }
        found["merged"][size] = shares
    (name, layer), merged = max(by_layer.items(), key=lambda item: item[1])
    tops = {
        when: next(row for row in layers if row["name"] == layer)["quantiles"]["0.99"]
        for when, layers in networks[name]["when"].items()
    }
    found["most"] = {"network": name, "layer": layer, "merged": merged, "quantile 99 %": tops}
    found["summary"] = _summary(found["networks"])
    return found


def _summary(networks: Mapping[str, Any]) -> dict[str, Any]:
    """Narrow networks that learned, by optimizer; each network of full width."""
    rows: dict[str, list[Any]] = {}
    for name, one in networks.items():
        if one["width"] == 1:
            rows[name] = [one]
        elif one["auc"] >= LEARNED:
            rows.setdefault(f"quarter width, {one['optimizer'].upper()}, BreastMNIST", []).append(
                one
            )
    return {
        name: {
            "networks": len(some),
            "above": {when: max(one["above"][when] for one in some) for when in WHEN},
            "none": sum(one["above"]["backbone"] == 0 for one in some),
            "highest": max(one["highest"] for one in some),
            "shallow": max(
                (one["shallow"] for one in some if one["shallow"] is not None), default=None
            ),
        }
        for name, some in rows.items()
    }


def _binned(layers: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Mean 99 % quantile of the similarity by tenth of the depth; None without a layer."""
    bins: list[list[float]] = [[] for _ in range(BINS)]
    for index, layer in enumerate(layers):
        bins[index * BINS // len(layers)].append(layer["quantiles"]["0.99"])
    return [float(np.mean(one)) if one else None for one in bins]


def table(found: Found) -> str:
    """A row for each group of networks; shares are the largest of the group."""
    rows = [
        (
            f"{name} ({row['networks']})" if row["networks"] > 1 else name,
            *(share(row["above"][when], 3) for when in ("before training", "backbone", "inmerge")),
            f"{row['highest']:.2f}",
            share(row["shallow"], 1),
        )
        for name, row in found["summary"].items()
    ]
    columns = (
        *(
            "Networks",
            "Deep pairs above 0.3 before training",
            "after the backbone",
            "after merging",
        ),
        *("Highest cosine of a deep pair", "Pairs above 0.3 in the first 10 layers"),
    )
    return markdown(columns, rows)


def figure(found: Found) -> Plot:
    """99 % quantile of the similarity by depth, after the backbone."""
    rows = {name: one["bins"]["backbone"] for name, one in found["networks"].items()}
    values = np.array([[np.nan if x is None else x for x in row] for row in rows.values()])
    title = "99 % quantile of kernel similarity after the backbone"
    return heat_map(title, list(rows), values, "cosine", "depth, in tenths of the convolutions")


def overview(found: Found) -> Overview:
    """The chance that a random partner passes."""
    highest = max(one["above"]["backbone"] for one in found["networks"].values())
    effect = f"pairs above 0.3 in deep layers: at most {share(highest, 3)} after the backbone"
    return Overview(
        effect, f"{len(found['networks'])} networks", "descriptive: such merges are rare"
    )


QUESTION = Question(
    name="similarity",
    title="How similar are kernels?",
    hypothesis="Kernels of deep layers are similar enough (cosine above 0.3) to be merged.",
    trials=grid(),
    analyse=analyse,
    table=table,
    figure=figure,
    overview=overview,
)
