"""Numbers as text."""

import math

import numpy as np

from inmerge_jax.reporting.summary import Spread

MINUS = "\u2212"


def plain(value: float, digits: int = 3) -> str:
    """A number, or n/a for NaN and infinity."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "n/a"


def signed(value: float, digits: int = 3) -> str:
    """A difference with its sign (also for zero) and a typographic minus; n/a for NaN."""
    if not math.isfinite(value):
        return "n/a"
    return f"{value + 0.0:+.{digits}f}".replace("-", MINUS)


def mean_sd(values: Spread) -> str:
    """Mean and standard deviation; the mean alone for one seed."""
    text = plain(values.mean)
    if values.sd is not None:
        text += f" \u00b1 {plain(values.sd)}"
    if values.count < len(values.values):
        text += f" ({values.count} of {len(values.values)} seeds defined)"
    return text


def interval(values: Spread) -> str:
    """The interval of a mean difference, or why there is none."""
    if values.interval is not None:
        return f"[{signed(values.interval[0])}, {signed(values.interval[1])}]"
    return {0: "n/a", 1: "n/a (one seed)"}.get(values.count, "n/a (equal seeds)")


def counts(values: tuple[int, ...]) -> str:
    """Counts by seed, separated by spaces."""
    return " ".join(f"{value:,}" for value in values)


def describe_test(count: int, examples: str, patients: np.ndarray | None) -> str:
    """Number of test examples, such as "images", and of their patients where these are known."""
    text = f"{count:,} test {examples}"
    return text if patients is None else f"{text} of {len(np.unique(patients)):,} patients"
