"""Sharded parameters under `jit` merge as unsharded ones, and keep their shardings."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from inmerge_jax import Kernel, MergeRule, merge_kernels, quantile, tie, with_merging

SHAPE = (3, 3, 16, 32)
KEY = jax.random.key(3)


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))


def kernel(name, shape=SHAPE, axis=-1, **fields):
    return Kernel((jax.tree_util.DictKey(name),), shape, axis, **fields)


def params_of():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "conv": jax.random.normal(keys[0], SHAPE) + 0.5,
        "dense": jax.random.normal(keys[1], (16, 32)) + 0.5,
        "bias": jax.random.normal(keys[2], (32,)),
    }


KERNELS = [
    kernel("conv"),
    *tie(
        [kernel("dense", (16, 32), op="dense"), kernel("bias", (32,), op="dense")],
        "neuron",
        compared=lambda one: one.name == "dense",
    ),
]
SPECS = {
    "units": {"conv": (None, None, None, "a"), "dense": (None, "a"), "bias": ("a",)},
    "inputs": {"conv": (None, None, "a", None), "dense": ("a", None), "bias": (None,)},
    "both": {"conv": (None, None, "b", "a"), "dense": ("b", "a"), "bias": ("a",)},
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("specs", SPECS)
@pytest.mark.parametrize("partner", ["random", "nearest"])
def test_sharded_weights_merge_as_unsharded_ones(kind, specs, partner):
    params, rule = params_of(), MergeRule(0.6, 0.2, 0.8, partner)
    merge = jax.jit(lambda params: merge_kernels(params, KEY, KERNELS, rule))
    expected, stats = merge(params)
    mesh = mesh_of(kind)
    shardings = {
        name: NamedSharding(mesh, PartitionSpec(*spec)) for name, spec in SPECS[specs].items()
    }
    found, found_stats = merge(jax.device_put(params, shardings))
    assert stats.merged.min() > 0
    np.testing.assert_array_equal(found_stats.merged, stats.merged)
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
        if kind == AxisType.Explicit:
            assert found[name].sharding.spec == shardings[name].spec


def test_a_quantile_and_the_transformation_over_an_explicit_mesh():
    params, rule = params_of(), MergeRule(0.6, quantile(0.5))
    mesh = mesh_of(AxisType.Explicit)
    shardings = {
        name: NamedSharding(mesh, PartitionSpec(*spec)) for name, spec in SPECS["both"].items()
    }
    tx = with_merging(optax.sgd(0.1), KERNELS, rule, KEY)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    expected, _ = step(params, tx.init(params))
    sharded = jax.device_put(params, shardings)
    found, state = step(sharded, tx.init(sharded))
    assert int(state[-1].stats.merged.sum()) > 0
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
        assert found[name].sharding.spec == shardings[name].spec


def collectives(partner, spec):
    """Kinds of collectives in the compiled merge of one layer, with the size of the largest."""
    mesh = mesh_of(AxisType.Auto)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    rule = MergeRule(0.6, 0.2, 0.8, partner)
    merge = jax.jit(
        lambda w: merge_kernels({"w": w}, KEY, [kernel("w")], rule, implementation="reference"),
        in_shardings=sharding,
        out_shardings=({"w": sharding}, None),
    )
    text = merge.lower(jax.ShapeDtypeStruct(SHAPE, jnp.float32)).compile().as_text()
    found = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]*? (all-\w+|collective-permute)\(", text)
    return {(kind, tuple(map(int, filter(None, shape.split(","))))) for _, shape, kind in found}


def test_weights_that_are_sharded_by_their_inputs_are_not_gathered():
    """FSDP along another axis than the units': only similarities are reduced."""
    for partner in ("random", "nearest"):
        found = collectives(partner, (None, None, "a", None))
        assert found, partner
        assert all(np.prod(shape) <= 32 * 32 for _, shape in found), found
