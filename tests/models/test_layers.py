"""Pools and dropout are PyTorch's, in each platform's form, however a batch is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inmerge_jax.models.layers import (
    Dropout,
    _max_of_slices,
    _max_of_windows,
    adaptive_average_pool,
    average_pool_2x2,
    max_pool_2x2,
)


def test_dropout_is_the_same_however_the_batch_is_split():
    x = jnp.ones((8, 200))
    rngs = {"dropout": jax.random.key(3)}

    def drop(axis_name, x):
        return Dropout(0.25, axis_name).apply({}, x, train=True, rngs=rngs)

    whole = drop(None, x)
    for devices in (1, 2, 8):
        parts = jax.pmap(
            lambda x: drop("devices", x), axis_name="devices", devices=jax.devices()[:devices]
        )(x.reshape(devices, -1, *x.shape[1:]))
        np.testing.assert_array_equal(parts.reshape(8, 200), whole)
    kept = np.asarray(whole > 0)
    assert abs(kept.mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / kept.size)
    np.testing.assert_allclose(whole[kept], 1 / 0.75)
    assert len({row.tobytes() for row in kept}) == 8
    np.testing.assert_array_equal(Dropout(0.25).apply({}, x, train=False), x)


def test_pools_are_pytorchs():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, 9, 6, 3)).astype(np.float32)
    theirs = torch.tensor(x.transpose(0, 3, 1, 2))
    for ours, expected in (
        (max_pool_2x2(x), torch.nn.functional.max_pool2d(theirs, 2)),
        (average_pool_2x2(x), torch.nn.functional.avg_pool2d(theirs, 2)),
        (adaptive_average_pool(x, 7), torch.nn.functional.adaptive_avg_pool2d(theirs, 7)),
        (adaptive_average_pool(x, 4), torch.nn.functional.adaptive_avg_pool2d(theirs, 4)),
    ):
        np.testing.assert_allclose(
            ours, expected.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_both_forms_of_the_max_pool_agree(size):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    actual, pull = jax.vjp(_max_of_slices, x)
    expected, pull_expected = jax.vjp(_max_of_windows, x)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(pull(jnp.cos(actual))[0], pull_expected(jnp.cos(actual))[0])


@pytest.mark.parametrize(("platform", "windows"), [("cpu", 0), ("tpu", 1), ("cuda", 1)])
def test_only_the_cpu_pools_by_slices(platform, windows):
    lowered = (
        jax.jit(max_pool_2x2).trace(jnp.zeros((1, 4, 4, 1))).lower(lowering_platforms=(platform,))
    )
    assert lowered.as_text().count("stablehlo.reduce_window") == windows
