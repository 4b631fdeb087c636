"""First looks at merging in networks beyond image CNNs.

    python -m experiments.first_look --data-dir FOLDER

trains each case with `inmerge train`, five seeds and three rules, and stores test metrics, merges
and similarities for docs/results/beyond-convolutions.md. FOLDER holds medmnist/ and ecg/.
"""

import json
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.benchmarks.timing import machine, measured_on
from experiments.study.render import heat_map
from inmerge_jax.data import load_breast_cancer
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_arrays, write_json
from inmerge_jax.reporting.plots import Plot
from inmerge_jax.reporting.summary import Spread, spread
from inmerge_jax.reporting.tables import markdown_rows
from inmerge_jax.training.metrics import compute_metrics


class Case(NamedTuple):
    """A network and a data set.

    Attributes:
      title: network and units, in tables.
      data: data set, in tables.
      options: of `inmerge train`; {data} is the folder of the data, {blood} a part of the blood
        cells.
    """

    title: str
    data: str
    options: str


_MEDMNIST = "--data-dir {data}/medmnist --no-download --batch-size 64"
_HEARTBEATS = "--data signals:{data}/ecg/ecg5000_train.csv.gz --batch-size 50"

CASES = {
    "mlp": Case(
        "MLP: neurons",
        "breast cancer table",
        "--data breast_cancer --model mlp --skip 0 --batch-size 64 --epochs 40 --merging-epochs 20",
    ),
    "signals": Case(
        "ResNet-18, 1-D: kernels",
        "heartbeats",
        f"{_HEARTBEATS} --model resnet18 --width 0.25 --epochs 20 --merging-epochs 10",
    ),
    "mamba": Case(
        "Mamba: channels",
        "heartbeats",
        f"{_HEARTBEATS} --model mamba_tiny --epochs 20 --merging-epochs 10",
    ),
    "vit": Case(
        "ViT: heads, neurons",
        "BreastMNIST",
        f"--data breastmnist {_MEDMNIST} --model vit_tiny --epochs 6 --merging-epochs 3 "
        "--learning-rate 3e-4",
    ),
    "unet": Case(
        "U-Net: kernels",
        "phantom, lungs and heart",
        "--data phantom_masks --size 32 --phantom.train 256 --phantom.val 64 --phantom.test 256 "
        "--model unet --width 0.25 --batch-size 32 --epochs 16 --merging-epochs 8",
    ),
    "volumes": Case(
        "ResNet-18, 3-D: kernels",
        "volume phantom",
        "--data phantom3d --size 16 --phantom.train 256 --phantom.val 64 --phantom.test 256 "
        "--model resnet18 --width 0.25 --batch-size 32 --epochs 8 --merging-epochs 4",
    ),
    "images": Case(
        "ResNet-18, 2-D: kernels",
        "BreastMNIST",
        f"--data breastmnist {_MEDMNIST} --model resnet18 --width 0.25 --epochs 10 "
        "--merging-epochs 5",
    ),
    "vit_blood": Case(
        "ViT: heads, neurons",
        "500 blood cells",
        "--data bloodmnist --file {blood} --allow-unverified "
        "--batch-size 64 --model vit_tiny --epochs 6 --merging-epochs 3 --learning-rate 3e-4",
    ),
}
BLOOD = {"train": 500, "val": 150, "test": 500}
"""Images of each split: all 17,092 would take 11 hours."""
RULES = {
    "random": "--partner random",
    "nearest": "--partner nearest",
    "quantile 0.5": "--partner nearest --quantile 0.5",
}
SEEDS = "--seeds 0 1 2 3 4 --devices 1 --merging-learning-rate 1e-4"
RESULTS = Path(__file__).parent / "results" / "first_look.json"
METRICS = ("dice", "auc")
"""A case is compared by the first of these that its results have."""
_BINS = 10


@dataclass(frozen=True)
class FirstLookConfig:
    """Trains networks beyond image CNNs with and without merging.

    Attributes:
      data_dir: Folder of medmnist/ and ecg/.
      only: Cases to train; the stored results of others stay.
      work: Folder of the runs. Finished ones are not trained again, others are resumed.
      output: The JSON file.
    """

    data_dir: Path
    only: tuple[str, ...] = tuple(CASES)
    work: Path = Path("runs/first_look")
    output: Path = RESULTS


def run_trainer(arguments: Sequence[str]) -> None:
    """Runs `inmerge train` in a subprocess."""
    subprocess.run([sys.executable, "-m", "experiments.train", *arguments], check=True)


