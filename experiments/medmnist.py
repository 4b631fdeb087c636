"""Question 1: backbone, finetune and inmerge on real data, with the benchmark's numbers beside."""

import sys
from collections.abc import Mapping
from typing import Any, Literal

from experiments.study import datasets, telling
from experiments.study.cells import Backbone, Cell, Treatment
from experiments.study.command import main
from experiments.study.pooling import NAMES, mean, pool, pooled_table, verdict
from experiments.study.question import Kept, Question, compare_groups, minus, told
from inmerge_jax.reporting.plots import Plot
from inmerge_jax.reporting.published import published_reference
from inmerge_jax.reporting.tables import Table

MODELS = ("vgg16", "resnet18")
# Data set to seeds, epochs of the backbones (the benchmark's are 100) in the order of MODELS, and
# of the second stage. VGG16, without batch normalisation, needs some 200 updates to leave the most
# frequent class: seen on validation images, after 24 epochs on BreastMNIST.
PLAN = {
    "breastmnist": (5, (60, 24), 8),
    "retinamnist": (5, (30, 16), 6),
    "bloodmnist_like": (3, (2, 2), 1),
    "pneumoniamnist": (3, (6, 3), 1),
    "chestxray14": (3, (4, 30), 2),
}
# At 64 px torchvision's stem takes a ResNet-18 a fifteenth of the small stem's operations.
STEMS: dict[tuple[str, str], Literal["imagenet"]] = {("chestxray14", "resnet18"): "imagenet"}
# The second arm with merging is one that does merge on every network, by the rule of question 5.
# Its quantile was fixed before any training of this question or with a quantile.
ARMS = {
    "finetune": Treatment(),
    "inmerge": Treatment("merge"),
    "inmerge, adaptive": Treatment("merge", quantile=0.5),
}
FROM_FINETUNE = (("inmerge", "finetune"), ("inmerge, adaptive", "finetune"))
FROM_BACKBONE = (
    ("inmerge", "backbone"),
    ("inmerge, adaptive", "backbone"),
    ("finetune", "backbone"),
)
MERGING = tuple(arm for arm in ARMS if arm != "finetune")


def grid() -> tuple[Cell, ...]:
    """All cells, small data sets and low seeds first."""
    found = []
    for data, (seeds, backbones, more) in PLAN.items():
        for seed in range(seeds):
            for model, epochs in zip(MODELS, backbones, strict=True):
                start = Backbone(data, model, seed, epochs, stem=STEMS.get((data, model), "small"))
                found.append(Cell(start))
                found += [Cell(start, arm, more, treatment=t) for arm, t in ARMS.items()]
    return tuple(found)


def analyse(kept: Kept) -> dict[str, Any]:
    """Every data set and network, Holm's correction over all of them, and all trainings pooled."""
    groups = {
        name: group
        for name, group in compare_groups(kept, FROM_FINETUNE, FROM_BACKBONE).items()
        if "finetune" in group["arms"]
    }
    return {"groups": groups, "pooled": pool(groups, MERGING)}


def _against_finetune(found: dict[str, Any], arm: str) -> list[tuple[str, dict[str, Any]]]:
    """Data set and network, and the arm's test AUC there minus finetune's."""
    groups = {name: minus(group, "finetune") for name, group in found["groups"].items()}
    return [(name, rows[arm]["auc"]) for name, rows in groups.items() if arm in rows]


def came_out(found: dict[str, Any]) -> str:
    """What all trainings say together, and which comparisons show something on their own."""
    pooled = found["pooled"]
    clear = [
        f"{arm} on {name} {telling.difference(one)}"
        for arm in pooled
        for name, one in _against_finetune(found, arm)
        if told(one)
    ]
    idle = [
        f" {arm} MERGED NOTHING in {row['idle']} more trainings by the epoch that is scored."
        for arm, row in pooled.items()
        if row["idle"]
    ]
    return (
        f"{verdict(pooled, 'finetune')} "
        + " ".join(f"Mean {NAMES[metric]}: {_pooled(pooled, metric)}." for metric in NAMES)
        + " On one data set and network (Holm's correction over the table), in AUC: "
        + f"{'; '.join(clear) if clear else 'none'}."
        + "".join(idle)
    )


def _pooled(pooled: Mapping[str, Any], metric: str) -> str:
    """The arms' means over all trainings, and over those of networks that had learned."""
    parts = []
    for arm, row in pooled.items():
        text = f"{arm} {mean(row[metric])} of {row[metric]['trainings']} trainings"
        if row["learned"] is not None:
            learned = row["learned"][metric]
            text += f" ({mean(learned)} of {learned['trainings']} whose backbone had learned)"
        parts.append(text)
    return ", ".join(parts)


