"""Question 3: is it the similarity of the partner that matters?"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from experiments.study import batch_statistics, shared, telling
from experiments.study.cells import Treatment
from experiments.study.command import main
from experiments.study.pooling import alone, pool, pooled_table, verdict
from experiments.study.question import Kept, Question, compare_groups, minus, told, where
from inmerge_jax.reporting.plots import Plot
from inmerge_jax.reporting.tables import Table

ARMS = {
    "merge": shared.WORKING,
    "any partner": dataclasses.replace(shared.WORKING, kind="any"),
    "any partner, every selected kernel": Treatment("merge", threshold=-1.0, partner="random"),
    "least similar partner": dataclasses.replace(shared.WORKING, kind="least"),
    "noise of the same length": dataclasses.replace(shared.WORKING, kind="noise"),
    "shrink and perturb": dataclasses.replace(shared.WORKING, kind="perturb"),
    "averaged weights (0.99)": Treatment("ema", decay=0.99),
    "weight decay 5e-4": Treatment("decay", decay=5e-4),
    # Added before Adam's moments, 5e-4 moves nothing in so short a stage; this is of the gradient's
    # size.
    "weight decay 0.05": Treatment("decay", decay=0.05),
}
FROM_FINETUNE = tuple((arm, "finetune") for arm in ARMS)
FROM_CONTROLS = tuple(("merge", arm) for arm in ARMS if arm != "merge")


def analyse(kept: Kept) -> dict[str, Any]:
    """Each data set; Holm's correction over all differences from finetune, and from controls."""
    families = FROM_FINETUNE, FROM_CONTROLS
    groups = compare_groups(kept, *families, alone=shared.SECOND_STAGE)
    for key, cells in kept.groups().items():
        groups[where(key)]["batch_statistics"] = batch_statistics.summary(cells)
    return {"groups": groups, "pooled": pool(groups, tuple(ARMS))}


