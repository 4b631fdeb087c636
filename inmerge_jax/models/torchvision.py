"""torchvision's weights in and out.

    variables = from_state_dict("vgg19", read_state_dict("vgg19.pth"))
    logits = create_model("vgg19", 1000, stem="imagenet").apply(variables, images, train=False)
    write_state_dict("mine.safetensors", to_state_dict("vgg19", variables))

Only layouts differ: a weight is (height, width, inputs, outputs) here and (outputs, inputs, height,
width) there, and a VGG's maps are flattened as height, width, channels here and as channels,
height, width there. So nothing is rounded, and a state dict comes back bit for bit; but for
`num_batches_tracked`, which no network reads and no file needs, and which is written as 0.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from inmerge_jax.errors import UsageError
from inmerge_jax.models import create_model
from inmerge_jax.models.weight_files import read_state_dict, unwrapped, write_state_dict

__all__ = ["from_state_dict", "read_state_dict", "to_state_dict", "write_state_dict"]

_POOLED = 7 * 7
_SQUARE = 256
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_TRACKED = "num_batches_tracked"

Names = Literal["torchvision", "medmnist"]


def from_state_dict(
    name: str,
    state_dict: Mapping[str, Any],
    *,
    stem: str | None = None,
    num_classes: int | None = None,
    channels: int | None = None,
    width: float = 1.0,
    head_key: jax.Array | None = None,
) -> dict[str, Any]:
    """The variables of `create_model(name, ...)` that hold a PyTorch network's weights.

    Args:
      name: one of `model_names()`.
      state_dict: of torchvision's network of that name, in its present or its oldest spelling; of
        such a network with the small stem, whose VGG has one layer "classifier"; or of the MedMNIST
        v2 benchmark's ResNet, bare or as its checkpoint {"net": ...}. Values are PyTorch tensors or
        arrays; they are copied, and other floating-point types are made float32.
      stem: "small" or "imagenet"; None for the stem of the state dict.
      num_classes: number of logits; None for the state dict's.
      channels: of the images; None for the state dict's.
      width: as in `create_model`.
      head_key: where the state dict's last layer has not `num_classes` outputs, a new one is drawn
        from this key, as `model.init` draws it. With None that is an error.

    Returns:
      {"params": ..., "batch_stats": ...} of float32 NumPy arrays; no "batch_stats" without batch
      normalisation.

    Raises:
      UsageError: an unknown name or stem; entries that are missing, surplus or of another shape,
        all of which are listed.
    """
    found = {_modern(key): value for key, value in unwrapped(state_dict).items()}
    shapes = {key: tuple(np.shape(value)) for key, value in found.items()}
    first, head = _first_and_head(name, shapes)
    if stem is None:
        stem = _stem_of(name, shapes)
    if num_classes is None:
        num_classes = (*shapes.get(f"{head}.weight", ()), 1)[0]
    if channels is None:
        channels = (*shapes.get(f"{first}.weight", ()), 3, 3)[1]
    model = create_model(name, num_classes, stem=stem, width=width)
    image = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    init = partial(model.init, train=False)
    template = jax.eval_shape(init, jax.random.key(0), image)
    entries = _entries(name, template, "medmnist" if head == "linear" else "torchvision")

    expected = {key: _torch_shape(leaf.shape) for key, (_, leaf) in entries.items()}
    fresh = {f"{head}.weight", f"{head}.bias"} & shapes.keys()
    if head_key is None or all(shapes[key][0] == num_classes for key in fresh):
        fresh = set()
    tracked = {key for key in shapes if _is_tracked(key, expected)}
    _check(
        f"the state dict is not that of {name} with the {stem} stem, {channels} image channels "
        f"and {num_classes} classes",
        {key: shape for key, shape in expected.items() if key not in fresh},
        {key: shape for key, shape in shapes.items() if key not in fresh | tracked},
        head,
    )
    leaves = {
        path: _to_ours(path, _array(found[key]))
        for key, (path, _) in entries.items()
        if key not in fresh
    }
    if fresh:
        paths = [entries[key][0] for key in sorted(fresh)]
        leaves |= _drawn(init, head_key, image.shape, paths)
    return unflatten_dict({path: leaves[path] for path, _ in entries.values()})


def to_state_dict(
    name: str, variables: Mapping[str, Any], *, names: Names = "torchvision"
) -> dict[str, np.ndarray]:
    """The state dict of a network's variables, for `load_state_dict(strict=True)` in PyTorch.

    Args:
      name: one of `model_names()`.
      variables: {"params": ..., "batch_stats": ...} of `create_model(name, ...)`, of either stem
        and any width, arrays of any kind; not replicated over devices.
      names: what entries are called: "torchvision" as there, "medmnist" as in the MedMNIST v2
        benchmark (ResNets with the small stem). With the small stem, torchvision's names are those
        of its network whose stem was changed, and whose `classifier`, in a VGG, is one layer.

    Returns:
      New C-contiguous arrays: float32, and int64 for "num_batches_tracked".

    Raises:
      UsageError: an unknown name; variables of another network, with what is missing and surplus;
        the benchmark's names for what it does not have.
    """
    leaves = flatten_dict(variables)
    stem = _stem_of_ours(name, leaves)
    if names == "medmnist" and not (name.startswith("resnet") and stem == "small"):
        raise UsageError(
            f"{name} with the {stem} stem has no names in the MedMNIST benchmark, whose networks "
            "are ResNets with the small stem; take torchvision's names"
        )
    model = create_model(name, 1, stem=stem, width=1 / 64)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    template = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)
    _check(
        f"the variables are not those of {name} with the {stem} stem",
        {"/".join(path): () for path in flatten_dict(template)},
        {"/".join(path): () for path in leaves},
    )
    state_dict = {}
    for key, (path, _) in _entries(name, template, names).items():
        state_dict[key] = _to_torch(path, np.asarray(leaves[path], np.float32))
        if key.endswith(".running_var"):
            state_dict[key.replace("running_var", _TRACKED)] = np.zeros((), np.int64)
    return state_dict


# ---- names


def _entries(
    name: str, variables: Mapping[str, Any], names: Names
) -> dict[str, tuple[tuple[str, ...], Any]]:
    """PyTorch's key to our path and the leaf there."""
    flat = flatten_dict(variables)
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
    return entries


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


