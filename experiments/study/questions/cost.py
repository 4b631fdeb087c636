"""What merging costs in time, memory and compilation."""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from scipy import stats

from experiments.study.archive import RESULTS, Archive
from experiments.study.questions.question import Found, Overview, Question
from experiments.study.render import dot_plot, markdown
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_json
from inmerge_jax.models import model_names
from inmerge_jax.reporting.plots import Plot
from inmerge_jax.training.environment import environment

ARMS = ("backbone", "finetune", "inmerge")
MODELS = ("vgg16", "vgg19", "resnet18", "resnet50", "densenet121")


@dataclass(frozen=True)
class CostConfig:
    """Measures time, memory and compilation of the three arms on the phantom at 28 px.

    Every selected kernel merges with its most similar one, the most expensive case; the cache of
    compiled programs is off. Memory and compilation are measured in fresh processes, one per arm;
    times in one process in which the arms take turns. Each network is stored when it is finished,
    and not measured again under the same options.

    Attributes:
      models: The networks to measure.
      width: Factor on their channels.
      batch_size: Images of an update.
      updates: Updates in each process of one arm.
      rounds: Processes of each arm.
      limit: Seconds for which updates are timed, in 16 turns or more.
      overwrite: Measure again what is stored.
      results: Folder of cost.json.
    """

    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = MODELS
    width: float = 0.5
    batch_size: int = 64
    updates: int = 16
    rounds: int = 3
    limit: int = 90
    overwrite: bool = False
    results: Path = RESULTS

    @property
    def options(self) -> dict[str, Any]:
        """The options that decide a network's memory and compilation."""
        return {name: getattr(self, name) for name in ("width", "batch_size", "updates", "rounds")}


def run(config: CostConfig, model: str, arms: Sequence[str], count: int) -> dict[str, Any]:
    """The output of one process of `cost_step`."""
    words = (model, ",".join(arms), config.width, config.batch_size, count)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.study.cost_step", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(done.args)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(config: CostConfig, model: str) -> dict[str, Any]:
    """Memory and compilation of one network's arms, each measured in separate processes."""
    started, around = time.monotonic(), environment()
    arms: dict[str, list[Any]] = {arm: [] for arm in ARMS}
    for number in range(config.rounds):
        for arm in ARMS if number % 2 == 0 else ARMS[::-1]:
            arms[arm].append(run(config, model, (arm,), config.updates))
        print(f"{model}: round {number + 1} of {config.rounds}", flush=True)
    return {
        **{arm: _figures(runs) for arm, runs in arms.items()},
        "environment": around,
        "seconds": time.monotonic() - started,
    }


def measure_time(config: CostConfig, model: str) -> dict[str, Any]:
    """Seconds per update of one network's arms, which take turns in one process."""
    started, around = time.monotonic(), environment()
    found = run(config, model, ARMS, config.limit)
    print(f"{model}: {len(found['updates'][ARMS[0]])} turns", flush=True)
    around = {"environment": around, "seconds": time.monotonic() - started}
    return {"limit": config.limit, **found, **around}


def _figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    one = statistics.median(seconds for run in runs for seconds in run["updates"])
    return {
        "compile": statistics.median(run["first"] - one for run in runs),
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
        "merged": runs[0]["merged"],
    }


def ratio(row: Mapping[str, Any], arm: str) -> tuple[float, float, float]:
    """An arm's time over finetune's, the median over turns with its 95 % interval.

    The interval is between two of the turns' own ratios, those that the binomial distribution
    gives; it supposes nothing of how the times are distributed.
    """
    updates = row["time"]["updates"]
    found = np.divide(updates[arm], updates["finetune"])
    interval = stats.quantile_test(found, p=0.5).confidence_interval(0.95)
    return float(np.median(found)), float(interval.low), float(interval.high)


def read(results: Path = RESULTS) -> dict[str, Any]:
    """What is stored: "config", and "models", a row for each network."""
    path = results / "cost.json"
    return json.loads(path.read_bytes()) if path.exists() else {"config": {}, "models": {}}


