"""Does merging help in the paper's setting, from pretrained weights? See docs/protocol.md, 1."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.study import corrupted_predictions, datasets, statistics
from experiments.study.analysis import Group, groups, intervals
from experiments.study.archive import Archive
from experiments.study.questions import shared
from experiments.study.questions.question import Found, Overview, Question, is_lost
from experiments.study.render import difference, dot_plot, markdown, p_value, share
from experiments.study.trials import Backbone, Treatment, Trial, with_dependencies
from inmerge_jax.reporting.plots import Plot


class Recipe(NamedTuple):
    """What both stages of a data set share, next to what all data sets share.

    Attributes:
      epochs: of each stage.
      class_weights: see `Backbone`.
    """

    epochs: int
    class_weights: Literal["balanced"] | None = None


RECIPES = {
    "breastmnist_64": Recipe(10, "balanced"),
    "chestxray14_rgb": Recipe(10),
    "retinamnist_64": Recipe(5),
    "pneumoniamnist_rgb": Recipe(2),
    "bloodmnist_like_rgb": Recipe(1),
}
"""Data set to its recipe."""
REPLACED = (
    ("breastmnist_64", Recipe(5)),
    ("breastmnist_64", Recipe(10)),
    ("chestxray14_rgb", Recipe(5)),
)
"""Recipes that were given up; their backbones have the rates and seeds of the selection."""
CANDIDATES = (1e-4, 3e-4, 1e-3, 3e-3)
"""Learning rates of the backbone that `selection` compares."""
SELECTION_SEEDS = (100, 101, 102)
LOOKS = (16, 32, 48, 64)
"""Seeds at each look; the next one follows if the answer is still undecided."""
LEVEL = 0.05 / len(LOOKS)
"""Of every test at each look."""
ACCEPTED = 0.6
"""Validation AUC that a backbone needs."""
ARMS = {
    "finetune": Treatment(),
    "paper": Treatment("merge"),
    "released": Treatment("released", partner="random"),
    "quantile": Treatment("merge", quantile=0.5),
}
LATER_ARMS = ("finetune", "paper")
"""Arms of the seeds after the first look: those of the primary outcome."""
MERGING = tuple(ARMS)[1:]
PAIRS = tuple((arm, "finetune") for arm in MERGING)


def backbone(data: str, rate: float, seed: int, recipe: Recipe | None = None) -> Backbone:
    """The first stage on a data set, by its recipe in `RECIPES` unless another one is given."""
    recipe = recipe or RECIPES[data]
    return Backbone(
        data,
        "vgg16",
        seed,
        recipe.epochs,
        optimizer="sgd",
        learning_rate=rate,
        weights="edges",
        class_weights=recipe.class_weights,
    )


def second_stage(start: Backbone, arm: str) -> Trial:
    """A second stage: as many epochs at a tenth of the backbone's learning rate."""
    return Trial(start, arm, start.epochs, start.rate / 10, ARMS[arm])


def selection_grid() -> tuple[Trial, ...]:
    """The backbones by which the learning rates are chosen."""
    every = product(RECIPES, CANDIDATES, SELECTION_SEEDS)
    return tuple(Trial(backbone(*one)) for one in every)


def replaced_grid() -> tuple[Trial, ...]:
    """The backbones of recipes that were given up, see the deviations in the protocol."""
    return tuple(
        Trial(backbone(data, rate, seed, recipe))
        for data, recipe in REPLACED
        for rate, seed in product(CANDIDATES, SELECTION_SEEDS)
    )


def comparison_grid(archive: Archive) -> tuple[Trial, ...]:
    """The trials that are compared: low seeds first.

    Those of the data sets whose learning rate is chosen. Those of the next look follow if the
    answer is undecided and some number of pairs would decide it.
    """
    rates, grid = chosen(selection(archive)), list[Trial]()
    for first, end in pairwise((0, *LOOKS)):
        grid += [
            second_stage(backbone(data, rate, seed), arm)
            for seed, (data, rate), arm in product(
                range(first, end), rates.items(), LATER_ARMS if first else ARMS
            )
        ]
        planned = with_dependencies(grid)
        if not (is_selected(archive) and shared.is_complete(shared.progress(planned, archive))):
            break
        paper = _pooled(groups(planned, archive))["paper"]
        more = statistics.needed(paper["auc"], paper["mixed"])
        if conclusion(paper) != "undecided" or more == float("inf"):
            break
    return tuple(grid)


