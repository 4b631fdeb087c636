"""torchvision's weights in and out.

    variables = from_state_dict("vgg19", read_state_dict("vgg19.pth"))
    logits = create_model("vgg19", 1000, stem="imagenet").apply(variables, images, train=False)
    write_state_dict("mine.safetensors", to_state_dict("vgg19", variables))

Only names and layouts differ, see `torch_layout`. So nothing is rounded, and a state dict comes
back bit for bit; but for `num_batches_tracked`, which no network reads, and which is written as 0.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from inmerge_jax.errors import UsageError
from inmerge_jax.models import family
from inmerge_jax.models.torch_layout import (
    Entries,
    Names,
    check_counterpart,
    is_r3d,
    join_attention,
    split_attention,
    to_ours,
    to_torch,
    torch_entries,
    torch_shape,
)
from inmerge_jax.models.vit import ViT
from inmerge_jax.models.weight_files import (
    as_float32,
    read_state_dict,
    unwrapped,
    write_state_dict,
)

__all__ = [
    "LoadReport",
    "from_state_dict",
    "match_state_dict",
    "read_state_dict",
    "to_state_dict",
    "write_state_dict",
]

_TRACKED = "num_batches_tracked"
_SHOWN = 6
"""Number of entries that a message lists."""


@dataclass(frozen=True)
class LoadReport:
    """What `match_state_dict` took from a state dict.

    Attributes:
      loaded: number of the network's entries that were loaded.
      initialized: names of those that have their random initialization, as torchvision spells them.
      unused: names of the state dict's entries that were not loaded, but for those of `misshapen`.
      misshapen: entries of another shape, such as "conv1.weight: (64, 3, 7, 7) found, (64, 3, 3, 3)
        expected"; for the first convolution with the argument that would make it fit.
      share: loaded share of the convolution weights, by number of elements, in [0, 1]. It is that
        of the network's, or of the state dict's if these are more, as in a deeper network's. Of a
        Vision Transformer, dense layers count too, but for the last.
    """

    loaded: int
    initialized: tuple[str, ...]
    unused: tuple[str, ...]
    misshapen: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        first = f"{self.loaded} of {self.loaded + len(self.initialized)} entries"
        lines = _lines(self.initialized, self.unused, self.misshapen, "initialized at random")
        return "\n  ".join([f"{first}, {self.share:.1%} of the convolution weights", *lines])


def from_state_dict(
    name: str,
    state_dict: Mapping[str, Any],
    *,
    stem: str | None = None,
    num_classes: int | None = None,
    channels: int | None = None,
    width: float = 1.0,
) -> dict[str, Any]:
    """The variables of `create_model(name, ...)` that hold a PyTorch network's weights.

    Every entry must be there and fit; `match_state_dict` takes the layers that fit.

    Args:
      name: a ResNet, DenseNet, VGG or Vision Transformer of `model_names()`.
      state_dict: of torchvision's network of that name, in its present or its oldest spelling, or
        in timm's; of `r3d_18` for "resnet18"; of such a network with the small stem, whose VGG has
        one layer "classifier"; of a ResNet with 1-D or 3-D convolutions; or of the MedMNIST v2
        benchmark's ResNet. Wrappers such as {"net": ...} and prefixes such as "module." are
        removed. Values are PyTorch tensors or arrays; they are copied, and other floating-point
        types are made float32.
      stem: "small" or "imagenet"; None for the stem of the state dict.
      num_classes: number of logits; None for the state dict's.
      channels: of the images; None for the state dict's.
      width: as in `create_model`.

    Returns:
      {"params": ..., "batch_stats": ...} of float32 NumPy arrays; no "batch_stats" without batch
      normalisation.

    Raises:
      UsageError: an unknown name or stem; entries that are missing, surplus, of another shape, or
        of a dtype that is not floating-point.
    """
    given = _read(name, state_dict)
    spatial = _spatial_of(name, given.shapes)
    if stem is None:
        stem = _stem_of(name, given.shapes)
    first, head = _first_and_head(name, stem, spatial)
    if num_classes is None:
        num_classes = (*given.shapes.get(f"{head}.weight", ()), 1)[0]
    if channels is None:
        channels = (*given.shapes.get(f"{first}.weight", ()), 3, 3)[1]
    _, entries = torch_entries(name, num_classes, stem, channels, width, spatial=spatial)
    missing, surplus, misshapen = _differences(given, entries, first)
    if missing or surplus or misshapen:
        remedy = "name the network, stem and width that it is of"
        modules = {key.rpartition(".")[0] for key in misshapen}
        if modules == {head} and not missing and not surplus:
            remedy = "only the head differs: `match_state_dict` initializes a new one"
        raise _refusal(
            f"the state dict is not that of {name} with the {stem} stem, {channels} image channels "
            f"and {num_classes} classes",
            _lines(missing, surplus, misshapen.values(), "missing"),
            [*given.names.values(), *given.others],
            remedy,
        )
    return unflatten_dict(_arrays(given, entries))


def match_state_dict(
    name: str,
    state_dict: Mapping[str, Any],
    *,
    stem: str,
    num_classes: int,
    channels: int,
    key: jax.Array,
    spatial: tuple[int, ...] = (32, 32),
    width: float = 1.0,
    replace_head: bool = False,
    min_match: float = 0.9,
) -> tuple[dict[str, Any], LoadReport]:
    """As `from_state_dict`, but takes the layers that fit and initializes the others.

    The others are typically the last layer, for another number of classes; a VGG's hidden layers;
    and for another stem or number of channels the first convolution and its normalisation.

    Args:
      name: one of `model_names()`.
      state_dict: as in `from_state_dict`; layers may be missing, surplus or of another shape.
      stem: "small" or "imagenet".
      num_classes: number of logits.
      channels: of the images.
      key: random key; initialized layers have the values that `model.init` gives them.
      spatial: size of an example: (height, width), with a depth before them for volumes, or (time,)
        for signals. A Vision Transformer has one position per patch of it.
      width: as in `create_model`.
      replace_head: initialize the last layer, even if the state dict's fits.
      min_match: lowest accepted `LoadReport.share`.

    Raises:
      UsageError: an unknown name or stem; fewer convolution weights fit than `min_match`; or an
        entry that fits has a dtype that is not floating-point.
    """
    given = _read(name, state_dict)
    init, entries = torch_entries(name, num_classes, stem, channels, width, spatial=spatial)
    first, head = _first_and_head(name, stem, spatial)
    missing, surplus, misshapen = _differences(given, entries, first)
    fits = [entry for entry in entries if entry not in misshapen and entry in given.shapes]
    # A bias or a running mean is of no use without its layer's weight.
    layers = {_layer(entry) for entry in fits if entry.endswith(".weight")}
    layers |= {_layer(entry) for entry in fits if entry in ("class_token", _POSITIONS)}
    if replace_head:
        layers.discard(head)
    if first not in layers:
        layers.discard(_NORM_OF_FIRST.get(first, ""))
    loaded = {entry: entries[entry] for entry in fits if _layer(entry) in layers}
    initialized = [entry for entry in entries if entry not in loaded]

    least = 2 if family(name) is ViT else 2 + len(spatial)
    sizes = {
        entry: math.prod(leaf.shape)
        for entry, (_, leaf) in entries.items()
        if entry.endswith(".weight") and leaf.ndim >= least and _layer(entry) != head
    }
    total = max(sum(sizes.values()), _compared_weights(given, sizes, least))
    share = sum(size for entry, size in sizes.items() if entry in loaded) / total
    if share < min_match:
        raise _refusal(
            f"{share:.1%} of the convolution weights fit {name} with the {stem} stem and width "
            f"{width:g}, fewer than `min_match` {min_match:g}",
            _lines(missing, surplus, misshapen.values(), "missing"),
            [*given.names.values(), *given.others],
            "name the network and width that the weights are of, or lower `min_match`",
        )
    unused = [given.names[entry] for entry in fits if entry not in loaded]
    report = LoadReport(
        len(loaded),
        tuple(initialized),
        (*unused, *surplus),
        tuple(misshapen.values()),
        share,
    )
    leaves = _arrays(given, loaded)
    if initialized:
        paths = [entries[entry][0] for entry in initialized]
        leaves |= _drawn(init, key, (1, *spatial, channels), paths)
    return unflatten_dict({path: leaves[path] for path, _ in entries.values()}), report


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
    stem, spatial = _stem_of_ours(name, leaves), _spatial_of_ours(name, leaves)
    if names == "medmnist" and not (name.startswith("resnet") and stem == "small"):
        raise UsageError(
            f"{name} with the {stem} stem has no names in the MedMNIST benchmark, whose networks "
            "are ResNets with the small stem; take torchvision's names"
        )
    entries = torch_entries(name, 1, stem, 3, 1 / 64, names, spatial)[1]
    expected = {path: "/".join(path) for path, _ in entries.values()}
    missing = [text for path, text in expected.items() if path not in leaves]
    surplus = ["/".join(path) for path in leaves if path not in expected]
    if missing or surplus:
        raise _refusal(
            f"the variables are not those of {name} with the {stem} stem",
            _lines(missing, surplus, (), "missing"),
            (),
            "name the network that they are of",
        )
    state_dict = {}
    for key, (path, _) in entries.items():
        state_dict[key] = to_torch(path, np.asarray(leaves[path], np.float32))
        if key.endswith(".running_var"):
            state_dict[key.replace("running_var", _TRACKED)] = np.zeros((), np.int64)
    return join_attention(state_dict)


# ---- the network's ends

_NORM_OF_FIRST = {
    "features.0": "features.1",
    "features.conv0": "features.norm0",
    "conv1": "bn1",
    "stem.0": "stem.1",
}
"""PyTorch's name of the first convolution to that of its normalisation, if it has one."""

