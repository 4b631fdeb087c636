"""Units beyond the kernels of a plain convolution, against the NumPy oracle."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.oracles import merging_numpy
from inmerge_jax import (
    Kernel,
    MergeRule,
    attention_heads,
    deep_kernels,
    experts,
    in_model_merging,
    kernel_similarity,
    merge_kernels,
    merge_report,
    quantile,
    tie,
)
from inmerge_jax.merging.merge import draw_pairs
from inmerge_jax.merging.units import as_rows, from_rows, group_weights
from tests.long import long_unless


def at(name):
    return (jax.tree_util.DictKey(name),)


def heads_of(params, **rest):
    names = {"query": "q", "key": "k", "value": "v", "out": "o"}
    return attention_heads(params, "attn", **names, **rest)


def mamba():
    """A state-space layer's channels: two weights compared, two mixed along."""
    weights = [Kernel(at("in"), (6, 8), 1), Kernel(at("conv"), (3, 8), 1)]
    along = [Kernel(at("A"), (8, 4), 0), Kernel(at("D"), (8,), 0)]
    return tie([*weights, *along], "ssm", compared=lambda k: k.name in ("in", "conv"))


SHAPES = {"q": (6, 4, 3), "k": (6, 4, 3), "v": (6, 4, 3), "o": (4, 3, 6)}
FLAT = {"q": (12, 6), "k": (12, 6), "v": (12, 6), "o": (6, 12)}
FUSED = {"qkv": (6, 36), "b": (36,), "o": (12, 6)}


def abstract(shapes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


CASES = {
    "convolution": [Kernel(at("w"), (3, 3, 4, 6), 3)],
    "OIHW": [Kernel(at("w"), (6, 4, 3, 3), 0)],
    "grouped": [Kernel(at("w"), (3, 3, 2, 8), 3, groups=2)],
    "scanned": [Kernel(at("w"), (3, 1, 2, 4, 5), -1, batch_axes=(0,))],
    "scanned and grouped": [Kernel(at("w"), (2, 3, 4, 6), 3, batch_axes=(0,), groups=3)],
    "two batch axes": [Kernel(at("w"), (2, 5, 3, 4), 1, batch_axes=(0, -2))],
    "neuron with bias": tie(
        [Kernel(at("w"), (7, 6), 1), Kernel(at("b"), (6,), 0)], "fc", lambda k: k.name == "w"
    ),
    "heads": heads_of(abstract(SHAPES)),
    "heads of flat weights": heads_of(abstract(FLAT), heads=4, out_first=True),
    "fused heads": attention_heads(
        abstract(FUSED), "attn", query="qkv", key="qkv", value="qkv", out="o", heads=4, biases=["b"]
    ),
    "experts": experts(abstract({"wi": (4, 5, 6), "wo": (4, 6, 5)}), "moe", ["wi", "wo"]),
    "neurons of experts": [Kernel(at("wi"), (3, 5, 6), 2, batch_axes=(0,))],
    "state space": mamba(),
}


def weights_of(kernels, seed, spread=1.0):
    """Weights whose units share a common part, so that similarities take all values."""
    rng = np.random.default_rng(seed)
    params = {}
    for kernel in kernels:
        rows = as_rows(jnp.zeros(kernel.shape), kernel)
        common = rng.standard_normal((rows.shape[0], 1, *rows.shape[2:]))
        values = common + spread * rng.standard_normal(rows.shape)
        params[kernel.name] = np.asarray(from_rows(jnp.asarray(values, jnp.float32), kernel))
    return params


@functools.partial(jax.jit, static_argnums=2)
def draw_and_merge(params, key, kernels, rule):
    return draw_pairs(key, kernels[0], rule), merge_kernels(params, key, kernels, rule)


@settings(deadline=None)
@given(
    case=st.sampled_from(sorted(CASES)),
    seed=st.integers(0, 99),
    threshold=st.floats(-0.5, 0.875, width=32),
    partner=st.sampled_from(["random", "nearest"]),
)
def test_every_kind_of_unit_agrees_with_the_oracle(case, seed, threshold, partner):
    kernels = CASES[case]
    params = weights_of(kernels, seed)
    rule = MergeRule(0.7, threshold, 0.75, partner)
    (selected, partners), (merged, stats) = draw_and_merge(
        params, jax.random.key(seed), tuple(kernels), rule
    )
    expected, mixed = merging_numpy.merge_units(
        [params[k.name] for k in kernels],
        kernels,
        np.asarray(selected),
        None if partners is None else np.asarray(partners),
        threshold,
        0.75,
    )
    if stats.merged[0] != mixed.sum():
        # Rounding may decide where a similarity is as good as equal to the threshold.
        near = kernel_similarity(params, kernels, thresholds=(threshold - 1e-5, threshold + 1e-5))
        assert near[0].above[threshold - 1e-5] != near[0].above[threshold + 1e-5]
        return
    assert stats.kernels[0] == kernels[0].count and stats.selected[0] == selected.sum()
    for kernel, weight in zip(kernels, expected, strict=True):
        np.testing.assert_allclose(merged[kernel.name], weight, rtol=1e-5, atol=1e-6)


QUICK = ("convolution", "OIHW", "grouped", "fused heads")


@pytest.mark.parametrize("case", long_unless(QUICK, CASES))
def test_units_of_different_problems_never_mix(case):
    """With every problem at a value of its own, a mix within problems changes nothing."""
    kernels = CASES[case]
    params = {}
    for kernel in kernels:
        rows = as_rows(jnp.zeros(kernel.shape), kernel)
        value = jnp.arange(1.0, rows.shape[0] + 1).reshape(-1, *[1] * (rows.ndim - 1))
        params[kernel.name] = from_rows(jnp.broadcast_to(value, rows.shape), kernel)
    merged, stats = merge_kernels(params, jax.random.key(0), kernels, MergeRule(1.0, 0.5, 0.5))
    assert stats.merged[0] == kernels[0].count
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), merged, params)


