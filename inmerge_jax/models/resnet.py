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
    """A residual network of four stages, each of `stage_sizes` blocks.

    With the stem "imagenet" this is torchvision's network, initial values included; with "small"
    the MedMNIST v2 benchmark's for 28 px (3x3 stem of stride 1, no max-pool, PyTorch's default
    initial values). Blocks are named `layer1_0` where torchvision says `layer1.0`.
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
        """Maps images (batch, h, w, c) to logits (batch, num_classes), at least float32."""
        imagenet = self.stem == "imagenet"
        make_conv = partial(
            conv, kernel_init=KAIMING_FAN_OUT if imagenet else TORCH_DEFAULT, dtype=self.dtype
        )
        make_norm = partial(BatchNorm, train, self.dtype, self.axis_name)

        channels = scaled(_STAGE_CHANNELS[0], self.width)
        x = make_conv(channels, 7 if imagenet else 3, 2 if imagenet else 1, name="conv1")(x)
        x = nn.relu(make_norm(name="bn1")(x))
        if imagenet:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for stage, blocks in enumerate(self.stage_sizes):
            channels = scaled(_STAGE_CHANNELS[stage], self.width)
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"layer{stage + 1}_{index}"
                x = self.block(channels, stride, make_conv, make_norm, name=name)(x)
        x = jnp.mean(x, axis=(1, 2))
        return at_least_float32(Linear(self.num_classes, self.dtype, name="fc")(x))