def sure(found: dict[str, Any]) -> str:
    """What the data sets could have told."""
    return (
        telling.could_tell(found["groups"], *(f"{arm} - finetune" for arm in MERGING))
        + " The pooled intervals count trainings as independent, though those of a data set share "
        "its test images; the mean of data sets does not."
    )


def notes(found: dict[str, Any]) -> tuple[str, ...]:
    """Which trainings tell little, and where merges were."""
    return (
        "Adam at 1e-3, of the second stage at 1e-4, batches of 128, no augmentation; epochs are "
        "those of the backbone plus those of the second stage. inmerge, adaptive has the quantile "
        "0.5 as its threshold (question 5), fixed before any training of this question.",
        telling.never_merged(found["groups"], MERGING),
        telling.one_answer(found["groups"]),
        telling.in_shortcuts(found["groups"], MERGING),
        *dict.fromkeys(
            f"{datasets.SOURCES[group['key'][0]].title}: ACC is the mean over {of['classes']} "
            f"findings, and the commoner answer to each has {of['constant']:.3f}; AUC is over the "
            f"{of['defined']} that have positive and negative test images. The "
            f"{group['images']} images are {of['patients']} patients'."
            for group in found["groups"].values()
            if (of := group["labels"])["patients"] is not None
        ),
        *(
            f"{name} has torchvision's stem (7x7, stride 2, max-pool), the others the small one."
            for name, group in found["groups"].items()
            if tuple(group["key"][:2]) in STEMS
        ),
    )


def tables(found: dict[str, Any]) -> list[Table]:
    """Arms beside the published numbers, then the differences."""
    rows, kinds = [], []
    for name, group in found["groups"].items():
        known = published(group["key"])
        data = group["key"][0]
        _, backbones, more = PLAN[data]
        epochs = backbones[MODELS.index(group["key"][1])]
        for arm, row in group["arms"].items():
            share = group["merged"][arm]
            cells = telling.mean_sd(row["auc"]), telling.mean_sd(row["acc"])
            beside = known if arm == "backbone" else ""
            shares = "" if share is None else f"{share:.2%}"
            rows.append((f"{name}: {arm}", f"{epochs}+{more}", *cells, shares, beside))
            kinds.append("total" if arm == "backbone" else "arm")
    arms = Table(
        "Test AUC and ACC, mean \u00b1 sd over seeds; published: 100 epochs, where ours are fewer",
        ("data set, network: arm", "epochs", "AUC", "ACC", "merged at an update", "published"),
        tuple(rows),
        tuple(kinds),
    )
    more = "The same from the backbone, which had no second stage"
    return [
        arms,
        telling.difference_table(telling.AGAINST_FINETUNE, found["groups"], "finetune"),
        pooled_table(found["pooled"], "finetune"),
        telling.difference_table(more, found["groups"], "backbone"),
    ]


def published(key: list[Any]) -> str:
    """The benchmark's AUC / ACC."""
    data, model, width, _ = key
    size = datasets.SOURCES[data].config.size
    known = published_reference({"name": data, "size": size}, {"name": model, "width": width})
    return "none" if known is None else f"{known.auc:.3f} / {known.acc:.3f}"


def figures(found: dict[str, Any]) -> list[Plot]:
    """The differences from finetune, by data set and network."""
    groups = {arm: _against_finetune(found, arm) for arm in MERGING}
    caption = (
        "Test AUC of the arms with merging minus that of finetune, which had the same second stage "
        "without merging. Dots: means over seeds; bars: 95% bootstrap intervals over seeds and "
        "test images. A bar that crosses the dotted line can't be told from no difference, which "
        "is not to say that there is none."
    )
    drawn = {name: rows for name, rows in groups.items() if rows}
    return [
        telling.interval_plot("Merging against finetune", drawn, "difference in test AUC", caption)
    ]


QUESTION = Question(
    name="medmnist",
    number=1,
    title="Does merging help?",
    asked=(
        "Is a network that goes on training with in-model merging (paper's rule: the most similar "
        "kernel, threshold 0.3, probability 0.3, alpha 0.8, all but the first 10 convolutions) "
        "better on test images than one that goes on without it?"
    ),
    cells=grid(),
    analyse=analyse,
    came_out=came_out,
    sure=sure,
    tables=tables,
    figures=figures,
    notes=notes,
)

if __name__ == "__main__":
    sys.exit(main(QUESTION))
