"""Networks in Flax Linen, built as PyTorch users know them."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from inmerge_jax.errors import UsageError
from inmerge_jax.modality import Modality
from inmerge_jax.models.densenet import DenseNet
from inmerge_jax.models.mamba import Mamba
from inmerge_jax.models.mlp import MLP, MLPMixer
from inmerge_jax.models.resnet import Bottleneck, ResNet
from inmerge_jax.models.unet import UNet
from inmerge_jax.models.vgg import VGG
from inmerge_jax.models.vit import ViT

__all__ = ["STEMS", "create_model", "family", "model_names", "segments"]

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
    "vit_tiny": partial(ViT, depth=12, heads=3, patch=4),
    "vit_s_16": partial(ViT, depth=12, heads=6, patch=16),
    "vit_b_16": partial(ViT, depth=12, heads=12, patch=16),
    "mamba_tiny": partial(Mamba, depth=6, features=96, patch=4),
    "mamba_130m": partial(Mamba, depth=24, features=768, patch=16),
    "mixer_tiny": partial(MLPMixer, depth=6, features=128, patch=4),
    "mlp": partial(MLP, hidden=(128, 128)),
    "unet": UNet,
}

_MODALITIES: dict[Any, tuple[Modality, ...]] = {
    ResNet: ("image", "volume", "signal"),
    DenseNet: ("image",),
    VGG: ("image",),
    ViT: ("image",),
    Mamba: ("image", "signal"),
    MLPMixer: ("image",),
    MLP: ("table",),
    UNet: ("image", "volume"),
}
"""What the networks of each family read."""


def model_names(modality: Modality | None = None) -> tuple[str, ...]:
    """The names that `create_model` knows: all, or those of networks for one modality."""
    return tuple(name for name in _MODELS if modality in (None, *_MODALITIES[family(name)]))


def segments(name: str) -> bool:
    """Whether a network is a segmenter, which labels every pixel or voxel."""
    return family(name) is UNet


def create_model(
    name: str,
    num_classes: int,
    *,
    modality: Modality = "image",
    stem: str = "small",
    width: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    axis_name: str | None = None,
    remat: bool = False,
) -> nn.Module:
    """A classifier, or for "unet" a segmenter: examples to logits, at least float32.

    Logits are (batch, num_classes); those of a segmenter (batch, ..., num_classes), one vector per
    pixel or voxel. Call it as `model.apply(variables, examples, train=...)`. With `train=True`,
    batch normalisation writes the collection "batch_stats" (ResNets, DenseNets, VGGs named _bn and
    the U-Net have it), and VGGs with the imagenet stem draw dropout from the rng "dropout", which
    is the same key on every device.

    Args:
      name: one of `model_names()`: resnet18, resnet34, resnet50, densenet121, vgg11 to vgg19 (also
        with batch normalisation, vgg11_bn), vit_tiny, vit_s_16, vit_b_16, mamba_tiny, mamba_130m,
        mixer_tiny, mlp, or unet.
      num_classes: number of logits, at least 1.
      modality: what the examples are, floats: images (batch, h, w, c), volumes (batch, d, h, w, c),
        signals (batch, time, c), or rows of a table (batch, features).
      stem: "imagenet" is torchvision's network, parameter for parameter (of volumes: `r3d_18`).
        "small" is for images of about 28 to 64 px: for ResNets the form of the MedMNIST v2
        benchmark; for DenseNets the same change, a 3x3 stem of stride 1 without max-pool; for VGGs
        the same convolutions with a pooled linear head. Other networks have no stem.
      width: factor on the number of channels of every layer; of a Vision Transformer, on the number
        of heads.
      dtype: what activations are computed in. With bfloat16 parameters, batch statistics and logits
        stay float32. float64, under JAX's 64-bit mode and given float64 variables, is float64
        throughout.
      axis_name: the mapped axis over whose devices batch statistics are averaged.
      remat: keep less for the backward pass and compute it again; for DenseNets.

    Raises:
      UsageError: on an unknown name or stem, a network for another modality, or a number out of
        range; `remat` or `stem` for a network without it.
    """
    check_options(name, stem=stem, width=width, remat=remat)
    if modality not in _MODALITIES[family(name)]:
        reads = " and ".join(f"{kind}s" for kind in _MODALITIES[family(name)])
        raise UsageError(
            f"`model` {name} reads {reads}, not {modality}s: choose one of "
            f"{', '.join(model_names(modality))}"
        )
    if num_classes < 1:
        raise UsageError(f"num_classes {num_classes} for {name}: choose 1 or more")
    given = {"stem": stem, "axis_name": axis_name, "remat": remat}
    given = {field: value for field, value in given.items() if field in _fields(name)}
    return _MODELS[name](num_classes=num_classes, width=width, dtype=dtype, **given)


def check_options(name: str, *, stem: str, width: float, remat: bool) -> None:
    """Checks what `create_model` can check without a data set.

    Raises:
      UsageError: see `create_model`.
    """
    if name not in _MODELS:
        raise UsageError(f"unknown model {name!r}: choose one of {', '.join(_MODELS)}")
    if stem not in STEMS:
        raise UsageError(
            f"unknown stem {stem!r} for model {name}: choose one of {', '.join(STEMS)}"
        )
    if not 0 < width < float("inf"):
        raise UsageError(f"width {width} for {name}: choose a positive factor, such as 1.0 or 0.25")
    if remat and "remat" not in _fields(name):
        raise UsageError(f"`remat` is for densenet121, whose layers' inputs are large; not {name}")
    if stem != "small" and "stem" not in _fields(name):
        raise UsageError(f"`stem` {stem}: {name} has no stem; leave it out")


def _fields(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(family(name))}


def family(name: str) -> Any:
    """The class of the network of this name; None if there is none."""
    make = _MODELS.get(name)
    return getattr(make, "func", make)
