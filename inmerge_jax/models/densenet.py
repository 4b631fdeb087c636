"""Densely connected networks (Huang et al. 2017, arXiv 1608.06993)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import variance_scaling
from jax.typing import DTypeLike

from inmerge_jax.errors import UsageError
from inmerge_jax.models.layers import (
    BATCH_MOMENTS,
    BatchNorm,
    Linear,
    at_least_float32,
    average_pool_2x2,
    conv,
    scaled,
)

_KAIMING_FAN_IN = variance_scaling(2.0, "fan_in", "normal")
_BOTTLENECK = 4


class DenseLayer(nn.Module):
    """A 1x1 and a 3x3 convolution, each after its normalisation, of all that came before.

    `conv` and `norm` make layers: `conv(features, size, name=...)`, `norm(name=...)`.
    """

    growth: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, *features: jax.Array) -> jax.Array:
        """Maps arrays (batch, h, w, any) to (batch, h, w, growth)."""
        x = features[0] if len(features) == 1 else jnp.concatenate(features, axis=-1)
        y = nn.relu(self.norm(name="norm1")(x))
        y = self.conv(_BOTTLENECK * self.growth, 1, name="conv1")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        return self.conv(self.growth, 3, name="conv2")(y)


class Transition(nn.Module):
    """Halves the channels by a 1x1 convolution, then height and width by an average pool."""

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, h, w, inputs) to (batch, h // 2, w // 2, inputs // 2)."""
        y = nn.relu(self.norm(name="norm")(x))
        return average_pool_2x2(self.conv(x.shape[-1] // 2, 1, name="conv")(y))


class DenseNet(nn.Module):
    """Four blocks of `block_sizes` dense layers, with a transition between any two.

    With the stem "imagenet" this is torchvision's network, initial values included. With "small"
    it is the usual form for small images: a 3x3 stem of stride 1 and no max-pool. Layers are named
    `denseblock1_denselayer2` where torchvision says `features.denseblock1.denselayer2`.

    With `remat`, training keeps the output of each dense layer and the statistics of its
    normalisations alone, and computes the rest of the layer again in the backward pass: less
    memory for the operations of one more forward pass, and no more collectives.
    """

    block_sizes: tuple[int, ...]
    num_classes: int
    growth: int = 32
    stem: str = "small"
    width: float = 1.0
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images (batch, h, w, c) to logits (batch, num_classes), at least float32."""
        make_conv = partial(conv, kernel_init=_KAIMING_FAN_IN, dtype=self.dtype)
        make_norm = partial(BatchNorm, train, self.dtype, self.axis_name)
        imagenet = self.stem == "imagenet"
        smallest = 32 if imagenet else 8
        if min(x.shape[1:3]) < smallest:
            raise UsageError(
                f"images of {x.shape[1]}x{x.shape[2]} px vanish in the pools: give a DenseNet with "
                f"the {self.stem} stem {smallest} px or more"
                + (', or choose the stem "small"' if imagenet else "")
            )
        growth = scaled(self.growth, self.width)

        x = make_conv(2 * growth, 7 if imagenet else 3, 2 if imagenet else 1, name="conv0")(x)
        x = nn.relu(make_norm(name="norm0")(x))
        if imagenet:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        dense_layer: Any = DenseLayer
        if self.remat:
            kept = jax.checkpoint_policies.save_only_these_names(BATCH_MOMENTS)
            dense_layer = nn.remat(DenseLayer, policy=kept)
        for block, layers in enumerate(self.block_sizes, start=1):
            features = [x]
            for layer in range(1, layers + 1):
                name = f"denseblock{block}_denselayer{layer}"
                features.append(dense_layer(growth, make_conv, make_norm, name=name)(*features))
                if not self.remat:  # Then each layer joins them again, so that no join is kept.
                    features = [jnp.concatenate(features, axis=-1)]
            x = jnp.concatenate(features, axis=-1)
            if block < len(self.block_sizes):
                x = Transition(make_conv, make_norm, name=f"transition{block}")(x)
        x = nn.relu(make_norm(name="norm5")(x))
        x = jnp.mean(x, axis=(1, 2))
        head = Linear(self.num_classes, self.dtype, nn.initializers.zeros, name="classifier")
        return at_least_float32(head(x))
