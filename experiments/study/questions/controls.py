"""Is it the similarity of the partner that matters?"""

import dataclasses

import numpy as np

from experiments.study import batch_statistics
from experiments.study.analysis import groups, intervals, pool
from experiments.study.archive import Archive
from experiments.study.questions import shared
from experiments.study.questions.question import Found, Overview, Question
from experiments.study.render import difference, dot_plot, markdown, p_value, share
from experiments.study.trials import Treatment
from inmerge_jax.reporting.plots import Plot

ARMS = {
    "merge": shared.WORKING,
    "any partner": dataclasses.replace(shared.WORKING, kind="any"),
    "any partner, every selected kernel": Treatment("merge", threshold=-1.0, partner="random"),
    "least similar partner": dataclasses.replace(shared.WORKING, kind="least"),
    "noise of the same length": dataclasses.replace(shared.WORKING, kind="noise"),
    "shrink and perturb": dataclasses.replace(shared.WORKING, kind="perturb"),
    "averaged weights (0.99)": Treatment("ema", decay=0.99),
    "weight decay 5e-4": Treatment("decay", decay=5e-4),
    # Added before Adam's moments, 5e-4 has no effect in so short a stage; this is of the gradient's
    # size.
    "weight decay 0.05": Treatment("decay", decay=0.05),
}
PAIRS = tuple((arm, "finetune") for arm in ARMS)
FROM_CONTROLS = tuple(("merge", arm) for arm in ARMS if arm != "merge")
CONTROL = "any partner"
"""The control that differs from merging in the choice of the partner alone."""


def analyse(archive: Archive) -> Found:
    """All trainings against fine-tuning, and merging against each control."""
    own = groups(QUESTION.trials, archive)
    shares = {arm: [s for group in own if (s := group.merged(arm)) is not None] for arm in ARMS}
    return {
        "merged": {arm: float(np.mean(some)) if some else None for arm, some in shares.items()},
        "pooled": pool(own, PAIRS),
        "controls": pool(own, FROM_CONTROLS),
        "intervals": intervals(own, PAIRS),
        "re-estimated": {
            control: batch_statistics.differences(own, (merge, control))
            for merge, control in FROM_CONTROLS
        },
        "batch statistics": batch_statistics.ranges(own),
    }


def table(found: Found) -> str:
    """A row for each control."""
    rows = []
    for arm in ARMS:
        gap = found["pooled"][f"{arm} - finetune"]["auc"]
        cells = ["", "", ""]
        if arm != "merge":
            direct = found["controls"][f"merge - {arm}"]["auc"]
            renewed = found["re-estimated"][arm]["renewed"]["auc"]
            cells = [difference(direct), p_value(direct["p"]), difference(renewed)]
        rows.append((arm, share(found["merged"][arm]), difference(gap), *cells))
    columns = (
        *("Arm", "Kernels changed per update", "Test AUC minus fine-tuning"),
        *("Merging minus arm, test AUC", "p, uncorrected"),
        "Merging minus arm, validation AUC, statistics re-estimated",
    )
    return markdown(columns, rows)


def figure(found: Found) -> Plot:
    """Differences from fine-tuning, by arm and data set."""
    series = shared.series(found["intervals"])
    return dot_plot("Merging and its controls, minus fine-tuning", "difference in test AUC", series)


def overview(found: Found) -> Overview:
    """Merging against any partner."""
    row = found["controls"][f"merge - {CONTROL}"]["auc"]
    return shared.overview("most similar minus any partner", row)


QUESTION = Question(
    name="controls",
    title="Is it similarity that matters?",
    hypothesis=(
        "Mixing a kernel with its most similar one gives a higher test AUC than mixing it with any "
        "other, than noise of the same length, weight averaging or weight decay."
    ),
    trials=shared.second_stages(ARMS),
    analyse=analyse,
    table=table,
    figure=figure,
    overview=overview,
    measure=batch_statistics.measure,
    measured=batch_statistics.measured,
)
