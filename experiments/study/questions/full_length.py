"""Does merging help from random weights at the benchmark's length? See docs/protocol.md, 2."""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from scipy import stats

from experiments.study import archive as store
from experiments.study import corrupted_predictions, datasets
from experiments.study.analysis import Group, groups, intervals
from experiments.study.archive import Archive
from experiments.study.questions import shared
from experiments.study.questions.question import Found, Overview, Question, is_lost
from experiments.study.render import difference, dot_plot, markdown, p_value
from experiments.study.stages import Paths, best_state
from experiments.study.statistics import CONFIDENCE, add_holm, over_trials, verdict
from experiments.study.trials import Backbone, Treatment, Trial, with_dependencies
from inmerge_jax.reporting.plots import Plot
from inmerge_jax.reporting.published import published_reference
from inmerge_jax.training.metrics import compute_metrics
from inmerge_jax.training.parallel import replicate

MODEL = "resnet18"
# Seeds, epochs of the backbone (100 in the benchmark) and of the second stage. The two larger sets
# have what three hours on two cores allow.
PLAN = {
    "breastmnist": (8, 100, 30),
    "retinamnist": (8, 100, 30),
    "pneumoniamnist": (5, 12, 4),
    "bloodmnist_like": (5, 5, 1),
}
BENCHMARK_EPOCHS, CHECK_SEEDS = 100, 3
"""Of the benchmark; and the seeds after which the backbones are compared with it."""
ARMS = {
    "finetune": Treatment(),
    "paper": Treatment("merge"),
    "quantile": Treatment("merge", quantile=0.5),
}
MERGING = ("paper", "quantile")
PAIRS = tuple((arm, "finetune") for arm in MERGING)
STATISTICS = ("running", "re-estimated")


def grid() -> tuple[Trial, ...]:
    """All second stages, low seeds first."""
    found = []
    for seed in range(max(seeds for seeds, _, _ in PLAN.values())):
        for data, (seeds, epochs, more) in PLAN.items():
            start = Backbone(data, MODEL, seed, epochs)
            if seed < seeds:
                found += [Trial(start, arm, more, treatment=given) for arm, given in ARMS.items()]
    return tuple(found)


def full_sets() -> tuple[str, ...]:
    """The data sets whose backbones train for as many epochs as the benchmark's."""
    return tuple(data for data, (_, epochs, _) in PLAN.items() if epochs == BENCHMARK_EPOCHS)


def first_grid() -> tuple[Trial, ...]:
    """The part of `grid` after which the backbones are compared with the benchmark."""
    return tuple(trial for trial in grid() if trial.backbone.seed < CHECK_SEEDS)


def later(archive: Archive) -> tuple[Trial, ...]:
    """The rest of `grid`; nothing before the backbones of `first_grid` reach the benchmark."""
    starts = [
        trial
        for trial in with_dependencies(first_grid())
        if trial.is_backbone and trial.backbone.data in full_sets()
    ]
    if not all(one.hash in archive.records or is_lost(one, archive) for one in starts):
        return ()
    if not reach_the_benchmark(groups(starts, archive)):
        return ()
    return tuple(trial for trial in grid() if trial.backbone.seed >= CHECK_SEEDS)


def reach_the_benchmark(own: Sequence[Group]) -> bool:
    """Whether the backbones of the benchmark's length reach the published rows.

    Otherwise the protocol asks for the reason, and the second stages are not compared.
    """
    found = {group.backbone.data: _published(group) for group in own}
    rows = [found.get(data) for data in full_sets()]
    return all(row is not None and row["high"] >= row["auc"] for row in rows)


def backbones_table(archive: Archive, trials: Sequence[Trial] | None = None) -> str:
    """Test AUC of the backbones, with the interval of its mean over seeds, and the benchmark's.

    The interval needs two seeds.

    Args:
      archive: the stored results.
      trials: of which the stored ones count; default: all.
    """
    rows = []
    for group in groups(with_dependencies(grid() if trials is None else trials), archive):
        row, count = _published(group), len(group.records("backbone"))
        cells = ("", "") if row is None else (_interval(group, row), f"{row['auc']:.3f}")
        rows.append((f"{group.name}, {group.backbone.epochs} epochs", f"{count}", *cells))
    return markdown(("Test AUC", "Seeds", "Backbone", "MedMNIST benchmark, 100 epochs"), rows)


