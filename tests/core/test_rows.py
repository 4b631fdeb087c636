"""With kernels as rows, as TPUs merge where not fused, the merge is the same; here on CPU."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inmerge_jax import MergeRule, merging, pairs
from inmerge_jax.kernels import Kernel
from tests.core.test_pairs import SHAPES, case
from tests.long import long_unless

MORE_SHAPES = [*SHAPES, (3, 3, 128, 32), (1, 1, 256, 24)]  # kernels of 9 and 2 times 128 numbers

FORMS = list(itertools.product(("float32", "bfloat16"), ("random", "nearest")))


def merge(form, weight, axis, rule, monkeypatch):
    """Merges one layer in one platform's form, whichever this one is; returns weight and stats."""

    def choose(*args, **forms):
        return forms.get(form, forms["default"])(*args)

    kernel = Kernel((jax.tree_util.DictKey("w"),), weight.shape, axis)
    with monkeypatch.context() as patch:
        patch.setattr(pairs.lax, "platform_dependent", choose)
        run = jax.jit(lambda w: merging.merge_kernels({"w": w}, jax.random.key(3), [kernel], rule))
        params, stats = run(weight)
    return np.asarray(params["w"]), stats


@pytest.mark.parametrize(
    ("shape", "dtype", "partner"),
    long_unless(
        # Each shape, each dtype with each partner.
        lambda case: FORMS.index(case[1:]) == MORE_SHAPES.index(case[0]) % len(FORMS),
        [(shape, *form) for shape in MORE_SHAPES for form in FORMS],
    ),
)
def test_rows_merge_as_columns_do(shape, dtype, partner, monkeypatch):
    weight, _, _ = case(shape, dtype)
    axis = len(shape) - 1
    rule = MergeRule(probability=0.6, threshold=0.1, alpha=0.8, partner=partner)
    rows, row_stats = merge("tpu", weight, axis, rule, monkeypatch)
    for other in ("cpu", "cuda"):
        columns, stats = merge(other, weight, axis, rule, monkeypatch)
        assert rows.dtype == columns.dtype
        np.testing.assert_array_equal(row_stats.merged, stats.merged)
        np.testing.assert_allclose(row_stats.similarity, stats.similarity, rtol=1e-5)
        rounding = 1e-6 if dtype == "float32" else 1e-2
        np.testing.assert_allclose(
            rows.astype(np.float32), columns.astype(np.float32), rtol=rounding, atol=1e-7
        )
        same = (columns == np.asarray(weight)).all(axis=tuple(range(axis)))
        np.testing.assert_array_equal(rows[..., same], columns[..., same])
    assert 0 < row_stats.merged[0]


@pytest.mark.parametrize("shape", MORE_SHAPES)
@pytest.mark.parametrize("partner", ["random", "nearest"])
def test_a_nan_stays_in_its_own_kernel(shape, partner, monkeypatch):
    weight, _, _ = case(shape, "float32")
    weight = weight.at[..., 1].set(jnp.nan).at[..., 2].set(jnp.inf)
    rule = MergeRule(probability=1.0, threshold=-1.0, alpha=0.8, partner=partner)
    merged, _ = merge("tpu", weight, len(shape) - 1, rule, monkeypatch)
    broken = ~np.isfinite(merged).all(axis=tuple(range(len(shape) - 1)))
    np.testing.assert_array_equal(np.flatnonzero(broken), [1, 2])


@pytest.mark.parametrize("axis", [0, 1, 3])
def test_rows_and_back_for_any_axis(axis):
    weight = jnp.arange(2 * 64 * 2 * 3, dtype=jnp.float32).reshape(2, 64, 2, 3)
    rows = pairs.to_rows(weight, axis)
    assert rows.shape[0] == weight.shape[axis]
    for i in range(weight.shape[axis]):
        np.testing.assert_array_equal(rows[i].ravel(), weight.take(i, axis).ravel())
    np.testing.assert_array_equal(pairs.from_rows(rows, weight.shape, axis), weight)


def test_gradients_are_those_of_the_columns(monkeypatch):
    weight, _, _ = case((3, 3, 128, 32), "float32")
    rule = MergeRule(probability=0.5, threshold=0.1)
    kernel = Kernel((jax.tree_util.DictKey("w"),), weight.shape, 3)

    def gradient(form):
        def choose(*args, **forms):
            return forms.get(form, forms["default"])(*args)

        def loss(w):
            merged, _ = merging.merge_kernels({"w": w}, jax.random.key(3), [kernel], rule)
            return jnp.sum(jnp.sin(merged["w"]))

        with monkeypatch.context() as patch:
            patch.setattr(pairs.lax, "platform_dependent", choose)
            return jax.jit(jax.grad(loss))(weight)

    rows, columns = gradient("tpu"), gradient("cuda")
    assert float(jnp.abs(columns - jnp.cos(weight)).max()) > 0.1  # something merged
    np.testing.assert_allclose(rows, columns, atol=1e-6)


def test_rows_are_in_the_program_for_tpus_alone():
    weight, _, _ = case((3, 3, 4, 6), "float32")
    kernel = Kernel((jax.tree_util.DictKey("w"),), weight.shape, 3)

    def program(platform):
        traced = jax.jit(
            lambda w: merging.merge_kernels({"w": w}, jax.random.key(0), [kernel], MergeRule())
        ).trace(weight)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "optimization_barrier" in program("tpu")
    assert "optimization_barrier" not in program("cuda")
    assert "optimization_barrier" not in program("cpu")


@pytest.mark.parametrize(("channels", "waiting"), [(512, 2), (256, 0)])
def test_on_tpus_alone_large_layers_wait_for_the_one_before(channels, waiting):
    shape = (3, 3, channels, channels)
    kernels = [Kernel((jax.tree_util.DictKey(name),), shape, 3) for name in "abc"]

    def barriers(platform):
        traced = jax.jit(
            lambda w: merging.merge_kernels(w, jax.random.key(0), kernels, MergeRule())
        ).trace(dict.fromkeys("abc", jax.ShapeDtypeStruct(shape, jnp.float32)))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        lines = [line for line in text.splitlines() if "optimization_barrier" in line]
        return [line.partition(" : ")[2].count("tensor") for line in lines]

    # One array for each layer's rows, and from the second on the weight with the one before.
    assert sorted(barriers("tpu")) == [1] * 3 + [2] * waiting
    assert barriers("cuda") == barriers("cpu") == []
