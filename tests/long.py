"""Marks what `make test` leaves out and `make test-long` runs."""

from collections.abc import Callable, Container, Iterable
from typing import Any

import pytest

LONG = pytest.mark.long


def long_unless(kept: Callable[[Any], bool] | Container[Any], cases: Iterable[Any]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`, of which those that are not `kept` are long.

    Args:
      kept: the cases that are not long, or a predicate; a tuple is the values of several arguments.
      cases: all.
    """
    return [
        case
        if (kept(case) if callable(kept) else case in kept)
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=LONG)
        for case in cases
    ]