def test_depthwise_kernels_are_left_alone():
    kernel = Kernel(at("w"), (3, 3, 1, 8), 3, groups=8)
    params = weights_of([kernel], 0)
    merged, stats = merge_kernels(params, jax.random.key(0), [kernel], MergeRule(1.0, -1.0))
    np.testing.assert_array_equal(merged["w"], params["w"])
    assert stats.kernels[0] == 8 and stats.merged[0] == stats.selected[0] == 0
    assert np.isnan(kernel_similarity(params, [kernel])[0].mean)


@pytest.mark.parametrize("case", ["grouped", "scanned", "heads", "state space"])
def test_similarities_are_those_of_the_pairs_of_each_problem(case):
    kernels = CASES[case]
    params = weights_of(kernels, 1)
    found = []
    compared = [k for k in kernels if k.compared]
    slices = [merging_numpy.unit_slices(kernel) for kernel in compared]
    for problem in range(len(slices[0])):
        vectors = [
            np.concatenate(
                [
                    params[k.name].reshape(k.dims)[s[problem][i]].ravel()
                    for k, s in zip(compared, slices, strict=True)
                ]
            )
            for i in range(len(slices[0][problem]))
        ]
        found += [
            merging_numpy.cosine(a, b) for i, a in enumerate(vectors) for b in vectors[i + 1 :]
        ]
    (layer,) = kernel_similarity(params, kernels)
    assert layer.name == kernels[0].label and layer.kernels == kernels[0].count
    assert layer.mean == pytest.approx(np.mean(found), abs=1e-6)
    assert layer.maximum == pytest.approx(np.max(found), abs=1e-6)


@pytest.mark.long
def test_a_quantile_is_that_of_each_problem():
    kernel = Kernel(at("w"), (4, 3, 3, 2, 20), 4, batch_axes=(0,))
    params = weights_of([kernel], 0)
    # The layers differ in how similar their units are.
    params["w"] = params["w"] * np.array([1, 10, 0.1, 1], np.float32).reshape(4, 1, 1, 1, 1)
    rule = MergeRule(1.0, quantile(0.75))
    merged, _ = merge_kernels(params, jax.random.key(0), [kernel], rule)
    changed = (merged["w"] != params["w"]).any(axis=(1, 2, 3)).sum(1)
    np.testing.assert_array_equal(changed, [5, 5, 5, 5])


