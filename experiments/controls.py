"""Question 3: is it the similarity of the partner that matters?"""

import sys
from typing import Any

from experiments.study import shared, telling
from experiments.study.cells import Treatment
from experiments.study.command import main
from experiments.study.question import Kept, Question, add_holm
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
}
PAIRS = (
    *((arm, "finetune") for arm in ARMS),
    *(("merge", arm) for arm in ARMS if arm != "merge"),
    ("finetune", "backbone"),
)


def analyse(kept: Kept) -> dict[str, Any]:
    """Each data set; Holm's correction over all differences from finetune, and from merge."""
    groups = {telling.where(key): cells.compare(PAIRS) for key, cells in kept.groups().items()}
    for against in ("finetune", "merge"):
        pairs = [
            f"{first} - {second}"
            for first, second in PAIRS
            if (second == "finetune" and first in ARMS and against == "finetune")
            or (first == "merge" and second != "finetune" and against == "merge")
        ]
        found = [group["differences"] for group in groups.values()]
        add_holm([rows[pair]["auc"] for rows in found for pair in pairs if pair in rows])
    return {"groups": groups}


def came_out(found: dict[str, Any]) -> str:
    """Merging against finetune and each control, by data set."""
    parts = []
    for name, group in found["groups"].items():
        rows = group["differences"]
        if "merge - finetune" not in rows:
            continue
        own = telling.difference(rows["merge - finetune"]["auc"])
        told = [
            pair.removeprefix("merge - ")
            for pair, row in rows.items()
            if pair.startswith("merge - ")
            and pair != "merge - finetune"
            and row["auc"]["p_images_holm"] < 0.05
        ]
        apart = f"told apart from {', '.join(told)}" if told else "told apart from no control"
        parts.append(
            f"{name}: merging against finetune {own} AUC; {apart} at p < 0.05 after Holm's "
            "correction"
        )
    return "; ".join(parts) + "."


def sure(found: dict[str, Any]) -> str:
    """What could have been told."""
    could = telling.resolvable(found["groups"], "merge - finetune")
    return (
        f"{shared.PAGE_NOTE}. All controls had the same backbone, batches and epochs; any, least "
        "similar, noise and perturb act on the very kernels that the rule would merge there and "
        f"then. {could}"
    )


def tables(found: dict[str, Any]) -> list[Table]:
    """Differences from finetune."""
    title = "Test AUC and ACC against finetune [95% bootstrap interval over seeds and images]"
    return [telling.difference_table(title, found["groups"], "finetune")]


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
