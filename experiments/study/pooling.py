"""One answer of all data sets and networks: the mean difference over their trainings."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from experiments.study.question import minus
from experiments.study.statistics import (
    CONFIDENCE,
    METRICS,
    holm,
    over_trainings,
    sign_flips_over_seeds,
)
from experiments.study.telling import STUCK, difference, p_value
from inmerge_jax.reporting import wording
from inmerge_jax.reporting.tables import Table

NAMES = {"auc": "AUC", "acc": "ACC"}


def pool(
    groups: Mapping[str, Any], arms: Sequence[str], against: str = "finetune"
) -> dict[str, dict[str, Any]]:
    """Each arm's test AUC and ACC minus those of `against`, over the trainings of all groups.

    A training whose scores are those of `against` does not count: it merged nothing, or only after
    the epoch that is scored. p comes from sign flips over trainings, with Holm's correction over
    all arms and both metrics.

    Args:
      groups: what `compare_groups` gave.
      arms: to pool; those without a training that counts are left out.
      against: the arm that is subtracted.

    Returns:
      By arm: "idle" (trainings that don't count), "auc" and "acc" (see `summary`), and "learned",
      the same two over the trainings whose backbone does not give nearly every test image the same
      answer; None where all are of that kind, or none.
    """
    found = {}
    for arm in arms:
        rows, idle = _trainings(groups, arm, against)
        if not rows:
            continue
        learned = [row for row in rows if not row["stuck"]]
        apart = 0 < len(learned) < len(rows)
        found[arm] = {
            "idle": idle,
            **{metric: summary(rows, metric) for metric in METRICS},
            "learned": {m: summary(learned, m) for m in METRICS} if apart else None,
        }
    tested = [row[metric] for row in found.values() for metric in METRICS]
    for row, corrected in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = corrected
    return found


def _trainings(
    groups: Mapping[str, Any], arm: str, against: str
) -> tuple[list[dict[str, Any]], int]:
    rows, idle = [], 0
    for group in groups.values():
        if arm not in minus(group, against):
            continue
        both = [seed for seed in group["over"][arm] if seed in group["over"][against]]
        stuck = dict(
            zip(group["over"].get("backbone", ()), group["same"].get("backbone", ()), strict=True)
        )
        for index, seed in enumerate(both):
            if seed in group["identical"][f"{arm} - {against}"]:
                idle += 1
                continue
            of_arm = minus(group, against)[arm]
            gaps = {metric: of_arm[metric]["seeds"][index] for metric in METRICS}
            rows.append({"data": group["key"][0], "stuck": stuck.get(seed, 0.0) >= STUCK, **gaps})
    return rows, idle


def summary(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Of one metric's differences over trainings.

    Returns:
      "trainings", "better" and "worse" (how many), "mean", "median", "p" (sign flips), "data_sets"
      (the mean of each), and with two trainings or more "low" and "high" of the mean.
    """
    gaps = [row[metric] for row in rows]
    by_data: dict[str, list[float]] = {}
    for row in rows:
        by_data.setdefault(row["data"], []).append(row[metric])
    return {
        "trainings": len(gaps),
        "better": sum(gap > 0 for gap in gaps),
        "worse": sum(gap < 0 for gap in gaps),
        "median": median(gaps),
        "p": sign_flips_over_seeds(gaps),
        "data_sets": {data: sum(some) / len(some) for data, some in by_data.items()},
        **over_trainings(gaps),
    }


def told(pooled: Mapping[str, Any]) -> list[str]:
    """The differences that are distinguished from zero, in words."""
    return [
        f"{arm} {NAMES[metric]} {mean(row[metric])}"
        for arm, row in pooled.items()
        for metric in METRICS
        if row[metric]["p_holm"] < 1 - CONFIDENCE
    ]


def verdict(pooled: Mapping[str, Any], against: str) -> str:
    """Whether any arm differs over all trainings, as a sentence."""
    over = (
        f"Holm's correction over {len(pooled)} arm{'s' if len(pooled) > 1 else ''} and "
        f"{len(METRICS)} metrics"
    )
    apart = told(pooled)
    if apart:
        return f"Over all trainings, distinguished from {against} ({over}): {'; '.join(apart)}."
    text = f"Over all trainings no arm is distinguished from {against} in AUC or ACC ({over})"
    most = max((row["auc"]["trainings"] for row in pooled.values()), default=0)
    # Sign flips of n trainings have no smaller p than this.
    least = 2.0 ** (1 - most)
    if len(METRICS) * len(pooled) * least > 1 - CONFIDENCE:
        text += f", nor can any be: sign flips of {most} trainings give no p below {least:.2f}"
    return f"{text}."


def alone(pooled: Mapping[str, Any], metric: str = "auc") -> str:
    """Which arms' own intervals leave out zero, as a sentence."""
    apart: dict[str, list[str]] = {"better": [], "worse": []}
    for arm, found in pooled.items():
        row = found[metric]
        if "low" in row and not row["low"] <= 0 <= row["high"]:
            apart["better" if row["mean"] > 0 else "worse"].append(f"{arm} {mean(row)}")
    parts = [f"{which}: {'; '.join(some) if some else 'none'}" for which, some in apart.items()]
    return (
        f"Intervals of the mean {NAMES[metric]} over all trainings that leave out zero, each alone "
        f"and without correction: {', '.join(parts)}."
    )


def mean(row: Mapping[str, Any]) -> str:
    """The mean over trainings with its interval."""
    return difference(row, digits=4)


def over_data_sets(row: Mapping[str, Any]) -> str:
    """The mean of the data sets' own means, since trainings share their test images."""
    return difference(over_trainings(list(row["data_sets"].values())), digits=4)


def pooled_table(pooled: Mapping[str, Any], against: str) -> Table:
    """A row for each arm and metric."""
    rows = []
    for arm, found in pooled.items():
        for metric in METRICS:
            row, learned = found[metric], found["learned"]
            without = (
                f"{mean(learned[metric])} of {learned[metric]['trainings']}" if learned else ""
            )
            rows.append(
                (
                    f"{arm}: {NAMES[metric]}",
                    str(row["trainings"]),
                    f"{row['better']} / {row['worse']}",
                    mean(row),
                    wording.signed(row["median"], 4),
                    p_value(row["p"]),
                    p_value(row["p_holm"]),
                    over_data_sets(row),
                    without,
                )
            )
    title = (
        f"All trainings together, minus {against}'s: mean over trainings [Student's 95% interval, "
        "each alone]; p by sign flips, and by Holm over this table; of data sets: each with its "
        "own mean; that learned: without backbones that give nearly every test image one answer"
    )
    columns = (
        *("arm", "trainings", "better / worse", "mean", "median", "p", "Holm"),
        *("mean of data sets", "mean, those that learned"),
    )
    return Table(title, columns, tuple(rows), ("arm",) * len(rows))