def _interval(group: Group, row: Mapping[str, float]) -> str:
    return f"{group.mean('backbone', 'auc'):.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def measure(trial: Trial, paths: Paths) -> None:
    """Stores a finished trial's test scores with re-estimated batch statistics.

    And, of second stages, the classes predicted for corrupted images, with running statistics.

    Raises:
      UsageError: its checkpoint is gone.
    """
    setup, stage, state = best_state(trial, paths)
    stage = dataclasses.replace(stage, recompute_batch_stats=True)
    copies = setup.evaluation_state(stage, replicate(state, setup.devices))
    scores, _ = setup.evaluate(copies, setup.dataset.test)
    store.add(paths.results, {}, {f"renewed/{trial.hash}": scores.astype(np.float32)})
    if corrupted_predictions.is_wanted(trial):
        corrupted_predictions.measure(trial, paths)


def wants_renewed(trial: Trial) -> bool:
    """Whether the protocol asks for test scores with re-estimated batch statistics."""
    return trial.hash in {one.hash for one in with_dependencies(grid())}


def measured(trial: Trial, archive: Archive) -> bool:
    """Whether both are stored."""
    return corrupted_predictions.measured(trial, archive) and is_renewed(trial, archive)


def is_renewed(trial: Trial, archive: Archive) -> bool:
    """Whether scores with re-estimated batch statistics are stored."""
    return f"renewed/{trial.hash}" in archive.arrays


def with_renewed(archive: Archive) -> Archive:
    """The archive with the scores and test metrics of re-estimated statistics."""
    arrays, records = dict(archive.arrays), dict(archive.records)
    for trial in QUESTION.stored(archive):
        scores = archive.arrays[f"renewed/{trial.hash}"]
        labels = archive.labels[trial.backbone.data]
        metrics = compute_metrics(labels.labels, scores, labels.task)
        record = records[trial.hash]
        test = record["result"]["test"] | {"auc": metrics.auc, "acc": metrics.acc}
        records[trial.hash] = record | {"result": record["result"] | {"test": test}}
        arrays[f"scores/{trial.hash}"] = scores
    return dataclasses.replace(archive, records=records, arrays=arrays)


def analyse(archive: Archive) -> Found:
    """Every data set with both kinds of statistics, and all pairs; once all trials are stored.

    The verdict is about the data sets of the benchmark's length. The others are pooled apart.
    """
    planned = with_dependencies((*first_grid(), *later(archive)))
    found: Found = shared.progress(planned, archive, is_renewed)
    if not shared.is_complete(found):
        return found
    if not reach_the_benchmark(groups(planned, archive)):
        return found | {"backbones": backbones_table(archive, planned)}
    kinds = dict(zip(STATISTICS, (archive, with_renewed(archive)), strict=True))
    own = {kind: groups(planned, one) for kind, one in kinds.items()}
    pooled: dict[str, dict[str, dict[str, Any]]] = {}
    for part, wanted in (("full", True), ("short", False)):
        for (kind, some), pair in product(own.items(), PAIRS):
            gaps = [
                g.differences(pair, "auc")
                for g in some
                if (g.backbone.data in full_sets()) == wanted
            ]
            row = over_trials([gap for by_seed in gaps for gap in by_seed])
            pooled.setdefault(part, {}).setdefault(kind, {})[pair[0]] = row
    add_holm([row for rows in pooled["full"].values() for row in rows.values()])
    return found | {
        "groups": {
            kind: {
                group.name: {
                    "seeds": len(group.records("finetune")),
                    "epochs": (group.backbone.epochs, PLAN[group.backbone.data][2]),
                    **{arm: group.mean(arm, "auc") for arm in ("backbone", "finetune")},
                    "merged": {arm: group.merged(arm) for arm in MERGING},
                    "published": _published(group),
                }
                for group in some
            }
            for kind, some in own.items()
        },
        "intervals": {kind: intervals(some, PAIRS) for kind, some in own.items()},
        "pooled": pooled,
    }