def _modern(key: str) -> str:
    """The names of today: torchvision's DenseNet files still spell norm1 as norm.1."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", key)


def _first_and_head(name: str, shapes: Mapping[str, Any]) -> tuple[str, str]:
    """PyTorch's names of the first convolution and of the last layer."""
    if name.startswith("vgg"):
        imagenet = _stem_of(name, shapes) == "imagenet"
        return "features.0", "classifier.6" if imagenet else "classifier"
    if name.startswith("densenet"):
        return "features.conv0", "classifier"
    return "conv1", "linear" if "linear.weight" in shapes else "fc"


def _stem_of(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    if name.startswith("vgg"):
        return "small" if "classifier.weight" in shapes else "imagenet"
    first = "features.conv0" if name.startswith("densenet") else "conv1"
    benchmark = "linear.weight" in shapes
    small = shapes.get(f"{first}.weight", ())[2:] == (3, 3) or benchmark
    return "small" if small else "imagenet"


def _stem_of_ours(name: str, leaves: Mapping[tuple[str, ...], Any]) -> str:
    if name.startswith("vgg"):
        return "small" if ("params", "fc", "kernel") in leaves else "imagenet"
    first = "conv0" if name.startswith("densenet") else "conv1"
    stem = leaves.get(("params", first, "kernel"))
    return "small" if np.shape(stem)[:2] == (3, 3) else "imagenet"


def _is_tracked(key: str, expected: Mapping[str, Any]) -> bool:
    module, _, last = key.rpartition(".")
    return last == _TRACKED and f"{module}.running_var" in expected


def _check(
    what: str,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    head: str | None = None,
) -> None:
    missing = [key for key in expected if key not in found]
    surplus = [key for key in found if key not in expected]
    misshapen = [key for key in expected if key in found and found[key] != expected[key]]
    if not missing and not surplus and not misshapen:
        return
    lines = [what + ":"]
    lines += [f"missing: {', '.join(missing)}"] if missing else []
    lines += [f"surplus: {', '.join(surplus)}"] if surplus else []
    lines += [f"{key}: {found[key]} found, {expected[key]} expected" for key in misshapen]
    text = "\n  ".join(lines)
    if not missing and not surplus and {key.rpartition(".")[0] for key in misshapen} == {head}:
        text += "\nonly the head differs: give `head_key` to initialize a new one"
    else:
        text += "\nname the network, stem and width that it is of"
    raise UsageError(text)


# ---- arrays


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:
        return (shape[3], shape[2], shape[0], shape[1])
    return tuple(reversed(shape))


def _to_ours(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        return _copy(array.transpose(2, 3, 1, 0))
    if _is_flattened(path):
        maps = array.reshape(array.shape[0], -1, _POOLED)
        return _copy(maps.transpose(2, 1, 0)).reshape(-1, array.shape[0])
    return _copy(array.T)


def _to_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
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


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a PyTorch tensor, whose bfloat16 NumPy does not know
        value = value.detach().cpu().float().numpy()
    return np.asarray(value, np.float32)


def _drawn(
    init: Any, key: jax.Array, shape: tuple[int, ...], paths: list[tuple[str, ...]]
) -> dict[tuple[str, ...], np.ndarray]:
    """The leaves at `paths` of freshly initialised variables; XLA leaves out all other draws."""

    def draw(key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
        leaves = flatten_dict(init(key, jnp.zeros(shape)))
        return {path: leaves[path] for path in paths}

    return jax.device_get(jax.jit(draw)(key))
