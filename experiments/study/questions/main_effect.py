"""Does a second stage with merging beat the same second stage without it?"""

import json
from typing import Any, Literal

from experiments.study.analysis import groups, intervals, pool
from experiments.study.archive import RESULTS, Archive
from experiments.study.questions import adaptive
from experiments.study.questions.question import Found, Overview, Question
from experiments.study.questions.shared import overview as shared_overview
from experiments.study.render import difference, dot_plot, markdown
from experiments.study.trials import Backbone, Treatment, Trial
from inmerge_jax.reporting.plots import Plot
from inmerge_jax.reporting.published import published_reference

MODELS = ("vgg16", "resnet18")
# Data set to seeds, epochs of the backbones (100 in the benchmark) in the order of MODELS, and of
# the second stage. A VGG16 without batch normalisation needs some 200 updates on BreastMNIST to
# predict more than the most frequent class (validation images).
PLAN = {
    "breastmnist": (5, (60, 24), 8),
    "retinamnist": (5, (30, 16), 6),
    "bloodmnist_like": (3, (2, 2), 1),
    "pneumoniamnist": (3, (6, 3), 1),
    "chestxray14": (3, (4, 30), 2),
}
# At 64 px torchvision's stem takes a ResNet-18 a fifteenth of the small stem's operations.
STEMS: dict[tuple[str, str], Literal["imagenet"]] = {("chestxray14", "resnet18"): "imagenet"}
# The second arm merges on every network. Its quantile was fixed before any of these trainings.
ADAPTIVE = "inmerge, adaptive"
ARMS = {
    "finetune": Treatment(),
    "inmerge": Treatment("merge"),
    ADAPTIVE: Treatment("merge", quantile=0.5),
}
PAIRS = (("inmerge", "finetune"), (ADAPTIVE, "finetune"))
STAGE = (("finetune", "backbone"),)


def grid() -> tuple[Trial, ...]:
    """All trials, small data sets and low seeds first."""
    found = []
    for data, (seeds, backbones, more) in PLAN.items():
        for seed in range(seeds):
            for model, epochs in zip(MODELS, backbones, strict=True):
                start = Backbone(data, model, seed, epochs, stem=STEMS.get((data, model), "small"))
                found.append(Trial(start))
                found += [Trial(start, arm, more, treatment=t) for arm, t in ARMS.items()]
    return tuple(found)


def analyse(archive: Archive) -> Found:
    """Every data set and network, and all trainings pooled."""
    own = groups(QUESTION.trials, archive)
    rows = {
        group.name: {
            "seeds": len(group.records("finetune")),
            "backbone": group.mean("backbone", "auc"),
            "finetune": group.mean("finetune", "auc"),
            "published": _published(group.backbone),
        }
        for group in own
    }
    narrow = groups(adaptive.QUESTION.trials, archive)
    return {
        "groups": rows,
        "intervals": intervals(own, PAIRS),
        "pooled": pool(own, PAIRS),
        "learned": pool(own, PAIRS, learned=True),
        "second stage": pool(own, STAGE),
        "half width": pool(narrow, (("quantile 0.5", "finetune"),)),
        "retrained": retrained(),
    }


def retrained() -> dict[str, Any]:
    """How far retrained trials came out from the stored ones, in AUC.

    "commits" has two of them, retrained on one machine at their own commit and at later ones.
    """
    stored = json.loads((RESULTS / "again.json").read_bytes())
    rows = stored["rows"]
    gaps = [row["auc"][0] - row["auc"][1] for row in rows]
    equal = sum(row["between_them"] == 0 for row in rows)
    return {
        "trials": len(gaps),
        "lower": sum(gap > 0 for gap in gaps),
        "equal twice": equal,
        "smallest": min(gaps),
        "largest": max(gaps),
        "stored": {row["trial"]: row["auc"][0] for row in rows},
        "commits": {
            f"{row['trial']} {row['commit']}": row["auc"] for row in stored.get("commits", ())
        },
    }


def _published(start: Backbone) -> float | None:
    from experiments.study import datasets

    size = datasets.SOURCES[start.data].config.size
    model = {"name": start.model, "width": start.width}
    known = published_reference({"name": start.data, "size": size}, model)
    return None if known is None else known.auc


def table(found: Found) -> str:
    """Test AUC by data set and network."""
    rows = []
    for name, group in found["groups"].items():
        gaps = [difference(found["intervals"][f"{arm} - finetune"].get(name)) for arm, _ in PAIRS]
        published = "" if group["published"] is None else f"{group['published']:.3f}"
        values = (f"{group[arm]:.3f}" for arm in ("backbone", "finetune"))
        rows.append((f"{name} ({group['seeds']} seeds)", *values, *gaps, published))
    columns = (
        *("Test AUC", "Backbone", "Fine-tuning", "Merging, threshold 0.3, minus fine-tuning"),
        *("Merging, median threshold, minus fine-tuning", "MedMNIST benchmark, 100 epochs"),
    )
    return markdown(columns, rows)


def figure(found: Found) -> Plot:
    """The differences from fine-tuning, by data set and network."""
    series = dict(
        zip(("threshold 0.3", "median threshold"), found["intervals"].values(), strict=True)
    )
    return dot_plot("Merging minus fine-tuning", "difference in test AUC", series)


def overview(found: Found) -> Overview:
    """The paper's rule, over all trainings."""
    return shared_overview(
        "paper's rule minus fine-tuning", found["pooled"]["inmerge - finetune"]["auc"]
    )


QUESTION = Question(
    name="main_effect",
    title="Does merging help?",
    hypothesis="Merging in the second stage raises the test AUC over the same stage without it.",
    trials=grid(),
    analyse=analyse,
    table=table,
    figure=figure,
    overview=overview,
)
