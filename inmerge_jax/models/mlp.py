"""Multilayer perceptrons for tables, and MLP-Mixer for images (arXiv 2105.01601)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import zeros
from jax.typing import DTypeLike

from inmerge_jax.models.layers import Linear, at_least_float32, patch_tokens, scaled


class MLP(nn.Module):
    """Dense layers with ReLU between them.

    Attributes:
      num_classes: number of logits.
      hidden: outputs of each hidden layer, at width 1.
      width: factor on `hidden`.
      dtype: dtype of activations.
    """

    num_classes: int
    hidden: tuple[int, ...]
    width: float = 1.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps rows (batch, ...), which are flattened, to logits (batch, num_classes).

        Logits are at least float32.
        """
        del train  # Nothing in it depends on it.
        x = x.reshape(len(x), -1)
        for number, features in enumerate(self.hidden, 1):
            x = nn.relu(Linear(scaled(features, self.width), self.dtype, name=f"fc{number}")(x))
        return at_least_float32(Linear(self.num_classes, self.dtype, name="head")(x))


class MixerBlock(nn.Module):
    """An MLP over tokens and one over channels, each after a layer norm, with residuals."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens (batch, tokens, d) to tokens."""
        d = x.shape[-1]
        y = nn.LayerNorm(dtype=self.dtype, name="norm1")(x).swapaxes(1, 2)
        x = x + self._mlp(y, max(1, d // 2), "tokens").swapaxes(1, 2)
        y = nn.LayerNorm(dtype=self.dtype, name="norm2")(x)
        return x + self._mlp(y, 4 * d, "channels")

    def _mlp(self, x: jax.Array, hidden: int, name: str) -> jax.Array:
        y = nn.Dense(hidden, dtype=self.dtype, name=f"{name}_fc1")(x)
        y = nn.gelu(y, approximate=False)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name=f"{name}_fc2")(y)


class MLPMixer(nn.Module):
    """MLP-Mixer: the parameters have the shapes of timm's.

    Attributes:
      num_classes: number of logits.
      depth: number of blocks.
      features: channels of a token, at width 1.
      patch: height and width of a patch in pixels.
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
        """Maps images (batch, h, w, c) to logits (batch, num_classes), at least float32."""
        del train  # Nothing in it depends on it.
        x = patch_tokens(x, scaled(self.features, self.width), self.patch, self.dtype)
        for number in range(self.depth):
            x = MixerBlock(self.dtype, name=f"block_{number}")(x)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x).mean(1)
        logits = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=zeros, name="head")(x)
        return at_least_float32(logits)
