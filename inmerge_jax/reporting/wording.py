"""What a run's numbers say, in sentences that claim no more than the numbers do."""

import math

import numpy as np

from inmerge_jax.reporting.findings import Cell, Findings
from inmerge_jax.reporting.published import CHESTXRAY14
from inmerge_jax.reporting.runs import Run
from inmerge_jax.reporting.summary import RELEASED_RULE, Resolution, Spread, Summary

MINUS = "\u2212"
FORMULA = (
    "1.96 paired standard errors over the test images, for AUC by the formula of DeLong, DeLong "
    "and Clarke-Pearson 1988, for the mean over classes and seeds"
)


def signed(value: float, digits: int = 3) -> str:
    """A difference with its sign, also where it rounds to zero; a real minus; n/a for NaN."""
    if not math.isfinite(value):
        return "n/a"
    return f"{value + 0.0:+.{digits}f}".replace("-", MINUS)


def plain(value: float, digits: int = 3) -> str:
    """A number, or n/a for NaN."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "n/a"


def mean_sd(values: Spread) -> str:
    """Mean and sd, the mean alone for one seed, saying how many seeds had a number."""
    text = plain(values.mean)
    if values.sd is not None:
        text += f" \u00b1 {plain(values.sd)}"
    if values.count < len(values.values):
        text += f" ({values.count} of {len(values.values)} seeds defined)"
    return text


def difference(values: Spread) -> str:
    """Mean difference with its interval, or why there is none."""
    text = signed(values.mean)
    if values.interval is not None:
        return f"{text} [{signed(values.interval[0])}, {signed(values.interval[1])}]"
    if values.count == 1:
        return f"{text} (one seed: no interval)"
    return f"{text} (equal by chance: no interval)" if values.count else text


def headline(run: Run, summary: Summary) -> str:
    """One or two sentences: what merging changed, and how sure that is."""
    title = run.dataset.get("title") or run.dataset["name"]
    pair = summary.differences.get(("inmerge", "finetune"))
    if pair is None:
        done = ", ".join(run.arms) or "none"
        return f"{title}: no comparison is possible, because only these arms were run: {done}."
    auc = pair["auc"]
    if not auc.count:
        return (
            f"{title}: the test AUC is undefined for every seed (one label only in the test "
            "split), so the arms cannot be compared by AUC."
        )
    if not sum(summary.merged) + sum(summary.val_merged or ()):
        reason = "No selected kernel had a partner above the threshold"
        if not summary.layers:
            reason = "There was no layer to merge in"
        return (
            f"{title}: nothing was merged. {reason}, so the arm inmerge is a second run of "
            f"finetune, and the difference in test AUC ({signed(auc.mean)}) says "
            "nothing about merging."
        )
    with_it, without = (summary.arms[arm]["auc"].mean for arm in ("inmerge", "finetune"))
    start = (
        f"{title}: mean test AUC {plain(with_it)} with merging and {plain(without)} in the same "
        f"second stage without it, a paired difference of {signed(auc.mean)} ({_certainty(auc)})."
    )
    return f"{start} {_verdict(summary, auc)}"


def _certainty(auc: Spread) -> str:
    if auc.interval is None:
        return "no interval: one seed" if auc.count == 1 else "no interval: equal by chance"
    low, high = auc.interval
    return f"95% interval {signed(low)} to {signed(high)}, {auc.count} paired seeds"


def _verdict(summary: Summary, auc: Spread) -> str:
    smallest = _smallest(summary)
    beyond = ""
    if smallest is not None and summary.resolution is not None:
        images = _images(summary.resolution)
        small = abs(auc.mean) < smallest
        beyond = (
            f"the choice of {images} alone moves it by {plain(smallest)} either way, and it is "
            f"{'smaller' if small else 'larger'} than that"
            if smallest
            else f"no choice of {images} could change it"
        )
    if auc.interval is None:
        return f"That shows no effect either way{'; ' + beyond if beyond else ''}."
    if auc.interval[0] <= 0 <= auc.interval[1]:
        text = "The interval includes zero: this run does not show that merging helps or harms"
        return f"{text}{'; ' + beyond if beyond else ''}."
    better = "better" if auc.mean > 0 else "worse"
    text = f"The interval excludes zero: over these seeds merging did {better}"
    if smallest is not None and abs(auc.mean) < smallest:
        return f"{text}, but {beyond}, so other test images may show otherwise."
    return f"{text}{'; ' + beyond if beyond else ''}."


def _smallest(summary: Summary) -> float | None:
    if summary.resolution is None:
        return None
    value = summary.resolution.smallest.get(("inmerge", "finetune"), {}).get("auc", math.nan)
    return value if math.isfinite(value) else None


def _images(resolution: Resolution) -> str:
    text = f"{resolution.images} test images"
    return text if resolution.patients is None else f"{text} ({resolution.patients} patients')"


def resolution_note(summary: Summary) -> str:
    """How far the choice of test images alone moves the difference, and by which formula."""
    smallest, resolution = _smallest(summary), summary.resolution
    if resolution is None:
        return (
            "How far the choice of test images moves the difference is not known: the run folder "
            "lacks test labels or score files."
        )
    if smallest is None:
        return (
            "How far the choice of test images moves the difference cannot be estimated: an arm "
            "was not run, or a class has fewer than two test images."
        )
    acc = resolution.smallest["inmerge", "finetune"]["acc"]
    return (
        f"The choice of {_images(resolution)} alone moves the difference between inmerge and "
        f"finetune by {plain(smallest)} AUC, {plain(acc)} ACC either way ({FORMULA}). One "
        f"arm's AUC has a standard error of {plain(resolution.error['auc'])}. Read smaller "
        "differences as noise."
    )


def interval_note(summary: Summary) -> str:
    """How the intervals were made and what few seeds do to them."""
    counts = [pair["auc"].count for pair in summary.differences.values()]
    if not counts:
        return ""
    seeds = min(counts)
    if seeds < 2:
        return "Differences are paired by seed; with one seed there is no interval."
    text = f"Differences are paired by seed, with 95% t-intervals from {seeds} seeds"
    if seeds == 2:
        text += " (two seeds multiply the standard error by 12.7: wide by construction)"
    return f"{text}; they cover the training's randomness, not the choice of test images."


def undefined_note(summary: Summary) -> str:
    """Says how many classes have no AUC."""
    if not summary.undefined:
        return ""
    return (
        f"AUC is undefined for {summary.undefined} of the classes, which have one label only in "
        "the test split; they are left out of the mean."
    )


def merges_note(summary: Summary) -> str:
    """Kernels merged in all, or loudly that there were none."""
    if "inmerge" not in summary.arms:
        return "The arm inmerge was not run, so there are no merges to count."
    if not summary.layers:
        return "NOTHING WAS MERGED: there was no layer to merge in; the run's warnings say why."
    if not sum(summary.merged) + sum(summary.val_merged or ()):
        return "NOTHING WAS MERGED: no selected kernel had a partner above the threshold."
    totals = " ".join(f"{total:,}" for total in summary.merged)
    text = f"Kernels merged over the whole stage, by seed: {totals}."
    if summary.val_merged is not None:
        more = " ".join(f"{total:,}" for total in summary.val_merged)
        text += f" In validation, before its images, by seed: {more}."
    return text


def rule_note(run: Run) -> str:
    """Where the rule differs from the released code's, and how much that one would have merged."""
    rule = run.results.get("rule") or {}
    adapts = "quantile" in rule
    changed = [
        f"{name} {rule[name]} (there {value})"
        for name, value in RELEASED_RULE.items()
        if name in rule and rule[name] != value and not (adapts and name == "threshold")
    ]
    if adapts:
        here = f"each layer's quantile {rule['quantile']} as its threshold"
        changed.append(f"{here} (there {RELEASED_RULE['threshold']})")
    if not changed:
        return (
            "The rule is the released code's: "
            + ", ".join(f"{k} {v}" for k, v in rule.items())
            + "."
        )
    text = f"The rule is not the released code's: {', '.join(changed)}."
    share = _share_above(run, RELEASED_RULE["threshold"])
    if share is not None and (adapts or rule.get("threshold") != RELEASED_RULE["threshold"]):
        own = None if adapts else _share_above(run, rule["threshold"])
        here = "" if own is None else f", and {_share(own)} above {rule['threshold']}"
        text += (
            f" Why: before the stage, {_share(share)} of the median layer's kernel pairs were "
            f"above {RELEASED_RULE['threshold']}{here}."
        )
    return text


