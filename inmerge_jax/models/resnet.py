"""Residual networks (He et al. 2016, arXiv 1512.03385), post-activation."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from inmerge_jax.models.layers import (
    KAIMING_FAN_OUT,
    TORCH_DEFAULT,
    BatchNorm,
    Linear,
    at_least_float32,
    before_stride,
    conv,
    scaled,
)

_STAGE_CHANNELS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 projection where shapes differ.

    `conv` and `norm` make layers: `conv(features, size, stride, name=...)`, `norm(name=...)`.
    """

    channels: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, h, w, inputs) to (batch, h / stride, w / stride, channels)."""
        x = before_stride(x, self.stride)
        y = self.conv(self.channels, 3, self.stride, name="conv1")(x)
        y = nn.relu(self.norm(name="bn1")(y))
        y = self.conv(self.channels, 3, name="conv2")(y)
        y = self.norm(name="bn2")(y)
        if self.stride != 1 or x.shape[-1] != self.channels:
            x = self.conv(self.channels, 1, self.stride, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_bn")(x)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, the second of which has four times as many channels.

    The 3x3 convolution has the stride, as in torchvision and the MedMNIST v2 benchmark; in the
    paper the first 1x1 has it. For `conv` and `norm` see `BasicBlock`.
    """

    channels: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, h, w, inputs) to (batch, h / stride, w / stride, 4 * channels)."""
        outputs = 4 * self.channels
        y = self.conv(self.channels, 1, name="conv1")(x)
        y = before_stride(nn.relu(self.norm(name="bn1")(y)), self.stride)
        y = self.conv(self.channels, 3, self.stride, name="conv2")(y)
        y = nn.relu(self.norm(name="bn2")(y))
        y = self.conv(outputs, 1, name="conv3")(y)
        y = self.norm(name="bn3")(y)
        if self.stride != 1 or x.shape[-1] != outputs:
            x = before_stride(x, self.stride)
            x = self.conv(outputs, 1, self.stride, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_bn")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network of four stages, each of `stage_sizes` blocks, for any number of axes.

    With the stem "imagenet" this is torchvision's network, initial values included (for volumes
    `r3d_18`); with "small" the MedMNIST v2 benchmark's for 28 px (stem of 3 taps per axis and
    stride 1, no max-pool, PyTorch's default initial values). Blocks are named `layer1_0` where
    torchvision says `layer1.0`.
    """

    stage_sizes: tuple[int, ...]
    num_classes: int
    stem: str = "small"
    width: float = 1.0
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None
    block: Callable[..., nn.Module] = BasicBlock

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps inputs to logits (batch, num_classes), at least float32.

        Inputs are signals (batch, time, c), images (batch, h, w, c) or volumes (batch, d, h, w, c).
        """
        imagenet, ndim = self.stem == "imagenet", x.ndim - 2
        make_conv = partial(
            conv,
            ndim=ndim,
            kernel_init=KAIMING_FAN_OUT if imagenet else TORCH_DEFAULT,
            dtype=self.dtype,
        )
        make_norm = partial(BatchNorm, train, self.dtype, self.axis_name)

        channels = scaled(_STAGE_CHANNELS[0], self.width)
        size, stride = (7, 2) if imagenet else (3, 1)
        if imagenet and ndim == 3:
            size, stride = (3, 7, 7), (1, 2, 2)
        x = make_conv(channels, size, stride, name="conv1")(x)
        x = nn.relu(make_norm(name="bn1")(x))
        if imagenet and ndim < 3:
            x = nn.max_pool(x, (3,) * ndim, (2,) * ndim, padding=((1, 1),) * ndim)  # pyright: ignore[reportArgumentType]
        for stage, blocks in enumerate(self.stage_sizes):
            channels = scaled(_STAGE_CHANNELS[stage], self.width)
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"layer{stage + 1}_{index}"
                x = self.block(channels, stride, make_conv, make_norm, name=name)(x)
        x = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))
        return at_least_float32(Linear(self.num_classes, self.dtype, name="fc")(x))
