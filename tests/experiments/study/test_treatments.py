"""The controls do to the kernels that would merge what they say, and nothing to others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.study.treatments import (
    make_treatment,
    numbers,
    selection,
)
from experiments.study.trials import Treatment
from inmerge_jax import merge_kernels
from tests.core.test_merging import kernel, similar_weight
from tests.long import LONG, long_unless

SHAPE = (3, 3, 4, 30)
LAYER = kernel("w", SHAPE)
RULE = Treatment("merge", probability=0.5, threshold=0.2, alpha=0.7)


def treat(kind, weight, step=0, seed=0, given=RULE):
    chosen = dataclasses.replace(given, kind=kind)
    params, stats = jax.jit(make_treatment(kind, (LAYER,)))(
        {"w": weight, "other": jnp.ones(3)},
        jax.random.key(seed),
        jnp.int32(step),
        numbers(chosen, 5),
    )
    assert params["other"].tolist() == [1, 1, 1]
    return np.asarray(params["w"]).reshape(-1, SHAPE[-1]).T, stats


@pytest.fixture
def weight():
    return jnp.asarray(similar_weight(3, SHAPE))


def rows(weight):
    return np.asarray(weight, np.float64).reshape(-1, SHAPE[-1]).T


def test_merge_is_merge_kernels(weight):
    found, stats = treat("merge", weight)
    rule = numbers(RULE, 5).rule
    expected, counts = merge_kernels({"w": weight}, jax.random.key(0), (LAYER,), rule)
    np.testing.assert_array_equal(found, rows(expected["w"]).astype(np.float32))
    assert stats.merged == counts.merged > 3


@pytest.mark.parametrize("kind", long_unless(["least"], ["any", "least", "noise", "perturb"]))
def test_a_control_changes_the_kernels_that_would_merge(kind, weight):
    old = rows(weight)
    merged, stats = treat("merge", weight)
    found, same_stats = treat(kind, weight)
    would = np.any(merged != old.astype(np.float32), axis=1)
    did = np.any(found != old.astype(np.float32), axis=1)
    np.testing.assert_array_equal(would, did)
    assert stats.merged == same_stats.merged == did.sum()
    moved, length = found - old, np.linalg.norm(merged - old, axis=1)
    if kind == "noise":
        np.testing.assert_allclose(np.linalg.norm(moved, axis=1), length, rtol=1e-4)
        cosine = (moved * (merged - old)).sum(1)[did] / length[did] ** 2
        assert np.abs(cosine).mean() < 0.4
        return
    other = (found[did] - 0.7 * old[did]) / 0.3
    if kind == "perturb":
        np.testing.assert_allclose(
            np.linalg.norm(other, axis=1), np.linalg.norm(old[did], axis=1), rtol=1e-3
        )
        return
    unit = old / np.linalg.norm(old, axis=1, keepdims=True)
    gap = np.linalg.norm(other[:, None] - old[None], axis=2)
    partner = gap.argmin(1)
    assert gap.min(1).max() < 1e-4 and (partner != np.flatnonzero(did)).all()
    if kind == "least":
        cosine = unit @ unit.T
        np.fill_diagonal(cosine, np.inf)
        np.testing.assert_array_equal(partner, cosine.argmin(1)[did])


@pytest.mark.parametrize("kind", ["any", "noise", "perturb"])
def test_a_controls_draws_change_with_the_step(kind, weight):
    assert np.any(treat(kind, weight, seed=0)[0] != treat(kind, weight, seed=1)[0])


@pytest.mark.parametrize(
    ("every", "steps"),
    [pytest.param(1, [0, 1, 2, 3], marks=LONG), (3, [0, 3]), pytest.param(0, [0], marks=LONG)],
)
def test_merging_now_and_then(every, steps, weight):
    given = dataclasses.replace(RULE, every=every)
    merged = [int(treat("merge", weight, step, given=given)[1].merged[0]) for step in range(5)]
    expected = {0, 5} & set(range(5)) if every == 0 else {s for s in range(5) if s % every == 0}
    assert {step for step, count in enumerate(merged) if count} == expected
    assert set(steps) <= expected


def test_the_deeper_half_merges_where_there_are_few_layers():
    layers = tuple(kernel(f"w{i}", SHAPE) for i in range(8))
    assert len(selection(RULE, layers)) == 4
    assert len(selection(dataclasses.replace(RULE, skip=2), layers)) == 6
