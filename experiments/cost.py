"""Question 7: what merging costs in time, memory and compilation."""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.study.command import store_answer
from experiments.study.question import RESULTS, Question
from inmerge_jax.models import model_names
from inmerge_jax.reporting.plots import COLOURS, Plot, make_plot
from inmerge_jax.reporting.tables import Table
from inmerge_jax.training.runfolder import environment

ARMS = ("backbone", "finetune", "inmerge")
MODELS = ("vgg16", "vgg19", "resnet18", "resnet50", "densenet121")


@dataclass(frozen=True)
class CostConfig:
    """Times the three arms of some networks on the phantom at 28 px, each in a fresh process.

    Every selected kernel merges with its most similar one, the dearest case; nothing is read from
    the cache of compiled programs. The arms take turns, forwards and backwards. Each network is
    stored as it is done, and not measured again under the same options.

    Attributes:
      models: The networks; of the others, what is stored stays if the options below are the same.
      width: Factor on their channels.
      batch_size: Images of an update; an epoch has four.
      epochs: Timed in each process, after one that is not.
      rounds: Processes for each arm.
      overwrite: Measure again what is stored.
    """

    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = MODELS
    width: float = 0.5
    batch_size: int = 64
    epochs: int = 3
    rounds: int = 3
    overwrite: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What decides the figures of a network."""
        return {name: getattr(self, name) for name in ("width", "batch_size", "epochs", "rounds")}


def run_arm(config: CostConfig, model: str, arm: str) -> dict[str, Any]:
    """One process; see `cost_step.main`."""
    words = (model, arm, config.width, config.batch_size, config.epochs)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cost_step", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(done.args)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(config: CostConfig, model: str) -> dict[str, Any]:
    """All rounds of one network."""
    started, around = time.monotonic(), environment()
    arms: dict[str, list[Any]] = {arm: [] for arm in ARMS}
    for number in range(config.rounds):
        for arm in ARMS if number % 2 == 0 else ARMS[::-1]:
            arms[arm].append(run_arm(config, model, arm))
        print(f"{model}: round {number + 1} of {config.rounds}", flush=True)
    ratios = [
        statistics.median(merged["epochs"]) / statistics.median(plain["epochs"])
        for merged, plain in zip(arms["inmerge"], arms["finetune"], strict=True)
    ]
    ratio = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return {
        **{arm: _figures(runs) for arm, runs in arms.items()},
        "ratio": ratio,
        "environment": around,
        "seconds": time.monotonic() - started,
    }


def stored_networks(config: CostConfig, results: Path) -> dict[str, Any]:
    """What is stored of each network, measured under the same options."""
    path = QUESTION.path(results)
    if not path.exists():
        return {}
    analysis = json.loads(path.read_bytes())["analysis"]
    return analysis["models"] if analysis["config"] == config.options else {}


def store(config: CostConfig, found: dict[str, Any], results: Path) -> None:
    """Writes the answer of the networks measured so far, in the order of `MODELS`; prints it."""
    order = [name for name in (*MODELS, *sorted(set(found) - set(MODELS))) if name in found]
    processes = len(ARMS) * config.rounds
    planned = len(set(MODELS) | set(found))
    store_answer(
        QUESTION,
        results,
        arguments=_arguments(config, set(found) - set(MODELS)),
        around=[row["environment"] for row in found.values()],
        planned=processes * planned,
        finished=processes * len(found),
        seconds=sum(row["seconds"] for row in found.values()),
        analysis={"config": config.options, "models": {name: found[name] for name in order}},
    )


def _arguments(config: CostConfig, more: Set[str]) -> tuple[str, ...]:
    """What was not the default, and the networks beside `MODELS`."""
    found = [
        (f"--{name.replace('_', '-')}", str(value))
        for name, value in config.options.items()
        if value != getattr(CostConfig, name)
    ]
    if more:
        found.append(("--models", *MODELS, *sorted(more)))
    return tuple(word for words in found for word in words)


def _figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    epochs = [seconds for run in runs for seconds in run["epochs"]]
    one = statistics.median(epochs) / runs[0]["steps"]
    return {
        "epoch": statistics.median(epochs),
        "epoch_low": min(epochs),
        "epoch_high": max(epochs),
        "compile": statistics.median(run["first"] - one for run in runs),
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
        "merged": runs[0]["merged"],
    }


def came_out(found: dict[str, Any]) -> str:
    """Ratio of the step times, memory and compilation."""
    parts = []
    for model, row in found["models"].items():
        ratio, merge, plain = row["ratio"], row["inmerge"], row["finetune"]
        memory = (merge["peak_bytes"] - plain["peak_bytes"]) / 2**20
        more = merge["compile"] - plain["compile"]
        same = row["backbone"]
        noise = abs(same["peak_bytes"] - plain["peak_bytes"]) / 2**20
        parts.append(
            f"{model} {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] times as "
            f"long an epoch, {memory:+.0f} MiB (noise {noise:.0f}), {more:+.1f} s to compile "
            f"(noise {abs(same['compile'] - plain['compile']):.1f})"
        )
    return (
        "Merging against finetune (noise: what backbone differs from finetune by, of the same "
        f"program): {'; '.join(parts)}. A trained network is the same at inference."
    )


def sure(found: dict[str, Any]) -> str:
    """How it was measured."""
    config = found["config"]
    return (
        f"Brackets: lowest and highest of {_count(config['rounds'], 'pair')} of processes, whose "
        "own spread is the precision; the machine's speed drifts. Width "
        f"{config['width']:g}, batch {config['batch_size']}, 28 px, {config['epochs']} epochs "
        "timed in each process, every selected kernel merging."
        " backbone and finetune run the same program, so what differs between them is noise. Peak "
        "memory is the process's, compiling included."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def tables(found: dict[str, Any]) -> list[Table]:
    """A row for each network and arm."""
    rows = []
    for model, row in found["models"].items():
        for arm in ARMS:
            one = row[arm]
            ratio = f"{row['ratio']['median']:.3f}" if arm == "inmerge" else ""
            epoch = f"{one['epoch']:.2f} [{one['epoch_low']:.2f}, {one['epoch_high']:.2f}]"
            memory = f"{one['peak_bytes'] / 2**20:,.0f}"
            rows.append((f"{model}: {arm}", epoch, ratio, memory, f"{one['compile']:.1f}"))
    columns = (
        *("network: arm", "seconds an epoch [lowest, highest]", "of finetune"),
        *("peak memory, MiB", "compile, s"),
    )
    kinds = tuple("total" if row[0].endswith("backbone") else "arm" for row in rows)
    return [Table("What the arms cost (an epoch has 4 updates)", columns, tuple(rows), kinds)]


def figures(found: dict[str, Any]) -> list[Plot]:
    """Seconds an epoch of the arms."""

    def draw(axes: Any) -> None:
        for index, arm in enumerate(ARMS):
            rows = [row[arm] for row in found["models"].values()]
            place = [x + 0.27 * (index - 1) for x in range(len(rows))]
            values = [row["epoch"] for row in rows]
            low = [row["epoch"] - row["epoch_low"] for row in rows]
            high = [row["epoch_high"] - row["epoch"] for row in rows]
            axes.bar(place, values, 0.25, yerr=[low, high], color=COLOURS[arm], label=arm,
                     error_kw={"lw": 1, "ecolor": "#767676"})  # fmt: skip
        axes.set_xticks(range(len(found["models"])), list(found["models"]), fontsize=8)
        axes.set_title("Seconds an epoch")
        axes.set_ylabel("seconds for 4 updates")
        axes.figure.legend(loc="outside lower center", ncols=3)

    caption = (
        "Bars: medians; lines: fastest and slowest epoch. backbone and finetune are the same "
        "program; where inmerge stands within their lines, merging costs less than can be measured."
    )
    return [make_plot(draw, caption, "Seconds an epoch, by network and arm")]


QUESTION = Question(
    name="cost",
    number=7,
    title="What does merging cost?",
    asked="How much time, memory and compilation does merging add to training, per network?",
    cells=(),
    analyse=None,
    came_out=came_out,
    sure=sure,
    tables=tables,
    figures=figures,
)


def main(arguments: list[str] | None = None, results: Path = RESULTS) -> int:
    """Measures, stores and prints; returns 0, or 2 on a name that no network has."""
    config = tyro.cli(CostConfig, prog="python -m experiments.cost", args=arguments)
    for model in config.models:
        if model not in model_names():
            known = ", ".join(model_names())
            print(f"error: --models {model}: no such network; there are {known}", file=sys.stderr)
            return 2
    found = stored_networks(config, results)
    for model in config.models:
        if config.overwrite or model not in found:
            found[model] = measure(config, model)
            store(config, found, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
