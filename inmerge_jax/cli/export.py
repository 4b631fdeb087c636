"""Exports a trained network's weights for PyTorch: `inmerge export`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from inmerge_jax.buckets import path_registry
from inmerge_jax.cli.errors import run_command

if TYPE_CHECKING:
    from inmerge_jax.training.load import FinishedStage


@dataclass(frozen=True)
class ExportConfig:
    """Exports the best checkpoint of one arm of a run as a torchvision state dict.

    In PyTorch: model.load_state_dict(torch.load(FILE), strict=True), or for .safetensors
    model.load_state_dict(safetensors.torch.load_file(FILE), strict=True). With the small stem, the
    names are those of torchvision's network with a modified stem (3x3, stride 1, no max-pool; one
    pooled linear layer as a VGG's classifier).

    Attributes:
      run: Folder of the run (its --output).
      to: File to write; its suffix sets the format: .safetensors, .pth or .pt.
      arm: Arm of the run.
      seed: Seed of the run; the first one by default.
      names: Naming scheme: torchvision, or medmnist for the MedMNIST benchmark's ResNets (stem
        small), whose .pth files have the form {"net": ...}.
      overwrite: Replace an existing file.
    """

    run: tyro.conf.Positional[Path]
    to: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    arm: Literal["backbone", "finetune", "inmerge"] = "inmerge"
    seed: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    names: Literal["torchvision", "medmnist"] = "torchvision"
    overwrite: bool = False


def export(config: ExportConfig) -> str:
    """Writes the file and returns a description of it: its network, inputs and outputs.

    Raises:
      UsageError: there is no such run, arm or seed; the arm is not finished; its checkpoint is
        damaged; or the file cannot be written.
    """
    from inmerge_jax.models.torchvision import to_state_dict
    from inmerge_jax.models.weight_files import check_weight_file, write_state_dict
    from inmerge_jax.training.load import find_stage

    check_weight_file(config.to, overwrite=config.overwrite)
    stage = find_stage(config.run, config.arm, config.seed)
    name, stem = stage.config["model"]["name"], stage.config["model"]["stem"]
    state_dict = to_state_dict(name, stage.variables(), names=config.names)
    net = config.names == "medmnist" and config.to.suffix != ".safetensors"
    write_state_dict(
        config.to, state_dict, overwrite=config.overwrite, wrapped="net" if net else None
    )
    return (
        f"{config.to}: {name} with the {stem} stem, {len(state_dict)} entries, "
        f"seed {stage.seed} {stage.arm} epoch {stage.result['best_epoch']}{_described(stage)}"
    )


def _described(stage: "FinishedStage") -> str:
    """What the network expects and gives, which the file does not say; "" before the run's end."""
    from inmerge_jax.files import read_json_object

    path = stage.run / "results.json"
    if not path.is_file():
        return ""
    data = read_json_object(path, "restore it, or train again")["dataset"]
    modality, recipe = data.get("modality", "image"), stage.config["recipe"]
    x = "x / 255" if modality in ("image", "volume") else "x"
    mean, std = (" ".join(f"{one:g}" for one in recipe[name]) for name in ("mean", "std"))
    size = f"{data['size']} px, " if modality in ("image", "volume") else ""
    inputs = f"\n  inputs: {size}({x} - mean) / std with mean {mean} and std {std}"
    if modality == "table":  # A mean for each feature, too many to print.
        inputs = f"\n  inputs: (x - mean) / std of {', '.join(data['features'])}, see config.json"
    return f"{inputs}\n  outputs: {', '.join(data['classes'])}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status, see `errors`."""
    config = tyro.cli(
        ExportConfig,
        prog="inmerge export",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
        registry=path_registry(),
    )
    return run_command(
        lambda: print(export(config)), config.to, stopped="stopped; nothing was written"
    )


if __name__ == "__main__":
    sys.exit(main())