def _from_controls(group: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What was found of merging minus each control, by control."""
    pairs = {control: f"merge - {control}" for _, control in FROM_CONTROLS}
    found = group["differences"]
    return {control: found[pair] for control, pair in pairs.items() if pair in found}


def came_out(found: dict[str, Any]) -> str:
    """Merging against finetune and each control, by data set."""
    parts = []
    for name, group in found["groups"].items():
        own = minus(group, "finetune").get("merge")
        if own is None:
            continue
        apart = []
        for metric in ("auc", "acc"):
            better = [
                f"{control} {telling.difference(row[metric])}"
                for control, row in _from_controls(group).items()
                if told(row[metric])
            ]
            apart.append(f"in {metric.upper()} from {'; '.join(better) if better else 'none'}")
        parts.append(
            f"{name}: merging against finetune {telling.difference(own['auc'])} AUC, "
            f"{telling.difference(own['acc'])} ACC; distinguished from controls (merge minus "
            f"control, p < 0.05 after Holm's correction) {', '.join(apart)}"
        )
    pooled = found["pooled"]
    about = shared.around(found["groups"], "merge")
    text = about + ". ".join(parts) + f". {verdict(pooled, 'finetune')} {alone(pooled)}"
    row = batch_statistics.paired(_renewed(found), "merge").get("any partner")
    if row is not None:
        said = {
            kind: " AUC and ".join(telling.difference(row[kind][m]) for m in ("auc", "acc"))
            for kind in batch_statistics.KINDS
        }
        text += (
            " With batch statistics averaged anew, on validation images, merge minus any partner "
            f"is {said['renewed']} ACC over {row['trainings']} trainings (with the running ones "
            f"{said['running']} ACC)."
        )
    return text


def _renewed(found: dict[str, Any]) -> dict[str, Any]:
    return {name: group["batch_statistics"] for name, group in found["groups"].items()}


def sure(found: dict[str, Any]) -> str:
    """What could have been told."""
    pairs = [f"{one} - {two}" for one, two in (*FROM_FINETUNE, *FROM_CONTROLS)]
    could = telling.could_tell(found["groups"], *pairs)
    return (
        f"{could} All controls had the same backbone, batches and epochs, but did not act on "
        "equally many kernels (column merged)."
    )


def notes(found: dict[str, Any]) -> tuple[str, ...]:
    """What was trained, and what of it is due to lagging batch statistics."""
    return (
        f"{shared.PAGE_NOTE}.",
        f"{shared.RULE_NOTE}.",
        "Any, least similar, noise and perturb act at each update on the kernels that the rule "
        "would merge in their own weights: the same at the first, later more or fewer, as the "
        "column merged shows, because what is mixed grows alike.",
        "Test scores are those of the running batch statistics, as trained. Where weights jump "
        "these lag behind, and the last table tells that from harm to the weights themselves, for "
        "which alone similarity could matter.",
        *batch_statistics.notes(found["groups"]),
        telling.one_answer(found["groups"]),
    )


def tables(found: dict[str, Any]) -> list[Table]:
    """Differences from finetune."""
    rows = [
        (
            f"{name}: merge - {control}",
            telling.difference(row["auc"]),
            telling.p_value(row["auc"]["p_holm"]),
            telling.difference(row["acc"]),
            telling.p_value(row["acc"]["p_holm"]),
        )
        for name, group in found["groups"].items()
        for control, row in _from_controls(group).items()
    ]
    columns = ("merge minus control", "test AUC", "p, Holm", "test ACC", "p, Holm")
    direct = Table(
        "Merging against each control", columns, tuple(rows), tuple("difference" for _ in rows)
    )
    against = telling.difference_table(telling.AGAINST_FINETUNE, found["groups"], "finetune")
    renewed = _renewed(found)
    return [
        against,
        direct,
        pooled_table(found["pooled"], "finetune"),
        batch_statistics.paired_table(renewed, "merge"),
        batch_statistics.table(renewed),
    ]


def figures(found: dict[str, Any]) -> list[Plot]:
    """One figure for each data set."""
    drawn = []
    for name, group in found["groups"].items():
        rows = [(arm, row["auc"]) for arm, row in minus(group, "finetune").items()]
        caption = (
            "Test AUC minus that of finetune. Dots: means over seeds; bars: 95% bootstrap "
            "intervals over seeds and test images. If similarity matters, merge lies to the right "
            f"of any, least similar, noise and perturb: {_to_see(group)}"
        )
        title, unit = f"Merging and its controls: {name}", "difference in test AUC"
        drawn.append(telling.interval_plot(title, {name: rows}, unit, caption))
    return drawn


def _to_see(group: Mapping[str, Any]) -> str:
    """Which controls merging is distinguished from, and what is left with other statistics."""
    apart = [control for control, row in _from_controls(group).items() if told(row["auc"])]
    text = f"it is distinguished from {', '.join(apart) or 'none of them'} after Holm's correction"
    renewed = group["batch_statistics"]
    if "merge" in renewed and "any partner" in renewed:
        merge, other = (renewed[arm]["renewed"]["auc"] for arm in ("merge", "any partner"))
        text += (
            ", and with batch statistics averaged anew, on validation images, it has an AUC of "
            f"{merge:.3f} beside {other:.3f} with any partner"
        )
    return f"{text}."


QUESTION = Question(
    name="controls",
    number=3,
    title="Is it similarity that matters?",
    asked=(
        "Does mixing a kernel with its most similar one do anything that mixing it with another, "
        "noise of the same size, weight averaging or more weight decay does not? With a threshold "
        f"of {shared.WORKING.threshold:g}, since with the paper's {shared.PAPER.threshold:g} few "
        "kernels merge."
    ),
    cells=shared.second_stages(ARMS),
    analyse=analyse,
    came_out=came_out,
    sure=sure,
    tables=tables,
    figures=figures,
    notes=notes,
    measure=batch_statistics.measure,
    measured=batch_statistics.measured,
)

if __name__ == "__main__":
    sys.exit(main(QUESTION))
