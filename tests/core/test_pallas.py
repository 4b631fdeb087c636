"""The Pallas kernel that merges on TPU, run by Pallas's interpreter of TPU programs on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from inmerge_jax import MergeRule, in_model_merging, merge_kernels, quantile
from inmerge_jax.merging import Kernel, backends
from inmerge_jax.merging.backends import pallas
from tests.long import LONG, long_unless

needs_lowering = pytest.mark.skipif(
    tuple(map(int, jax.__version__.split(".")[:2])) > (0, 10),
    reason="from JAX 0.11 on Pallas asks for a TPU when it lowers a kernel for one",
)

# Groups of 64 and of 16 rows; of 128 kernels one, and five.
SHAPES = [(2, 2, 48, 128), (1, 1, 48, 128), (1, 1, 16, 640)]
THRESHOLDS = {"number": 0.05, "quantile": quantile(0.6)}
CASES = [
    (shape, dtype, partner, threshold)
    for shape in SHAPES
    for dtype in ("float32", "bfloat16")
    for partner in ("random", "nearest")
    for threshold in THRESHOLDS
]


def layer(shape):
    return Kernel((jax.tree_util.DictKey("w"),), shape, len(shape) - 1)


def case(shape, dtype="float32"):
    """A weight some of whose kernels are alike, one zero."""
    weight = jax.random.normal(jax.random.key(0), shape) + 0.3
    return weight.at[..., 3].set(0).astype(dtype)


@pytest.fixture
def on_tpu(monkeypatch):
    """Makes `platform_dependent` take what TPUs run, and has Pallas interpret it."""

    def choose(*args, **forms):
        return forms.get("tpu", forms["default"])(*args)

    with monkeypatch.context() as patch, pltpu.force_tpu_interpret_mode():
        patch.setattr(backends.lax, "platform_dependent", choose)
        yield


def merge(weight, rule, key=3, with_pallas=True):
    def run(weight, rule):
        params = {"w": weight}
        params, stats = merge_kernels(
            params,
            jax.random.key(key),
            [layer(weight.shape)],
            rule,
            implementation="tpu" if with_pallas else "auto",
        )
        return params["w"], stats

    return jax.jit(run)(weight, rule)


@pytest.mark.parametrize(
    ("shape", "dtype", "partner", "threshold"),
    long_unless(
        lambda case: CASES.index(case) == 0,
        CASES,
    ),
)
def test_merges_as_the_other_forms_do(shape, dtype, partner, threshold, request):
    weight = case(shape, dtype)
    rule = MergeRule(0.6, THRESHOLDS[threshold], 0.8, partner)
    expected, expected_stats = merge(weight, rule, with_pallas=False)
    request.getfixturevalue("on_tpu")
    merged, stats = merge(weight, rule)
    assert merged.dtype == weight.dtype
    assert 0 < stats.merged[0] < stats.selected[0]
    np.testing.assert_array_equal(stats.selected, expected_stats.selected)
    np.testing.assert_array_equal(stats.merged, expected_stats.merged)
    np.testing.assert_allclose(stats.similarity, expected_stats.similarity, rtol=1e-5)
    rounding = 1e-6 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(
        np.asarray(merged, np.float32), np.asarray(expected, np.float32), rtol=rounding, atol=1e-6
    )
    same = np.asarray(expected == weight).all((0, 1, 2))
    assert same.any()
    np.testing.assert_array_equal(np.asarray(merged)[..., same], np.asarray(weight)[..., same])


@pytest.mark.parametrize(
    ("partner", "threshold"),
    [
        pytest.param("random", quantile(0.0), marks=LONG),
        ("nearest", -1.0),
        pytest.param("random", -1.0, marks=LONG),
        pytest.param("nearest", quantile(0.0), marks=LONG),
    ],
)
def test_a_broken_kernel_stays_alone(on_tpu, partner, threshold):
    weight = case((1, 1, 16, 128)).at[..., 1].set(jnp.nan).at[..., 2].set(jnp.inf)
    merged, stats = merge(weight, MergeRule(1.0, threshold, 0.8, partner))
    broken = ~np.isfinite(merged).all((0, 1, 2))
    np.testing.assert_array_equal(np.flatnonzero(broken), [1, 2])
    if partner == "nearest":
        assert stats.merged[0] == 126


def test_the_nearest_of_equals_is_the_first(on_tpu):
    weight = jnp.tile(jax.random.normal(jax.random.key(1), (1, 1, 16, 1)), (1, 1, 1, 256))
    found = pallas._merge(
        False, weight, jnp.float32(0.8), jnp.ones(256, bool), None, jnp.float32(0.5)
    )
    np.testing.assert_array_equal(found[3], [1] + [0] * 255)
    np.testing.assert_allclose(found[0], weight, rtol=1e-6)


@LONG
def test_gradients_are_those_of_the_other_forms(request):
    weight = case((1, 1, 48, 128))

    def loss(weight, alpha, with_pallas):
        rule = MergeRule(0.5, 0.05, alpha)
        merged, stats = merge_kernels(
            {"w": weight},
            jax.random.key(3),
            [layer(weight.shape)],
            rule,
            implementation="tpu" if with_pallas else "auto",
        )
        return jnp.sum(jnp.sin(merged["w"])) + jnp.sum(stats.similarity)

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    expected = gradient(weight, 0.8, False)
    request.getfixturevalue("on_tpu")
    for a, b in zip(gradient(weight, 0.8, True), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@LONG
def test_a_batch_of_weights_and_rules(request):
    weights = jnp.stack([case((1, 1, 48, 128)), case((1, 1, 48, 128)) * 2])
    rules = MergeRule(jnp.array([0.5, 0.9]), jnp.array([0.05, -1.0]), jnp.array([0.8, 0.5]))
    run = jax.vmap(functools.partial(merge, with_pallas=False))
    expected, expected_stats = run(weights, rules)
    request.getfixturevalue("on_tpu")
    merged, stats = jax.vmap(merge)(weights, rules)
    np.testing.assert_allclose(merged, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(stats.merged, expected_stats.merged)


@pytest.mark.parametrize(
    ("shape", "axis", "dtype", "taken"),
    [
        ((3, 3, 512, 512), 3, "float32", True),
        ((1, 1, 2048, 512), 3, "bfloat16", True),
        ((3, 3, 128, 32), 3, "float32", False),
        ((512, 512, 3, 3), 0, "float32", False),
        ((3, 3, 16, 160), 3, "float32", False),
        ((7, 7, 3, 64), 3, "float32", False),
        ((3, 3, 512, 512), 3, "float16", False),
        ((3, 3, 1024, 512), 3, "float32", False),
        ((64,), 0, "float32", False),
        ((16, 65536), 1, "float32", True),
        ((16, 98304), 1, "float32", False),  # Without the kernels' own numbers it would.
    ],
)
def test_which_weights_it_takes(shape, axis, dtype, taken):
    assert pallas.fits(jax.ShapeDtypeStruct(shape, dtype), axis) == taken


@needs_lowering
@pytest.mark.parametrize("threshold", [0.05, quantile(0.5)], ids=str)
def test_in_64_bit_mode_the_form_by_xla_merges(threshold):
    weight, rule = case((1, 1, 48, 128)), MergeRule(0.6, threshold, 0.8, "nearest")
    with jax.enable_x64(True):
        assert not pallas.fits(weight, 3)
        plain, asked = (
            program(lambda w, f=f: merge(w, rule, with_pallas=f), weight) for f in (False, True)
        )
    assert plain == asked


def program(run, *arguments, platform="tpu"):
    return jax.jit(run).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@needs_lowering
def test_the_kernel_is_only_in_programs_for_tpus():
    weight = case((1, 1, 48, 128))
    for platform in ("tpu", "cuda", "cpu"):
        text = program(lambda w: merge(w, MergeRule()), weight, platform=platform)
        assert ("tpu_custom_call" in text) == (platform == "tpu")
    assert "tpu_custom_call" not in program(lambda w: merge(w, MergeRule(), 3, False), weight)
    large = jax.ShapeDtypeStruct((3, 3, 16, 160), jnp.float32)
    text = program(lambda w: merge(w, MergeRule()), large)
    assert "tpu_custom_call" not in text and "optimization_barrier" in text


@needs_lowering
def test_it_goes_through_scan_shard_map_and_the_transformation():
    weight = case((1, 1, 48, 128))

    def repeated(weight):
        keys = jax.random.split(jax.random.key(0), 3)

        def one(w, key):
            params, _ = merge_kernels(
                {"w": w}, key, [layer(w.shape)], MergeRule(), implementation="tpu"
            )
            return params["w"], None

        return jax.lax.scan(one, weight, keys)

    assert program(repeated, weight).count("tpu_custom_call") == 1

    mesh = jax.make_mesh((8,), ("d",))
    shared = jax.shard_map(
        lambda w: merge(w, MergeRule()),
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    assert "tpu_custom_call" in program(shared, weight)

    merging = in_model_merging(
        [layer(weight.shape)], MergeRule(), jax.random.key(0), implementation="tpu"
    )
    tx = optax.chain(optax.sgd(0.1), merging)

    def update(params):
        updates, _ = tx.update(params, tx.init(params), params)
        return optax.apply_updates(params, updates)

    assert "tpu_custom_call" in program(update, {"w": weight})


@needs_lowering
def test_it_exports_for_tpus():
    weight = case((1, 1, 48, 128))
    run = jax.jit(lambda w: merge(w, MergeRule(0.6, 0.05))[0])
    exported = jax.export.export(run, platforms=("tpu",))(weight)
    assert "tpu_custom_call" in exported.mlir_module()