_POSITIONS = "encoder.pos_embedding"
_VOLUME, _IMAGE, _SIGNAL = (32, 32, 32), (32, 32), (32,)


def _first_and_head(name: str, stem: str, spatial: tuple[int, ...]) -> tuple[str, str]:
    """PyTorch's names of the first convolution and of the last layer."""
    if family(name) is ViT:
        return "conv_proj", "heads.head"
    if name.startswith("vgg"):
        return "features.0", "classifier.6" if stem == "imagenet" else "classifier"
    if name.startswith("densenet"):
        return "features.conv0", "classifier"
    return "stem.0" if is_r3d(name, stem, spatial) else "conv1", "fc"


def _stem_of(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    if family(name) is ViT:
        return "small"
    if name.startswith("vgg"):
        return "small" if "classifier.weight" in shapes else "imagenet"
    first = "features.conv0" if name.startswith("densenet") else "conv1"
    return "small" if set(shapes.get(f"{first}.weight", ())[2:]) == {3} else "imagenet"


def _spatial_of(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """A size of examples that the network of a state dict reads, see `match_state_dict`."""
    if family(name) is ViT:
        tokens = (*shapes.get(_POSITIONS, ()), 0, 0)[1] - 1
        patch = (*shapes.get("conv_proj.weight", ()), 4)[2:][0]
        return (math.isqrt(max(tokens, 1)) * patch,) * 2
    axes = {len(shape) - 2 for entry, shape in shapes.items() if entry.endswith("conv1.weight")}
    axes |= {len(shape) - 2 for entry, shape in shapes.items() if entry == "stem.0.weight"}
    return {3: _VOLUME, 1: _SIGNAL}.get(max(axes, default=2), _IMAGE)


def _stem_of_ours(name: str, leaves: Mapping[tuple[str, ...], Any]) -> str:
    if family(name) is ViT:
        return "small"
    if name.startswith("vgg"):
        return "small" if ("params", "fc", "kernel") in leaves else "imagenet"
    first = "conv0" if name.startswith("densenet") else "conv1"
    stem = leaves.get(("params", first, "kernel"))
    return "small" if set(np.shape(stem)[:-2]) == {3} else "imagenet"


def _spatial_of_ours(name: str, leaves: Mapping[tuple[str, ...], Any]) -> tuple[int, ...]:
    axes = np.ndim(leaves.get(("params", "conv1", "kernel"), np.zeros((1,) * 4))) - 2
    return {3: _VOLUME, 1: _SIGNAL}.get(axes, _IMAGE) if name.startswith("resnet") else _IMAGE


def _layer(entry: str) -> str:
    return entry.rpartition(".")[0]


# ---- other people's state dicts

_ANCHORS = {
    "resnet": ("layer1.0.conv1.weight", "layer1.0.conv1.0.weight"),
    "densenet": ("features.denseblock1.denselayer1.conv1.weight",),
    "vgg": ("features.0.weight",),
    "vit": ("encoder.layers.encoder_layer_0.ln_1.weight", "blocks.0.norm1.weight"),
}
"""Entries of which every network of a family has one; what precedes it is a prefix."""
_RENAMED = {
    "vit": {  # timm, and torchvision's oldest spelling
        r"^cls_token$": "class_token",
        r"^pos_embed$": _POSITIONS,
        r"^patch_embed\.proj\.": "conv_proj.",
        r"^blocks\.(\d+)\.norm(\d)\.": r"encoder.layers.encoder_layer_\1.ln_\2.",
        r"^blocks\.(\d+)\.attn\.qkv\.": r"encoder.layers.encoder_layer_\1.self_attention.in_proj_",
        r"^blocks\.(\d+)\.attn\.proj\.": (
            r"encoder.layers.encoder_layer_\1.self_attention.out_proj."
        ),
        r"^blocks\.(\d+)\.mlp\.fc1\.": r"encoder.layers.encoder_layer_\1.mlp.0.",
        r"^blocks\.(\d+)\.mlp\.fc2\.": r"encoder.layers.encoder_layer_\1.mlp.3.",
        r"\.mlp\.linear_1\.": ".mlp.0.",
        r"\.mlp\.linear_2\.": ".mlp.3.",
        r"^norm\.": "encoder.ln.",
        r"^head\.": "heads.head.",
    },
    "resnet": {r"^linear\.": "fc.", r"\.shortcut\.": ".downsample."},  # the MedMNIST benchmark
    "vgg": {  # timm
        r"^pre_logits\.fc1\.": "classifier.0.",
        r"^pre_logits\.fc2\.": "classifier.3.",
        r"^head\.fc\.": "classifier.6.",
    },
}


class _Given(NamedTuple):
    """A state dict's entries by torchvision's names.

    Attributes:
      values: name to value.
      names: name to the state dict's own.
      shapes: name to the shape that torchvision's layer has.
      others: names of entries outside the network.
    """

    values: Mapping[str, Any]
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    others: tuple[str, ...]


def _read(name: str, state_dict: Mapping[str, Any]) -> _Given:
    """Finds a network's entries in a state dict, whatever it is wrapped in and prefixed by."""
    check_counterpart(name)
    kind = next(kind for kind in _ANCHORS if name.startswith(kind))
    # DataParallel and torch.compile wrap modules at any place. torchvision's DenseNet files still
    # spell norm1 as norm.1.
    values = unwrapped(state_dict)
    plain = {key: re.sub(r"(?:(?<=\.)|^)(?:module|_orig_mod)\.", "", key) for key in values}
    plain = {
        key: re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", new)
        for key, new in plain.items()
    }
    prefix, start = "", ""
    # With the second, `model.features.state_dict()`.
    for anchor, added in itertools.product(_ANCHORS[kind], ("", "features.")):
        end = anchor.removeprefix(added)
        ends = [key for key in plain.values() if f".{key}".endswith(f".{end}")]
        if ends:
            prefix, start = ends[0].removesuffix(end), added
            break
    names: dict[str, str] = {}
    for key, new in plain.items():
        if new.startswith(prefix):
            new = start + new.removeprefix(prefix)
            for pattern, replacement in _RENAMED.get(kind, {}).items():
                new = re.sub(pattern, replacement, new)
            names[new] = key
    others = tuple(key for key, new in plain.items() if not new.startswith(prefix))
    found = split_attention({new: values[key] for new, key in names.items()})
    fused = {new: re.sub(r"\.(?:query|key|value)\.(\w+)$", r".in_proj_\1", new) for new in found}
    names = {new: names[new if new in names else fused[new]] for new in found}
    shapes = {new: tuple(np.shape(value)) for new, value in found.items()}
    for new, shape in shapes.items():
        if len(shape) == 4 and new.startswith("classifier."):
            shapes[new] = (shape[0], math.prod(shape[1:]))  # timm's linear layers are convolutions
    return _Given(found, names, shapes, others)


def _differences(
    given: _Given, entries: Entries, first: str
) -> tuple[list[str], list[str], dict[str, str]]:
    """Missing and surplus entries, and a text for each entry of another shape."""
    missing = [entry for entry in entries if entry not in given.shapes]
    surplus = [
        name
        for entry, name in given.names.items()
        if entry not in entries
        and not (entry.endswith(_TRACKED) and f"{_layer(entry)}.running_var" in entries)
    ]
    misshapen = {}
    for entry, (path, leaf) in entries.items():
        found, expected = given.shapes.get(entry), torch_shape(path, leaf.shape)
        if found not in (None, expected):
            misshapen[entry] = f"{given.names[entry]}: {found} found, {expected} expected"
            if entry == f"{first}.weight":
                misshapen[entry] += _remedy(found, expected)
    return missing, [*surplus, *given.others], misshapen


def _remedy(found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """The arguments with which the first convolution would fit."""
    arguments = []
    if len(found) == 4 and found[1] != expected[1] and found[1] in (1, 3):
        arguments.append(f"`channels={found[1]}`")
    stems = {(3, 3): "small", (7, 7): "imagenet"}
    if found[2:] != expected[2:] and found[2:] in stems:
        arguments.append(f"`stem={stems[found[2:]]}`")
    return f"; it would fit with {' and '.join(arguments)}" if arguments else ""


def _compared_weights(given: _Given, ours: Iterable[str], least: int) -> int:
    """Number of elements of all weights in those parts of a network that have some of ours.

    A deeper network's state dict has more of them in the same parts. Only weights with `least` axes
    or more count.
    """
    parts = {entry.partition(".")[0] for entry in ours}
    return sum(
        math.prod(shape)
        for entry, shape in given.shapes.items()
        if len(shape) >= least
        and entry.partition(".")[0] in parts
        and entry not in ("class_token", _POSITIONS)
    )


def _lines(
    missing: Iterable[str], surplus: Iterable[str], misshapen: Iterable[str], absent: str
) -> list[str]:
    """The first few of each kind of entry; `absent` says what is done about missing ones."""
    named = {absent: _first_few(missing), "not used": _first_few(surplus)}
    lines = [f"{title}: {', '.join(names)}" for title, names in named.items() if names]
    return [*lines, *_first_few(misshapen)]


def _first_few(texts: Iterable[str]) -> list[str]:
    texts = list(texts)
    more = len(texts) - _SHOWN
    return texts if more <= 0 else [*texts[:_SHOWN], f"and {more} more"]


def _refusal(what: str, lines: list[str], names: Iterable[str], remedy: str) -> UsageError:
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = itertools.takewhile(lambda column: len({*column}) == 1, columns)
    prefix = ".".join(column[0] for column in shared)
    lines = [*lines, f"all names begin with {prefix!r}"] if prefix else lines
    return UsageError("\n  ".join([f"{what}:", *lines]) + f"\n{remedy}")


# ---- arrays


def _arrays(given: _Given, entries: Entries) -> dict[tuple[str, ...], np.ndarray]:
    """Path to float32 array."""
    leaves = {}
    for entry, (path, _) in entries.items():
        array = as_float32(given.names[entry], given.values[entry])
        leaves[path] = to_ours(path, array.reshape(given.shapes[entry]))
    return leaves


def _drawn(
    init: Any, key: jax.Array, shape: tuple[int, ...], paths: list[tuple[str, ...]]
) -> dict[tuple[str, ...], np.ndarray]:
    """The leaves at `paths` of freshly initialised variables; XLA leaves out all other draws."""

    def draw(key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
        leaves = flatten_dict(init(key, jnp.zeros(shape)))
        return {path: leaves[path] for path in paths}

    return jax.device_get(jax.jit(draw)(key))
