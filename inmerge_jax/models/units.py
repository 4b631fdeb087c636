"""The units of each network that can merge: kernels, attention heads, neurons, channels.

The paper merges convolution kernels. Other units are an extension of it.
"""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from inmerge_jax.errors import UsageError
from inmerge_jax.merging import Kernel, attention_heads, find_kernels, tie
from inmerge_jax.models import family
from inmerge_jax.models.mamba import EXPAND, Mamba
from inmerge_jax.models.mlp import MLP, MLPMixer
from inmerge_jax.models.unet import UNet
from inmerge_jax.models.vgg import VGG
from inmerge_jax.models.vit import ViT

UnitKind = Literal["kernels", "heads", "neurons", "channels"]

_DEFAULT: Mapping[Any, tuple[UnitKind, ...]] = MappingProxyType(
    {
        ViT: ("heads", "neurons"),
        Mamba: ("channels",),
        MLPMixer: ("neurons",),
        MLP: ("neurons",),
    }
)

_HIDDEN: Mapping[Any, str] = MappingProxyType(
    {
        ViT: r"fc1",
        Mamba: r"in_proj",
        MLPMixer: r"(tokens|channels)_fc1",
        MLP: r"fc\d+",
        VGG: r"fc[12]",
    }
)
"""Names of the dense layers whose outputs are hidden neurons."""


def default_units(name: str) -> tuple[UnitKind, ...]:
    """The kinds of units that the network of this name merges unless others are chosen."""
    return _DEFAULT.get(family(name), ("kernels",))


def find_units(
    model: nn.Module, shape: Sequence[int], kinds: Sequence[UnitKind]
) -> tuple[Kernel, ...]:
    """All units of the given kinds in a network, layers in execution order.

    A head is its query, key, value and output weights with their biases. A neuron is the weights
    and the bias of an output of a hidden dense layer. A channel of a state-space layer is its
    column of both halves of `in_proj`, its convolution, step size, states and skip. See
    `merging.Kernel` for the fields. Nothing is computed: the network is traced.

    Args:
      model: a network of `create_model`.
      shape: shape of one example, such as (h, w, c).
      kinds: kinds of units.

    Raises:
      UsageError: a kind is unknown or given twice, or the network has no units of it.
    """
    known = get_args(UnitKind)
    for kind in kinds:
        if kind not in known:
            raise UsageError(f"`units` {kind}: unknown; choose from {', '.join(known)}")
    if len(set(kinds)) < len(kinds) or not kinds:
        raise UsageError(f"`units` {' '.join(kinds)}: name each kind once, and one at least")
    example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = jax.eval_shape(
        lambda key, x: model.init(key, x, train=False), jax.random.key(0), example
    )
    params = variables["params"]

    def forward(params: Any, batch_stats: Any, x: Any) -> Any:
        return model.apply({"params": params, "batch_stats": batch_stats}, x, train=False)

    weights = find_kernels(
        forward, params, variables.get("batch_stats", {}), example, ops=("conv", "dense")
    )
    found: dict[UnitKind, dict[str, tuple[Kernel, ...]]] = {kind: {} for kind in known}
    hidden = _HIDDEN.get(type(model), r"(?!)")
    order = []
    for weight in weights:
        module, _, leaf = weight.name.rpartition("/")
        parent, _, name = module.rpartition("/")
        units: dict[UnitKind, tuple[str, tuple[Kernel, ...]]] = {}
        outputs = isinstance(model, UNet) and name == "head"
        if weight.op != "dense" and weight.groups == 1 and not outputs:
            units["kernels"] = weight.name, (weight,)
        if leaf == "kernel" and weight.op == "dense" and re.fullmatch(hidden, name):
            units["neurons"] = module, _neurons(params, module)
        if name == "query" and isinstance(model, ViT):
            units["heads"] = parent, _heads(params, parent)
        if name == "in_proj" and isinstance(model, Mamba):
            units["channels"] = parent, _channels(params, parent)
        for kind, (label, members) in units.items():
            if label not in found[kind]:
                found[kind][label] = members
                order.append((kind, label))
    for kind in kinds:
        if not found[kind]:
            there = ", ".join(kind for kind in known if found[kind])
            raise UsageError(
                f"`units` {kind}: {type(model).__name__} has none; choose from {there}"
            )
    if {"neurons", "channels"} <= set(kinds) and isinstance(model, Mamba):
        raise UsageError(
            "`units` neurons channels: in a Mamba both are outputs of in_proj; choose one of them"
        )
    return tuple(kernel for kind, label in order if kind in kinds for kernel in found[kind][label])


def _neurons(params: Any, module: str) -> tuple[Kernel, ...]:
    weight = Kernel.named(params, f"{module}/kernel", 1, op="dense")
    if "bias" not in _module(params, module):
        return (weight,)
    bias = Kernel.named(params, f"{module}/bias", 0, op="dense")
    return tie([weight, bias], module, compared=lambda kernel: kernel is weight)


def _heads(params: Any, module: str) -> tuple[Kernel, ...]:
    inputs = ("query", "key", "value")
    return attention_heads(
        params,
        module,
        **{name: f"{module}/{name}/kernel" for name in inputs},
        out=f"{module}/out/kernel",
        biases=[f"{module}/{name}/bias" for name in inputs],
    )


def _channels(params: Any, module: str) -> tuple[Kernel, ...]:
    """The channels of a Mamba layer; `in_proj` has the inputs of all channels, then their gates."""
    d = _module(params, module)["in_proj"]["kernel"].shape[0]
    halves = (d, 2, EXPAND * d)
    compared = [
        Kernel.named(params, f"{module}/in_proj/kernel", 2, view=halves, op="dense"),
        Kernel.named(params, f"{module}/conv1d/kernel", 2, op="conv"),
    ]
    mixed = [
        Kernel.named(params, f"{module}/{name}", axis, op="dense")
        for name, axis in (
            ("conv1d/bias", 0),
            ("dt_proj/kernel", 1),
            ("dt_proj/bias", 0),
            ("A_log", 0),
            ("D", 0),
        )
    ]
    return tie([*compared, *mixed], module, compared=lambda kernel: kernel in compared)


def _module(params: Any, name: str) -> Any:
    for part in name.split("/"):
        params = params[part]
    return params
