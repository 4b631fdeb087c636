"""The networks that questions 2, 3, 5 and 6 have in common: ResNet-18 at half width.

Their backbones, and the arms finetune and inmerge, are the same cells in all of these.
"""

from collections.abc import Mapping
from typing import Any

from experiments.study.cells import Backbone, Cell, Treatment

SEEDS = 3
MODEL, WIDTH = "resnet18", 0.5
# Data set to epochs of the backbone and of the second stage.
EPOCHS = {"breastmnist": (30, 8), "retinamnist": (16, 5)}
# The paper's numbers but for the threshold, which is about what the most similar kernels of the
# deep 3x3 layers have in the backbones (Adam), so that about half of those selected merge. It was
# read off the similarities of one backbone's weights, before any second stage was looked at.
WORKING = Treatment("merge", threshold=0.1)
PAPER = Treatment("merge")
SECOND_STAGE = (("finetune", "backbone"),)
"""What the second stage does without any treatment."""
PAGE_NOTE = (
    "ResNet-18 at half width, Adam; BreastMNIST 30 and RetinaMNIST 16 epochs, then 8 and 5 at a "
    "learning rate of 1e-4"
)
RULE_NOTE = (
    "The rule is the paper's (nearest partner, p 0.3, alpha 0.8, the first 10 convolutions left "
    "alone) but for the threshold, 0.1 in place of 0.3, unless a row says otherwise"
)


def around(groups: Mapping[str, Any], rule: str, paper: str | None = None) -> str:
    """How much the working rule merges, by data set, and the paper's threshold, if it was tried."""
    rates = {
        arm: ", ".join(f"{group['merged'][arm]:.1%}" for group in groups.values())
        for arm in (rule, paper)
        if arm is not None
        and all(group["merged"].get(arm) is not None for group in groups.values())
    }
    if rule not in rates:
        return ""
    text = (
        f"All around a threshold of {WORKING.threshold:g}, with which {rates[rule]} of the deep "
        "kernels merge at an update, by data set"
    )
    return (
        f"{text} (with the paper's {PAPER.threshold:g}: {rates[paper]}). "
        if paper in rates
        else f"{text}. "
    )


def second_stages(arms: dict[str, Treatment]) -> tuple[Cell, ...]:
    """Backbones, finetune and these arms, on every data set and seed."""
    found = []
    for seed in range(SEEDS):
        for data, (epochs, more) in EPOCHS.items():
            start = Backbone(data, MODEL, seed, epochs, WIDTH)
            found += [Cell(start), Cell(start, "finetune", more)]
            found += [Cell(start, arm, more, treatment=given) for arm, given in arms.items()]
    return tuple(found)
