"""Question 7: what merging costs in time, memory and compilation."""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from experiments.study.command import store_answer
from experiments.study.question import RESULTS, Question
from experiments.study.statistics import interval_over_trainings
from inmerge_jax.models import model_names
from inmerge_jax.reporting.plots import COLOURS, Plot, make_plot
from inmerge_jax.reporting.tables import Table
from inmerge_jax.training.runfolder import environment

ARMS = ("backbone", "finetune", "inmerge")
MODELS = ("vgg16", "vgg19", "resnet18", "resnet50", "densenet121")


@dataclass(frozen=True)
class CostConfig:
    """Measures time, memory and compilation of the three arms on the phantom at 28 px.

    Every selected kernel merges with its most similar one, the dearest case; nothing is read from
    the cache of compiled programs. Memory and compilation are those of fresh processes, one for
    each arm, in turns forwards and backwards; times are of all arms in one process, in turns too.
    Each network is stored as it is done, and not measured again under the same options.

    Attributes:
      models: The networks; of the others, what is stored stays if the options below are the same.
      width: Factor on their channels.
      batch_size: Images of an update; an epoch has four.
      epochs: Trained in each process of one arm, after the one that compiles.
      rounds: Processes for each arm.
      turns: Epochs of each arm that are timed, after one that is not.
      overwrite: Measure again what is stored.
    """

    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = MODELS
    width: float = 0.5
    batch_size: int = 64
    epochs: int = 3
    rounds: int = 3
    turns: int = 6
    overwrite: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What decides a network's memory and compilation."""
        return {name: getattr(self, name) for name in ("width", "batch_size", "epochs", "rounds")}


def run(config: CostConfig, model: str, arms: Sequence[str], count: int) -> dict[str, Any]:
    """One process; see `cost_step.main`."""
    words = (model, ",".join(arms), config.width, config.batch_size, count)
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
    """Memory and compilation of one network's arms, each in processes of its own."""
    started, around = time.monotonic(), environment()
    arms: dict[str, list[Any]] = {arm: [] for arm in ARMS}
    for number in range(config.rounds):
        for arm in ARMS if number % 2 == 0 else ARMS[::-1]:
            arms[arm].append(run(config, model, (arm,), config.epochs))
        print(f"{model}: round {number + 1} of {config.rounds}", flush=True)
    return {
        **{arm: _figures(runs) for arm, runs in arms.items()},
        "environment": around,
        "seconds": time.monotonic() - started,
    }


def measure_time(config: CostConfig, model: str) -> dict[str, Any]:
    """Seconds an epoch of one network's arms, in turns in one process."""
    started, around = time.monotonic(), environment()
    found = run(config, model, ARMS, config.turns)
    print(f"{model}: {config.turns} turns", flush=True)
    around = {"environment": around, "seconds": time.monotonic() - started}
    return {"turns": config.turns, **found, **around}


def stored_networks(config: CostConfig, results: Path) -> dict[str, Any]:
    """What is stored of each network, or of a part of it, measured under the same options."""
    path = QUESTION.path(results)
    if not path.exists():
        return {}
    analysis = json.loads(path.read_bytes())["analysis"]
    if analysis["config"] != config.options:
        return {}
    return {**analysis["models"], **analysis.get("in part", {})}


def store(config: CostConfig, found: dict[str, Any], results: Path) -> None:
    """Writes the answer of the networks measured so far, in the order of `MODELS`; prints it.

    What there is of a network whose times are missing is kept beside the answer.
    """
    part = {name: row for name, row in found.items() if "time" not in row}
    found = {name: row for name, row in found.items() if "time" in row}
    order = [name for name in (*MODELS, *sorted(set(found) - set(MODELS))) if name in found]
    processes = len(ARMS) * config.rounds + 1
    planned = len(set(MODELS) | set(found))
    store_answer(
        QUESTION,
        results,
        arguments=_arguments(config, set(found) - set(MODELS)),
        around=[one["environment"] for row in found.values() for one in (row, row["time"])],
        planned=processes * planned,
        finished=processes * len(found),
        seconds=sum(one["seconds"] for row in found.values() for one in (row, row["time"])),
        analysis={
            "config": config.options,
            "models": {name: found[name] for name in order},
            **({"in part": part} if part else {}),
        },
    )


def _arguments(config: CostConfig, more: Set[str]) -> tuple[str, ...]:
    """What was not the default, and the networks beside `MODELS`."""
    found = [
        (f"--{name.replace('_', '-')}", str(value))
        for name, value in (*config.options.items(), ("turns", config.turns))
        if value != getattr(CostConfig, name)
    ]
    if more:
        found.append(("--models", *MODELS, *sorted(more)))
    return tuple(word for words in found for word in words)


