"""Mamba, a selective state-space model (Gu & Dao 2023, arXiv 2312.00752), for classification.

Each block computes, per channel c with N states,

    h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t,    y_t = C_t . h_t + D u_t

where the step size dt, B and C depend on the input u. Parameters have the names of Hugging Face's
`MambaModel`.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer, normal, ones, variance_scaling
from jax.typing import DTypeLike

from inmerge_jax.models.layers import (
    TORCH_DEFAULT,
    Linear,
    at_least_float32,
    patch_tokens,
    scaled,
)

STATES, EXPAND, _TAPS = 16, 2, 4
_STEP_MIN, _STEP_MAX = 0.001, 0.1


def selective_scan(
    u: jax.Array, step: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array
) -> jax.Array:
    """The states' outputs C_t . h_t, by an associative scan over time.

    Args:
      u: float32 (batch, time, channels), the input.
      step: float32 (batch, time, channels), the step size dt.
      a: float32 (channels, states), the negative diagonal state matrix A.
      b: float32 (batch, time, states), the input's weights B.
      c: float32 (batch, time, states), the output's weights C.

    Returns:
      float32 (batch, time, channels).
    """

    def combine(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple:
        return left[0] * right[0], right[0] * left[1] + right[1]

    decay = jnp.exp(step[..., None] * a)
    driven = (step * u)[..., None] * b[:, :, None]
    _, states = lax.associative_scan(combine, (decay, driven), axis=1)
    return jnp.einsum("btcn,btn->btc", states, c)


class Mixer(nn.Module):
    """Gated selective state-space layer; arithmetic of the scan is float32.

    Attributes:
      depth: number of blocks of the network, by whose square root outputs are scaled initially.
      dtype: dtype of activations.
    """

    depth: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps a sequence (batch, time, d) to one of the same shape."""
        d = x.shape[-1]
        channels, rank = EXPAND * d, math.ceil(d / 16)
        u, gate = jnp.split(self._dense(2 * channels, "in_proj")(x), 2, axis=-1)
        u = nn.Conv(
            channels,
            (_TAPS,),
            padding=[(_TAPS - 1, 0)],
            feature_group_count=channels,
            kernel_init=TORCH_DEFAULT,
            dtype=self.dtype,
            name="conv1d",
        )(u)
        u = nn.silu(u)
        mixed = self._dense(rank + 2 * STATES, "x_proj")(u)
        step, b, c = jnp.split(mixed, [rank, rank + STATES], axis=-1)
        step = nn.Dense(
            channels,
            dtype=self.dtype,
            kernel_init=_uniform(rank**-0.5),
            bias_init=_inverse_softplus_of_step,
            name="dt_proj",
        )(step)
        a_log = self.param("A_log", _log_of_states, (channels, STATES))
        skip = self.param("D", ones, (channels,))
        wide, step, b, c = (v.astype(jnp.float32) for v in (u, step, b, c))
        y = selective_scan(wide, nn.softplus(step), -jnp.exp(a_log), b, c) + wide * skip
        y = y.astype(self.dtype) * nn.silu(gate)
        smaller = variance_scaling(1 / 3 / self.depth, "fan_in", "uniform")
        return self._dense(d, "out_proj", smaller)(y)

    def _dense(
        self, features: int, name: str, kernel_init: Initializer = TORCH_DEFAULT
    ) -> nn.Dense:
        return nn.Dense(
            features, use_bias=False, dtype=self.dtype, kernel_init=kernel_init, name=name
        )


class Mamba(nn.Module):
    """A stack of Mamba blocks over patches of an image or samples of a signal, and their mean.

    Attributes:
      num_classes: number of logits.
      depth: number of blocks.
      features: channels between blocks, at width 1.
      patch: height and width of a patch of an image in pixels, or samples of a signal per token.
      width: factor on `features`.
      dtype: dtype of activations.
    """

    num_classes: int
    depth: int
    features: int
    patch: int
    width: float = 1.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images (batch, h, w, c) or signals (batch, time, c) to logits (batch, num_classes).

        Logits are at least float32.
        """
        del train  # Nothing in it depends on it.
        d = scaled(self.features, self.width)
        image = x.ndim > 3
        x = patch_tokens(x, d, self.patch, self.dtype)
        if image:  # A scan over rows of patches cannot tell where a row begins.
            positions = self.param("pos_embedding", normal(0.02), (1, x.shape[1], d))
            x = x + positions.astype(x.dtype)
        for number in range(self.depth):
            y = nn.RMSNorm(epsilon=1e-5, dtype=self.dtype, name=f"norm_{number}")(x)
            x = x + Mixer(self.depth, self.dtype, name=f"mixer_{number}")(y)
        x = nn.RMSNorm(epsilon=1e-5, dtype=self.dtype, name="norm_f")(x).mean(1)
        return at_least_float32(Linear(self.num_classes, self.dtype, name="head")(x))


def _uniform(limit: float) -> Initializer:
    """Draws from U(-limit, limit)."""

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return draw


def _inverse_softplus_of_step(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Biases for which the initial step size is log-uniform between 0.001 and 0.1."""
    low, high = math.log(_STEP_MIN), math.log(_STEP_MAX)
    step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return step + jnp.log(-jnp.expm1(-step))


def _log_of_states(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Logarithms of 1, 2, ... for every channel (S4D-real, arXiv 2206.11893)."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)
