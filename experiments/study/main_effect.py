"""Question 1: backbone, finetune and inmerge on real data, with the benchmark's numbers beside."""

import sys
from collections.abc import Mapping
from typing import Any, Literal

from experiments.study import adaptive, datasets, pooling, telling
from experiments.study.cells import Backbone, Cell, Treatment
from experiments.study.command import main
from experiments.study.pooling import NAMES, mean, pool, pooled_table, verdict
from experiments.study.question import Kept, Question, compare_groups, differing, minus, told
from inmerge_jax.reporting.plots import Plot
from inmerge_jax.reporting.published import published_reference
from inmerge_jax.reporting.tables import Table

MODELS = ("vgg16", "resnet18")
# Data set to seeds, epochs of the backbones (the benchmark's are 100) in the order of MODELS, and
# of the second stage. VGG16, without batch normalisation, needs some 200 updates on BreastMNIST to
# leave the most frequent class (seen on validation images); on RetinaMNIST and ChestX-ray14 most of
# its backbones have not left it by the end, which the page says of each.
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
ADAPTIVE, NARROW = "inmerge, adaptive", "quantile 0.5"
"""The second arm, and what question 5 calls it on a narrower network."""


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
    cells = [c for c in adaptive.QUESTION.cells if c.arm in ("finetune", NARROW) or c.is_backbone]
    narrow = compare_groups(Kept.of(cells, kept.folder), ((NARROW, "finetune"),))
    return {
        "groups": groups,
        "pooled": pool(groups, MERGING),
        "narrow": pool(narrow, (NARROW,)),
    }


def _against_finetune(found: dict[str, Any], arm: str) -> list[tuple[str, dict[str, Any]]]:
    """Data set and network, and the arm's test AUC there minus finetune's."""
    return [
        (name, {**rows[arm]["auc"], "same": not differing(group, f"{arm} - finetune")})
        for name, group in found["groups"].items()
        if arm in (rows := minus(group, "finetune"))
    ]


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
    means = (
        f"mean {NAMES[metric]}: "
        + ", ".join(
            f"{arm} {mean(row[metric])} of {row[metric]['trainings']} trainings"
            for arm, row in pooled.items()
        )
        for metric in NAMES
    )
    return (
        ("" if clear or pooling.told(pooled) else "No difference was found. ")
        + f"{verdict(pooled, 'finetune')} Minus finetune, {'; '.join(means)}. Distinguished in AUC "
        + "on a single data set and network (Holm's correction over the table): "
        + f"{'; '.join(clear) if clear else 'none'}."
        + "".join(idle)
    )


def sure(found: dict[str, Any]) -> str:
    """What the data sets could have told, and what speaks against the pooled means."""
    parts = [telling.could_tell(found["groups"], *(f"{arm} - finetune" for arm in MERGING))]
    learned = found["pooled"].get(ADAPTIVE, {}).get("learned")
    if learned is not None:
        parts.append(
            f"Without the trainings whose backbone gives nearly every test image one answer, "
            f"{ADAPTIVE} is {mean(learned['auc'])} AUC and {mean(learned['acc'])} ACC of "
            f"{learned['auc']['trainings']} (a division made after the results were seen)."
        )
    narrow = found["narrow"].get(NARROW)
    if narrow is not None:
        parts.append(
            f"The same rule is {mean(narrow['auc'])} AUC in question 5's "
            f"{narrow['auc']['trainings']} trainings, of ResNet-18 at half width."
        )
    return (
        f"{' '.join(parts)} The pooled intervals count trainings as independent, though those of a "
        "data set share its test images; the mean of data sets does not."
    )


