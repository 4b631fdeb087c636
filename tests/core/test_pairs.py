"""The form for CPU and the form for other platforms agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inmerge_jax import pairs

# The last has several blocks of rows with some left over, several groups of selected kernels, and
# more chosen ones than are written singly.
SHAPES = [(3, 3, 4, 6), (1, 1, 8, 5), (3, 4, 7), (2, 2, 2, 3, 4), (5, 9), (3, 3, 64, 40)]


@pytest.fixture(params=["blocked", "whole"])
def form(request, monkeypatch):
    """Runs the form of one platform, whichever this one is."""
    choose = {"blocked": lambda w, axis, blocked, whole: blocked}.get(
        request.param, lambda w, axis, blocked, whole: whole
    )
    monkeypatch.setattr(pairs, "_by_platform", choose)


def case(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    weight = jnp.asarray(rng.standard_normal(shape) + 0.5, dtype)
    partner = jnp.asarray(rng.permutation(shape[-1]), jnp.int32)
    chosen = jnp.asarray(rng.random(shape[-1]) < 0.5)
    return weight, partner, chosen


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_forms_equal_numpy(form, shape, dtype):
    weight, partner, chosen = case(shape, dtype)
    axis = len(shape) - 1
    w = np.asarray(weight).astype(np.float64).reshape(-1, shape[-1])
    other, pick = w[:, np.asarray(partner)], np.asarray(chosen)
    cosine = (w * other).sum(0) / np.linalg.norm(w, axis=0) / np.linalg.norm(other, axis=0)
    compare = jax.jit(pairs.pair_similarity, static_argnums=1)
    found = compare(weight, axis, partner, chosen)
    np.testing.assert_allclose(found, np.where(pick, cosine, -np.inf), atol=1e-6)
    mixed = jax.jit(pairs.mix_pairs, static_argnums=1)(weight, axis, partner, chosen, 0.8)
    assert mixed.dtype == weight.dtype
    expected = np.where(pick, 0.8 * w + 0.2 * other, w)
    found = np.asarray(mixed).astype(np.float64).reshape(w.shape)
    np.testing.assert_allclose(
        found, expected, rtol=1e-6 if dtype == "float32" else 1e-2, atol=1e-6
    )
    assert (found[:, ~pick] == w[:, ~pick]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_both_forms_find_the_nearest_partner_that_numpy_finds(form, shape):
    weight, _, selected = case(shape, "float32")
    w = np.asarray(weight, np.float64).reshape(-1, shape[-1])
    w /= np.linalg.norm(w, axis=0)
    cosine = w.T @ w
    np.fill_diagonal(cosine, -np.inf)
    find = jax.jit(pairs.nearest_partner, static_argnums=1)
    nearest, similarity = find(weight, len(shape) - 1, selected)
    pick = np.asarray(selected)
    assert pick.any() and not pick.all()
    np.testing.assert_array_equal(np.asarray(nearest)[pick], cosine.argmax(1)[pick])
    np.testing.assert_allclose(similarity, np.where(pick, cosine.max(1), -np.inf), atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_both_forms_have_the_gradients_of_the_formula(form, share):
    shape = (3, 3, 64, 40)
    weight, partner, _ = case(shape, "float32")
    rng = np.random.default_rng(1)
    chosen, seed = rng.random(40) < share, rng.standard_normal(shape).astype(np.float32)

    def total(weight, alpha):
        return jnp.sum(seed * pairs.mix_pairs(weight, 3, partner, jnp.asarray(chosen), alpha))

    by_weight, by_alpha = jax.jit(jax.grad(total, argnums=(0, 1)))(weight, 0.8)
    expected = np.where(chosen, np.float32(0.8), 1) * seed
    np.add.at(
        expected,
        (..., np.asarray(partner)),
        np.where(chosen, np.float32(0.2), 0) * seed,
    )
    np.testing.assert_allclose(by_weight, expected, atol=1e-5)
    w = np.asarray(weight)
    difference = np.where(chosen, seed * (w - w[..., np.asarray(partner)]), 0).sum()
    np.testing.assert_allclose(by_alpha, difference, rtol=1e-4, atol=1e-3)


def test_both_forms_are_in_the_program_that_is_lowered_for_their_platform():
    weight, partner, chosen = case((3, 3, 4, 6), "float32")

    def program(platform):
        traced = jax.jit(lambda w: pairs.mix_pairs(w, 3, partner, chosen, 0.8)).trace(weight)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "while" in program("cpu")
    assert "while" not in program("tpu")
    assert "while" not in program("cuda")


def test_nothing_chosen_changes_nothing(form):
    weight, partner, chosen = case((3, 3, 4, 6), "bfloat16")
    out = pairs.mix_pairs(weight, 3, partner, jnp.zeros_like(chosen), 0.1)
    np.testing.assert_array_equal(out, weight)
