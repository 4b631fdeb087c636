"""Test metrics of short trainings, evaluated with running and with re-estimated batch statistics.

    python -m experiments.benchmarks.batch_statistics --data-dir FOLDER

trains with `--recompute-batch-stats` off and all, and stores the means over seeds for the table of
docs/trainer.md. It takes some ten minutes on two CPU cores.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from experiments.benchmarks.timing import machine, measured_on
from inmerge_jax.files import write_json
from inmerge_jax.reporting.tables import markdown_rows

DATA = {"breastmnist": "BreastMNIST", "retinamnist": "RetinaMNIST"}
RULES = {
    "harsh": "--partner random --threshold -1 --arms finetune inmerge",
    "paper": "--partner nearest --threshold 0.3 --arms inmerge",
}
_LABELS = {"harsh": "threshold -1", "paper": "paper"}
"""What the table calls a rule."""
MODES = ("off", "all")
TRAINING = (
    "--model resnet18 --width 0.125 --epochs 8 --merging-epochs 5 --seeds 0 1 2 --devices 1 "
    "--no-download"
)
RESULTS = Path(__file__).parents[1] / "results" / "recompute_batch_stats.json"


@dataclass(frozen=True)
class BatchStatisticsConfig:
    """Measures what re-estimated batch statistics change in short trainings.

    Attributes:
      data_dir: Folder of breastmnist.npz and retinamnist.npz.
      work: Folder of the runs; a run that is finished there is not trained again.
      output: The JSON file.
    """

    data_dir: Path
    work: Path = Path("runs/batch_statistics")
    output: Path = RESULTS


def run_trainer(arguments: list[str]) -> None:
    """Runs `inmerge train` in a subprocess."""
    subprocess.run([sys.executable, "-m", "experiments.train", *arguments], check=True)


def train(config: BatchStatisticsConfig, data: str, rule: str, mode: str) -> dict[str, Any]:
    """One run; returns the content of its results.json."""
    folder = config.work / f"{data}-{rule}-{mode}"
    command = ["--data", data, "--data-dir", str(config.data_dir), "--output", str(folder)]
    command += [*TRAINING.split(), *RULES[rule].split(), "--recompute-batch-stats", mode]
    if not (folder / "results.json").exists():
        again = ["--resume"] if (folder / "config.json").exists() else []
        run_trainer([*command, *again])
    return json.loads((folder / "results.json").read_bytes())


def rows(results: dict[tuple[str, str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per data set and arm: kernels merged per seed, and mean test AUC and ACC per mode."""
    found = []
    for data in DATA:
        for arm, rule in (
            ("backbone", "harsh"),
            ("finetune", "harsh"),
            *(("inmerge", rule) for rule in RULES),
        ):
            row: dict[str, Any] = {"data": data, "arm": arm, "rule": rule}
            for mode in MODES:
                stages = results[data, rule, mode]["arms"][arm]
                row[mode] = {
                    metric: statistics.mean(stage["test"][metric] for stage in stages)
                    for metric in ("auc", "acc")
                }
                if arm == "inmerge":
                    row["merged"] = statistics.mean(sum(stage["merged"]) for stage in stages)
            found.append(row)
    return found


def markdown(stored: dict[str, Any]) -> str:
    """The stored rows as a table, and where they were measured."""
    lines = []
    for row in stored["rows"]:
        arm = f"inmerge, {_LABELS[row['rule']]}" if row["arm"] == "inmerge" else row["arm"]
        merged = f"{row['merged']:,.0f}" if "merged" in row else ""
        cells = (f"{row[mode]['auc']:.3f}, {row[mode]['acc']:.3f}" for mode in MODES)
        lines.append((DATA[row["data"]], arm, merged, *cells))
    columns = ("data", "arm", "merged per seed", *(f"AUC, ACC: `{mode}`" for mode in MODES))
    table = markdown_rows(columns, lines, "llrll")
    return f"{table}\n\nTrained on {measured_on([stored['machine']])}.\n"


def main(arguments: list[str] | None = None) -> int:
    """Trains what is missing and stores the rows."""
    config = tyro.cli(
        BatchStatisticsConfig,
        prog="python -m experiments.benchmarks.batch_statistics",
        args=arguments,
    )
    results = {
        (data, rule, mode): train(config, data, rule, mode)
        for data in DATA
        for rule in RULES
        for mode in MODES
    }
    stored = {"training": TRAINING, "rules": RULES, "rows": rows(results), "machine": machine()}
    write_json(config.output, stored)
    print(markdown(stored))
    return 0


if __name__ == "__main__":
    sys.exit(main())