def notes(found: dict[str, Any]) -> tuple[str, ...]:
    """Which trainings tell little, and where merges were."""
    return (
        "Epochs and updates are those of the backbone plus those of the second stage. Adam at "
        "1e-3, of the second stage at 1e-4, batches of 128, no augmentation. inmerge, adaptive has "
        "the quantile 0.5 as its threshold (question 5), fixed before any training of this "
        "question.",
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
            lengths = f"{epochs}+{more}", _updates(group)
            rows.append((f"{name}: {arm}", *lengths, *cells, shares, beside))
            kinds.append("total" if arm == "backbone" else "arm")
    arms = Table(
        "Test AUC and ACC, mean \u00b1 sd over seeds; published: 100 epochs, where ours are fewer",
        (
            "data set, network: arm",
            "epochs",
            "updates",
            "AUC",
            "ACC",
            "merged at an update",
            "published",
        ),
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


def main_table(found: dict[str, Any]) -> Table:
    """Every arm, its difference from finetune with interval and p, and the published numbers."""
    rows, kinds = [], []
    for name, group in found["groups"].items():
        against = minus(group, "finetune")
        if "finetune - backbone" in group["differences"]:
            pair = group["differences"]["finetune - backbone"]
            against["backbone"] = {metric: negated(row) for metric, row in pair.items()}
        for arm, row in group["arms"].items():
            count = len(row["auc"]["seeds"])
            first = arm == "backbone"
            share = group["merged"][arm]
            words = f"{name} ({group['images']:,} images, {count} seeds): {arm}" if first else arm
            figures = []
            for metric in NAMES:
                figures.append(telling.mean_sd(row[metric]))
                figures += _gap(group, arm, against.get(arm, {}).get(metric))
            merged = "" if share is None else f"{share:.2%}"
            rows.append((words, *figures, merged, published(group["key"]) if first else ""))
            kinds.append("total" if first else "arm")
    columns = (
        *("data set, network: arm", "AUC", "minus finetune", "p"),
        *("ACC", "minus finetune", "p", "merged", "published"),
    )
    title = (
        "Test AUC and ACC, mean \u00b1 sd over seeds; minus finetune [95% interval over seeds and "
        "test images]; p after Holm's correction over all comparisons with finetune (of the "
        "backbone: with the backbone); kernels merged at an update; published: AUC / ACC of the "
        "benchmark, 100 epochs"
    )
    return Table(title, columns, tuple(rows), tuple(kinds))


def negated(row: Mapping[str, Any]) -> dict[str, Any]:
    """A difference the other way round."""
    return {**row, "mean": -row["mean"], "low": -row["high"], "high": -row["low"]}


def _gap(group: Mapping[str, Any], arm: str, row: Mapping[str, Any] | None) -> tuple[str, str]:
    """A difference from finetune and its corrected p; that the networks are the same."""
    if row is None:
        return ("", "")
    pair = "finetune - backbone" if arm == "backbone" else f"{arm} - finetune"
    if not differing(group, pair):
        return ("finetune itself", "")
    corrected = row.get("p_holm")
    return (telling.difference(row), "" if corrected is None else telling.p_value(corrected))


def _updates(group: Mapping[str, Any]) -> str:
    """Of the backbone and of the second stage."""
    steps = group["steps"]
    return f"{steps['backbone']}+{steps['finetune']}" if "backbone" in steps else ""


def published(key: list[Any]) -> str:
    """The benchmark's AUC / ACC."""
    data, model, width, _ = key
    size = datasets.SOURCES[data].config.size
    known = published_reference({"name": data, "size": size}, {"name": model, "width": width})
    return "none" if known is None else f"{known.auc:.3f} / {known.acc:.3f}"


def figures(found: dict[str, Any]) -> list[Plot]:
    """The differences from finetune, by data set and network."""
    groups = {arm: _against_finetune(found, arm) for arm in MERGING}
    bars = [row for rows in groups.values() for _, row in rows if not row["same"]]
    crossing = sum(row["low"] <= 0 <= row["high"] for row in bars)
    caption = (
        "Test AUC of the arms with merging minus that of finetune, which had the same second stage "
        "without merging. Dots: means over seeds; bars: 95% bootstrap intervals over seeds and "
        "test images; hollow: nothing was merged, so these networks are finetune's. "
        f"{crossing} of the {len(bars)} others have a bar that crosses the dotted line: they can't "
        "be told from no difference, which is not to say that there is none."
    )
    drawn = {name: rows for name, rows in groups.items() if rows}
    return [
        telling.interval_plot("Merging against finetune", drawn, "difference in test AUC", caption)
    ]


QUESTION = Question(
    name="main_effect",
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