def ranked(cell: Cell) -> str:
    """A finding's AUROC with its interval and its rank."""
    if not math.isfinite(cell.auc):
        return "n/a"
    return f"{plain(cell.auc)} [{plain(cell.low)}, {plain(cell.high)}] ({cell.rank})"


def findings_notes(run: Run, findings: Findings) -> tuple[str, ...]:
    """How the ranks and intervals were made, and whether the published rows can be compared."""
    images, resamples = findings.images, findings.resamples
    drawn = f"of the {images:,} test images"
    if findings.patients is not None:
        drawn = f"of the {findings.patients:,} patients {drawn}"
    among = "the arms"
    if findings.comparable:
        among += f" and {', '.join(findings.comparable)}"
    intervals = (
        f"Intervals: percentiles of {resamples:,} bootstrap resamples {drawn}, the same for every "
        "arm and seed; they cover the choice of images, not the training's randomness."
        if resamples
        else "There are no intervals: the run folder lacks test labels or score files."
    )
    lines = [
        comparable_note(run, findings),
        f"{intervals} Rank: among {among}, by the mean over seeds.",
    ]
    worst = max(cell.undefined for cells in findings.arms.values() for cell in cells)
    if worst:
        few = [
            f"{name} in {max(cells[index].undefined for cells in findings.arms.values()):,}"
            for index, name in enumerate(findings.names)
            if any(cells[index].undefined for cells in findings.arms.values())
        ]
        lines.append(
            f"Resamples without a positive or a negative image have no AUROC and were left out: "
            f"{', '.join(few)} of {resamples:,}; the mean is over what a resample defines."
        )
    return tuple(lines)


