"""The commands that `fault_injection` kills, and the evidence that must come out the same."""

import csv
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TRAINING = (
    "--size 16 --phantom.train 480 --phantom.val 128 --phantom.test 32 --model vgg16_bn "
    "--width 0.1 --skip 8 --batch-size 16 --epochs 3 --merging-epochs 3 --arms inmerge --devices 1 "
    "--recipe released --learning-rate 0.01 --threshold 0.1 --seeds 7"
).split()
LONGER = ("--epochs", "12", "--merging-epochs", "12")
"""For kills at random moments, so that most of them come after an arm's first epoch."""
TIMINGS = {"seconds", "images_per_second", "environment"}
"""What results and metrics say that may differ between equal runs."""


@dataclass(frozen=True)
class Job:
    """A command that is killed and resumed.

    Attributes:
      module: for `python -m`.
      options: with the output folder; without what makes it go on.
      output: that folder.
      resume: options that make it go on, once there is something in the folder.
      finished: the file that it writes last.
      evidence: reads what must come out the same.
    """

    module: str
    options: tuple[str, ...]
    output: Path
    resume: tuple[str, ...]
    finished: str
    evidence: Callable[[Path], dict[str, Any]]


def training(output: Path, cache: Path, *more: str) -> Job:
    """A training command of two arms on the phantom, a few seconds without its start."""
    options = (*TRAINING, *more, "--output", str(output), "--compilation-cache-dir", str(cache))
    return Job("experiments.train", options, output, ("--resume",), "table.md", run_evidence)


def building(output: Path, images: Path) -> Job:
    """A build of what `write_radiographs` has written."""
    options = ("build", "--images", str(images), "--split", "patient_hash", "--size", "224")
    options += ("--workers", "2", "--output", str(output))
    return Job("inmerge_jax.cli.data", options, output, (), "manifest.json", build_evidence)


def run_evidence(output: Path) -> dict[str, Any]:
    """Checkpoints' arrays, metrics, scores and results of a run; no times."""
    from inmerge_jax.training.checkpointing import checkpoint_epochs, read_arrays
    from inmerge_jax.training.metrics_file import read_metrics

    found = {"results": timeless(json.loads((output / "results.json").read_text()))}
    for folder in sorted(output.glob("seed*/*")):
        name = str(folder.relative_to(output))
        found[f"metrics {name}"] = timeless(read_metrics(folder / "metrics.jsonl"))
        found[f"similarity {name}"] = (folder / "similarity.json").read_bytes()
        for path in (folder / "scores").iterdir():
            found[f"scores {name} {path.name}"] = path.read_bytes()
        for epoch in checkpoint_epochs(folder / "checkpoints"):
            arrays = read_arrays(folder / "checkpoints" / str(epoch)).items()
            found[f"parameters {name} {epoch}"] = {key: x.tobytes() for key, x in arrays}
    return found


def build_evidence(output: Path) -> dict[str, Any]:
    """The manifest of a build, and a hash of each split's images as training reads them.

    Not the shards' bytes: the fields of a record come in another order in each process.
    """
    from inmerge_jax.data.chestxray14.records import load_chestxray14

    data = load_chestxray14(output)
    splits = {"train": data.train, "val": data.val, "test": data.test}
    return {"manifest": json.loads((output / "manifest.json").read_text())} | {
        f"images of {name}": hashlib.sha256(split.images[:].tobytes()).hexdigest()
        for name, split in splits.items()
    }


def timeless(value: Any) -> Any:
    """JSON without the fields in `TIMINGS`."""
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if key not in TIMINGS}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def write_radiographs(folder: Path, count: int = 640, size: int = 400) -> Path:
    """A folder as NIH's is, of `count` names for eight images of noise."""
    from PIL import Image

    from inmerge_jax.data.chestxray14.labels import FINDINGS

    folder.mkdir(parents=True)
    for index in range(8):
        noise = np.random.default_rng(index).integers(0, 256, (size, size), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.bin", "PNG")
    with open(folder / "Data_Entry_2017.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Image Index", "Finding Labels", "Patient ID"])
        for patient in range(1, count + 1):
            name = f"{patient:08}_000.png"
            writer.writerow([name, FINDINGS[patient % 14], patient])
            os.link(folder / f"{patient % 8}.bin", folder / name)
    return folder
