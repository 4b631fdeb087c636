"""A threshold that each layer sets by its own similarities."""

import numpy as np

from experiments.study.analysis import groups, intervals, pool
from experiments.study.archive import Archive
from experiments.study.questions import shared
from experiments.study.questions.question import Found, Overview, Question
from experiments.study.render import difference, dot_plot, markdown, p_value, share
from experiments.study.trials import Treatment, Trial
from inmerge_jax.reporting.formatting import signed
from inmerge_jax.reporting.plots import Plot

FIXED = "threshold 0.3 (paper)"
ARMS = {
    FIXED: shared.PAPER,
    "threshold 0.1": shared.WORKING,
    "quantile 0.5": Treatment("merge", quantile=0.5),
    "quantile 0.75": Treatment("merge", quantile=0.75),
    "quantile 0.9": Treatment("merge", quantile=0.9),
    "quantile 0.9, random partner": Treatment("merge", quantile=0.9, partner="random"),
}
PAIRS = tuple((arm, "finetune") for arm in ARMS)
FROM_FIXED = tuple((arm, FIXED) for arm in ARMS if arm.startswith("quantile"))


def analyse(archive: Archive) -> Found:
    """All trainings against fine-tuning and the fixed threshold, and the best by validation."""
    own = groups(QUESTION.trials, archive)
    gains = {
        arm: float(
            np.mean(
                [
                    np.mean([_val(archive, a) - _val(archive, b) for a, b in both])
                    for group in own
                    if (both := group.pairs((arm, "finetune"), changed=False))
                ]
            )
        )
        for arm in ARMS
    }
    return {
        "merged": {arm: float(np.mean([group.merged(arm) for group in own])) for arm in ARMS},
        "pooled": pool(own, PAIRS),
        "from fixed": pool(own, FROM_FIXED),
        "intervals": intervals(own, PAIRS),
        "validation": gains,
        "best": max(gains, key=gains.__getitem__),
    }


def _val(archive: Archive, trial: Trial) -> float:
    return archive.records[trial.hash]["result"]["val"]["auc"]


def table(found: Found) -> str:
    """A row for each rule."""
    rows = []
    for arm in ARMS:
        gap = found["pooled"][f"{arm} - finetune"]["auc"]
        fixed = found["from fixed"].get(f"{arm} - {FIXED}")
        rows.append(
            (
                arm,
                share(found["merged"][arm]),
                difference(gap, 4),
                p_value(gap["p_holm"]),
                "" if fixed is None else difference(fixed["auc"], 4),
                signed(found["validation"][arm], 4),
            )
        )
    columns = (
        *("Rule", "Kernels merged per update", "Test AUC minus fine-tuning", "p after Holm"),
        *("Test AUC minus threshold 0.3", "Validation AUC minus fine-tuning"),
    )
    return markdown(columns, rows)


def figure(found: Found) -> Plot:
    """Differences from fine-tuning, by rule and data set."""
    series = shared.series(found["intervals"])
    return dot_plot(
        "Fixed thresholds and quantiles, minus fine-tuning", "difference in test AUC", series
    )


def overview(found: Found) -> Overview:
    """The rule that validation chooses, against fine-tuning."""
    best = found["best"]
    return shared.overview(
        f"{best}, minus fine-tuning", found["pooled"][f"{best} - finetune"]["auc"]
    )


QUESTION = Question(
    name="adaptive",
    title="Does an adaptive threshold help?",
    hypothesis=(
        "A threshold at a quantile of each layer's own similarities gives a higher test AUC than a "
        "fixed threshold, and than fine-tuning without merging."
    ),
    trials=shared.second_stages(ARMS),
    analyse=analyse,
    table=table,
    figure=figure,
    overview=overview,
)
