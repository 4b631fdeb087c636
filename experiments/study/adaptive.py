"""Question 5: a threshold that each layer sets by its own kernels."""

import sys
from typing import Any

from experiments.study import shared, telling
from experiments.study.cells import Treatment
from experiments.study.command import main
from experiments.study.pooling import alone, pool, pooled_table, verdict
from experiments.study.question import Kept, Question, compare_groups, minus, told
from inmerge_jax.reporting.plots import Plot
from inmerge_jax.reporting.tables import Table

ARMS = {
    "threshold 0.3 (paper)": shared.PAPER,
    "threshold 0.1": shared.WORKING,
    "quantile 0.5": Treatment("merge", quantile=0.5),
    "quantile 0.75": Treatment("merge", quantile=0.75),
    "quantile 0.9": Treatment("merge", quantile=0.9),
    "quantile 0.9, random partner": Treatment("merge", quantile=0.9, partner="random"),
}
FIXED = "threshold 0.3 (paper)"
FROM_FINETUNE = tuple((arm, "finetune") for arm in ARMS)
FROM_FIXED = tuple((arm, FIXED) for arm in ARMS if arm.startswith("quantile"))


def analyse(kept: Kept) -> dict[str, Any]:
    """Each data set, Holm's correction, and the arm with the best validation AUC."""
    groups = compare_groups(kept, FROM_FINETUNE, FROM_FIXED, alone=shared.SECOND_STAGE)
    gains: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for group in groups.values():
        plain = dict(
            zip(group["over"].get("finetune", []), group["val"].get("finetune", []), strict=True)
        )
        for arm in ARMS:
            own = zip(group["over"].get(arm, []), group["val"].get(arm, []), strict=True)
            mine = [value - plain[seed] for seed, value in own if seed in plain]
            gains[arm] += [sum(mine) / len(mine)] if mine else []
    whole = {arm: sum(g) / len(g) for arm, g in gains.items() if len(g) == len(groups)}
    best = max(whole, key=lambda arm: whole[arm]) if whole else None
    rates = {
        arm: [group["merged"][arm] for group in groups.values() if arm in group["merged"]]
        for arm in ARMS
    }
    return {
        "groups": groups,
        "pooled": pool(groups, tuple(ARMS)),
        "val_gain": whole,
        "best": best,
        "rates": rates,
    }


def came_out(found: dict[str, Any]) -> str:
    """The rates, and what validation chooses, with what the test images then say of it."""
    rates = "; ".join(
        f"{arm} {', '.join(f'{rate:.1%}' for rate in values)}"
        for arm, values in found["rates"].items()
        if values
    )
    best = found["best"]
    if best is None:
        return f"Kernels merged at an update: {rates}."
    tests = [
        f"{name} {telling.difference(minus(group, 'finetune')[best]['auc'])}"
        for name, group in found["groups"].items()
        if best in minus(group, "finetune")
    ]
    against = [
        f"{arm} on {name} {telling.difference(row['auc'])}"
        for name, group in found["groups"].items()
        for arm, row in minus(group, FIXED).items()
        if told(row["auc"])
    ]
    fixed = "; ".join(against) if against else "none"
    return (
        f"Kernels merged at an update, by data set: {rates}. Quantiles distinguished in test AUC "
        f"from the paper's threshold (p < 0.05 after Holm's correction): {fixed}. On validation "
        f"images {best} gains most over finetune ({found['val_gain'][best]:+.4f} AUC); on test "
        f"images it differs from finetune by {'; '.join(tests)}. "
        f"{verdict(found['pooled'], 'finetune')} {alone(found['pooled'])}"
    )


def sure(found: dict[str, Any]) -> str:
    """What could have been told, and whether anything is recommended."""
    best = found["best"]
    rows = [
        minus(group, "finetune")[best]["auc"]
        for group in found["groups"].values()
        if best in minus(group, "finetune")
    ]
    clear = len(rows) > 1 and all(row["low"] > 0 and told(row) for row in rows)
    recommended = (
        "on every data set it is better than finetune (p < 0.05 after Holm's correction)"
        if clear
        else "it is not distinguished from finetune on every data set, so no rule is recommended "
        "over training on without merging"
    )
    could = telling.could_tell(found["groups"], *(f"{arm} - finetune" for arm in ARMS))
    return (
        f"{could} The rule was chosen by the best validation AUC of an epoch, which favours a rule "
        f"that swings; {recommended}."
    )


def notes(found: dict[str, Any]) -> tuple[str, ...]:
    """What was trained, and what a quantile does for certain."""
    return (
        f"{shared.PAGE_NOTE}.",
        "What the quantile does for certain is to merge at about its rate, probability times "
        "(1 - quantile), a little less in layers of few kernels, whatever the network; a fixed "
        "threshold does not.",
    )


def tables(found: dict[str, Any]) -> list[Table]:
    """Differences from finetune and from the paper's rule, and what validation said."""
    more = "The same minus the paper's fixed threshold"
    val = Table(
        "Validation AUC minus finetune's, mean over data sets and seeds: what chooses the rule",
        ("rule", "validation AUC, difference"),
        tuple((arm, f"{gain:+.4f}") for arm, gain in found["val_gain"].items()),
        tuple("arm" for _ in found["val_gain"]),
    )
    return [
        telling.difference_table(telling.AGAINST_FINETUNE, found["groups"], "finetune"),
        telling.difference_table(more, found["groups"], FIXED),
        pooled_table(found["pooled"], "finetune"),
        val,
    ]


def figures(found: dict[str, Any]) -> list[Plot]:
    """Differences by rule."""
    groups = {
        name: [(arm, row["auc"]) for arm, row in minus(group, "finetune").items()]
        for name, group in found["groups"].items()
    }
    caption = (
        "Test AUC minus that of finetune, with a fixed threshold and with quantiles of each "
        "layer's own similarities. Dots: means over seeds; bars: 95% bootstrap intervals over "
        "seeds and test images."
    )
    title, unit = "Fixed thresholds and quantiles", "difference in test AUC"
    return [telling.interval_plot(title, groups, unit, caption)]


QUESTION = Question(
    name="adaptive",
    number=5,
    title="A threshold that adapts",
    asked=(
        "Does a threshold that is a quantile of each layer's own similarities, so that merging "
        "happens at a chosen rate, do better than a fixed one?"
    ),
    cells=shared.second_stages(ARMS),
    analyse=analyse,
    came_out=came_out,
    sure=sure,
    tables=tables,
    figures=figures,
    notes=notes,
)

if __name__ == "__main__":
    sys.exit(main(QUESTION))