def comparable_note(run: Run, findings: Findings) -> str:
    """One line: which published rows this run can be compared with, and why not with the rest."""
    data = run.dataset
    all_counts = data.get("full_counts") or data["counts"]
    full = all_counts.get("test")
    if findings.comparable:
        trained, whole = (counts.get("train") for counts in (data["counts"], all_counts))
        fewer = f" (but trained on {trained:,} of {whole:,} images)" if trained != whole else ""
        return (
            f"Comparable with {', '.join(findings.comparable)}, the same {findings.images:,} test "
            f"images{fewer}; not with the other published rows, which have other test images."
        )
    if full is not None and findings.images != full:
        return (
            f"NOT COMPARABLE with any published row: {findings.images:,} of the {full:,} test "
            f"images of the split {data.get('split')}, a subset."
        )
    rows = [row for row in CHESTXRAY14 if row.same_as == data.get("split")]
    if rows:
        return (
            f"NOT COMPARABLE with any published row: the {findings.images:,} test images are not "
            f"the {rows[0].images:,} of the split {rows[0].same_as} that {rows[0].label} was "
            "tested on."
        )
    return (
        f"NOT COMPARABLE with any published row: none was tested on the split {data.get('split')}."
    )


def _share(value: float) -> str:
    return f"{value:.2%}" if value else "none"


def _share_above(run: Run, threshold: float) -> float | None:
    """Share of pairs above `threshold` in the median merging layer before the stage.

    The median over layers and seeds: a few 1x1 shortcuts would lift the mean.
    """
    shares = []
    for seed, result in run.arm("inmerge").items():
        before = run.similarity.get((seed, "inmerge"), {}).get("before", ())
        layers = set(result.get("layers", ()))
        for layer in before:
            above = {float(key): value for key, value in layer["above"].items()}
            if layer["name"] in layers and threshold in above:
                shares.append(above[threshold])
    return float(np.median(shares)) if shares else None
