"""Compares the presets `paper` and `released` on BreastMNIST with VGG16.

Both are trained at the given threshold, and at one that kernels of this network pass, from the
first run's backbone. Each is a run of `inmerge train` in its own folder; the same command resumes.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from experiments.study.render import markdown
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_json

PRESETS = ("paper", "released")
_QUANTILE = "0.99"


@dataclass(frozen=True)
class FidelityConfig:
    """Trains the presets paper and released, and compares merges and test AUC.

    Then again at the threshold that one in a hundred pairs of deep kernels passes: the median over
    the merging layers of the 99 % quantile of their kernels' similarity, in the backbone of the
    first run.

    Attributes:
      data: breastmnist, or phantom.
      data_dir: Folder of breastmnist.npz.
      epochs: Epochs of the backbone.
      merging_epochs: Epochs of the merging stage.
      batch_size: Images per update. The recipe's 324 would leave two updates per epoch.
      learning_rate: Of the backbone's first epoch. At the recipe's 0.1 a VGG without batch
        normalisation may not train from random weights.
      threshold: Cosine similarity above which a selected kernel merges, in the first run.
      width: Factor on the channels.
      size: Height and width of the images.
      seeds: One run of each preset per seed.
      output: Folder of the four runs.
      result: JSON file to write.
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


def arguments(config: FidelityConfig, preset: str, threshold: float, folder: Path) -> list[str]:
    """The options of `inmerge train` for one preset, except --resume."""
    return [
        *("--preset", preset, "--model", "vgg16", "--arms", "inmerge"),
        *("--data", config.data, "--data-dir", str(config.data_dir), "--size", str(config.size)),
        *("--epochs", str(config.epochs), "--merging-epochs", str(config.merging_epochs)),
        *("--batch-size", str(config.batch_size), "--learning-rate", str(config.learning_rate)),
        *("--threshold", str(threshold), "--width", str(config.width)),
        *("--seeds", *map(str, config.seeds), "--output", str(folder)),
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


def passed_by_one_in_a_hundred(run: Path) -> float:
    """The threshold of the second run: from the backbones of the first, without test images."""
    quantiles = []
    for stage in sorted(run.glob("seed*")):
        merging = json.loads((stage / "inmerge" / "result.json").read_bytes())["layers"]
        layers = json.loads((stage / "backbone" / "similarity.json").read_bytes())["after"]
        quantiles += [x["quantiles"][_QUANTILE] for x in layers if x["name"] in merging]
    return round(statistics.median(quantiles), 4)


def table(stored: dict[str, Any]) -> str:
    """The stored results as Markdown; several seeds are separated by slashes."""
    rows = []
    for run in stored["runs"]:
        for preset in PRESETS:
            row = run[preset]
            counts = [
                " / ".join(f"{value:,}" for value in row[f"{stage}_{what}"])
                for what in ("passes", "merges")
                for stage in ("training", "validation")
            ]
            aucs = ["undefined" if auc is None else f"{auc:.3f}" for auc in row["test_auc"]]
            name = f"{preset}, threshold {row['rule']['threshold']:g}"
            rows.append((name, *counts, " / ".join(aucs)))
    columns = (
        *("Preset", "Merge passes (training)", "Merge passes (validation)"),
        *("Kernels merged (training)", "Kernels merged (validation)", "Test AUC"),
    )
    return markdown(columns, rows)


def train_preset(given: list[str], folder: Path) -> int:
    """Trains or resumes one preset, unless it is finished; returns the exit status."""
    from inmerge_jax.cli.options import parse_config
    from inmerge_jax.cli.train import main as train
    from inmerge_jax.training.parallel import choose_devices
    from inmerge_jax.training.resolve import config_dict, resolve_recipe
    from inmerge_jax.training.workdir import diff_configs

    try:
        wanted = parse_config(given)
        recipe = resolve_recipe(wanted.recipe)
        wanted = config_dict(wanted, recipe, len(choose_devices(wanted.devices)))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    begun = (folder / "config.json").exists()
    if begun and diff_configs(json.loads((folder / "config.json").read_bytes()), wanted):
        message = f"{folder} holds a run of other options; choose another --output"
        print(f"error: {message}", file=sys.stderr)
        return 2
    if (folder / "results.json").exists():
        return 0
    return train([*given, *(["--resume"] if begun else [])])


def main(options: list[str] | None = None) -> int:
    """Trains what is missing; returns the exit status of `inmerge train`, or 0."""
    config = tyro.cli(FidelityConfig, prog="python -m experiments.study presets", args=options)
    first, runs = config.output / "given", []
    for place in (first, config.output / "quantile"):
        threshold = passed_by_one_in_a_hundred(first / PRESETS[0]) if runs else config.threshold
        run = {}
        for preset in PRESETS:
            folder = place / preset
            status = train_preset(arguments(config, preset, threshold, folder), folder)
            if status:
                return status
            run[preset] = summarise(json.loads((folder / "results.json").read_bytes()))
        runs.append(run)
    stored = {"runs": runs}
    write_json(config.result, stored)
    print(table(stored), end="")
    return 0
