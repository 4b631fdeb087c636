"""The layers that the networks share, with PyTorch's padding, initial values and pooling."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer, variance_scaling
from jax.typing import DTypeLike

from inmerge_jax.errors import UsageError
from inmerge_jax.models.convolution import conv_general_dilated

KAIMING_FAN_OUT = variance_scaling(2.0, "fan_out", "normal")
"""torchvision's initial convolution weights."""

TORCH_DEFAULT = variance_scaling(1 / 3, "fan_in", "uniform")
"""What PyTorch's Conv2d and Linear draw by default: U(-1, 1) / sqrt(fan_in)."""

BATCH_MOMENTS = "batch_moments"
"""Name of the batch statistics, for policies of rematerialisation that keep them."""

MOMENTUM, _EPSILON = 0.1, 1e-5


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in float32, or in float64 if it has that."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded, at least 1."""
    return max(1, round(channels * width))


def conv(
    features: int,
    size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    *,
    ndim: int = 2,
    use_bias: bool = False,
    kernel_init: Initializer = KAIMING_FAN_OUT,
    dtype: DTypeLike = jnp.float32,
    name: str | None = None,
) -> nn.Conv:
    """A convolution over `ndim` spatial axes, padded by size // 2 on every side, as in PyTorch.

    A number for `size` or `stride` is that of every axis. XLA's "SAME" would pad a strided
    convolution on the right and at the bottom only.
    """
    sizes = (size,) * ndim if isinstance(size, int) else size
    return nn.Conv(
        features,
        sizes,
        (stride,) * ndim if isinstance(stride, int) else stride,
        padding=[(taps // 2, taps // 2) for taps in sizes],
        use_bias=use_bias,
        kernel_init=kernel_init,
        dtype=dtype,
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


def patch_tokens(x: jax.Array, features: int, size: int, dtype: DTypeLike) -> jax.Array:
    """One vector per patch, by a convolution named "patches" whose kernel and stride are `size`.

    Initial weights are those of torchvision's Vision Transformers. Call it inside `nn.compact`.

    Args:
      x: float (batch, ..., channels): images, signals or volumes.
      features: length of the vectors.
      size: length of a patch along each spatial axis, in pixels or samples.
      dtype: dtype of the result.

    Returns:
      (batch, tokens, features).

    Raises:
      UsageError: an axis of `x` is not a multiple of `size`.
    """
    spatial = x.shape[1:-1]
    if any(length % size for length in spatial):
        raise UsageError(
            f"inputs of size {'x'.join(map(str, spatial))} do not divide into patches of {size}: "
            f"choose a `size` that is a multiple of {size}"
        )
    init = variance_scaling(1.0, "fan_in", "truncated_normal")
    window = (size,) * len(spatial)
    x = nn.Conv(features, window, window, "VALID", dtype=dtype, kernel_init=init, name="patches")(x)
    return x.reshape(len(x), -1, features)


def before_stride(x: jax.Array, stride: int) -> jax.Array:
    """`x`, the input of a convolution with this stride; on TPU with a barrier in between.

    The TPU compiler joins the gradient of a strided convolution's input with the sums of the batch
    normalisation before it, and for v6e chips it then recurses until its stack overflows (libtpu
    0.0.42.1; seen on maps of 20x20 pixels and above, with 8 channels and with 64).
    """
    if stride == 1:
        return x
    return lax.platform_dependent(x, tpu=lax.optimization_barrier, default=lambda x: x)


class BatchNorm(nn.Module):
    """Batch normalisation with PyTorch's running statistics, over the last axis.

    A batch is normalised with its biased variance, and the running variance moves towards the
    unbiased one, as PyTorch's BatchNorm2d has it (SyncBatchNorm with an `axis_name`: the batch is
    then that of all its devices). Flax's own layer keeps the biased one.

    Attributes:
      train: normalise with the batch's statistics and update the running ones.
      dtype: of the result; statistics are float32, or float64 where `x` is.
      axis_name: the mapped axis over whose devices batch statistics are averaged.
    """

    train: bool
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises (batch, ..., channels).

        Raises:
          UsageError: in training, where a channel has one value only.
        """
        channels = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        mean, var = running_mean.value, running_var.value
        if self.train and not self.is_initializing():
            mean, var, count = self._batch_statistics(x)
            if count < 2:
                raise UsageError(
                    f"batch normalisation of a batch of shape {x.shape}: one value per channel has "
                    "no variance; train with a larger batch or larger images"
                )
            running_mean.value = _moved(running_mean.value, mean)
            running_var.value = _moved(running_var.value, var * (count / (count - 1)))
        y = (x - mean) * (lax.rsqrt(var + _EPSILON) * scale) + bias
        return y.astype(self.dtype)

    def _batch_statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array, int]:
        """Mean, biased variance and number of values per channel, over all devices."""
        x = at_least_float32(x)
        axes = tuple(range(x.ndim - 1))
        moments = jnp.stack([jnp.mean(x, axes), jnp.mean(jnp.square(x), axes)])
        count = x.size // x.shape[-1]
        if self.axis_name is not None:
            moments = lax.pmean(moments, self.axis_name)
            count *= lax.psum(1, self.axis_name)
        mean, square = checkpoint_name(moments, BATCH_MOMENTS)
        return mean, jnp.maximum(square - jnp.square(mean), 0), count


def _moved(running: jax.Array, batch: jax.Array) -> jax.Array:
    """PyTorch's momentum 0.1 is the share of the batch; Flax's 0.9 is the share that stays."""
    return (1 - MOMENTUM) * running + MOMENTUM * batch


class Linear(nn.Module):
    """A dense layer with PyTorch's initial values: weight and bias U(-1, 1) / sqrt(inputs).

    `bias_init` takes the place of the bias's.
    """

    features: int
    dtype: DTypeLike = jnp.float32
    bias_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, inputs) to (batch, features)."""
        limit = 1 / np.sqrt(x.shape[-1])

        def torch_default(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -limit, limit)

        kernel = self.param("kernel", TORCH_DEFAULT, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init or torch_default, (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        return x @ kernel + bias


class Dropout(nn.Module):
    """Dropout whose mask belongs to an example's place in the global batch.

    The mask of row r on device d is drawn from `fold_in(key, d * rows + r)`: a batch gets the same
    masks on one device as when it is split over the devices of `axis_name`.
    """

    rate: float = 0.5
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Zeroes entries of (batch, ...) with chance `rate` and scales the others to match."""
        if not train:
            return x
        rows = jnp.arange(x.shape[0])
        if self.axis_name is not None and not self.is_initializing():
            rows += lax.axis_index(self.axis_name) * x.shape[0]
        key = self.make_rng("dropout")

        def draw(row: jax.Array) -> jax.Array:
            return jax.random.bernoulli(jax.random.fold_in(key, row), 1 - self.rate, x.shape[1:])

        keep = jax.vmap(draw)(rows)
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """Largest of each 2x2 window, stride 2; an odd last row or column is left out.

    On CPU, where the gradient of `lax.reduce_window` is slow, by slices, which differentiate to
    plain arithmetic; entries of a window that tie share the gradient there, and elsewhere the first
    has it. On a TPU the slices would add a third to the bytes that VGG-19's training step moves.
    """
    return lax.platform_dependent(x, cpu=_max_of_slices, default=_max_of_windows)


def _max_of_slices(x: jax.Array) -> jax.Array:
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    upper, lower = x[:, 0:height:2], x[:, 1:height:2]
    tall = jnp.maximum(upper, lower)[:, :, :width]
    return jnp.maximum(tall[:, :, 0::2], tall[:, :, 1::2])


def _max_of_windows(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (2, 2), (2, 2))


def average_pool_2x2(x: jax.Array) -> jax.Array:
    """Mean of each 2x2 window, stride 2; an odd last row or column is left out."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """PyTorch's AdaptiveAvgPool2d, from any height and width to (batch, size, size, channels)."""
    if x.shape[1:3] == (size, size):
        return x
    rows, columns = (jnp.asarray(_averaging(n, size), x.dtype) for n in x.shape[1:3])
    return jnp.einsum("bhwc,ih,jw->bijc", x, rows, columns)


def _averaging(inputs: int, outputs: int) -> np.ndarray:
    """Matrix (outputs, inputs): window i runs from floor(i n / m) to ceil((i + 1) n / m)."""
    matrix = np.zeros((outputs, inputs))
    for i in range(outputs):
        start, stop = i * inputs // outputs, -(-(i + 1) * inputs // outputs)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix
