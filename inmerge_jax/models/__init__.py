"""Image classifiers in Flax Linen, built as PyTorch users know them."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from inmerge_jax.errors import UsageError
from inmerge_jax.models.densenet import DenseNet
from inmerge_jax.models.resnet import Bottleneck, ResNet
from inmerge_jax.models.vgg import VGG

__all__ = ["STEMS", "create_model", "model_names"]

STEMS = ("small", "imagenet")

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(ResNet, stage_sizes=(2, 2, 2, 2)),
    "resnet34": partial(ResNet, stage_sizes=(3, 4, 6, 3)),
    "resnet50": partial(ResNet, stage_sizes=(3, 4, 6, 3), block=Bottleneck),
    "densenet121": partial(DenseNet, block_sizes=(6, 12, 24, 16)),
    "vgg11": partial(VGG, stage_sizes=(1, 1, 2, 2, 2)),
    "vgg11_bn": partial(VGG, stage_sizes=(1, 1, 2, 2, 2), batch_norm=True),
    "vgg13": partial(VGG, stage_sizes=(2, 2, 2, 2, 2)),
    "vgg13_bn": partial(VGG, stage_sizes=(2, 2, 2, 2, 2), batch_norm=True),
    "vgg16": partial(VGG, stage_sizes=(2, 2, 3, 3, 3)),
    "vgg16_bn": partial(VGG, stage_sizes=(2, 2, 3, 3, 3), batch_norm=True),
    "vgg19": partial(VGG, stage_sizes=(2, 2, 4, 4, 4)),
    "vgg19_bn": partial(VGG, stage_sizes=(2, 2, 4, 4, 4), batch_norm=True),
}


def model_names() -> tuple[str, ...]:
    """The names that `create_model` knows."""
    return tuple(_MODELS)


def create_model(
    name: str,
    num_classes: int,
    *,
    stem: str = "small",
    width: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    axis_name: str | None = None,
    remat: bool = False,
) -> nn.Module:
    """A classifier: float NHWC images to logits (batch, num_classes), at least float32.

    Call it as `model.apply(variables, images, train=...)`. With `train=True`, batch normalisation
    writes the collection "batch_stats" (all but the plain VGGs have it), and VGGs with the imagenet
    stem draw dropout from the rng "dropout", which is the same key on every device.

    Args:
      name: resnet18, resnet34, resnet50, densenet121, or vgg11, vgg13, vgg16, vgg19, each of these
        four also with batch normalisation (vgg11_bn). `model_names()` lists them.
      num_classes: number of logits, at least 1.
      stem: "imagenet" is torchvision's network, parameter for parameter. "small" is for images of
        about 28 to 64 px: for ResNets the form of the MedMNIST v2 benchmark; for DenseNets the same
        change, a 3x3 stem of stride 1 without max-pool; for VGGs the same convolutions with a
        pooled linear head.
      width: factor on the number of channels of every layer.
      dtype: what activations are computed in. With bfloat16 parameters, batch statistics and logits
        stay float32. float64, under JAX's 64-bit mode and given float64 variables, is float64
        throughout.
      axis_name: the mapped axis over whose devices batch statistics are averaged.
      remat: keep less for the backward pass and compute it again; for DenseNets.

    Raises:
      UsageError: on an unknown name or stem, or a number out of range; `remat` for another network.
    """
    if name not in _MODELS:
        raise UsageError(f"unknown model {name!r}: choose one of {', '.join(_MODELS)}")
    if stem not in STEMS:
        raise UsageError(
            f"unknown stem {stem!r} for model {name}: choose one of {', '.join(STEMS)}"
        )
    if not 0 < width < float("inf"):
        raise UsageError(f"width {width} for {name}: choose a positive factor, such as 1.0 or 0.25")
    if num_classes < 1:
        raise UsageError(f"num_classes {num_classes} for {name}: choose 1 or more")
    if remat and not name.startswith("densenet"):
        raise UsageError(f"`remat` is for densenet121, whose layers' inputs are large; not {name}")
    return _MODELS[name](
        num_classes=num_classes,
        stem=stem,
        width=width,
        dtype=dtype,
        axis_name=axis_name,
        **({"remat": True} if remat else {}),
    )
