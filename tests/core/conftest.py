"""The core is held to the strictest settings: no implicit promotion, warnings are errors."""

import warnings

import jax
import pytest


@pytest.fixture(autouse=True)
def strict():
    with (
        warnings.catch_warnings(),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        warnings.simplefilter("error")
        yield