def is_selected(archive: Archive) -> bool:
    """Whether the learning rates of all data sets are chosen."""
    return len(chosen(selection(archive))) == len(RECIPES)


def selection(archive: Archive) -> dict[str, dict[float, dict[str, Any]]]:
    """What the learning rates are chosen by: data set to rate to what its backbones reached.

    "auc", the validation AUC of each seed; "accepted", whether each of them is at least `ACCEPTED`
    and none of the networks gives all validation images one answer (where images have one label).
    A rate with which a backbone diverged has no "auc" and is not accepted.
    """
    found: dict[str, dict[float, dict[str, Any]]] = {}
    for data, rate in product(RECIPES, CANDIDATES):
        trials = [Trial(backbone(data, rate, seed)) for seed in SELECTION_SEEDS]
        if any(is_lost(trial, archive) for trial in trials):
            found.setdefault(data, {})[rate] = {"auc": [], "accepted": False}
        elif all(trial.hash in archive.records for trial in trials):
            val = [archive.records[trial.hash]["result"]["val"] for trial in trials]
            aucs = [one["auc"] for one in val]
            several = archive.labels[data].task.startswith("multi-label")
            accepted = min(aucs) >= ACCEPTED and all(several or one["same"] < 1 for one in val)
            found.setdefault(data, {})[rate] = {"auc": aucs, "accepted": accepted}
    return found


def chosen(found: Mapping[str, Mapping[float, Mapping[str, Any]]]) -> dict[str, float]:
    """The learning rate of each data set: of those accepted, the highest mean validation AUC.

    None for a data set of which no rate is accepted: the protocol then asks for another recipe.

    Args:
      found: of `selection`.
    """
    best = {}
    for data, rates in found.items():
        means = {rate: np.mean(row["auc"]) for rate, row in rates.items() if row["accepted"]}
        if means and len(rates) == len(CANDIDATES):
            best[data] = max(means, key=lambda rate: float(means[rate]))
    return best


def analyse(archive: Archive) -> Found:
    """The selection of learning rates; and once all trials are stored, the comparison.

    Outcomes of single trials are not looked at before, see the stopping rule of the protocol.
    """
    found: Found = {"selection": selection(archive)}
    planned = with_dependencies(comparison_grid(archive))
    found |= shared.progress(planned, archive)
    if not (is_selected(archive) and shared.is_complete(found)):
        return found
    # Network and optimizer are the same everywhere.
    own = [
        replace(group, name=datasets.SOURCES[group.backbone.data].title)
        for group in groups(planned, archive)
    ]
    return found | {
        "groups": {
            group.name: {
                **{arm: group.mean(arm, "auc") for arm in ("backbone", "finetune")},
                **{f"merged {arm}": group.merged(arm) for arm in MERGING},
            }
            for group in own
        },
        "intervals": intervals(own, PAIRS),
        "pooled": _pooled(own),
        "accuracies": _accuracies(own),
        "merges": {group.name: {arm: _merges(group, arm) for arm in MERGING} for group in own},
        "similarity": _similarity(own),
    }


