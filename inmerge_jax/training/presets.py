"""Presets: readings of the method that fix kernels, partner, time of merging and recipe.

The paper's text and its released code differ; docs/fidelity.md compares them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from inmerge_jax.errors import UsageError
from inmerge_jax.merging import Kernel, deep_kernels

PresetName = Literal["paper", "released", "released_intent"]


@dataclass(frozen=True)
class Preset:
    """One reading of the method.

    Attributes:
      recipe: default recipe.
      partner: default partner of the rule.
      selection: kernels to merge. "forward": the convolutions after the first L_s in execution
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


def select_kernels(
    preset: Preset, model: str, kernels: Sequence[Kernel], skip: int
) -> tuple[tuple[Kernel, ...], str]:
    """Selects the kernels to merge, in execution order.

    Args:
      preset: supplies `selection`.
      model: name of the network, see `create_model`.
      kernels: all convolution kernels of the network, in execution order.
      skip: L_s, the number of convolutions that are not merged; for "intent" and a ResNet, the
        number of blocks.

    Returns:
      The kernels, and "" or the reason why the released code merges nothing in this network.

    Raises:
      UsageError: `skip` leaves nothing to merge, or the intent for this network is unknown.
    """
    family = model.rstrip("0123456789") if not model.startswith("vgg") else "vgg"
    if preset.selection == "released" and family == "resnet":
        return (), (
            f"the released code merges nothing in {model}, whatever its options: it looks for "
            "convolutions one level deeper than a ResNet nests them. The arm inmerge is plain "
            "fine-tuning here. The preset released_intent merges the layers that were meant."
        )
    if preset.selection == "released" and family == "densenet":
        if skip == 0:
            return tuple(kernels[:1]), ""
        return (), (
            f"the released code merges nothing in {model} at skip {skip}: it reaches only a "
            "DenseNet's first convolution, which any skip above 0 leaves out. The arm inmerge is "
            "plain fine-tuning here."
        )
    if preset.selection == "intent" and family == "resnet":
        second = [kernel for kernel in kernels if "conv2" in kernel.name.split("/")]
        return _after(second, skip, f"{model} has {len(second)} residual blocks"), ""
    if preset.selection == "intent" and family == "densenet":
        raise UsageError(
            f"`preset` released_intent: the layers that the released code meant to merge in "
            f"{model} are unknown; choose released or paper"
        )
    return _after(kernels, skip, f"{model} has {len(kernels)} convolutions"), ""


def _after(kernels: Sequence[Kernel], skip: int, count: str) -> tuple[Kernel, ...]:
    if skip >= len(kernels):
        raise UsageError(
            f"`skip` {skip} leaves nothing to merge: {count}; choose 0 to {len(kernels) - 1}"
        )
    return deep_kernels(kernels, skip=skip)
