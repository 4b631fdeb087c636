"""Where PyTorch's networks keep each of our parameters: names, shapes and order of axes.

A weight is (height, width, inputs, outputs) here and (outputs, inputs, height, width) there, with
one axis less for signals and one more for volumes. The maps of a VGG are flattened as height,
width, channels here, and as channels, height, width there. Attention has a weight each for query,
key and value here, (inputs, heads, head width), and one for all three there; `split_attention` and
`join_attention` are between them.
"""

import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from inmerge_jax.errors import UsageError
from inmerge_jax.modality import SPATIAL_AXES
from inmerge_jax.models import create_model, family, model_names
from inmerge_jax.models.densenet import DenseNet
from inmerge_jax.models.resnet import ResNet
from inmerge_jax.models.vgg import VGG
from inmerge_jax.models.vit import HEAD_WIDTH, ViT

_POOLED = 7 * 7
_SQUARE = 256
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}

_WHOLE = {"class_token": "class_token", "pos_embedding": "encoder.pos_embedding"}
"""PyTorch's name of parameters that belong to no layer."""

_ATTENTION = "self_attention"
_INPUTS = ("query", "key", "value")
_VIT_MODULES = {
    "patches": "conv_proj",
    "ln": "encoder.ln",
    "head": "heads.head",
    "fc1": "mlp.0",
    "fc2": "mlp.3",
    "attention.out": f"{_ATTENTION}.out_proj",
    **{f"attention.{name}": f"{_ATTENTION}.{name}" for name in _INPUTS},
}

Names = Literal["torchvision", "medmnist"]

Entries = Mapping[str, tuple[tuple[str, ...], Any]]
"""PyTorch's name of an entry to our path and the leaf there."""


@lru_cache(maxsize=8)  # The abstract trace takes up to a second.
def torch_entries(
    name: str,
    num_classes: int,
    stem: str,
    channels: int,
    width: float,
    names: Names = "torchvision",
    spatial: tuple[int, ...] = (32, 32),
) -> tuple[Any, Entries]:
    """The network's `init`, and its entries with abstract leaves.

    Raises:
      UsageError: an unknown name or stem, or a network without a counterpart in torchvision.
    """
    modality = next(kind for kind, axes in SPATIAL_AXES.items() if axes == len(spatial))
    check_counterpart(name)
    model = create_model(name, num_classes, modality=modality, stem=stem, width=width)
    init = partial(model.init, train=False)
    example = jax.ShapeDtypeStruct((1, *spatial, channels), jnp.float32)
    flat = flatten_dict(jax.eval_shape(init, jax.random.key(0), example))
    vgg = _vgg_modules(path[1] for path in flat) if name.startswith("vgg") else {}
    r3d = is_r3d(name, stem, spatial)
    entries = {}
    for path, leaf in flat.items():
        _, *module, last = path
        place = ".".join(module)
        if vgg:
            place = vgg[place]
        elif family(name) is ViT:
            place = _vit_module(place)
        elif family(name) is ResNet:
            place = _r3d_module(place) if r3d else _resnet_module(place, names)
        else:
            place = place.replace("_denselayer", ".denselayer")
            place = place if place == "classifier" else f"features.{place}"
        entries[_WHOLE.get(last) or f"{place}.{_LEAVES[last]}"] = (path, leaf)
    return init, MappingProxyType(entries)


def check_counterpart(name: str) -> None:
    """Checks that PyTorch weights of a network can be read and written.

    Raises:
      UsageError: an unknown name, or a network without a counterpart in torchvision.
    """
    if name not in model_names():
        raise UsageError(f"unknown model {name!r}: choose one of {', '.join(model_names())}")
    if family(name) not in (ResNet, DenseNet, VGG, ViT):
        raise UsageError(
            f"{name} has no counterpart in torchvision: weights are loaded and exported for "
            "ResNets, DenseNets, VGGs and Vision Transformers"
        )


def is_r3d(name: str, stem: str, spatial: tuple[int, ...]) -> bool:
    """Whether the network is torchvision's `r3d_18`, whose layers have other names."""
    return (name, stem, len(spatial)) == ("resnet18", "imagenet", 3)


def _r3d_module(module: str) -> str:
    module = {"conv1": "stem.0", "bn1": "stem.1"}.get(module, _resnet_module(module, "torchvision"))
    return re.sub(r"\.bn(\d)$", r".conv\1.1", re.sub(r"\.conv(\d)$", r".conv\1.0", module))


def _vit_module(module: str) -> str:
    """`block_3.fc1` to `encoder.layers.encoder_layer_3.mlp.0` and so on."""
    block, _, rest = module.partition(".")
    if block in _VIT_MODULES:
        return _VIT_MODULES[block]
    return (
        f"encoder.layers.{block.replace('block', 'encoder_layer')}.{_VIT_MODULES.get(rest, rest)}"
    )