def first_images(file: Path, counts: Mapping[str, int], output: Path) -> Path:
    """Writes the first images of each split of a MedMNIST file; returns `output`.

    The blood cells are in random order, so these are a random sample.
    """
    if not output.exists():
        with np.load(file) as arrays:
            parts = {
                f"{split}_{kind}": arrays[f"{split}_{kind}"][:count]
                for split, count in counts.items()
                for kind in ("images", "labels")
            }
        write_arrays(output, parts)
    return output


def train(config: FirstLookConfig, name: str, rule: str) -> Path:
    """Trains one case with one rule; returns the run folder.

    The backbones and the arm finetune do not depend on the rule, so only the first rule trains
    them. The others begin with a copy of its backbones.
    """
    first, folder = (
        config.work / f"{name}-{one.replace(' ', '-')}" for one in (next(iter(RULES)), rule)
    )
    if (folder / "results.json").exists():
        return folder
    if folder != first and not (folder / "config.json").exists():
        copy_backbones(first, folder, rule)
    options, blood = CASES[name].options, config.work / "blood.npz"
    if "{blood}" in options:
        first_images(config.data_dir / "medmnist" / "bloodmnist_like.npz", BLOOD, blood)
    options = options.format(data=config.data_dir, blood=blood)
    arms = "" if rule == next(iter(RULES)) else "--arms inmerge"
    command = shlex.split(f"{options} {RULES[rule]} {SEEDS} {arms}")
    again = ["--resume"] if (folder / "config.json").exists() else []
    run_trainer([*command, "--output", str(folder), *again])
    return folder


def copy_backbones(source: Path, folder: Path, rule: str) -> None:
    """Begins the run of another rule with the backbones of a finished run, for `--resume`.

    The trainer refuses the folder if the configuration written here is not that of its options.
    """
    settings = json.loads((source / "config.json").read_bytes())
    settings["arms"] = ["backbone", "inmerge"]
    settings["rule"] |= {"partner": "nearest"}
    if "quantile" in rule:
        del settings["rule"]["threshold"]
        settings["rule"]["quantile"] = float(rule.partition(" ")[2])
    for seed in settings["seeds"]:
        part = Path(f"seed{seed}") / "backbone"
        shutil.copytree(source / part, folder / part)
    for name in ("environment.json", "labels.npz", "samples.npz"):
        if (source / name).exists():
            shutil.copy(source / name, folder)
    write_json(folder / "config.json", settings)


