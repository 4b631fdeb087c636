"""How long a case is expected to take."""

import pytest

from experiments.benchmarks.accelerator import train_step
from experiments.benchmarks.accelerator.session import Session
from experiments.benchmarks.accelerator.train_step import COMPILED, PLAIN, estimate
from experiments.benchmarks.step_cases import Case

CASE = Case("densenet121", "small", 32, 64)


def expected(*stored):
    session = Session(None, 100.0)
    session.found = {"merge": {"cases": {}}, "step": {"cases": dict(enumerate(stored))}}
    return estimate(CASE, session)


def test_compilation_on_this_machine_scales_the_estimates():
    assumed = train_step._COMPILE["resnet18"]
    slow, fast = ({"model": "resnet18", "compile_seconds": {PLAIN: s}} for s in (2, 0.5))
    for case, factor in ((slow, 2), (fast, 0.5)):
        case["compile_seconds"][PLAIN] *= assumed
        more = expected(case) - expected()
        assert more == pytest.approx((factor - 1) * train_step._COMPILE["densenet121"])
    # A program from the cache says nothing of how long compilation takes.
    cached = {"model": "resnet18", COMPILED: True, "compile_seconds": {PLAIN: 1.0}}
    assert expected(slow, cached) == expected(slow)
