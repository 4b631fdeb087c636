"""The power that docs/protocol.md states."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from experiments.study.statistics import MARGIN

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
SD, LEVEL = 0.016, 0.025


def equivalence_power(pairs):
    """Of two one-sided t tests at `LEVEL`, for an effect of 0."""
    error = SD / np.sqrt(pairs)
    return 2 * stats.t.cdf(MARGIN / error - stats.t.isf(LEVEL, pairs - 1), pairs - 1) - 1


@pytest.mark.parametrize(("pairs", "look"), [(80, "first"), (160, "second")])
def test_the_power_of_each_look(pairs, look):
    (row,) = re.findall(rf"^\| {look} \| {pairs} \| (.*) \|$", PAGE, re.MULTILINE)
    error, none, smallest = row.split(" | ")
    assert float(error) == pytest.approx(SD / np.sqrt(pairs), abs=5e-5)
    assert none == f"{equivalence_power(pairs):.0%}".replace("%", " %")
    power = TTestPower().power(MARGIN / SD, pairs, LEVEL)
    assert smallest == f"{power:.0%}".replace("%", " %")
