"""Question 2: each number of the rule, changed on its own."""

import dataclasses
import sys
from typing import Any

from experiments.study import batch_statistics, shared, telling
from experiments.study.cells import Treatment
from experiments.study.command import main
from experiments.study.pooling import alone, pool, pooled_table, verdict
from experiments.study.question import Kept, Question, compare_groups, minus, told, where
from inmerge_jax.reporting import wording
from inmerge_jax.reporting.plots import Plot
from inmerge_jax.reporting.tables import Table

# Values around the rule's own, by the name of the treatment's field.
SWEEPS: dict[str, tuple[Any, ...]] = {
    "alpha": (0.5, 0.9),
    "threshold": (-1.0, 0.15, 0.2, 0.3),
    "probability": (0.1, 1.0),
    "skip": (0, 5, 15),
    "partner": ("random",),
    "every": (4, 0),
}
UNITS = {
    "alpha": "alpha: share of the kernel that stays",
    "threshold": "threshold tau: cosine to exceed",
    "probability": "probability p of a kernel to be selected",
    "skip": "L_s: convolutions that are left alone (of 20)",
    "partner": "partner",
    "every": "merging every so many updates",
}
_BASE = shared.WORKING


def arms() -> dict[str, Treatment]:
    """The rule itself, and every change of one number."""
    found = {"rule": _BASE}
    for field, values in SWEEPS.items():
        for value in values:
            if value != getattr(_BASE, field):
                found[f"{field} {value}"] = dataclasses.replace(_BASE, **{field: value})
    return found


ARMS = arms()
PAIRS = tuple((arm, "finetune") for arm in ARMS)
CHANGES = tuple(arm for arm in ARMS if arm != "rule")
FROM_RULE = tuple((arm, "rule") for arm in CHANGES)


def analyse(kept: Kept) -> dict[str, Any]:
    """Each data set, and all trainings together, against finetune and the unchanged rule."""
    groups = compare_groups(kept, PAIRS, FROM_RULE, alone=shared.SECOND_STAGE)
    for key, cells in kept.groups().items():
        groups[where(key)]["batch_statistics"] = batch_statistics.summary(cells)
    return {
        "groups": groups,
        "pooled": pool(groups, tuple(ARMS)),
        "changes": pool(groups, CHANGES, "rule"),
    }


def came_out(found: dict[str, Any]) -> str:
    """What is distinguished from finetune, and the range of means."""
    parts = []
    for name, group in found["groups"].items():
        rows = {arm: row["auc"] for arm, row in minus(group, "finetune").items()}
        if not rows:
            continue
        clear = [f"{arm} {telling.difference(row)}" for arm, row in rows.items() if told(row)]
        means = [row["mean"] for row in rows.values()]
        said = (
            f"distinguished from finetune (p < 0.05 after Holm's correction): {'; '.join(clear)}"
            if clear
            else "none is distinguished from finetune after Holm's correction"
        )
        parts.append(
            f"{name}: {len(rows)} settings, means from {min(means):+.3f} to {max(means):+.3f} AUC "
            f"against finetune; {said}"
        )
    changes = found["changes"]
    parts.append(
        f"Each setting minus the rule with nothing changed: {verdict(changes, 'the rule')}"
    )
    about = shared.around(found["groups"], "rule", "threshold 0.3")
    return about + ". ".join(parts) + f" {alone(changes)}"


def sure(found: dict[str, Any]) -> str:
    """What could have been told."""
    could = telling.could_tell(found["groups"], *(f"{arm} - finetune" for arm in ARMS))
    return f"{could} No setting was chosen by these test scores: the whole sweep is shown."


def notes(found: dict[str, Any]) -> tuple[str, ...]:
    """What was trained, and what of it is due to lagging batch statistics."""
    return (
        f"{shared.PAGE_NOTE}.",
        f"{shared.RULE_NOTE}.",
        "every 4 merges every fourth update, every 0 once an epoch, the others at every update.",
        "Test scores are those of the running batch statistics, which lag behind weights that "
        "jump: the last table tells that apart.",
        *batch_statistics.notes(found["groups"]),
        telling.one_answer(found["groups"]),
    )


def tables(found: dict[str, Any]) -> list[Table]:
    """Every setting against finetune."""
    renewed = {name: group["batch_statistics"] for name, group in found["groups"].items()}
    against = telling.difference_table(telling.AGAINST_FINETUNE, found["groups"], "finetune")
    return [
        against,
        pooled_table(found["changes"], "rule"),
        pooled_table(found["pooled"], "finetune"),
        batch_statistics.table(renewed),
    ]


def figures(found: dict[str, Any]) -> list[Plot]:
    """A figure for each number of the rule."""
    drawn = []
    for field in SWEEPS:
        own = getattr(_BASE, field)
        values = sorted({own, *SWEEPS[field]}, key=lambda v: (v == 0 and field == "every", v))
        labels = {v: "epoch" if field == "every" and v == 0 else f"{v}" for v in values}
        series = {}
        for name, group in found["groups"].items():
            points = []
            for value in values:
                arm = "rule" if value == own else f"{field} {value}"
                row = minus(group, "finetune").get(arm)
                if row is not None:
                    points.append((value, row["auc"], group["merged"][arm]))
            series[name] = points
        caption = (
            "Lines and bands: test AUC minus finetune's, mean over seeds and 95% bootstrap "
            "interval; dotted: share of the kernels that merge at an update. The dashed line "
            "marks the rule that the others change; the values stand at equal distances. "
            + " ".join(_to_see(name, points, labels) for name, points in series.items() if points)
        )
        drawn.append(
            telling.sweep_plot(f"Effect of {field}", UNITS[field], series, caption, own, labels)
        )
    return drawn


def _to_see(name: str, points: list[tuple[Any, Any, Any]], labels: dict[Any, str]) -> str:
    """Where a data set's line is highest and lowest, and where its band leaves out zero."""
    ordered = sorted(points, key=lambda point: point[1]["mean"])
    low, high = (
        f"{wording.signed(row['mean'])} at {labels[v]}" for v, row, _ in (ordered[0], ordered[-1])
    )
    apart = [labels[value] for value, row, _ in points if not row["low"] <= 0 <= row["high"]]
    return (
        f"{name}: lowest {low}, highest {high}; bands without zero: {', '.join(apart) or 'none'}."
    )


QUESTION = Question(
    name="ablation",
    number=2,
    title="Which of the rule's numbers matter?",
    asked=(
        "How do alpha, the threshold, the probability, the layers left alone, the partner and how "
        "often merging happens change test AUC, each on its own, around the paper's rule with a "
        f"threshold of {shared.WORKING.threshold:g}, since with its {shared.PAPER.threshold:g} few "
        "kernels merge?"
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
