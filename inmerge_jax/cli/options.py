"""The command line of `inmerge train`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, arg

from inmerge_jax.buckets import path_registry
from inmerge_jax.training.config import (
    DataOptions,
    DeviceConfig,
    LoggingConfig,
    ModelConfig,
    OutputConfig,
    RecipeConfig,
    RuleConfig,
    TrainConfig,
)
from inmerge_jax.training.presets import PresetName
from inmerge_jax.training.resolve import apply_preset


@dataclass(frozen=True)
class _MergingOptions(RuleConfig):
    __doc__ = RuleConfig.__doc__

    preset: Annotated[
        PresetName | None,
        arg(
            metavar="{paper,released,released_intent}",
            help="A reading of the method: the paper's text, the released code as it runs "
            "(merges nothing in a ResNet), or as it was meant.",
            help_behavior_hint="",
        ),
    ] = None


@dataclass(frozen=True)
class _CommandLine:
    """Trains a backbone, then fine-tunes its best checkpoint with and without in-model merging.

    Ctrl-C or SIGTERM saves a checkpoint after the current update; --resume continues.
    """

    data: Annotated[DataOptions, OmitArgPrefixes, arg(help="")]
    model: Annotated[ModelConfig, OmitArgPrefixes, arg(help="")]
    recipe: Annotated[RecipeConfig, OmitArgPrefixes]
    merging: Annotated[_MergingOptions, OmitArgPrefixes]
    output: Annotated[OutputConfig, OmitArgPrefixes, arg(help="")]
    devices_and_processes: Annotated[DeviceConfig, OmitArgPrefixes, arg(help="")]
    logging: Annotated[LoggingConfig, OmitArgPrefixes, arg(help="")]


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Parses the command line of `inmerge train`.

    Args:
      arguments: the arguments; None for those of this process.

    Raises:
      SystemExit: with status 0 after --help, 2 for an unknown option or value.
    """
    options = tyro.cli(
        _CommandLine,
        prog="inmerge train",
        compact_help=True,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
        registry=path_registry(),
    )
    rule = {name: value for name, value in vars(options.merging).items() if name != "preset"}
    config = TrainConfig(
        data=options.data,
        model=options.model,
        recipe=options.recipe,
        rule=RuleConfig(**rule),
        logging=options.logging,
        preset=options.merging.preset,
        **vars(options.output),
        **vars(options.devices_and_processes),
    )
    return apply_preset(config)
