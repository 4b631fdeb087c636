"""Trains the presets `paper` and `released` on BreastMNIST with VGG16 and prints both side by side.

Each preset is a run of `experiments.train` in its own folder; the same command goes on where it
stopped. What is printed is stored as JSON.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from inmerge_jax.errors import InputError
from inmerge_jax.files import write_json

PRESETS = ("paper", "released")


@dataclass(frozen=True)
class FidelityConfig:
    """Trains the presets paper and released, and compares merges and test AUC.

    Attributes:
      data: breastmnist, or phantom.
      data_dir: Folder that holds breastmnist.npz.
      epochs: Epochs of the backbone.
      merging_epochs: Epochs of the merging stage.
      batch_size: Examples of one update. The recipe's 324 would leave two updates an epoch.
      learning_rate: Rate of the backbone's first epoch. At the recipe's 0.1 a VGG without batch
        normalisation need not train from random weights.
      threshold: Cosine similarity above which a selected kernel merges.
      width: Factor on the channels.
      size: Height and width of the images.
      seeds: One run of each preset per seed.
      output: Folder of the runs.
      result: The JSON file to write.
      train_options: More options of experiments.train, in one string after an equals sign.
    """

    data: str = "breastmnist"
    data_dir: Path = Path("~/.medmnist")
    epochs: int = 8
    merging_epochs: int = 4
    batch_size: int = 64
    learning_rate: float = 0.01
    threshold: float = 0.3
    width: float = 1.0
    size: int = 28
    seeds: tuple[int, ...] = (0,)
    output: Path = Path("runs/fidelity")
    result: Path = Path("experiments/results/fidelity.json")
    train_options: str = ""


def arguments(config: FidelityConfig, preset: str) -> list[str]:
    """The options of `experiments.train` for one preset, but for --resume."""
    return [
        *("--preset", preset, "--model", "vgg16", "--arms", "inmerge"),
        *("--data", config.data, "--data-dir", str(config.data_dir), "--size", str(config.size)),
        *("--epochs", str(config.epochs), "--merging-epochs", str(config.merging_epochs)),
        *("--batch-size", str(config.batch_size), "--learning-rate", str(config.learning_rate)),
        *("--threshold", str(config.threshold), "--width", str(config.width)),
        *("--seeds", *map(str, config.seeds), "--output", str(config.output / preset)),
        *config.train_options.split(),
    ]


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """Merges in training and in validation, and test AUC, one value per seed."""
    arm = results["arms"]["inmerge"]
    return {
        "rule": results["rule"],
        "recipe": results["recipe"],
        "seeds": results["seeds"],
        "dataset": results["dataset"]["title"],
        "training_passes": [result["steps"] for result in arm],
        "training_merges": [sum(result["merged"]) for result in arm],
        "validation_passes": [result["val_passes"] for result in arm],
        "validation_merges": [sum(result["val_merged"]) for result in arm],
        "test_auc": [result["test"]["auc"] for result in arm],
        "seconds": results["seconds"],
    }


def table(stored: dict[str, Any]) -> str:
    """The stored results as Markdown; values of several seeds stand side by side."""
    names = ("training_passes", "training_merges", "validation_passes", "validation_merges")
    lines = [
        "| preset | merge passes in training | kernels merged there | merge passes in validation "
        "| kernels merged there | test AUC |",
        "| --- " + "| ---: " * 5 + "|",
    ]
    for preset in PRESETS:
        row = stored[preset]
        cells = [" / ".join(f"{value:,}" for value in row[name]) for name in names]
        aucs = ("undefined" if auc is None else f"{auc:.3f}" for auc in row["test_auc"])
        lines.append(f"| {preset} | {' | '.join(cells)} | {' / '.join(aucs)} |")
    return "\n".join(lines) + "\n"


def main(options: list[str] | None = None) -> int:
    """Trains what is not yet trained; returns the exit status of `experiments.train`, or 0."""
    from experiments.train import main as train
    from inmerge_jax.training.config import config_dict, parse_config, resolve_recipe
    from inmerge_jax.training.parallel import choose_devices
    from inmerge_jax.training.runfolder import differences

    config = tyro.cli(FidelityConfig, prog="python -m experiments.fidelity", args=options)
    stored = {}
    for preset in PRESETS:
        folder, given = config.output / preset, arguments(config, preset)
        finished = folder / "results.json"
        try:
            wanted = parse_config(given)
            recipe = resolve_recipe(wanted.recipe)
            wanted = config_dict(wanted, recipe, len(choose_devices(wanted.devices)))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        begun = (folder / "config.json").exists()
        if begun and differences(json.loads((folder / "config.json").read_bytes()), wanted):
            message = f"{folder} holds a run of other options; choose another --output"
            print(f"error: {message}", file=sys.stderr)
            return 2
        if not finished.exists():
            status = train([*given, *(["--resume"] if begun else [])])
            if status:
                return status
        stored[preset] = summarise(json.loads(finished.read_bytes()))
    write_json(config.result, stored)
    print(table(stored), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
