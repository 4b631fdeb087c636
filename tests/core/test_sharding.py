"""Sharded parameters under `jit` merge as unsharded ones, and keep their shardings."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from inmerge_jax import (
    Kernel,
    MergeRule,
    kernel_similarity,
    merge_kernels,
    quantile,
    tie,
    with_merging,
)
from tests.long import long_unless

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


CASES = list(itertools.product(("Auto", "Explicit"), SPECS, ("random", "nearest")))
QUICK = [
    ("Auto", "both", "nearest"),
    ("Explicit", "both", "random"),
]


@pytest.mark.parametrize(("kind", "specs", "partner"), long_unless(QUICK, CASES))
def test_sharded_weights_merge_as_unsharded_ones(kind, specs, partner):
    params, rule = params_of(), MergeRule(0.6, 0.2, 0.8, partner)
    merge = jax.jit(lambda params: merge_kernels(params, KEY, KERNELS, rule))
    expected, stats = merge(params)
    mesh = mesh_of(AxisType[kind])
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


@pytest.mark.long
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


def collectives(partner, spec, kind, implementation):
    """Kinds of collectives in the compiled merge of one layer, each with its number of entries."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(kind,))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    rule = MergeRule(0.6, 0.2, 0.8, partner)
    shape = (3, 3, 64, 64)

    @jax.jit
    def merge(w):
        params = {"w": w}
        layers = [kernel("w", shape)]
        return merge_kernels(params, KEY, layers, rule, implementation=implementation)[0]

    weight = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    merge = jax.jit(merge, out_shardings={"w": sharding})
    text = merge.lower(weight).compile().as_text()
    found = re.findall(r" = (.*?) (all-[\w-]+|collective-permute)\(", text)
    shapes = [(name, re.findall(r"\w+\[([\d,]*)\]", result)) for result, name in found]
    return [
        (name, sum(np.prod([int(n) for n in one.split(",") if n]) for one in several))
        for name, several in shapes
    ]


@pytest.mark.parametrize("partner", ["random", "nearest"])
@pytest.mark.parametrize(
    ("spec", "kind", "implementation"),
    [
        ((None, None, "a", None), AxisType.Auto, "reference"),
        ((None, None, "a", None), AxisType.Explicit, "auto"),
        ((None, None, None, "a"), AxisType.Explicit, "auto"),
    ],
)
def test_no_weight_is_gathered(partner, spec, kind, implementation):
    """Similarities are reduced; units of several devices are exchanged, an eighth by each."""
    found = collectives(partner, spec, kind, implementation)
    assert found
    for name, entries in found:
        if name == "all-to-all":
            assert entries <= 3 * 3 * 64 * 64 / 8 and spec[3] == "a", found
        else:
            assert entries <= {"all-reduce": 64 * 64, "all-gather": 64}[name], found
    assert ("all-to-all" in dict(found)) == (spec[3] == "a")


def test_similarities_of_explicitly_sharded_weights():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Explicit,))
    params = {"w": params_of()["conv"]}
    (expected,) = kernel_similarity(params, [kernel("w")])
    for spec in ((None, None, "a"), (None, None, None, "a")):
        sharded = jax.device_put(params, NamedSharding(mesh, PartitionSpec(*spec)))
        (found,) = kernel_similarity(sharded, [kernel("w")])
        assert found.mean == pytest.approx(expected.mean, abs=1e-6)


@pytest.mark.parametrize(
    ("implementation", "partner"),
    long_unless(
        [("auto", "nearest"), ("reference", "random")],
        itertools.product(("auto", "reference"), ("random", "nearest")),
    ),
)
def test_unsharded_weights_under_an_explicit_mesh(implementation, partner):
    params, rule = {"w": np.asarray(params_of()["conv"])}, MergeRule(0.6, 0.2, 0.8, partner)

    def merge(params):
        return merge_kernels(params, KEY, [kernel("w")], rule, implementation=implementation)[0]

    expected = jax.jit(merge)(params)
    with jax.set_mesh(jax.make_mesh((8,), ("a",), axis_types=(AxisType.Explicit,))):
        found = jax.jit(merge)(params)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-5, atol=1e-6)


def test_a_group_of_sharded_and_unsharded_weights():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Explicit,))
    params, rule = params_of(), MergeRule(0.6, 0.2)
    merge = jax.jit(lambda params: merge_kernels(params, KEY, KERNELS[1:], rule)[0])
    expected = merge(params)
    sharding = NamedSharding(mesh, PartitionSpec("a", None))
    found = merge(params | {"dense": jax.device_put(params["dense"], sharding)})
    assert found["dense"].sharding.spec == sharding.spec
    for name in ("dense", "bias"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