def _figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    one = statistics.median(seconds for run in runs for seconds in run["updates"])
    return {
        "compile": statistics.median(run["first"] - one for run in runs),
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
        "merged": runs[0]["merged"],
    }


def ratio(row: Mapping[str, Any], arm: str) -> tuple[float, float, float]:
    """An arm's time over finetune's, the mean over turns and its 95 % interval (Student's t)."""
    epochs = row["time"]["epochs"]
    logs = np.log(epochs[arm]) - np.log(epochs["finetune"])
    mean, low, high = np.exp([logs.mean(), *interval_over_trainings(logs.tolist())])
    return float(mean), float(low), float(high)


def came_out(found: dict[str, Any]) -> str:
    """Ratio of the step times, memory and compilation."""
    parts = []
    for model, row in found["models"].items():
        merge, plain, same = row["inmerge"], row["finetune"], row["backbone"]
        memory = (merge["peak_bytes"] - plain["peak_bytes"]) / 2**20
        more = merge["compile"] - plain["compile"]
        noise = abs(same["peak_bytes"] - plain["peak_bytes"]) / 2**20
        times, no_effect = (
            "{:.3f} [{:.3f}, {:.3f}]".format(*ratio(row, arm)) for arm in ("inmerge", "backbone")
        )
        parts.append(
            f"{model} {times} times as long an epoch (noise {no_effect}), {memory:+.0f} MiB (noise "
            f"{noise:.0f}), {more:+.1f} s to compile (noise "
            f"{abs(same['compile'] - plain['compile']):.1f})"
        )
    return (
        "Merging against finetune (noise: what backbone differs from finetune by, of the same "
        f"program): {'; '.join(parts)}. A trained network is the same at inference."
    )


def sure(found: dict[str, Any]) -> str:
    """How it was measured."""
    config = found["config"]
    return (
        "Ratios of times: the mean over epochs that the arms trained in turns in one process, with "
        "its 95% interval (Student's t), so that the machine's drift does not count. Memory, "
        "compiling included, and compilation: medians of processes for each arm "
        f"({config['rounds']}). Width {config['width']:g}, batch {config['batch_size']}, 28 px, "
        "every selected kernel merging. backbone and finetune run the same program, so what "
        "differs between them is noise."
    )


def tables(found: dict[str, Any]) -> list[Table]:
    """A row for each network and arm."""
    rows = []
    for model, row in found["models"].items():
        for arm in ARMS:
            one, epochs = row[arm], row["time"]["epochs"][arm]
            middle = statistics.median(epochs)
            epoch = f"{middle:.2f} [{min(epochs):.2f}, {max(epochs):.2f}]"
            times = "" if arm == "finetune" else "{:.3f} [{:.3f}, {:.3f}]".format(*ratio(row, arm))
            memory = f"{one['peak_bytes'] / 2**20:,.0f}"
            rows.append((f"{model}: {arm}", epoch, times, memory, f"{one['compile']:.1f}"))
    columns = (
        *("network: arm", "seconds an epoch [lowest, highest]", "of finetune [95% interval]"),
        *("peak memory, MiB", "compile, s"),
    )
    kinds = tuple("total" if row[0].endswith("backbone") else "arm" for row in rows)
    return [Table("What the arms cost (an epoch has 4 updates)", columns, tuple(rows), kinds)]


def figures(found: dict[str, Any]) -> list[Plot]:
    """Seconds an epoch of the arms."""

    def draw(axes: Any) -> None:
        for index, arm in enumerate(ARMS):
            rows = [row["time"]["epochs"][arm] for row in found["models"].values()]
            place = [x + 0.27 * (index - 1) for x in range(len(rows))]
            values = [statistics.median(epochs) for epochs in rows]
            low = [value - min(epochs) for value, epochs in zip(values, rows, strict=True)]
            high = [max(epochs) - value for value, epochs in zip(values, rows, strict=True)]
            axes.bar(place, values, 0.25, yerr=[low, high], color=COLOURS[arm], label=arm,
                     error_kw={"lw": 1, "ecolor": "#767676"})  # fmt: skip
        axes.set_xticks(range(len(found["models"])), list(found["models"]), fontsize=8)
        axes.set_title("Seconds an epoch")
        axes.set_ylabel("seconds for 4 updates")
        axes.figure.legend(loc="outside lower center", ncols=3)

    caption = (
        "Bars: medians; lines: fastest and slowest epoch. backbone and finetune are the same "
        "program, so what differs between them is noise."
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
        row = {} if config.overwrite else dict(found.get(model, {}))
        if "compile" not in row.get("finetune", {}):
            row |= measure(config, model)
        if row.get("time", {}).get("turns") != config.turns:
            row["time"] = measure_time(config, model)
        if row != found.get(model):
            found[model] = row
            store(config, found, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
