"""The examples in the docstrings run and print what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["units", "tracing", "rule", "merge", "transform", "similarity"])
def test_examples(name):
    outcome = doctest.testmod(importlib.import_module(f"inmerge_jax.merging.{name}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0
