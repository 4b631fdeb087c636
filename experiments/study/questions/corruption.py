"""Are merged networks more robust or better calibrated? See docs/protocol.md, section 5."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.study import statistics
from experiments.study.analysis import Group, drawn_counts, groups
from experiments.study.archive import Archive
from experiments.study.corrupted_predictions import is_wanted, measure, measured
from experiments.study.prediction_errors import balanced_error, calibration_error
from experiments.study.questions import full_length, pretrained, shared
from experiments.study.questions.question import Found, Overview, Question
from experiments.study.render import difference, dot_plot, markdown, p_value
from experiments.study.trials import Trial
from inmerge_jax.reporting.plots import Plot

MARGIN, BINS = 0.01, 15
OUTCOMES = {"error": "balanced error, corrupted", "ece": "calibration error (ECE)"}
STUDIES: Mapping[str, Callable[[Archive], tuple[Trial, ...]]] = {
    "pretrained": pretrained.comparison_grid,
    "from random weights": lambda archive: full_length.grid(),
}
"""The questions whose trials are measured, with all their second stages."""


def grids(archive: Archive) -> dict[str, list[Trial]]:
    """The trials of each study; none before all of them are known."""
    found = {name: [t for t in grid(archive) if is_wanted(t)] for name, grid in STUDIES.items()}
    return found if all(found.values()) else {}


def analyse(archive: Archive) -> Found:
    """Errors and calibration by study, data set and arm; once all trials are measured."""
    planned = grids(archive)
    every = [trial for trials in planned.values() for trial in trials]
    found: Found = shared.progress(every, archive, measured)
    if not shared.is_complete(found):
        return found
    found |= {"groups": {}, "pooled": {}}
    for study, trials in planned.items():
        own = {group.name: _analyse_group(group) for group in groups(trials, archive)}
        arms = next(iter(own.values()))["differences"]
        pooled = {
            arm: {
                name: statistics.over_trials(
                    [gap for one in own.values() for gap in one["differences"][arm][name]["gaps"]],
                    MARGIN,
                )
                for name in OUTCOMES
            }
            for arm in arms
        }
        rows = [row for by in pooled.values() for row in by.values()]
        statistics.add_holm(rows, margin=MARGIN)
        for one in own.values():
            for by in one["differences"].values():
                for row in by.values():
                    del row["gaps"]
        found["groups"][study], found["pooled"][study] = own, pooled
    return found


def _analyse_group(group: Group) -> dict[str, Any]:
    """The arms of one network on one data set, on the same seeds and the same drawn images."""
    archive, data = group.archive, group.backbone.data
    seeds = sorted(set.intersection(*(set(by) for by in group.arms.values())))
    labels, counts = archive.labels[data].labels, drawn_counts(archive, data)
    values: dict[str, dict[str, np.ndarray]] = {}
    for arm, by_seed in group.arms.items():
        scores = [archive.scores(by_seed[seed]) for seed in seeds]
        corrupted = [archive.arrays[f"corrupted/{by_seed[seed].hash}"] for seed in seeds]
        some = slice(corrupted[0].shape[-1])
        values[arm] = {
            "error": np.stack(
                [balanced_error(labels[some], x, counts[:, some]).mean((1, 2)) for x in corrupted]
            ),
            "ece": np.stack([calibration_error(labels, x, counts, BINS) for x in scores]),
        }
    differences: dict[str, Any] = {}
    for arm in group.arms:
        if arm == "finetune":
            continue
        differences[arm] = {}
        for name in OUTCOMES:
            gaps = values[arm][name] - values["finetune"][name]
            interval = statistics.bootstrap(gaps[:, 0], gaps[:, 1:].T, np.random.default_rng(0))
            differences[arm][name] = {**interval._asdict(), "gaps": gaps[:, 0].tolist()}
    means = {name: float(x[:, 0].mean()) for name, x in values["finetune"].items()}
    return {"seeds": len(seeds), "finetune": means, "differences": differences}


def table(found: Found) -> str:
    """Differences from fine-tuning by outcome: each data set, and all pairs of each study."""
    rows = []
    for outcome, title in OUTCOMES.items():
        for study, by_arm in found["pooled"].items():
            for name, group in found["groups"][study].items():
                gaps = {arm: difference(by[outcome]) for arm, by in group["differences"].items()}
                cells = (gaps.get(arm, "") for arm in pretrained.MERGING)
                label = f"{title}: {name} ({group['seeds']} seeds)"
                rows.append((label, f"{group['finetune'][outcome]:.3f}", *cells))
            pooled = {arm: by[outcome] for arm, by in by_arm.items()}
            cells = (_cell(pooled[a]) if a in pooled else "" for a in pretrained.MERGING)
            count = next(iter(pooled.values()))["trials"]
            rows.append((f"{title}: all {count} pairs, {study}", "", *cells))
    columns = ("", "Fine-tuning", *(f"{arm} minus fine-tuning" for arm in pretrained.MERGING))
    return markdown(columns, rows) + shared.diverged_note(found)


def _cell(row: Mapping[str, Any]) -> str:
    p, equivalent = (p_value(row[name]) for name in ("p_holm", "p_equivalent"))
    return f"{difference(row, 4)}, p {p}, of equivalence {equivalent}"


def conclusion(row: Mapping[str, Any]) -> str:
    """The verdict about an outcome, of which less is better."""
    verdict = statistics.verdict(row)
    return {"helps": "harms", "harms": "helps"}.get(verdict, verdict)


def figure(found: Found) -> Plot:
    """By data set and arm, how much larger than fine-tuning's the error under corruption is."""
    series: dict[str, Found] = {}
    for own in found["groups"].values():
        for name, group in own.items():
            for arm, row in group["differences"].items():
                series.setdefault(arm, {})[name] = row["error"]
    return dot_plot("Robustness to corruption", "balanced error, minus fine-tuning's", series)


def overview(found: Found) -> Overview:
    """The paper's rule, both outcomes, over the pairs of the primary question."""
    rows = found["pooled"]["pretrained"]["paper"]
    effects, verdicts = [], []
    for outcome, title in OUTCOMES.items():
        row = rows[outcome]
        effects.append(f"{title}: {difference(row, 4)}")
        verdict = conclusion(row)
        if verdict == "no effect":
            verdict += f" larger than \u00b1{MARGIN}"
        if verdict == "undecided" and row.get("needed"):
            verdict += f" ({row['needed']:,} pairs would decide)"
        verdicts.append(f"{title}: {verdict}")
    return Overview("; ".join(effects), str(rows["error"]["trials"]), "; ".join(verdicts))


QUESTION = Question(
    name="corruption",
    title="Are merged networks more robust or better calibrated?",
    hypothesis=(
        "A second stage with merging has another error on corrupted images, or another calibration "
        "error, than the same stage without it."
    ),
    trials=(),
    later=lambda archive: tuple(t for trials in grids(archive).values() for t in trials),
    choices=pretrained.rates_table,
    analyse=analyse,
    table=table,
    figure=figure,
    overview=overview,
    measure=measure,
    measured=measured,
)
