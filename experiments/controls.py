"""Question 3: is it the similarity of the partner that matters?"""

import sys
from typing import Any

from experiments.study import shared, telling
from experiments.study.cells import Treatment
from experiments.study.command import main
from experiments.study.question import Kept, Question, add_holm, told
from inmerge_jax.reporting.plots import Plot
from inmerge_jax.reporting.tables import Table

_RULE = vars(shared.WORKING) | {}
ARMS = {
    "merge": shared.WORKING,
    "any partner": Treatment(**(_RULE | {"kind": "any"})),
    "any partner, every selected kernel": Treatment("merge", threshold=-1.0, partner="random"),
    "least similar partner": Treatment(**(_RULE | {"kind": "least"})),
    "noise of the same length": Treatment(**(_RULE | {"kind": "noise"})),
    "shrink and perturb": Treatment(**(_RULE | {"kind": "perturb"})),
    "averaged weights (0.99)": Treatment("ema", decay=0.99),
    "weight decay 5e-4": Treatment("decay", decay=5e-4),
    # Added before Adam's moments, 5e-4 moves nothing in so short a stage; this is of the gradient's
    # size.
    "weight decay 0.05": Treatment("decay", decay=0.05),
}
PAIRS = (
    *((arm, "finetune") for arm in ARMS),
    *(("merge", arm) for arm in ARMS if arm != "merge"),
    ("finetune", "backbone"),
)


FIRST = PAIRS[: len(ARMS)]


def analyse(kept: Kept) -> dict[str, Any]:
    """Each data set; Holm's correction over all differences from finetune, and from merge."""
    groups = {telling.where(key): cells.compare(PAIRS) for key, cells in kept.groups().items()}
    add_holm(groups.values(), [pair for pair in PAIRS if pair[1] == "finetune"])
    add_holm(groups.values(), [pair for pair in PAIRS if pair[0] == "merge" and pair not in FIRST])
    return {"groups": groups}


def came_out(found: dict[str, Any]) -> str:
    """Merging against finetune and each control, by data set."""
    parts = []
    for name, group in found["groups"].items():
        rows = group["differences"]
        if "merge - finetune" not in rows:
            continue
        own = rows["merge - finetune"]
        apart = []
        for metric in ("auc", "acc"):
            better = [
                f"{pair.removeprefix('merge - ')} {telling.difference(row[metric])}"
                for pair, row in rows.items()
                if pair.startswith("merge - ") and pair != "merge - finetune" and told(row[metric])
            ]
            apart.append(f"in {metric.upper()} from {'; '.join(better) if better else 'none'}")
        parts.append(
            f"{name}: merging against finetune {telling.difference(own['auc'])} AUC, "
            f"{telling.difference(own['acc'])} ACC; told apart from controls (merge minus control, "
            f"p < 0.05 after Holm's correction) {', '.join(apart)}"
        )
    return ". ".join(parts) + "."


def sure(found: dict[str, Any]) -> str:
    """What could have been told."""
    could = telling.resolvable(found["groups"], "merge - finetune")
    return (
        f"{shared.PAGE_NOTE}. All controls had the same backbone, batches and epochs. Any, least "
        "similar, noise and perturb act at each update on the kernels that the rule would merge in "
        "their own weights: the same at the first, later more or fewer, as the column merged "
        f"shows, because what is mixed grows alike. {could}"
    )


def tables(found: dict[str, Any]) -> list[Table]:
    """Differences from finetune."""
    title = (
        "Test AUC and ACC minus finetune's [95% interval over seeds and images]; p over both, "
        "Holm's correction over the table; images: p of permuting test images alone"
    )
    rows = [
        (
            f"{name}: {pair}",
            telling.difference(row["auc"]),
            telling.p_value(row["auc"]["p_holm"]),
            telling.difference(row["acc"]),
            telling.p_value(row["acc"]["p_holm"]),
        )
        for name, group in found["groups"].items()
        for pair, row in group["differences"].items()
        if pair.startswith("merge - ") and "p_holm" in row["auc"] and pair != "merge - finetune"
    ]
    columns = ("merge minus control", "test AUC", "p, Holm", "test ACC", "p, Holm")
    direct = Table(
        "Merging against each control", columns, tuple(rows), tuple("difference" for _ in rows)
    )
    return [telling.difference_table(title, found["groups"], "finetune"), direct]


def figures(found: dict[str, Any]) -> list[Plot]:
    """One figure for each data set."""
    drawn = []
    for name, group in found["groups"].items():
        rows = [
            (pair.removesuffix(" - finetune"), row["auc"])
            for pair, row in group["differences"].items()
            if pair.endswith(" - finetune")
        ]
        caption = (
            "Test AUC minus that of finetune. Dots: means over seeds; bars: 95% bootstrap "
            "intervals over seeds and test images. If similarity matters, merge lies to the right "
            "of any, least similar, noise and perturb."
        )
        title, unit = f"Merging and its controls: {name}", "difference in test AUC"
        drawn.append(telling.interval_plot(title, {name: rows}, unit, caption))
    return drawn


QUESTION = Question(
    name="controls",
    number=3,
    title="Is it similarity that matters?",
    asked=(
        "Does mixing a kernel with its most similar one do anything that mixing it with another, "
        "noise of the same size, weight averaging or more weight decay does not?"
    ),
    cells=shared.second_stages(ARMS),
    analyse=analyse,
    came_out=came_out,
    sure=sure,
    tables=tables,
    figures=figures,
)

if __name__ == "__main__":
    sys.exit(main(QUESTION))