def _vgg_modules(modules: Iterable[str]) -> dict[str, str]:
    """`conv3_2` to `features.12` and so on: torchvision numbers ReLUs and pools too."""
    modules = set(modules)
    places = {"fc": "classifier", "fc1": "classifier.0", "fc2": "classifier.3"}
    places["fc3"] = "classifier.6"
    number = 0
    for stage in range(1, 6):
        index = 1
        while f"conv{stage}_{index}" in modules:
            places[f"conv{stage}_{index}"] = f"features.{number}"
            places[f"bn{stage}_{index}"] = f"features.{number + 1}"
            number += 3 if f"bn{stage}_{index}" in modules else 2
            index += 1
        number += 1
    return places


def _resnet_module(module: str, names: Names) -> str:
    module = re.sub(r"^(layer\d)_", r"\1.", module)
    shortcut = "downsample" if names == "torchvision" else "shortcut"
    module = module.replace("shortcut_conv", f"{shortcut}.0").replace(
        "shortcut_bn", f"{shortcut}.1"
    )
    return "linear" if (module, names) == ("fc", "medmnist") else module


def torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """PyTorch's shape of our parameter at `path`, of our `shape`."""
    if path[-1] in _WHOLE:
        return shape
    if _is_attention(path):
        inputs, outputs = (
            (shape[:-2], shape[-2:]) if path[-2] in _INPUTS else (shape[:2], shape[2:])
        )
        return tuple(math.prod(axes) for axes in (outputs, inputs) if axes)
    return (*shape[:-3:-1], *shape[:-2])


def to_ours(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """A copy of PyTorch's array in our layout; `path` is that of our parameter."""
    if path[-1] in _WHOLE:
        return _copy(array)
    if _is_flattened(path):
        maps = array.reshape(array.shape[0], -1, _POOLED)
        return _copy(maps.transpose(2, 1, 0)).reshape(-1, array.shape[0])
    if array.ndim < 3:
        copy = _copy(array.T)
        if not _is_attention(path) or path[-2:] == ("out", "bias"):
            return copy
        heads = (-1, HEAD_WIDTH)
        return (
            copy.reshape(*heads, *copy.shape[1:])
            if path[-2] == "out"
            else copy.reshape(*copy.shape[:-1], *heads)
        )
    return _copy(array.transpose(*range(2, array.ndim), 1, 0))


def to_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """A copy of our parameter at `path` in PyTorch's layout."""
    if path[-1] in _WHOLE:
        return _copy(array)
    if _is_flattened(path):
        maps = array.reshape(_POOLED, -1, array.shape[1])
        return _copy(maps.transpose(2, 1, 0)).reshape(array.shape[1], -1)
    if _is_attention(path):
        array = array.reshape(torch_shape(path, array.shape)[::-1])
    return _copy(array.transpose(*range(array.ndim)[:-3:-1], *range(array.ndim)[:-2]))


def split_attention(values: Mapping[str, Any]) -> dict[str, Any]:
    """Splits PyTorch's fused weights and biases: "in_proj_weight" to "query.weight" and so on."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        place, _, last = name.rpartition(".in_proj_")
        shape = np.shape(value)
        if not place or not shape or shape[0] % 3:
            found[name] = value
            continue
        part = shape[0] // 3
        for number, one in enumerate(_INPUTS):
            found[f"{place}.{one}.{last}"] = value[number * part : (number + 1) * part]
    return found


def join_attention(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `split_attention`."""
    found: dict[str, np.ndarray] = {}
    for name, value in values.items():
        place, _, last = name.partition(f"{_ATTENTION}.")
        first, _, leaf = last.partition(".")
        if first not in _INPUTS:
            found[name] = value
        elif first == _INPUTS[0]:
            parts = [values[f"{place}{_ATTENTION}.{one}.{leaf}"] for one in _INPUTS]
            found[f"{place}{_ATTENTION}.in_proj_{leaf}"] = np.concatenate(parts)
    return found


def _is_attention(path: tuple[str, ...]) -> bool:
    return path[-3:-2] == ("attention",)


def _is_flattened(path: tuple[str, ...]) -> bool:
    """Whether this is the weight that reads a VGG's flattened maps."""
    return path[1:] == ("fc1", "kernel")


def _copy(view: np.ndarray) -> np.ndarray:
    """C-contiguous, and never the memory of a network that may be trained further.

    By squares, whose reads and writes both stay in the cache: a transposed weight of VGG's head
    is copied twice to five times as fast.
    """
    copy = np.empty(view.shape, view.dtype)
    if view.ndim < 2:
        copy[...] = view
        return copy
    for i in range(0, view.shape[0], _SQUARE):
        for j in range(0, view.shape[-1], _SQUARE):
            square = (slice(i, i + _SQUARE), ..., slice(j, j + _SQUARE))
            copy[square] = view[square]
    return copy