def _pooled(own: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Each merging arm against fine-tuning: "auc" over all pairs, and "mixed"."""
    pooled: dict[str, dict[str, Any]] = {}
    for pair in PAIRS:
        gaps = {group.name: group.differences(pair, "auc") for group in own}
        every = statistics.over_trials([gap for some in gaps.values() for gap in some])
        pooled[pair[0]] = {"auc": every, "mixed": statistics.mixed_model(gaps)}
    for kind in ("auc", "mixed"):
        statistics.add_holm([row[kind] for row in pooled.values()], LEVEL)
    return pooled


def _accuracies(own: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Likewise in accuracy over all pairs, a secondary outcome without a test."""
    return {
        pair[0]: statistics.over_trials(
            [gap for group in own for gap in group.differences(pair, "acc")], tested=False
        )
        for pair in PAIRS
    }


def _merges(group: Group, arm: str) -> dict[str, list[float]]:
    """Merged kernels as a share of the mean number selected, by layer and epoch; mean over seeds.

    And as "LAYER, validation" of those selected before validation images, over all epochs.
    """
    found: dict[str, list[np.ndarray]] = {}
    for record in group.records(arm):
        result = record["result"]
        merged = np.asarray(result["merged_by_epoch"], np.float64).T
        selected = np.asarray(result["selected"]) / merged.shape[1]
        validation = result.get("val_selected") or ()
        for number, layer in enumerate(result["layers"]):
            found.setdefault(layer, []).append(merged[number] / selected[number])
            if len(validation):
                own = result["val_merged"][number] / validation[number]
                found.setdefault(f"{layer}, validation", []).append(np.array([own]))
    return {layer: np.mean(shares, axis=0).tolist() for layer, shares in found.items()}


def _similarity(own: Sequence[Group]) -> dict[str, dict[str, float]]:
    """Layer to mean share of its pairs above 0.3, before training and after each arm."""
    every = [record for group in own for arm in MERGING for record in group.records(arm)]
    deep = every[0]["result"]["layers"] if every else ()
    found: dict[str, dict[str, float]] = {layer: {} for layer in deep}
    for when in ("before training", "backbone", *ARMS):
        arm, key = ("backbone", "before") if when == "before training" else (when, "after")
        rows = [
            {layer["name"]: layer["above"]["0.3"] for layer in record["similarity"][key]}
            for group in own
            for record in group.records(arm)
        ]
        for layer in deep if rows else ():
            found[layer][when] = float(np.mean([row[layer] for row in rows]))
    return found


def conclusion(row: Mapping[str, Any]) -> str:
    """The verdict about an arm: "undecided" unless that over pairs and the mixed model's agree."""
    over_pairs, mixed = (statistics.verdict(row[name], LEVEL) for name in ("auc", "mixed"))
    return over_pairs if over_pairs == mixed else "undecided"


def table(found: Found) -> str:
    """Differences in test AUC by data set and pooled."""
    rows = []
    for name, group in found["groups"].items():
        gaps = [difference(found["intervals"][" - ".join(pair)].get(name), 4) for pair in PAIRS]
        values = (f"{group[arm]:.3f}" for arm in ("backbone", "finetune"))
        rows.append((name, *values, *gaps))
    every = [found["pooled"][arm] for arm in MERGING]
    for title, cells in (
        ("number of pairs", [str(row["auc"]["trials"]) for row in every]),
        ("mean of all pairs", [difference(row["auc"], 4) for row in every]),
        ("mixed model", [difference(row["mixed"], 4) for row in every]),
        ("its deviation between data sets", [_deviation(row["mixed"]) for row in every]),
        ("data sets that would decide", [_sets(row["mixed"]) for row in every]),
        ("p after Holm: pairs, mixed model", [_both(row, "p_holm") for row in every]),
        ("p of equivalence: pairs, mixed model", [_both(row, "p_equivalent") for row in every]),
        ("test ACC", [difference(found["accuracies"][arm], 4) for arm in MERGING]),
    ):
        rows.append((title, "", "", *cells))
    columns = (
        "Test AUC",
        "Backbone",
        "Fine-tuning",
        *(f"{arm} minus fine-tuning" for arm in MERGING),
    )
    return markdown(columns, rows) + shared.diverged_note(found)


def short_table(found: Found) -> str:
    """The result over all pairs, for the README."""
    names = (
        "threshold 0.3, nearest partner (paper)",
        "threshold 0.3, random partner (released code)",
        "median threshold, nearest partner",
    )
    rows = []
    for name, arm in zip(names, MERGING, strict=True):
        auc, mixed = (found["pooled"][arm][kind] for kind in ("auc", "mixed"))
        gaps = (auc, found["accuracies"][arm], mixed)
        rows.append((f"Merging, {name}", *(difference(gap, 4) for gap in gaps), f"{auc['trials']}"))
    columns = (
        *("Difference from fine-tuning without merging", "Test AUC [95 % interval]"),
        *("Test ACC [95 % interval]", "Test AUC, mixed model", "Pairs"),
    )
    return (
        f"{markdown(columns, rows)}\n*VGG16 from pretrained weights on {len(found['groups'])} data "
        "sets. The mixed model takes these as a sample of all data sets.*\n"
    )


def _both(row: Mapping[str, Any], name: str) -> str:
    return ", ".join(p_value(row[kind].get(name, 1.0)) for kind in ("auc", "mixed"))


def _deviation(row: Mapping[str, Any]) -> str:
    return f"{row['between']:.4f}" if "between" in row else ""


def _sets(row: Mapping[str, Any]) -> str:
    return f"{row['needed_sets']:,.0f}" if np.isfinite(row.get("needed_sets", np.inf)) else ""


def rates_table(archive: Archive) -> str:
    """Mean validation AUC of the backbones by data set and learning rate, the chosen one bold."""
    found = selection(archive)
    best, rows = chosen(found), []
    for data in RECIPES:
        rates = found.get(data, {})
        cells = []
        for rate in CANDIDATES:
            text = ""
            if rate in rates:
                aucs = rates[rate]["auc"]
                text = "diverged"
                if aucs:
                    text = f"{np.mean(aucs):.3f} ({min(aucs):.3f} to {max(aucs):.3f})"
                    text += "" if rates[rate]["accepted"] else ", not accepted"
            cells.append(f"**{text}**" if best.get(data) == rate else text)
        rows.append((datasets.SOURCES[data].title, *cells))
    return markdown(("Validation AUC", *(f"{rate:g}" for rate in CANDIDATES)), rows)


def merges_table(found: Found) -> str:
    """Merged of the selected kernels: a row for each data set and arm, a column for each layer."""
    layers = list(found["similarity"])
    rows = [
        (f"{name}, {arm}", *(_percentages(by_layer, layer) for layer in layers))
        for name, by_arm in found["merges"].items()
        for arm, by_layer in by_arm.items()
        if by_layer
    ]
    return markdown(("Merged of the selected, % by epoch", *map(_short, layers)), rows)


def _short(layer: str) -> str:
    return layer.removesuffix("/kernel")


def _percentages(by_layer: Mapping[str, Sequence[float]], layer: str) -> str:
    text = " ".join(f"{100 * one:.0f}" for one in by_layer[layer])
    if validation := by_layer.get(f"{layer}, validation"):
        text += f" (validation {100 * validation[0]:.0f})"
    return text


def similarity_table(found: Found) -> str:
    """Pairs of kernels with a similarity above 0.3: before training and by arm, for each layer."""
    layers = found["similarity"]
    rows = [
        (when, *(share(layer[when], 2) for layer in layers.values()))
        for when in next(iter(layers.values()))
    ]
    return markdown(("Pairs above 0.3", *map(_short, layers)), rows)


def figure(found: Found) -> Plot:
    """Differences from fine-tuning by data set, and over all pairs."""
    series = {
        arm: {**rows, "mean of all pairs": found["pooled"][arm]["auc"]}
        for arm, rows in zip(MERGING, found["intervals"].values(), strict=True)
    }
    unit, margin = "difference in test AUC", statistics.MARGIN
    return dot_plot("Merging minus fine-tuning", unit, series, margin=margin)


def overview(found: Found) -> Overview:
    """The paper's rule, over all pairs, and for data sets in general if that is undecided."""
    row = found["pooled"]["paper"]
    effect = f"paper's rule minus fine-tuning: {difference(row['auc'], 4)}"
    over_pairs, mixed = (statistics.verdict(row[name], LEVEL) for name in ("auc", "mixed"))
    if over_pairs == "undecided" or mixed != "undecided":
        return shared.overview_of(effect, row["auc"], conclusion(row), row["mixed"])
    here = shared.in_words(over_pairs, None, f"{statistics.MARGIN} AUC")
    more = shared.in_words(mixed, row["mixed"].get("needed_sets"), "", "data sets")
    words = f"{here} on these data sets; {more.replace('undecided', 'undecided for others')}"
    return Overview(effect, str(row["auc"]["trials"]), words)


QUESTION = Question(
    name="pretrained",
    title="Does merging help in the paper's setting?",
    hypothesis=(
        "From pretrained weights, the second stage with merging has another mean test AUC than the "
        "same stage without it."
    ),
    trials=(*selection_grid(), *replaced_grid()),
    later=comparison_grid,
    analyse=analyse,
    table=table,
    figure=figure,
    overview=overview,
    keeps_weights=False,
    choices=rates_table,
    has_chosen=is_selected,
    measure=corrupted_predictions.measure,
    measured=corrupted_predictions.measured,
)
