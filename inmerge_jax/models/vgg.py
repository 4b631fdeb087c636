"""VGG networks (Simonyan and Zisserman 2015, arXiv 1409.1556)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from inmerge_jax.errors import UsageError
from inmerge_jax.models.layers import (
    BatchNorm,
    Dropout,
    Linear,
    adaptive_average_pool,
    at_least_float32,
    conv,
    max_pool_2x2,
    scaled,
)

_STAGE_CHANNELS = (64, 128, 256, 512, 512)
_HIDDEN = 4096


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each of `stage_sizes` convolutions and a 2x2 max-pool.

    With the stem "imagenet" this is torchvision's network, classifier head and initial values
    included. With "small" the same convolutions end in an average pool and one linear layer, and a
    max-pool that would leave less than 2 px is left out. Convolutions have the paper's names:
    `conv3_2` is the second of the third stage.
    """

    stage_sizes: tuple[int, ...]
    num_classes: int
    batch_norm: bool = False
    stem: str = "small"
    width: float = 1.0
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images (batch, h, w, c) to logits (batch, num_classes), at least float32."""
        imagenet = self.stem == "imagenet"
        if imagenet and min(x.shape[1:3]) < 32:
            raise UsageError(
                f"images of {x.shape[1]}x{x.shape[2]} px vanish in five max-pools: give a VGG with "
                'the imagenet stem 32 px or more, or choose the stem "small"'
            )
        for stage, convolutions in enumerate(self.stage_sizes, start=1):
            channels = scaled(_STAGE_CHANNELS[stage - 1], self.width)
            for index in range(1, convolutions + 1):
                name = f"{stage}_{index}"
                x = conv(channels, 3, use_bias=True, dtype=self.dtype, name=f"conv{name}")(x)
                if self.batch_norm:
                    x = BatchNorm(train, self.dtype, self.axis_name, name=f"bn{name}")(x)
                x = nn.relu(x)
            if imagenet or min(x.shape[1:3]) >= 4:
                x = max_pool_2x2(x)
        if imagenet:
            x = self._hidden_layers(adaptive_average_pool(x, 7), train)
            head = nn.Dense(
                self.num_classes,
                dtype=self.dtype,
                kernel_init=nn.initializers.normal(0.01),
                name="fc3",
            )
        else:
            x = jnp.mean(x, axis=(1, 2))
            head = Linear(self.num_classes, self.dtype, name="fc")
        return at_least_float32(head(x))

    def _hidden_layers(self, x: jax.Array, train: bool) -> jax.Array:
        """The first two of torchvision's classifier layers, on maps flattened as h, w, c."""
        x = x.reshape(x.shape[0], -1)
        for name in ("fc1", "fc2"):
            x = nn.Dense(
                scaled(_HIDDEN, self.width),
                dtype=self.dtype,
                kernel_init=nn.initializers.normal(0.01),
                name=name,
            )(x)
            dropout = Dropout(0.5, self.axis_name, name=f"dropout_{name}")
            x = dropout(nn.relu(x), train=train)
        return x