def gathered(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Test metrics and merges by arm and seed, and similarities by layer, of one case.

    Args:
      folders: rule to run folder, the first with the arm finetune.
    """
    results = {
        rule: json.loads((path / "results.json").read_bytes()) for rule, path in folders.items()
    }
    first = next(iter(results))
    stages = {arm: results[first]["arms"][arm] for arm in ("backbone", "finetune")}
    stages |= {rule: results[rule]["arms"]["inmerge"] for rule in results}
    metric = next(name for name in METRICS if name in stages["finetune"][0]["test"])
    return {
        "metric": metric,
        "counts": results[first]["dataset"]["counts"],
        "arms": {
            arm: {
                "test": [stage["test"][metric] for stage in found],
                "merged": [sum(stage["merged"]) for stage in found],
                "selected": [sum(stage["selected"]) for stage in found],
            }
            for arm, found in stages.items()
        },
        "similarity": _similarity(folders[first], results[first]["seeds"]),
        # Backbones and fine-tuning are those of the first rule.
        "seconds": sum(stage["seconds"] for found in stages.values() for stage in found),
        "machine": machine(results[first]["environment"]),
    }


def baseline() -> float:
    """Test AUC of scikit-learn's logistic regression on the breast cancer table."""
    data = load_breast_cancer()
    regression = make_pipeline(StandardScaler(), LogisticRegression())
    regression.fit(data.train.images, data.train.labels)
    scores = regression.predict_proba(data.test.images)
    return compute_metrics(data.test.labels, scores, data.task).auc


def _similarity(folder: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """By layer: units, and means over seeds before and after the training of the backbone."""
    files = [
        json.loads((folder / f"seed{seed}" / "backbone" / "similarity.json").read_bytes())
        for seed in seeds
    ]
    rows = []
    for number, layer in enumerate(files[0]["before"]):
        row: dict[str, Any] = {"layer": layer["name"], "units": layer["kernels"]}
        for when in ("before", "after"):
            layers = [file[when][number] for file in files]
            row[when] = {
                "nearest": statistics.mean(one["nearest"] for one in layers),
                "above": statistics.mean(one["above"]["0.3"] for one in layers),
            }
        rows.append(row)
    return rows


def differences(case: Mapping[str, Any], arm: str) -> list[float]:
    """Test metric of an arm minus that of fine-tuning, by seed."""
    arms = case["arms"]
    return [a - b for a, b in zip(arms[arm]["test"], arms["finetune"]["test"], strict=True)]


def _spread(values: Sequence[float]) -> Spread:
    return spread(dict(enumerate(values)))


def answers(stored: Mapping[str, Any]) -> str:
    """The table of differences from fine-tuning, with 95 % t-intervals over seeds."""
    rows = []
    for name, case in stored["cases"].items():
        title = f"{CASES[name].title}; {CASES[name].data}"
        metric = {"auc": "AUC", "dice": "Dice"}[case["metric"]]
        cells = []
        for rule in RULES:
            found = _spread(differences(case, rule))
            arm = case["arms"][rule]
            merged = sum(arm["merged"]) / max(1, sum(arm["selected"]))
            low, high = found.interval or (found.mean, found.mean)
            cells.append(f"{found.mean:+.3f} [{low:+.3f}, {high:+.3f}], {merged:.0%}")
        mean = _spread(case["arms"]["finetune"]["test"]).mean
        rows.append((title, f"{metric} {mean:.3f}", *cells))
    header = ("network: units; data", "fine-tuning", *RULES)
    text = markdown_rows(header, rows, "llrrr") + "\n"
    if "mlp" in stored["cases"]:
        auc = stored["cases"]["mlp"]["baseline"]
        text += f"\nLogistic regression on the table (scikit-learn): AUC {auc:.3f}.\n"
    return text


def similarities(stored: Mapping[str, Any]) -> str:
    """The table of similarities: first, middle and last layer, before and after training."""
    rows = []
    for name, case in stored["cases"].items():
        for kind, layers in _by_kind(case["similarity"]).items():
            # Of two layers, none is in the middle.
            places = {len(layers) // 2: "middle", len(layers) - 1: "last", 0: "first"}
            for layer, place in sorted(places.items()):
                one = layers[layer]
                cells = (
                    f"{one[when]['nearest']:.2f}, {one[when]['above']:.1%}"
                    for when in ("before", "after")
                )
                what = _row_name(name, kind) if layer == 0 else ""
                rows.append((what, place, f"{one['units']:,}", *cells))
    header = ("network, data: units", "layer", "units", "before training", "after")
    return markdown_rows(header, rows, "llrrr") + "\n"


def figure(stored: Mapping[str, Any]) -> Plot:
    """Mean cosine of a unit and the most similar other one by depth, after training."""
    rows: dict[str, list[float]] = {}
    for name, case in stored["cases"].items():
        for kind, layers in _by_kind(case["similarity"]).items():
            bins: list[list[float]] = [[] for _ in range(_BINS)]
            for number, layer in enumerate(layers):
                bins[number * _BINS // len(layers)].append(layer["after"]["nearest"])
            rows[_row_name(name, kind)] = [statistics.mean(one) if one else np.nan for one in bins]
    title = "Mean cosine of a unit and its nearest, after training"
    values = np.array(list(rows.values()))
    return heat_map(title, list(rows), values, "cosine", "depth, in tenths of the layers")


def _row_name(name: str, kind: str) -> str:
    return f"{CASES[name].title.partition(':')[0]}, {CASES[name].data}: {kind}"


def _by_kind(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The layers by kind of unit, which is inferred from their names."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        name = layer["layer"]
        kinds = {"attention": "heads", "kernel": "kernels"}
        kind = kinds.get(name.rpartition("/")[2], "neurons")
        kind = "channels" if name.startswith("mixer_") else kind
        found.setdefault(kind, []).append(layer)
    return found


def provenance(stored: Mapping[str, Any]) -> str:
    """Time, processor and commit of the trainings."""
    hours = sum(case["seconds"] for case in stored["cases"].values()) / 3600
    places = measured_on([case["machine"] for case in stored["cases"].values()])
    return f"{hours:.1f} h of wall-clock time, with pauses, on {places}.\n"


def main(arguments: list[str] | None = None) -> int:
    """Trains what is missing, and stores the cases that are finished.

    Raises:
      UsageError: an unknown case.
    """
    config = tyro.cli(FirstLookConfig, prog="python -m experiments.first_look", args=arguments)
    for name in config.only:
        if name not in CASES:
            raise UsageError(f"`only` {name}: unknown; choose from {', '.join(CASES)}")
    stored: dict[str, Any] = {"cases": {}}
    if config.output.exists():
        stored = json.loads(config.output.read_bytes())
    for name in config.only:
        case = gathered({rule: train(config, name, rule) for rule in RULES})
        command = f"{CASES[name].options} {SEEDS}"
        case |= {"baseline": baseline()} if name == "mlp" else {}
        cases = stored["cases"] | {name: case | {"command": command}}
        stored["cases"] = {name: cases[name] for name in CASES if name in cases}
        write_json(config.output, stored)
    print(answers(stored), similarities(stored), provenance(stored), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
