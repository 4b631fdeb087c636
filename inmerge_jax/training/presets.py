"""Presets: readings of the method that fix kernels, partner, time of merging and recipe.

The paper's text and its released code differ; docs/fidelity.md compares them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from inmerge_jax.errors import UsageError
from inmerge_jax.merging import Kernel, deep_kernels
from inmerge_jax.merging.units import group_weights
from inmerge_jax.models import family
from inmerge_jax.models.densenet import DenseNet
from inmerge_jax.models.resnet import ResNet
from inmerge_jax.models.vgg import VGG

PresetName = Literal["paper", "released", "released_intent"]


@dataclass(frozen=True)
class Preset:
    """One reading of the method.

    Attributes:
      recipe: default recipe.
      partner: default partner of the rule.
      selection: units to merge. "forward": those of the layers after the first L_s in execution
        order; "released": those that the released code reaches; "intent": those that it was meant
        to reach.
      merge_in_validation: whether the merging stage also merges before every validation image,
        before the epoch's checkpoint is written.
    """

    recipe: str
    partner: Literal["random", "nearest"]
    selection: Literal["forward", "released", "intent"]
    merge_in_validation: bool


PRESETS: Mapping[PresetName, Preset] = MappingProxyType(
    {
        # The paper gives no complete recipe; this uses the released code's.
        "paper": Preset("released", "nearest", "forward", merge_in_validation=False),
        "released": Preset("released", "random", "released", merge_in_validation=True),
        "released_intent": Preset("released", "random", "intent", merge_in_validation=True),
    }
)

NO_PRESET = Preset("medmnist", "random", "forward", merge_in_validation=False)
"""The defaults without a preset."""


def find_preset(name: PresetName | None) -> Preset:
    """The preset called `name`; `NO_PRESET` for None.

    Raises:
      UsageError: the name is unknown.
    """
    if name is None:
        return NO_PRESET
    if name not in PRESETS:
        raise UsageError(f"`preset` {name}: unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def select_units(
    preset: Preset,
    model: str,
    kernels: Sequence[Kernel],
    skip: int | None,
    layers: str | None = None,
) -> tuple[tuple[Kernel, ...], str]:
    """Selects the units to merge, in execution order.

    Weights that form units together are one layer.

    Args:
      preset: supplies `selection`.
      model: name of the network, see `create_model`.
      kernels: all units of the network, in execution order.
      skip: L_s, the number of layers that are not merged; for "intent" and a ResNet, the number of
        blocks. None for half of the layers.
      layers: regular expression; after `skip`, only layers whose name it matches are merged.

    Returns:
      The units, and "" or the reason why the released code merges nothing in this network.

    Raises:
      UsageError: `skip` or `layers` leaves nothing to merge, `layers` is no regular expression, or
        the released code is not for this network, or its intent is unknown.
    """
    skip = len(group_weights(kernels)) // 2 if skip is None else skip
    network = family(model)
    if preset.selection != "forward" and (
        network not in (VGG, ResNet, DenseNet) or any(k.op == "dense" for k in kernels)
    ):
        raise UsageError(
            f"`preset` {'released' if preset.selection == 'released' else 'released_intent'}: the "
            f"released code merges convolution kernels of VGGs, ResNets and DenseNets, not the "
            f"units of {model}; choose paper, or no preset"
        )
    if preset.selection == "released" and network is ResNet:
        return (), (
            f"the released code merges nothing in {model}, whatever its options: it looks for "
            "convolutions one level deeper than a ResNet nests them. The arm inmerge is plain "
            "fine-tuning here. The preset released_intent merges the layers that were meant."
        )
    if preset.selection == "released" and network is DenseNet:
        if skip == 0:
            return tuple(kernels[:1]), ""
        return (), (
            f"the released code merges nothing in {model} at skip {skip}: it reaches only a "
            "DenseNet's first convolution, which any skip above 0 leaves out. The arm inmerge is "
            "plain fine-tuning here."
        )
    if preset.selection == "intent" and network is DenseNet:
        raise UsageError(
            f"`preset` released_intent: the layers that the released code meant to merge in "
            f"{model} are unknown; choose released or paper"
        )
    unit = "layers of units" if any(kernel.op == "dense" for kernel in kernels) else "convolutions"
    if preset.selection == "intent" and network is ResNet:
        kernels = [kernel for kernel in kernels if "conv2" in kernel.name.split("/")]
        unit = "residual blocks"
    count = len({kernel.label for kernel in kernels})
    if skip >= count:
        raise UsageError(
            f"`skip` {skip} leaves nothing to merge: {model} has {count} {unit}; choose 0 to "
            f"{count - 1}"
        )
    deep = deep_kernels(kernels, skip=skip)
    return (deep if layers is None else _matching(layers, deep)), ""


def _matching(layers: str, deep: Sequence[Kernel]) -> tuple[Kernel, ...]:
    try:
        pattern = re.compile(layers)
    except re.error as error:
        raise UsageError(f"`layers` {layers}: {error}; give a regular expression") from error
    found = tuple(kernel for kernel in deep if pattern.search(kernel.label))
    if not found:
        names = ", ".join(dict.fromkeys(kernel.label for kernel in deep))
        raise UsageError(f"`layers` {layers} matches none of the layers after `skip`: {names}")
    return found