def test_a_group_draws_by_its_label():
    one = tie([Kernel(at("w"), (5, 6), 1)], "name")
    other = tie([Kernel(at("v"), (5, 6), 1)], "name")
    params = weights_of(one, 0)
    rule, key = MergeRule(0.5, -1.0), jax.random.key(0)
    found, _ = merge_kernels(params, key, one, rule)
    same, _ = merge_kernels({"v": params["w"]}, key, other, rule)
    alone, _ = merge_kernels(params, key, [Kernel(at("w"), (5, 6), 1)], rule)
    np.testing.assert_array_equal(found["w"], same["v"])
    assert (found["w"] != alone["w"]).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(out_axis=4), r"axis 4 is out of range for shape \(3, 3, 2, 8\)"),
        (dict(out_axis=3, batch_axes=(-5,)), "axis -5 is out of range"),
        (dict(out_axis=3, batch_axes=(-1,)), "name an axis .* twice"),
        (dict(out_axis=3, groups=3), "groups is 3, which does not divide the 8 units"),
        (dict(out_axis=3, groups=0), "groups is 0"),
        (dict(out_axis=0, view=(4, 4)), r"view \(4, 4\) has 16 entries, but shape"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Kernel(at("w"), (3, 3, 2, 8), **fields)


def test_a_leaf_is_taken_by_its_name():
    params = {"fc": {"bias": jnp.ones(6)}}
    kernel = Kernel.named(params, "fc/bias", -1, op="dense")
    assert (kernel.name, kernel.shape, kernel.out_axis, kernel.op) == ("fc/bias", (6,), 0, "dense")
    with pytest.raises(ValueError, match="'bias' is not in params; its leaves begin with fc/bias"):
        Kernel.named(params, "bias", 0)


@pytest.mark.parametrize("seed", [np.int64(3), jnp.int32(3)])
def test_any_integer_is_a_seed(seed):
    weight = Kernel(at("w"), (5, 8), 1)
    params, rule = weights_of([weight], 0), MergeRule(0.5, -1.0)
    found, _ = merge_kernels(params, seed, [weight], rule)
    expected, _ = merge_kernels(params, 3, [weight], rule)
    np.testing.assert_array_equal(found["w"], expected["w"])


def test_negative_axes_are_normalised():
    kernel = Kernel(at("w"), (2, 3, 8), -1, batch_axes=(-3,))
    assert (kernel.out_axis, kernel.batch_axes) == (2, (0,))
    assert kernel == Kernel(at("w"), (2, 3, 8), 2, batch_axes=(0,))


def test_groups_are_checked():
    a, b = Kernel(at("a"), (4, 6), 1), Kernel(at("b"), (4, 5), 1)
    with pytest.raises(ValueError, match="'g' have different numbers .* a: 1 x 6, b: 1 x 5"):
        tie([a, b], "g")
    with pytest.raises(ValueError, match="no weight of group 'g' is compared"):
        tie([a], "g", compared=lambda kernel: False)
    with pytest.raises(ValueError, match="kernel 'a' is given twice"):
        group_weights([a, a])
    with pytest.raises(ValueError, match="kernels is empty"):
        tie([], "g")
    with pytest.raises(ValueError, match=r"kernel 'a' has shape \(0, 6\), which is empty"):
        tie([Kernel(at("a"), (0, 6), 1)], "g")


def test_what_is_not_in_params_is_named():
    with pytest.raises(ValueError, match="'q' is not in params; its leaves begin with k, o, v"):
        heads_of(abstract({name: SHAPES[name] for name in "kov"}))
    with pytest.raises(ValueError, match="give heads, the number of heads"):
        heads_of(abstract(FLAT))
    with pytest.raises(ValueError, match="'o' has .*: 12 does not divide into 5 heads"):
        heads_of(abstract(FLAT), heads=5, out_first=True)
    with pytest.raises(ValueError, match="'wi' is not in params"):
        experts({}, "moe", ["wi"])


def test_selecting_none_of_few_weights_says_what_else_there_is():
    """A Transformer has one convolution, its patch embedding, which is not the thing to merge."""
    patches = Kernel(at("embedding"), (4, 4, 3, 8), 3)
    with pytest.raises(
        ValueError, match=r'selects none of the 1 weights.*"dense".*attention_heads'
    ):
        deep_kernels([patches], skip=10)


def test_kernels_may_be_any_iterable():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 4))}
    kernels = [Kernel.named(params, name, 1, op="dense") for name in params]
    rule = MergeRule(1.0, -1.0)

    def once():
        return (kernel for kernel in kernels)

    assert deep_kernels(once(), skip=1) == tuple(kernels[1:])
    assert len(kernel_similarity(params, once())) == 2
    _, stats = merge_kernels(params, 0, once(), rule)
    assert stats.merged.tolist() == [4, 4]
    tx = in_model_merging(once(), rule, 0)
    _, state = tx.update(params, tx.init(params), params)
    assert sum(row.merged for row in merge_report(state, once())) == 8
    for wrong in (kernels[0], [1], None):
        with pytest.raises(ValueError, match="kernels must be a sequence of Kernel"):
            merge_kernels(params, 0, wrong, rule)


