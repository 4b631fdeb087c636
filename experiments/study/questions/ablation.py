"""Each number of the rule, changed on its own."""

import dataclasses
from typing import Any

import numpy as np

from experiments.study import batch_statistics
from experiments.study.analysis import groups, intervals, pool
from experiments.study.archive import Archive
from experiments.study.questions import shared
from experiments.study.questions.question import Found, Overview, Question
from experiments.study.render import difference, dot_plot, markdown, p_value, share
from experiments.study.trials import Treatment
from inmerge_jax.reporting.plots import Plot

SWEEPS: dict[str, tuple[Any, ...]] = {
    "alpha": (0.5, 0.9),
    "threshold": (-1.0, 0.15, 0.2, 0.3),
    "probability": (0.1, 1.0),
    "skip": (0, 5, 15),
    "partner": ("random",),
    "every": (4, 0),
}
"""Field of the treatment to the values that are tried in place of the rule's own."""
ARMS: dict[str, Treatment] = {"rule": shared.WORKING} | {
    f"{field} {value}": dataclasses.replace(shared.WORKING, **{field: value})
    for field, values in SWEEPS.items()
    for value in values
}
PAIRS = tuple((arm, "finetune") for arm in ARMS)
FROM_RULE = tuple((arm, "rule") for arm in ARMS if arm != "rule")
LARGEST = "skip 0"
"""The change with the largest effect."""


def analyse(archive: Archive) -> Found:
    """All trainings against fine-tuning and against the unchanged rule."""
    own = groups(QUESTION.trials, archive)
    return {
        "merged": {arm: float(np.mean([group.merged(arm) or 0 for group in own])) for arm in ARMS},
        "pooled": pool(own, PAIRS),
        "changes": pool(own, FROM_RULE),
        "intervals": intervals(own, PAIRS),
        "batch statistics": batch_statistics.ranges(own),
    }


def table(found: Found) -> str:
    """A row for each setting."""
    rows = []
    for arm in ARMS:
        gap, change = (
            found[name].get(f"{arm} - {base}")
            for name, base in (("pooled", "finetune"), ("changes", "rule"))
        )
        more = (
            ("", "") if change is None else (difference(change["auc"]), p_value(change["auc"]["p"]))
        )
        name = "every 0 (once an epoch)" if arm == "every 0" else arm
        rows.append((name, share(found["merged"][arm]), difference(gap["auc"]), *more))
    columns = (
        *("Setting", "Kernels merged per update", "Test AUC minus fine-tuning"),
        *("Test AUC minus rule", "p, uncorrected"),
    )
    return markdown(columns, rows)


def figure(found: Found) -> Plot:
    """Differences from fine-tuning, by setting and data set."""
    series = shared.series(found["intervals"])
    return dot_plot("Settings of the rule, minus fine-tuning", "difference in test AUC", series)


def overview(found: Found) -> Overview:
    """The largest effect of a change."""
    return shared.overview(f"{LARGEST} minus rule", found["changes"][f"{LARGEST} - rule"]["auc"])


QUESTION = Question(
    name="ablation",
    title="Which settings of the rule matter?",
    hypothesis=(
        "Changing one of alpha, threshold, probability, skipped layers, partner or frequency "
        "changes the test AUC."
    ),
    trials=shared.second_stages(ARMS),
    analyse=analyse,
    table=table,
    figure=figure,
    overview=overview,
    measure=batch_statistics.measure,
    measured=batch_statistics.measured,
)