def _published(group: Group) -> dict[str, float] | None:
    """The benchmark's test AUC, and the interval of the backbones' mean over two seeds or more."""
    start = group.backbone
    if datasets.SOURCES[start.data].config.allow_unverified:
        return None  # Its images may be others than the benchmark's.
    known = published_reference(
        {"name": start.data, "size": 28}, {"name": start.model, "width": start.width}
    )
    if known is None or len(group.records("backbone")) < 2:
        return None
    aucs = [record["result"]["test"]["auc"] for record in group.records("backbone")]
    interval = stats.ttest_1samp(aucs, 0).confidence_interval(CONFIDENCE)
    return {"auc": known.auc, "low": float(interval.low), "high": float(interval.high)}


def table(found: Found) -> str:
    """Differences in test AUC by data set and kind of statistics, at the benchmark's length.

    Of the backbones alone where these do not reach the benchmark.
    """
    if "backbones" in found:
        return f"{found['backbones']}\nNot compared: the backbones do not reach the benchmark.\n"
    return _table(found, full=True) + shared.diverged_note(found)


def short_table(found: Found) -> str:
    """The same for the data sets of fewer epochs, about which there is no verdict."""
    return "" if "backbones" in found else _table(found, full=False)


def _table(found: Found, *, full: bool) -> str:
    rows = []
    for kind, some in found["groups"].items():
        for name, group in some.items():
            if (group["epochs"][0] == BENCHMARK_EPOCHS) != full:
                continue
            gaps = [difference(by.get(name)) for by in found["intervals"][kind].values()]
            published = group["published"]
            backbone = f"{group['backbone']:.3f}"
            if published is not None:
                backbone += f" [{published['low']:.3f}, {published['high']:.3f}]"
                if full:
                    backbone += f", published {published['auc']:.3f}"
            epochs = "+".join(map(str, group["epochs"]))
            title = f"{name} ({group['seeds']} seeds, {epochs} epochs), {kind}"
            rows.append((title, backbone, f"{group['finetune']:.3f}", *gaps))
    for kind, by in found["pooled"]["full" if full else "short"].items():
        cells = [
            difference(row, 4) + (f", p {p_value(row['p_holm'])}" if "p_holm" in row else "")
            for row in by.values()
        ]
        rows.append((f"all {by['paper']['trials']} pairs, {kind}", "", "", *cells))
    columns = (
        *("Test AUC, batch statistics", "Backbone", "Fine-tuning"),
        *(f"{arm} minus fine-tuning" for arm in MERGING),
    )
    return markdown(columns, rows)


def merged_table(found: Found) -> str:
    """Kernels that merge per update, as a share of those that can, by data set."""
    if "backbones" in found:
        return ""
    return shared.merged_table(found["groups"][STATISTICS[0]], MERGING)


def figure(found: Found) -> Plot:
    """Differences from fine-tuning by data set and kind of statistics."""
    series = {
        f"{pair.removesuffix(' - finetune')}, {kind}": rows
        for kind, by in found.get("intervals", {}).items()
        for pair, rows in by.items()
    }
    return dot_plot("Merging minus fine-tuning", "difference in test AUC", series)


def overview(found: Found) -> Overview:
    """The paper's rule with running statistics, over the pairs of the benchmark's length."""
    if "backbones" in found:
        return Overview("not compared", "0", "the backbones do not reach the benchmark")
    row = found["pooled"]["full"]["running"]["paper"]
    effect = f"paper's rule minus fine-tuning: {difference(row, 4)}"
    return shared.overview_of(effect, row, verdict(row))


QUESTION = Question(
    name="full_length",
    title="Does merging help at the benchmark's length?",
    hypothesis=(
        "From random weights, trained for the benchmark's 100 epochs, the second stage with "
        "merging has another mean test AUC than the same stage without it."
    ),
    trials=first_grid(),
    later=later,
    check=backbones_table,
    analyse=analyse,
    table=table,
    figure=figure,
    overview=overview,
    keeps_weights=False,
    measure=measure,
    measured=measured,
)
