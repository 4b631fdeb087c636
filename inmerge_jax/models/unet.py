"""U-Net for segmentation in 2-D and 3-D (Ronneberger et al. 2015, arXiv 1505.04597)."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from inmerge_jax.errors import UsageError
from inmerge_jax.models.layers import TORCH_DEFAULT, BatchNorm, at_least_float32, conv, scaled


class UNet(nn.Module):
    """An encoder and a decoder of `levels` levels, joined by skip connections.

    A level is two convolutions of 3 taps per axis, each with batch normalisation and ReLU. The
    encoder halves the size by max-pooling and doubles the channels; the decoder doubles it by a
    transposed convolution of 2 taps. Convolutions are padded, so masks have the images' size.
    Modules are named encoder1_1, encoder1_2, ..., bottom_1, ..., up1, decoder1_1, ....

    Attributes:
      num_classes: number of logits per pixel or voxel.
      channels: channels of the first level, at width 1.
      levels: number of times that the size is halved.
      width: factor on the number of channels.
      dtype: dtype of activations.
      axis_name: mapped axis over whose devices batch statistics are averaged.
    """

    num_classes: int
    channels: int = 32
    levels: int = 4
    width: float = 1.0
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps (batch, h, w, c) or (batch, d, h, w, c) to logits (batch, ..., num_classes).

        Raises:
          UsageError: an axis is not a multiple of 2 ** levels.
        """
        spatial, factor = x.shape[1:-1], 2**self.levels
        if any(length % factor for length in spatial):
            raise UsageError(
                f"inputs of size {'x'.join(map(str, spatial))} cannot be halved {self.levels} "
                f"times: choose a `size` that is a multiple of {factor}"
            )
        ndim = len(spatial)
        norm = partial(BatchNorm, train, self.dtype, self.axis_name)

        def level(x: jax.Array, features: int, name: str) -> jax.Array:
            for part in ("1", "2"):
                x = conv(
                    features,
                    3,
                    ndim=ndim,
                    kernel_init=TORCH_DEFAULT,
                    dtype=self.dtype,
                    name=f"{name}_{part}",
                )(x)
                x = nn.relu(norm(name=f"{name}_bn{part}")(x))
            return x

        first = scaled(self.channels, self.width)
        skips = []
        for number in range(self.levels):
            x = level(x, first * 2**number, f"encoder{number + 1}")
            skips.append(x)
            x = nn.max_pool(x, (2,) * ndim, (2,) * ndim)
        x = level(x, first * factor, "bottom")
        for number in reversed(range(self.levels)):
            features = first * 2**number
            x = nn.ConvTranspose(
                features,
                (2,) * ndim,
                (2,) * ndim,
                "VALID",
                kernel_init=TORCH_DEFAULT,
                dtype=self.dtype,
                name=f"up{number + 1}",
            )(x)
            x = level(jnp.concatenate([skips[number], x], -1), features, f"decoder{number + 1}")
        return at_least_float32(
            conv(
                self.num_classes,
                1,
                ndim=ndim,
                use_bias=True,
                kernel_init=TORCH_DEFAULT,
                dtype=self.dtype,
                name="head",
            )(x)
        )
