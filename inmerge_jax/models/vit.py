"""Vision Transformers (Dosovitskiy et al. 2021, arXiv 2010.11929), as in torchvision."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, variance_scaling, xavier_uniform, zeros
from jax.typing import DTypeLike

from inmerge_jax.models.layers import TORCH_DEFAULT, at_least_float32, patch_tokens, scaled

HEAD_WIDTH = 64
_MLP_RATIO = 4
# torchvision draws query, key and value as one weight of d inputs and 3 d outputs.
_XAVIER_OF_THREE = variance_scaling(0.5, "fan_avg", "uniform")


class EncoderBlock(nn.Module):
    """Attention and an MLP, each after a layer norm and with a residual connection.

    The attention's weights are those of `flax.linen.MultiHeadDotProductAttention`: `query`, `key`
    and `value` (d, heads, 64), `out` (heads, 64, d).
    """

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens (batch, tokens, d) to tokens."""
        width = x.shape[-1]
        y = nn.LayerNorm(dtype=self.dtype, name="ln_1")(x)
        x = x + nn.MultiHeadDotProductAttention(
            num_heads=self.heads,
            dtype=self.dtype,
            kernel_init=_XAVIER_OF_THREE,
            out_kernel_init=TORCH_DEFAULT,
            name="attention",
        )(y)
        y = nn.LayerNorm(dtype=self.dtype, name="ln_2")(x)
        y = self._dense(_MLP_RATIO * width, "fc1")(y)
        return x + self._dense(width, "fc2")(nn.gelu(y, approximate=False))

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(
            features,
            dtype=self.dtype,
            kernel_init=xavier_uniform(),
            bias_init=normal(1e-6),
            name=name,
        )


class ViT(nn.Module):
    """A Vision Transformer with a class token and learned positions.

    With patches of 16 px and 12 heads this is torchvision's `vit_b_16`, initial values included.
    The number of positions is that of the images it is initialized with.

    Attributes:
      num_classes: number of logits.
      depth: number of blocks.
      heads: number of attention heads of 64 channels each, at width 1.
      patch: height and width of a patch in pixels.
      width: factor on the number of heads.
      dtype: dtype of activations.
    """

    num_classes: int
    depth: int
    heads: int
    patch: int
    width: float = 1.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images (batch, h, w, c) to logits (batch, num_classes), at least float32.

        Raises:
          UsageError: height or width is not a multiple of the patch.
        """
        del train  # Nothing in it depends on it.
        heads = scaled(self.heads, self.width)
        d = heads * HEAD_WIDTH
        x = patch_tokens(x, d, self.patch, self.dtype)
        token = self.param("class_token", zeros, (1, 1, d))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, d)).astype(x.dtype), x], 1)
        positions = self.param("pos_embedding", normal(0.02), (1, x.shape[1], d))
        x = x + positions.astype(x.dtype)
        for number in range(self.depth):
            x = EncoderBlock(heads, self.dtype, name=f"block_{number}")(x)
        x = nn.LayerNorm(dtype=self.dtype, name="ln")(x[:, 0])
        logits = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=zeros, name="head")(x)
        return at_least_float32(logits)
