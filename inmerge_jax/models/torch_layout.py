"""Where PyTorch's networks keep each of our parameters: names, shapes and order of axes.

A weight is (height, width, inputs, outputs) here and (outputs, inputs, height, width) there. The
maps of a VGG are flattened as height, width, channels here, and as channels, height, width there.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from inmerge_jax.models import create_model

_POOLED = 7 * 7
_SQUARE = 256
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}

Names = Literal["torchvision", "medmnist"]

Entries = Mapping[str, tuple[tuple[str, ...], Any]]
"""PyTorch's name of an entry to our path and the leaf there."""


def torch_entries(
    name: str,
    num_classes: int,
    stem: str,
    channels: int,
    width: float,
    names: Names = "torchvision",
) -> tuple[Any, Entries]:
    """The network's `init`, and its entries with abstract leaves."""
    model = create_model(name, num_classes, stem=stem, width=width)
    init = partial(model.init, train=False)
    image = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    flat = flatten_dict(jax.eval_shape(init, jax.random.key(0), image))
    modules = _vgg_modules(path[1] for path in flat) if name.startswith("vgg") else {}
    entries = {}
    for path, leaf in flat.items():
        _, *module, last = path
        if name.startswith("vgg"):
            place = modules[module[0]]
        elif name.startswith("resnet"):
            place = _resnet_module(".".join(module), names)
        else:
            place = ".".join(module).replace("_denselayer", ".denselayer")
            place = place if place == "classifier" else f"features.{place}"
        entries[f"{place}.{_LEAVES[last]}"] = (path, leaf)
    return init, entries


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


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """PyTorch's shape of a parameter of our `shape`."""
    if len(shape) == 4:
        return (shape[3], shape[2], shape[0], shape[1])
    return tuple(reversed(shape))


def to_ours(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """A copy of PyTorch's array in our layout; `path` is that of our parameter."""
    if array.ndim == 4:
        return _copy(array.transpose(2, 3, 1, 0))
    if _is_flattened(path):
        maps = array.reshape(array.shape[0], -1, _POOLED)
        return _copy(maps.transpose(2, 1, 0)).reshape(-1, array.shape[0])
    return _copy(array.T)


def to_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """A copy of our parameter at `path` in PyTorch's layout."""
    if array.ndim == 4:
        return _copy(array.transpose(3, 2, 0, 1))
    if _is_flattened(path):
        maps = array.reshape(_POOLED, -1, array.shape[1])
        return _copy(maps.transpose(2, 1, 0)).reshape(array.shape[1], -1)
    return _copy(array.T)


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
