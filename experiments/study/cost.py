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
from scipy import stats

from experiments.study.command import store_answer
from experiments.study.question import RESULTS, Question
from inmerge_jax.models import model_names
from inmerge_jax.reporting.plots import COLOURS, Plot, make_plot
from inmerge_jax.reporting.tables import Table
from inmerge_jax.training.environment import environment

ARMS = ("backbone", "finetune", "inmerge")
QUARTILES = (0.25, 0.5, 0.75)
EPOCH = 10_000
"""Images of the epoch that a table's column is for."""
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
      batch_size: Images of an update.
      updates: Done in each process of one arm.
      rounds: Processes for each arm.
      limit: Seconds for which updates are timed, in 16 turns or more.
      overwrite: Measure again what is stored.
    """

    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = MODELS
    width: float = 0.5
    batch_size: int = 64
    updates: int = 16
    rounds: int = 3
    limit: int = 90
    overwrite: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What decides a network's memory and compilation."""
        return {name: getattr(self, name) for name in ("width", "batch_size", "updates", "rounds")}


def run(config: CostConfig, model: str, arms: Sequence[str], count: int) -> dict[str, Any]:
    """One process; see `cost_step.main`."""
    words = (model, ",".join(arms), config.width, config.batch_size, count)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.study.cost_step", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
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
            arms[arm].append(run(config, model, (arm,), config.updates))
        print(f"{model}: round {number + 1} of {config.rounds}", flush=True)
    return {
        **{arm: _figures(runs) for arm, runs in arms.items()},
        "environment": around,
        "seconds": time.monotonic() - started,
    }


def measure_time(config: CostConfig, model: str) -> dict[str, Any]:
    """Seconds an update of one network's arms, in turns in one process."""
    started, around = time.monotonic(), environment()
    found = run(config, model, ARMS, config.limit)
    print(f"{model}: {len(found['updates'][ARMS[0]])} turns", flush=True)
    around = {"environment": around, "seconds": time.monotonic() - started}
    return {"limit": config.limit, **found, **around}


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
        for name, value in (*config.options.items(), ("limit", config.limit))
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
    """An arm's time over finetune's, the median over turns with its 95 % interval.

    The interval is between two of the turns' own ratios, those that the binomial distribution
    gives; it supposes nothing of how the times are distributed.
    """
    updates = row["time"]["updates"]
    found = np.divide(updates[arm], updates["finetune"])
    interval = stats.quantile_test(found, p=0.5).confidence_interval(0.95)
    return float(np.median(found)), float(interval.low), float(interval.high)


def came_out(found: dict[str, Any]) -> str:
    """Ratio of the step times, memory and compilation."""
    rows = found["models"]
    if not rows:
        return "Nothing is measured yet."
    times = {model: ratio(row, "inmerge") for model, row in rows.items()}
    slower = [f"{m} {_between(times[m])}" for m, (_, low, _) in times.items() if low > 1]
    middles = [middle for middle, _, _ in times.values()]
    noise = [_between(ratio(row, "backbone")) for row in rows.values()]
    memory, compiled = (
        [(row[arm][what] - row["finetune"][what]) / unit for row in rows.values()]
        for arm, what, unit in (("inmerge", "peak_bytes", 2**20), ("inmerge", "compile", 1))
    )
    return (
        f"With merging an update takes {min(middles):.3f} to {max(middles):.3f} times as long as "
        f"finetune's, by network; longer by its 95% interval: {'; '.join(slower) or 'none'} "
        f"(backbone, the same program as finetune: {'; '.join(noise)}). Training takes "
        f"{min(memory):,.0f} to {max(memory):,.0f} MiB more memory and compiling "
        f"{min(compiled):.1f} to {max(compiled):.1f} s more. A trained network is the same at "
        "inference."
    )


def _between(found: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*found)


def sure(found: dict[str, Any]) -> str:
    """How it was measured."""
    config = found["config"]
    turns = [len(row["time"]["updates"][ARMS[0]]) for row in found["models"].values()]
    return (
        "Ratios of times: the median over updates that the arms did in turns in one process "
        f"({min(turns)} to {max(turns)} of each), so that the machine's drift does not count, with "
        "its 95% interval. Memory, compiling included, and compilation: medians of processes for "
        f"each arm ({config['rounds']}). Width {config['width']:g}, batch "
        f"{config['batch_size']}, 28 px, every selected kernel merging; {len(turns)} of the "
        f"{len(model_names())} networks here. backbone and finetune run "
        "the same program, so what differs between them is noise."
    )


def tables(found: dict[str, Any]) -> list[Table]:
    """A row for each network and arm."""
    rows = []
    for model, row in found["models"].items():
        for arm in ARMS:
            one = row[arm]
            low, middle, high = np.quantile(row["time"]["updates"][arm], QUARTILES)
            update = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
            times = "" if arm == "finetune" else _between(ratio(row, arm))
            epoch = middle * EPOCH / found["config"]["batch_size"]
            memory = f"{one['peak_bytes'] / 2**20:,.0f}"
            compiled = f"{one['compile']:.1f}"
            rows.append((f"{model}: {arm}", update, f"{epoch:,.0f}", times, memory, compiled))
    columns = (
        *("network: arm", "seconds an update [quartiles]", f"an epoch of {EPOCH:,} images"),
        *("of finetune [95% interval]", "peak memory, MiB", "compile, s"),
    )
    kinds = tuple("total" if row[0].endswith("backbone") else "arm" for row in rows)
    return [Table("What the arms cost", columns, tuple(rows), kinds)]


def figures(found: dict[str, Any]) -> list[Plot]:
    """Seconds an update of the arms."""

    def draw(axes: Any) -> None:
        for index, arm in enumerate(ARMS):
            rows = [row["time"]["updates"][arm] for row in found["models"].values()]
            place = [x + 0.27 * (index - 1) for x in range(len(rows))]
            low, middle, high = (np.array([np.quantile(r, q) for r in rows]) for q in QUARTILES)
            axes.bar(
                place,
                middle,
                0.25,
                yerr=[middle - low, high - middle],
                color=COLOURS[arm],
                label=arm,
                error_kw={"lw": 1, "ecolor": "#767676"},
            )
        axes.set_xticks(range(len(found["models"])), list(found["models"]), fontsize=8)
        axes.set_title("Seconds an update")
        axes.set_ylabel("seconds")
        axes.figure.legend(loc="outside lower center", ncols=3)

    caption = (
        "Bars: medians; lines: quartiles of the updates. backbone and finetune are the same "
        "program, so what differs between them is noise; what inmerge's bar has beyond theirs is "
        f"what merging costs: {_to_see(found)}."
    )
    return [make_plot(draw, caption, "Seconds an update, by network and arm")]


def _to_see(found: dict[str, Any]) -> str:
    """Which networks' intervals leave out no cost at all."""
    slower = [name for name, row in found["models"].items() if ratio(row, "inmerge")[1] > 1]
    return (
        f"more than none for {', '.join(slower)}, and for the others the interval of the ratio "
        "includes 1"
        if slower
        else "for every network the interval of the ratio includes 1"
    )


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
    config = tyro.cli(CostConfig, prog="python -m experiments.study.cost", args=arguments)
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
        if row.get("time", {}).get("limit") != config.limit:
            row["time"] = measure_time(config, model)
        if row != found.get(model):
            found[model] = row
            store(config, found, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
