"""Does merging help where images are few or labels wrong? See docs/protocol.md, section 3."""

import dataclasses
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

from experiments.study.analysis import groups, intervals
from experiments.study.archive import Archive
from experiments.study.questions import shared
from experiments.study.questions.question import Found, Overview, Question, is_lost
from experiments.study.render import difference, dot_plot, markdown, p_value
from experiments.study.statistics import add_holm, is_significant, over_trials, verdict
from experiments.study.trials import Backbone, Treatment, Trial
from inmerge_jax.reporting.plots import Plot

DATA, EPOCHS, RATE = "bloodmnist_like_few", 30, 1e-3
IMAGES, WRONG = (250, 500, 2000), (0.0, 0.2, 0.4)
SEEDS = range(10)
CANDIDATES = {"decay": (1e-4, 1e-3, 1e-2), "ema": (0.9, 0.95, 0.99)}
"""Control to its strengths: weight decay, and decay of the averaged weights."""
SELECTION_SEEDS = (100,)
BASE, MERGING = "none", ("paper", "quantile")
ARMS = (*MERGING, *CANDIDATES)


def _control(kind: str, strength: float) -> Treatment:
    return Treatment("decay", decay=strength) if kind == "decay" else Treatment(average=strength)


def trial(images: int, wrong: float, seed: int, arm: str, treatment: Treatment) -> Trial:
    """A training from new weights in one stage."""
    start = Backbone(
        DATA,
        "resnet18",
        seed,
        0,
        0.25,
        images=images,
        wrong_labels=wrong,
    )
    renewed = dataclasses.replace(treatment, statistics="renewed")
    return Trial(start, arm, EPOCHS, RATE, renewed)


def selection_grid() -> tuple[Trial, ...]:
    """The trials by which the strengths of the controls are chosen."""
    return tuple(
        trial(images, wrong, seed, f"{kind} {strength:g}", _control(kind, strength))
        for seed, images, wrong in product(SELECTION_SEEDS, IMAGES, WRONG)
        for kind, strengths in CANDIDATES.items()
        for strength in strengths
    )


def comparison_grid(archive: Archive) -> tuple[Trial, ...]:
    """The trials that are compared; none before the strengths of the controls are chosen."""
    strengths = chosen(selection(archive))
    if len(strengths) < len(CANDIDATES):
        return ()
    arms = {
        BASE: Treatment(),
        "paper": Treatment("merge"),
        "quantile": Treatment("merge", quantile=0.5),
        **{kind: _control(kind, strength) for kind, strength in strengths.items()},
    }
    return tuple(
        trial(images, wrong, seed, arm, treatment)
        for seed, images, wrong in product(SEEDS, IMAGES, WRONG)
        for arm, treatment in arms.items()
    )


def selection(archive: Archive) -> dict[str, dict[float, float | None]]:
    """Mean validation AUC over settings and seeds, by control and strength.

    None for a strength with which a trial diverged; nothing for one with trials to be trained.
    """
    found: dict[str, dict[float, float | None]] = {}
    for kind, strengths in CANDIDATES.items():
        for strength in strengths:
            own = [t for t in selection_grid() if t.arm == f"{kind} {strength:g}"]
            if any(is_lost(one, archive) for one in own):
                found.setdefault(kind, {})[strength] = None
            elif all(one.hash in archive.records for one in own):
                aucs = [archive.records[one.hash]["result"]["val"]["auc"] for one in own]
                found.setdefault(kind, {})[strength] = float(np.mean(aucs))
    return found


def chosen(found: Mapping[str, Mapping[float, float | None]]) -> dict[str, float]:
    """The strength of each control with the highest mean validation AUC, of `selection`."""
    best = {}
    for kind, aucs in found.items():
        known = {strength: auc for strength, auc in aucs.items() if auc is not None}
        if known and len(aucs) == len(CANDIDATES[kind]):
            best[kind] = max(known, key=lambda strength: known[strength])
    return best


def analyse(archive: Archive) -> Found:
    """The choice of strengths; once all trials are stored, every arm against no merging."""
    found: Found = {"selection": selection(archive)}
    planned = comparison_grid(archive)
    found |= shared.progress(planned, archive)
    if not shared.is_complete(found):
        return found
    own = groups(planned, archive)
    pairs = [(arm, BASE) for arm in ARMS]
    by_pair = intervals(own, pairs)
    tested, means = [], {}
    for arm, base in pairs:
        for group in own:
            row = by_pair[f"{arm} - {base}"].get(group.name)
            if row is None:
                continue
            row["p"] = over_trials(group.differences((arm, base), "auc"))["p"]
            if arm in MERGING:
                tested.append(row)
        # Settings share weights, images and wrong labels of a seed, so the seed is the unit. A
        # seed that lacks a setting would have another mean, whatever merging does.
        settings = [group.by_seed((arm, base), "auc") for group in own]
        complete = sorted(set.intersection(*map(set, settings)))
        means[arm] = over_trials([float(np.mean([s[seed] for s in settings])) for seed in complete])
    # The nine settings and two merging arms; the controls are there for comparison.
    add_holm(tested)
    add_holm([means[arm] for arm in MERGING])
    return found | {
        "groups": {
            group.name: {
                "seeds": len(group.records(BASE)),
                BASE: group.mean(BASE, "auc"),
                "merged": {arm: group.merged(arm) for arm in MERGING},
            }
            for group in own
        },
        "intervals": by_pair,
        "means": means,
    }