def test_a_field_value_of_a_users_own_class_is_taken_by_its_name():
    @functools.partial(jax.tree_util.register_dataclass)
    @dataclasses.dataclass
    class Attention:
        query: jax.Array
        key: jax.Array
        value: jax.Array
        out: jax.Array

    weights = [jax.random.normal(jax.random.key(n), (16, 4, 4)) for n in range(4)]
    weights[3] = weights[3].reshape(4, 4, 16)
    params = {"attn": Attention(*weights)}
    names = {name: f"attn/{name}" for name in ("query", "key", "value", "out")}
    heads = attention_heads(params, "heads", **names)
    merged, stats = merge_kernels(params, 0, heads, MergeRule(1.0, -1.0))
    assert stats.merged.tolist() == [4]
    assert not np.array_equal(merged["attn"].value, params["attn"].value)
    Pair = collections.namedtuple("Pair", "value bias")
    assert Kernel.named(Pair(jnp.ones((2, 3)), jnp.ones(3)), "value", 1).name == "value"


def test_grouped_query_attention_is_named():
    weights = {"q": (16, 4, 4), "k": (16, 2, 4), "v": (16, 2, 4), "o": (4, 4, 16)}
    params = {name: jnp.ones(shape) for name, shape in weights.items()}
    with pytest.raises(ValueError, match="grouped-query attention"):
        attention_heads(params, "heads", query="q", key="k", value="v", out="o")


def test_a_grouped_convolution_of_an_ensemble_by_hand():
    """As on docs/beyond-convolutions.md: each member's groups merge as they would alone."""
    weight = jax.random.normal(jax.random.key(0), (2, 3, 3, 4, 8))
    every = Kernel(at("w"), weight.shape, out_axis=4, batch_axes=(0,), groups=2)
    rule = MergeRule(1.0, -1.0, 0.5, "nearest")
    merged, stats = merge_kernels({"w": weight}, 0, [every], rule)
    assert stats.merged.tolist() == [16]
    alone = Kernel(at("w"), weight.shape[1:], out_axis=3, groups=2)
    for member in range(2):
        expected, _ = merge_kernels({"w": weight[member]}, 0, [alone], rule)
        np.testing.assert_allclose(merged["w"][member], expected["w"], rtol=1e-6)


def test_a_stack_of_attention_layers_is_refused():
    params = {name: jnp.zeros((12, 16, 4, 4)) for name in ("q", "k", "v", "o")}
    with pytest.raises(ValueError, match="'o' has shape .*12, 16, 4, 4.*For a stack of layers"):
        attention_heads(params, "a", query="q", key="k", value="v", out="o")


def test_a_weight_in_two_layers_is_refused():
    weight = Kernel(at("w"), (5, 8), 1)
    params = {"w": jnp.ones((5, 8))}
    with pytest.raises(ValueError, match="kernel 'w' is given twice"):
        merge_kernels(params, 0, [weight, *tie([weight], "group")], MergeRule())
    with pytest.raises(ValueError, match="'a/b' is the name of two leaves of params"):
        both = {"a": {"b": params["w"]}, "a/b": params["w"]}
        merge_kernels(both, 0, [Kernel(at("a/b"), (5, 8), 1)], MergeRule())


