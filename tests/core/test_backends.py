"""The forms for CPU and TPU agree with the reference, and each is in its platform's program."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inmerge_jax import Kernel, MergeRule, merge_kernels, quantile, tie
from inmerge_jax.merging.backends import cpu, tpu
from inmerge_jax.merging.merge import draw_pairs, merge_layer
from tests.long import LONG, long_unless

# The sixth has several blocks of rows with some left over, several groups of selected kernels, and
# more chosen ones than are written singly; the last two are whole tiles of a TPU's memory.
SHAPES = [(3, 3, 4, 6), (1, 1, 8, 5), (3, 4, 7), (2, 2, 2, 3, 4), (5, 9), (3, 3, 64, 40)]
SHAPES += [(3, 3, 128, 32), (1, 1, 256, 24)]
FORMS = {"cpu": cpu.merge, "tpu": tpu.merge}
THRESHOLDS = {"number": 0.1, "quantile": quantile(0.4)}


def kernel(shape, axis=-1, name="w"):
    return Kernel((jax.tree_util.DictKey(name),), tuple(shape), axis)


def example(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape) + 0.5, dtype)


def run(form, weight, layer, rule, key=3):
    selected, partner = draw_pairs(jax.random.key(key), layer, rule)

    @jax.jit
    def merge(weight):
        return form([weight], [layer], selected, partner, rule)

    (merged,), count, total = merge(weight)
    return np.asarray(merged), int(count), float(total)


RULES = [
    # Two kernels that are each other's nearest have one similarity: at a quantile, rounding
    # decides between them.
    ("float32", "random", "number"),
    ("float32", "random", "quantile"),
    ("float32", "nearest", "number"),
    ("bfloat16", "random", "quantile"),
    ("bfloat16", "nearest", "number"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "rule"),
    # Every rule at the shape with rows left over, every shape with one rule.
    long_unless(
        lambda case: case[0] == SHAPES[5] or (case[1] == RULES[0] and case[0] in SHAPES[::3]),
        itertools.product(SHAPES, RULES),
    ),
)
def test_a_form_merges_as_the_reference_does(form, shape, rule):
    dtype, partner, threshold = rule
    weight, layer = example(shape, dtype), kernel(shape)
    rule = MergeRule(0.6, THRESHOLDS[threshold], 0.8, partner)
    expected, count, total = run(merge_layer, weight, layer, rule)
    found, found_count, found_total = run(FORMS[form], weight, layer, rule)
    assert found.dtype == expected.dtype and found_count == count
    assert found_total == pytest.approx(total, rel=1e-5)
    rounding = 1e-6 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(
        found.astype(np.float32), expected.astype(np.float32), rtol=rounding, atol=1e-6
    )
    same = (expected == np.asarray(weight)).all(axis=tuple(range(len(shape) - 1)))
    np.testing.assert_array_equal(found[..., same], expected[..., same])


def test_something_merges_in_these_cases():
    rule = MergeRule(0.6, 0.1, 0.8, "nearest")
    assert all(run(merge_layer, example(s, "float32"), kernel(s), rule)[1] for s in SHAPES)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_any_axis_on_tpu(axis):
    weight, layer = example((6, 8, 5, 9), "float32"), kernel((6, 8, 5, 9), axis)
    rule = MergeRule(1.0, -1.0, 0.5, "random")
    expected, found = (run(form, weight, layer, rule)[0] for form in (merge_layer, tpu.merge))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape", [s if s in SHAPES[::5] else pytest.param(s, marks=LONG) for s in SHAPES]
)
@pytest.mark.parametrize("partner", ["random", "nearest"])
def test_a_nan_stays_in_its_own_kernel(form, shape, partner):
    weight = example(shape, "float32").at[..., 1].set(jnp.nan).at[..., 2].set(jnp.inf)
    rule = MergeRule(1.0, -1.0, 0.8, partner)
    merged, *_ = run(FORMS[form], weight, kernel(shape), rule)
    broken = ~np.isfinite(merged).all(axis=tuple(range(len(shape) - 1)))
    np.testing.assert_array_equal(np.flatnonzero(broken), [1, 2])


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("partner", ["random", "nearest"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nan_that_is_not_compared_stays_in_its_own_unit(bad, partner, implementation):
    members = [
        Kernel((jax.tree_util.DictKey(name),), shape, len(shape) - 1, group="fc", compared=compared)
        for name, shape, compared in (("w", (5, 6), True), ("b", (6,), False))
    ]
    params = {"w": example((5, 6), "float32"), "b": jnp.arange(6.0).at[2].set(bad)}
    rule = MergeRule(1.0, -1.0, 0.5, partner)
    for seed in range(10):
        out, stats = merge_kernels(params, seed, members, rule, implementation=implementation)
        broken = ~np.isfinite(out["b"])
        np.testing.assert_array_equal(np.flatnonzero(broken), [2])
        np.testing.assert_array_equal(out["w"][:, 2], params["w"][:, 2])
        assert 0 < stats.merged[0] < 6 and np.isfinite(stats.similarity[0])
        if partner == "nearest":
            assert stats.merged[0] == 5


@pytest.mark.parametrize("partner", ["random", "nearest"])
@pytest.mark.parametrize("form", [merge_layer, cpu.merge], ids=["reference", "cpu"])
@pytest.mark.parametrize("small", [1e-12, 1e-21, 1e-30])
@pytest.mark.parametrize("rows", [slice(64), slice(-64, None)], ids=["first", "last"])
@pytest.mark.parametrize("inputs", [100, 144, 256])
def test_rows_that_are_tiny_in_all_kernels_change_no_similarity(inputs, rows, small, form, partner):
    """Weights of blank pixels, which decay: the CPU form takes its scale from some rows."""
    shape = (inputs, 40)
    weight, layer = example(shape, "float32"), kernel(shape)
    weight = weight + 3 * weight[:, :1]
    rule = MergeRule(0.6, 0.1, 0.8, partner)
    _, count, total = run(merge_layer, weight.at[rows].set(0), layer, rule)
    _, found_count, found_total = run(form, weight.at[rows].multiply(small), layer, rule)
    assert count and found_count == count
    assert found_total == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("scale", long_unless([1e30], [1e-22, 1e21, 1e30]))
@pytest.mark.parametrize("partner", ["random", "nearest"])
@pytest.mark.parametrize("form", [merge_layer, cpu.merge], ids=["reference", "cpu"])
def test_similarities_do_not_depend_on_the_scale(scale, partner, form):
    shape = (3, 3, 64, 40)
    weight, layer = example(shape, "float32"), kernel(shape)
    # One kernel is much smaller than the others, too.
    weight = weight.at[..., 3].multiply(1e-12)
    rule = MergeRule(0.6, 0.1, 0.8, partner)
    expected, count, total = run(form, weight, layer, rule)
    found, scaled_count, scaled_total = run(form, weight * np.float32(scale), layer, rule)
    assert count and scaled_count == count
    assert scaled_total == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(found / np.float32(scale), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [*FORMS.values(), merge_layer], ids=[*FORMS, "reference"])
@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_gradients_are_those_of_the_formula(form, probability):
    shape = (3, 3, 64, 40)
    weight, layer = example(shape, "float32"), kernel(shape)
    rule = MergeRule(probability, -1.0, 0.8)
    selected, partner = draw_pairs(jax.random.key(3), layer, rule)
    seed = np.random.default_rng(1).standard_normal(shape).astype(np.float32)

    def total(weight, alpha):
        now = MergeRule(probability, -1.0, alpha)
        (merged,), *_ = form([weight], [layer], selected, partner, now)
        return jnp.sum(seed * merged)

    by_weight, by_alpha = jax.jit(jax.grad(total, argnums=(0, 1)))(weight, 0.8)
    chosen, other = np.asarray(selected), np.asarray(partner)
    expected = np.where(chosen, np.float32(0.8), 1) * seed
    np.add.at(expected, (..., other), np.where(chosen, np.float32(0.2), 0) * seed)
    np.testing.assert_allclose(by_weight, expected, atol=1e-5)
    w = np.asarray(weight)
    difference = np.where(chosen, seed * (w - w[..., other]), 0).sum()
    np.testing.assert_allclose(by_alpha, difference, rtol=1e-4, atol=1e-3)


NEURONS = tie(
    [
        Kernel((jax.tree_util.DictKey("w"),), (300, 40), 1, op="dense"),
        Kernel((jax.tree_util.DictKey("b"),), (40,), 0, op="dense"),
        Kernel((jax.tree_util.DictKey("fused"),), (5, 80), 2, view=(5, 2, 40), op="dense"),
    ],
    "fc",
    compared=lambda one: one.name == "w",
)


@pytest.mark.parametrize("partner", ["random", "nearest"])
@pytest.mark.parametrize("dtype", long_unless(["float32"], ["float32", "bfloat16"]))
def test_neurons_with_biases_merge_on_cpu_as_in_the_reference(partner, dtype):
    params = {k.name: example(k.shape, dtype, seed) for seed, k in enumerate(NEURONS)}
    rule = MergeRule(0.6, 0.1, 0.8, partner)

    def merge(params, alpha, implementation):
        now = MergeRule(0.6, 0.1, alpha, partner)
        key = jax.random.key(3)
        new, stats = merge_kernels(params, key, NEURONS, now, implementation=implementation)
        total = sum(jnp.sum(jnp.square(w.astype(jnp.float32))) for w in new.values())
        return total, (new, stats)

    found, expected = (
        jax.jit(jax.value_and_grad(merge, argnums=(0, 1), has_aux=True), static_argnums=2)(
            params, rule.alpha, implementation
        )
        for implementation in ("cpu", "reference")
    )
    stats = found[0][1][1]
    assert 0 < stats.merged[0] < stats.selected[0] or partner == "nearest"
    rounding = 1e-5 if dtype == "float32" else 2e-2
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(one).astype(np.float32) for one in (a, b))
        np.testing.assert_allclose(a, b, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 3])
def test_rows_and_back_for_any_axis(axis):
    weight = jnp.arange(2 * 64 * 2 * 3, dtype=jnp.float32).reshape(2, 64, 2, 3)
    rows = tpu.to_rows(weight, axis)
    assert rows.shape[0] == weight.shape[axis]
    for i in range(weight.shape[axis]):
        np.testing.assert_array_equal(rows[i].ravel(), weight.take(i, axis).ravel())
    np.testing.assert_array_equal(tpu.from_rows(rows, weight.shape, axis), weight)


# ---- which form is in which program


def program(platform, implementation="auto", layer=(kernel((3, 3, 4, 6)),)):
    def merge(params):
        return merge_kernels(
            params, jax.random.key(0), layer, MergeRule(), implementation=implementation
        )

    params = {k.name: jax.ShapeDtypeStruct(k.shape, jnp.float32) for k in layer}
    return jax.jit(merge).trace(params).lower(lowering_platforms=(platform,)).as_text()


def loops(text):
    """The loops of a program: those of the draws, and of the CPU form."""
    return text.count("stablehlo.while")


def test_each_platform_gets_its_form():
    drawing = loops(program("cpu", "reference"))
    assert loops(program("cpu")) > drawing
    assert loops(program("tpu")) <= drawing and loops(program("cuda")) <= drawing
    assert "optimization_barrier" in program("tpu")
    assert "optimization_barrier" not in program("cuda")


def test_an_implementation_can_be_chosen():
    assert "optimization_barrier" not in program("tpu", "reference")
    assert loops(program("cuda", "cpu")) > loops(program("cuda"))


def test_neurons_with_biases_have_a_form_on_cpu_alone():
    for platform in ("cpu", "tpu", "cuda"):
        text, reference = (program(platform, name, NEURONS) for name in ("auto", "reference"))
        assert (loops(text) > loops(reference)) == (platform == "cpu")
        assert "optimization_barrier" not in text


HEADS = tie([kernel((8, 4, 3), 1, name=name) for name in "qkv"], "attention")


@pytest.mark.parametrize(
    "layer",
    [(dataclasses.replace(kernel((3, 3, 4, 6)), groups=2),), HEADS],
    ids=["grouped", "heads"],
)
def test_other_units_take_the_reference_on_every_platform(layer):
    for platform in ("cpu", "tpu", "cuda"):
        text = program(platform, layer=layer)
        assert loops(text) == loops(program(platform, "reference", layer))
        assert "optimization_barrier" not in text


def test_an_unknown_implementation_is_refused():
    with pytest.raises(
        ValueError, match="implementation is 'gpu'; choose one of auto, reference, cpu"
    ):
        program("cpu", "gpu")


@pytest.mark.parametrize(("channels", "waiting"), [(512, 2), (256, 0)])
def test_on_tpus_alone_large_layers_wait_for_the_one_before(channels, waiting):
    shape = (3, 3, channels, channels)
    kernels = [kernel(shape, name=name) for name in "abc"]

    def barriers(platform):
        traced = jax.jit(lambda w: merge_kernels(w, jax.random.key(0), kernels, MergeRule())).trace(
            dict.fromkeys("abc", jax.ShapeDtypeStruct(shape, jnp.float32))
        )
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        lines = [line for line in text.splitlines() if "optimization_barrier" in line]
        return [line.partition(" : ")[2].count("tensor") for line in lines]

    # One array for each layer's rows, and from the second on the weight with the one before.
    assert sorted(barriers("tpu")) == [1] * 3 + [2] * waiting
    assert barriers("cuda") == barriers("cpu") == []


# ---- JAX's own settings


@LONG
@pytest.mark.parametrize("partner", ["nearest", "random"])
def test_debugging_settings_change_nothing(partner):
    shape = (3, 3, 8, 16)
    weight, layer = {"w": example(shape, "float32")}, kernel(shape)
    rule = MergeRule(0.6, quantile(0.3), 0.8, partner)

    def merge():
        return merge_kernels(weight, jax.random.key(0), [layer], rule)

    expected, stats = jax.jit(merge)()
    for setting in (jax.disable_jit(), jax.debug_infs(True), jax.debug_nans(True)):
        with setting:
            found, found_stats = merge()
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(found_stats.merged, stats.merged)
    assert stats.merged[0] > 0


@pytest.mark.parametrize("partner", ["nearest", pytest.param("random", marks=LONG)])
def test_inside_shard_map_with_its_default_checks(partner):
    """Weights that differ by device, as those of an ensemble that is trained on several."""
    from jax.sharding import PartitionSpec

    count = jax.local_device_count()
    mesh = jax.make_mesh((count,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    shape = (3, 3, 4, 6)
    weights = jnp.stack([example(shape, "float32", seed) for seed in range(count)])
    layer, rule = kernel(shape), MergeRule(0.6, 0.1, 0.8, partner)

    def merge(weight):
        merged, stats = merge_kernels({"w": weight[0]}, jax.random.key(0), [layer], rule)
        return merged["w"][None], stats.merged

    spec = PartitionSpec("model")
    each = jax.jit(jax.shard_map(merge, mesh=mesh, in_specs=spec, out_specs=spec))
    found, counts = each(weights)
    for i in range(count):
        expected, stats = merge_kernels({"w": weights[i]}, jax.random.key(0), [layer], rule)
        np.testing.assert_allclose(found[i], expected["w"], rtol=1e-5)
        assert counts[i] == stats.merged[0]
