"""What several questions share.

The ablation, the controls, the adaptive threshold and robustness have the backbones and the arm
finetune in common: ResNet-18 at half width, Adam.
"""

from collections.abc import Callable, Sequence

from experiments.study import statistics
from experiments.study.archive import Archive
from experiments.study.questions.question import Found, Overview, is_lost
from experiments.study.render import difference, markdown, share
from experiments.study.trials import Backbone, Treatment, Trial, with_dependencies

SEEDS = 3
MODEL, WIDTH = "resnet18", 0.5
EPOCHS = {"breastmnist": (30, 8), "retinamnist": (16, 5)}
"""Data set to epochs of the backbone and of the second stage."""
# The median similarity of the most similar kernels in deep 3x3 layers of one Adam backbone, so that
# about half of the selected kernels merge. It was chosen before any second stage was trained.
WORKING = Treatment("merge", threshold=0.1)
PAPER = Treatment("merge")


def second_stages(arms: dict[str, Treatment]) -> tuple[Trial, ...]:
    """Backbones, fine-tuning and these arms, on every data set and seed."""
    found = []
    for seed in range(SEEDS):
        for data, (epochs, more) in EPOCHS.items():
            start = Backbone(data, MODEL, seed, epochs, WIDTH)
            found += [Trial(start), Trial(start, "finetune", more)]
            found += [Trial(start, arm, more, treatment=given) for arm, given in arms.items()]
    return tuple(found)


def overview(name: str, row: Found) -> Overview:
    """The overview's row of a difference of `analysis.pool`."""
    return overview_of(f"{name}: {difference(row, 4)}", row, statistics.verdict(row))


def overview_of(
    effect: str, row: Found, verdict: str, *others: Found, unit: str = "pairs"
) -> Overview:
    """The overview's row of a difference with a verdict of `statistics.verdict`.

    Args:
      effect: the difference in words.
      row: of `statistics.over_trials`.
      verdict: about it.
      others: rows of other analyses that have to lead to the same verdict.
      unit: of what `row` is over.
    """
    words = in_words(verdict, statistics.needed(row, *others), f"{statistics.MARGIN} AUC", unit)
    return Overview(effect, str(row["trials"]), words)


def in_words(verdict: str, needed: float | None, margin: str, unit: str = "pairs") -> str:
    """A verdict with the margin, or with the number of pairs, or other units, that would decide."""
    if verdict == "no effect":
        return f"no effect larger than \u00b1{margin}"
    if verdict == "undecided" and needed is not None:
        if needed == float("inf"):
            return f"undecided (more {unit} would not decide)"
        return f"undecided ({needed:,.0f} {unit} would decide)"
    return verdict


def merged_table(found: Found, arms: Sequence[str]) -> str:
    """Kernels that merge per update, as a share of those that can: a row for each group.

    Args:
      found: group name to a row with "merged", which has `Group.merged` by arm.
      arms: the columns.
    """
    rows = [
        (name, *(share(group["merged"].get(arm), 2) for arm in arms))
        for name, group in found.items()
    ]
    return markdown(("Merged per update, of the kernels that can merge", *arms), rows)


def series(found: Found) -> dict[str, Found]:
    """`analysis.intervals` against fine-tuning by data set and arm, for `render.dot_plot`."""
    by_group: dict[str, Found] = {}
    for pair, rows in found.items():
        for name, row in rows.items():
            by_group.setdefault(name, {})[pair.removesuffix(" - finetune")] = row
    return by_group


def progress(
    planned: Sequence[Trial],
    archive: Archive,
    measured: Callable[[Trial, Archive], bool] = lambda trial, archive: True,
) -> Found:
    """How many of the trials of a comparison are stored and measured, and which diverged.

    None are planned before the choices that they depend on.
    """
    every = with_dependencies(planned)
    stored = [one for one in every if one.hash in archive.records and measured(one, archive)]
    lost = [one.name for one in every if is_lost(one, archive)]
    return {"planned": len(every), "stored": len(stored), "diverged": lost}


def is_complete(found: Found) -> bool:
    """Whether all trials of a comparison are stored. Its outcomes are not looked at before."""
    return 0 < found["planned"] == found["stored"] + len(found["diverged"])


def diverged_note(found: Found) -> str:
    """A paragraph that names the trials that diverged, which are missing pairs; or nothing."""
    names = ", ".join(found["diverged"])
    return f"\nDiverged, and missing from all pairs: {names}.\n" if names else ""