def conclusion(found: Found, arm: str = "paper") -> str:
    """The verdict about an arm.

    Of its settings, where some are significant and all these have one sign; else of their mean.
    """
    rows = found["intervals"][f"{arm} - {BASE}"].values()
    signs = {row["mean"] > 0 for row in rows if is_significant(row)}
    if len(signs) != 1:
        return verdict(found["means"][arm])
    return "helps" if signs == {True} else "harms"


def significant_settings(found: Found, arm: str = "paper") -> dict[str, str]:
    """Setting to "helps" or "harms", of those that are significant after Holm's correction."""
    rows = found["intervals"][f"{arm} - {BASE}"]
    return {_title(name): verdict(row) for name, row in rows.items() if is_significant(row)}


def table(found: Found) -> str:
    """Differences in test AUC by setting, with p after Holm of the merging arms."""
    rows = []
    for name, group in found["groups"].items():
        by_arm = (by.get(name) for by in found["intervals"].values())
        rows.append((_title(name), f"{group[BASE]:.3f}", *map(_cell, by_arm)))
    seeds = dict.fromkeys(str(row["trials"]) for row in found["means"].values())
    title = f"mean of the settings, {' or '.join(seeds)} seeds"
    rows.append((title, "", *(_cell(row, 4) for row in found["means"].values())))
    columns = ("Test AUC", "No merging", *(f"{arm} minus none" for arm in ARMS))
    return markdown(columns, rows) + shared.diverged_note(found)


def merged_table(found: Found) -> str:
    """Kernels that merge per update, as a share of those that can, by setting."""
    own = {_title(name): group for name, group in found["groups"].items()}
    return shared.merged_table(own, MERGING)


def _title(name: str) -> str:
    return name.removeprefix(_PREFIX).removesuffix(_SUFFIX)


def _cell(row: Mapping[str, Any] | None, digits: int = 3) -> str:
    p = f", p {p_value(row['p_holm'])}" if row is not None and "p_holm" in row else ""
    return difference(row, digits) + p


_PREFIX, _SUFFIX = "PBC blood cells (not BloodMNIST's split), ", ", resnet18 \u00d70.25"


def strengths_table(archive: Archive) -> str:
    """Mean validation AUC of the controls by strength, the chosen one bold."""
    found = selection(archive)
    best, rows = chosen(found), []
    for kind, strengths in CANDIDATES.items():
        for strength in strengths:
            text = ""
            if strength in found.get(kind, {}):
                auc = found[kind][strength]
                text = "diverged" if auc is None else f"{auc:.4f}"
            text = f"**{text}**" if best.get(kind) == strength else text
            rows.append((f"{_NAMES[kind]} {strength:g}", text))
    return markdown(("Control", "Mean validation AUC"), rows)


_NAMES = {"decay": "weight decay", "ema": "averaged weights, decay"}


def figure(found: Found) -> Plot:
    """Differences from no merging by setting."""
    series = {
        name.removesuffix(f" - {BASE}"): {_title(setting): row for setting, row in rows.items()}
        for name, rows in found["intervals"].items()
    }
    return dot_plot("Minus no merging", "difference in test AUC", series)


def overview(found: Found) -> Overview:
    """The paper's rule, mean over the settings of each seed."""
    row = found["means"]["paper"]
    effect = f"paper's rule minus no merging, mean of nine settings: {difference(row, 4)}"
    shown = shared.overview_of(effect, row, conclusion(found), unit="seeds")
    some = "; ".join(f"{name}: {word}" for name, word in significant_settings(found).items())
    words = f"{shown.verdict} ({some})" if some else shown.verdict
    pairs = row["trials"] * len(found["groups"])
    return shown._replace(trials=str(pairs), verdict=words)


QUESTION = Question(
    name="scarce",
    title="Does merging help with few images or wrong labels?",
    hypothesis=(
        "Where images are few or labels wrong, merging has another test AUC than no merging."
    ),
    trials=selection_grid(),
    later=comparison_grid,
    analyse=analyse,
    table=table,
    figure=figure,
    overview=overview,
    choices=strengths_table,
    has_chosen=lambda archive: bool(comparison_grid(archive)),
    keeps_scores=lambda trial: (
        trial.backbone.data != DATA or trial.backbone.seed not in SELECTION_SEEDS
    ),
    keeps_weights=False,
)