def analyse(archive: Archive) -> Found:
    """Medians and ratios of every network that is measured completely."""
    stored = read()
    rows = {name: row for name, row in stored["models"].items() if "time" in row}
    found: dict[str, Any] = {"config": stored["config"], "models": {}}
    for name, row in rows.items():
        ratios = {arm: ratio(row, arm) for arm in ("backbone", "inmerge")}
        memory, compiled = (
            {arm: row[arm][what] / unit for arm in ("finetune", "inmerge")}
            for what, unit in (("peak_bytes", 2**20), ("compile", 1))
        )
        found["models"][name] = {
            "seconds": {arm: float(np.median(row["time"]["updates"][arm])) for arm in ARMS},
            "turns": len(row["time"]["updates"]["finetune"]),
            **{
                arm: dict(zip(("mean", "low", "high"), x, strict=True)) for arm, x in ratios.items()
            },
            "memory": memory,
            "compile": compiled,
            "more memory": memory["inmerge"] - memory["finetune"],
            "more compilation": compiled["inmerge"] - compiled["finetune"],
        }
    for name, of in (
        ("ratio", lambda row: row["inmerge"]["mean"]),
        ("more memory", lambda row: row["more memory"]),
        ("more compilation", lambda row: row["more compilation"]),
        ("turns", lambda row: row["turns"]),
    ):
        values = [of(row) for row in found["models"].values()]
        found[f"range of {name}"] = [min(values), max(values)]
    parts = [one for row in rows.values() for one in (row, row["time"])]
    around = [one["environment"] for one in parts]
    found["hours"] = sum(one["seconds"] for one in parts) / 3600
    found["cores"] = sorted({one["cpus"] for one in around})
    return found | {"dates": sorted(one["started"][:10] for one in around)}


def table(found: Found) -> str:
    """A row for each network."""
    rows = [
        (
            name,
            *(f"{row['seconds'][arm]:.2f}" for arm in ("finetune", "inmerge")),
            "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**row["inmerge"]),
            " / ".join(f"{row['memory'][arm]:,.0f}" for arm in ("finetune", "inmerge")),
            " / ".join(f"{row['compile'][arm]:.0f}" for arm in ("finetune", "inmerge")),
        )
        for name, row in found["models"].items()
    ]
    columns = (
        *("Network", "Fine-tuning, s per update", "Merging", "Ratio [95 % interval]"),
        *("Peak memory, MiB, without / with", "Compilation, s, without / with"),
    )
    origin = (
        f"*{found['hours']:.1f} h of measurements on {' or '.join(map(str, found['cores']))} CPU "
        f"cores, {' to '.join(dict.fromkeys((found['dates'][0], found['dates'][-1])))}.*"
    )
    return f"{markdown(columns, rows)}\n{origin}\n"


def figure(found: Found) -> Plot:
    """Time per update over fine-tuning's, of merging and of the backbone's equal program."""
    series = {
        name: {model: row[arm] for model, row in found["models"].items()}
        for name, arm in (("merging", "inmerge"), ("backbone (same program)", "backbone"))
    }
    return dot_plot("Time per update over fine-tuning's", "ratio", series, zero=1.0)


def overview(found: Found) -> Overview:
    """The range of the ratios."""
    low, high = found["range of ratio"]
    effect = f"time per update: {low:.3f} to {high:.3f} times fine-tuning's"
    return Overview(
        effect, f"{len(found['models'])} networks", "descriptive: costs up to a few percent"
    )


QUESTION = Question(
    name="cost",
    title="What does merging cost?",
    hypothesis="Merging adds time, memory and compilation to training.",
    trials=(),
    analyse=analyse,
    table=table,
    figure=figure,
    overview=overview,
)


def main(arguments: list[str] | None = None) -> int:
    """Measures what is not stored yet, stores and prints it; returns 0.

    Raises:
      UsageError: an unknown network.
    """
    config = tyro.cli(CostConfig, prog="python -m experiments.study cost", args=arguments)
    for model in config.models:
        if model not in (known := model_names("image")):
            raise UsageError(f"--models {model}: unknown; choose from {', '.join(known)}")
    stored = read(config.results)
    if stored["config"] != config.options:
        stored = {"config": config.options, "models": {}}
    for model in config.models:
        row = {} if config.overwrite else dict(stored["models"].get(model, {}))
        if "compile" not in row.get("finetune", {}):
            row |= measure(config, model)
        if row.get("time", {}).get("limit") != config.limit:
            row["time"] = measure_time(config, model)
        stored["models"][model] = row
        write_json(config.results / "cost.json", stored)
    for model in config.models:
        row = stored["models"][model]
        print(
            "{}: {:.3f} [{:.3f}, {:.3f}] times fine-tuning's".format(model, *ratio(row, "inmerge"))
        )
    return 0
