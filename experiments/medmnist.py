"""Question 1: backbone, finetune and inmerge on real data, with the benchmark's numbers beside."""

import sys
from collections.abc import Mapping
from typing import Any, Literal

from experiments.study import datasets, telling
from experiments.study.cells import Backbone, Cell, Treatment
from experiments.study.command import main
from experiments.study.question import Kept, Question, compare_groups, minus, told, where
from experiments.study.statistics import holm, interval_over_trainings, sign_flips_over_seeds
from inmerge_jax.reporting import wording
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
# Its quantile was fixed before anything was trained, not chosen by that question's answers.
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
    data = {where(key): (list(key), cells) for key, cells in kept.groups().items()}
    groups = {
        name: {"key": data[name][0], **group}
        for name, group in compare_groups(kept, FROM_FINETUNE, FROM_BACKBONE).items()
        if "finetune" in group["arms"]
    }
    pooled = {}
    for arm in MERGING:
        merges = {name: data[name][1].merges(arm) for name in groups}
        found = pool(groups, merges, arm)
        if found is not None:
            pooled[arm] = found
    corrected = holm([row["p_seeds"] for row in pooled.values()])
    for row, value in zip(pooled.values(), corrected, strict=True):
        row["p_holm"] = value
    return {"groups": groups, "pooled": pooled}


def pool(
    groups: Mapping[str, Any], merges: Mapping[str, Mapping[int, int]], arm: str
) -> dict[str, Any] | None:
    """The arm's test AUC minus finetune's over the trainings of all groups that merged something.

    A training whose scores are finetune's own does not count: where it merged at all, it did so
    only after the epoch that is scored.

    Args:
      groups: what `compare_groups` gave.
      merges: group to seed to the kernels that the arm merged there.
      arm: one with merging.

    Returns:
      What `came_out` tells; None where no training merged anything.
    """
    gaps, idle, by_data = [], 0, {}
    for name, group in groups.items():
        if arm not in minus(group, "finetune"):
            continue
        both = [seed for seed in group["over"][arm] if seed in group["over"]["finetune"]]
        of_seeds = minus(group, "finetune")[arm]["auc"]["seeds"]
        for seed, gap in zip(both, of_seeds, strict=True):
            if merges[name][seed] and seed not in group["identical"][f"{arm} - finetune"]:
                gaps.append(gap)
                by_data.setdefault(group["key"][0], []).append(gap)
            else:
                idle += 1
    if not gaps:
        return None
    found = {
        "trainings": len(gaps),
        "merged_nothing": idle,
        "mean": sum(gaps) / len(gaps),
        "data_sets": {data: sum(some) / len(some) for data, some in by_data.items()},
        "better": sum(gap > 0 for gap in gaps),
        "p_seeds": sign_flips_over_seeds(gaps),
    }
    if len(gaps) == 1:
        return found
    low, high = interval_over_trainings(gaps)
    return found | {"low": low, "high": high}


def _against_finetune(found: dict[str, Any], arm: str) -> list[tuple[str, dict[str, Any]]]:
    """Data set and network, and the arm's test AUC there minus finetune's."""
    groups = {name: minus(group, "finetune") for name, group in found["groups"].items()}
    return [(name, rows[arm]["auc"]) for name, rows in groups.items() if arm in rows]


def _pooled_mean(row: dict[str, Any]) -> str:
    """The mean over all trainings with its interval, which one training does not have."""
    mean = wording.signed(row["mean"], 4)
    if "low" not in row:
        return mean
    return f"{mean} [{wording.signed(row['low'], 4)}, {wording.signed(row['high'], 4)}]"


def _over_data_sets(row: dict[str, Any]) -> str:
    """The mean over data sets, each with its own mean: trainings share their test images."""
    means = list(row["data_sets"].values())
    if len(means) < 2:
        return ""
    mean, (low, high) = sum(means) / len(means), interval_over_trainings(means)
    ends = f"{wording.signed(low, 4)}, {wording.signed(high, 4)}"
    return f", {wording.signed(mean, 4)} [{ends}] as the mean of {len(means)} data sets"


def came_out(found: dict[str, Any]) -> str:
    """What all trainings say together, and how many comparisons show something on their own."""
    parts, clear, idle = [], [], []
    for arm, row in found["pooled"].items():
        clear += [
            f"{arm} on {name} {telling.difference(one)}"
            for name, one in _against_finetune(found, arm)
            if told(one)
        ]
        count = row["trainings"]
        flips = (
            f"p {telling.p_value(row['p_holm'])} by sign flips, after Holm's correction"
            if count > 5
            else "too few for a test by sign flips"
        )
        parts.append(
            f"{arm}: {_pooled_mean(row)} over {count} pair{'s' if count > 1 else ''} of trainings, "
            f"{row['better']} of them better ({flips}){_over_data_sets(row)}"
        )
        if row["merged_nothing"]:
            idle.append(
                f"{arm} MERGED NOTHING in {row['merged_nothing']} more trainings by the epoch that "
                "is scored"
            )
    apart = "; ".join(clear) if clear else "none"
    return (
        f"Mean test AUC minus that of going on without merging: {'; '.join(parts)}. Distinguished "
        f"from finetune on one data set (p < 0.05 after Holm's correction): {apart}."
        + "".join(f" {text}." for text in idle)
    )


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
        "0.5 as its threshold (question 5), fixed before anything was trained.",
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
        "test images. A bar that crosses the dotted line shows no difference."
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