def test_heads_of_other_layouts():
    """A fused key and value; heads given beside Flax's own axes; biases of both shapes."""
    shapes = {"q": (6, 12), "kv": (6, 24), "o": (12, 6), "bq": (12,), "bkv": (24,)}
    names = {"query": "q", "key": "kv", "value": "kv", "out": "o", "biases": ["bq", "bkv"]}
    found = attention_heads(abstract(shapes), "attn", **names, heads=4)
    assert {k.name: (k.dims, k.out_axis) for k in found} == {
        "q": ((6, 1, 4, 3), 2),
        "kv": ((6, 2, 4, 3), 2),
        "o": ((1, 4, 3, 6), 1),
        "bq": ((1, 4, 3), 1),
        "bkv": ((2, 4, 3), 1),
    }
    with_bias = abstract(SHAPES | {"b": (4, 3)})
    found = heads_of(with_bias, heads=4, biases=["b"])
    assert {k.name: (k.dims, k.out_axis) for k in found}["b"] == ((4, 3), 0)
    assert found[:3] == heads_of(with_bias)[:3]
    with pytest.raises(ValueError, match="which is 4 heads, not 2"):
        heads_of(with_bias, heads=2)
    with pytest.raises(
        ValueError, match=r"'b' has shape \(6,\): axis 0 is not 1 or 2 or 3 x 4 heads"
    ):
        heads_of(abstract(SHAPES | {"b": (6,)}), biases=["b"])


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_a_traced_threshold_below_all_similarities_merges_what_is_selected(implementation):
    weight = Kernel(at("w"), (5, 8), 1)
    params = weights_of([weight], 0)

    @jax.jit
    def merged(probability, threshold):
        rule = MergeRule(probability, threshold, 0.5)
        return merge_kernels(params, 0, [weight], rule, implementation=implementation)[1].merged[0]

    assert (merged(0.0, -3.0), merged(1.0, -3.0)) == (0, 8)


def test_a_rule_of_arrays_is_refused():
    weight = Kernel(at("w"), (5, 8), 1)
    for rule in (MergeRule(jnp.array([0.1, 0.3])), MergeRule(threshold=jnp.full(8, 0.1))):
        with pytest.raises(ValueError, match=r"has shape \(\d,\); give a scalar, and jax.vmap"):
            merge_kernels({"w": jnp.ones((5, 8))}, 0, [weight], rule)


def test_lists_are_as_good_as_tuples():
    fields = {
        "path": [jax.tree_util.DictKey("w")],
        "shape": [2, 12],
        "view": [2, 3, 4],
        "batch_axes": [0],
    }
    kernel = Kernel(**fields, out_axis=1)
    expected = Kernel(**{name: tuple(value) for name, value in fields.items()}, out_axis=1)
    assert kernel == expected and hash(kernel) == hash(expected)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: Kernel("w", (4, 6), 1), "path of a kernel is 'w'; give a tuple; for a name"),
        (lambda p: Kernel(at("w"), 4, 0), "shape of a kernel is 4; give a tuple"),
        (lambda p: Kernel(at("w"), (4, 6), 1, batch_axes=0), "batch_axes of a kernel is 0"),
        (lambda p: experts(p, "moe", "wi"), "weights is the name 'wi'; give a sequence"),
        (lambda p: heads_of(p, biases="b"), "biases is the name 'b'; give a sequence"),
        (lambda p: heads_of(p, heads=0), "heads is 0; give the number of heads"),
        (lambda p: heads_of(p, heads=2.0), "heads is 2.0; give the number of heads"),
        (lambda p: deep_kernels([Kernel(at("w"), (4, 6), 1)], skip=2.5), "skip is 2.5; it counts"),
        (lambda p: deep_kernels([Kernel(at("w"), (4, 6), 1)], skip=None), "skip is None"),
        (
            lambda p: deep_kernels([Kernel(at("w"), (4, 6), 1)], skip=0, where="conv"),
            "where is 'conv'; give a function of a Kernel",
        ),
    ],
)
def test_arguments_of_another_kind_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(abstract(FLAT))
