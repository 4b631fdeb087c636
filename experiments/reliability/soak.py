"""Trains for 2,000 steps, and holds memory, compilations, threads and open files to no growth.

One merging stage of the library's own loop, on the phantom in memory or on ChestX-ray14 from
shards by worker processes, with an evaluation and a checkpoint every 100 steps; what the process
and its workers hold is read at the end of each evaluation.
"""

import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.monitoring
import tyro

from experiments.benchmarks.startup import PROGRAM
from experiments.benchmarks.timing import machine, measured_on
from inmerge_jax import MergeRule, deep_kernels
from inmerge_jax.data import Dataset, Split, make_phantom
from inmerge_jax.data.chestxray14.records import load_chestxray14
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_json
from inmerge_jax.models import create_model
from inmerge_jax.progress import Progress
from inmerge_jax.training.environment import configure_malloc
from inmerge_jax.training.init import conv_kernels, init_variables
from inmerge_jax.training.parallel import DATA_AXIS
from inmerge_jax.training.recipes import RECIPES
from inmerge_jax.training.train import StageConfig, TrainContext, train_stage
from inmerge_jax.training.train_step import make_eval_step, make_optimizer, make_train_step

WARM_UP = 5
"""Evaluations until everything has happened, and the allocator and the pools have settled."""
GROWTH = 0.05
"""How far resident memory may go above what it was at the warm-up's end, and below."""
COUNTS = {
    "programs": "programs compiled",
    "threads": "threads",
    "files": "open files",
    "processes": "processes started",
}
MEMORY = {"resident_mb": "resident memory", "workers_mb": "workers' memory"}
_POOL = "ts_pool_worker"
POOL_LIMIT = 2 * max(4, os.cpu_count() or 1)
"""TensorStore starts threads when it needs them, up to max(4, cores) for each of its two pools."""


@dataclasses.dataclass(frozen=True)
class SoakConfig:
    """Trains a small network and watches the process.

    Attributes:
      steps: Updates in all.
      every: Updates between two evaluations.
      batch_size: Images of an update.
      model: The network.
      skip: Its convolutions that do not merge.
      width: Factor on the network's channels.
      size: Height and width of the images.
      data_dir: Output folder of `inmerge data build`, whose first
        steps-between-evaluations x batch-size training images are read from the shards; without it
        the images are the phantom's, in memory.
      workers: Processes that read these images.
      output: The JSON file to write.
    """

    steps: int = 2000
    every: int = 100
    batch_size: int = 16
    model: str = "vgg16_bn"
    skip: int = 8
    width: float = 0.1
    size: int = 16
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    workers: int = 0
    output: Path = Path("experiments/results/soak.json")


class Watch(Progress):
    """A progress line that also notes what the process holds whenever an epoch has ended."""

    def __init__(self, images: int) -> None:
        super().__init__(images)
        self.rows: list[dict[str, Any]] = []
        self._programs = 0
        self._began = time.monotonic()
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, duration: float, **_: Any) -> None:
        self._programs += event == PROGRAM

    def milestone(self, details: str | None = None, result: str = "") -> None:
        """As the line's own."""
        super().milestone(details, result)
        tasks = [_name(task) for task in Path("/proc/self/task").iterdir()]
        workers = _children()
        self.rows.append(
            {
                "seconds": round(time.monotonic() - self._began, 1),
                "resident_mb": _resident_mb("self"),
                "workers_mb": round(sum(map(_resident_mb, workers)), 1),
                "programs": self._programs,
                "threads": len(tasks) - tasks.count(_POOL),
                "tensorstore_threads": tasks.count(_POOL),
                "files": len(os.listdir("/proc/self/fd")),
                "processes": len(workers),
            }
        )


def _name(task: Path) -> str:
    try:
        return (task / "comm").read_text().strip()
    except OSError:  # It ended while the others were read.
        return ""


def _resident_mb(process: int | str) -> float:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):  # As above.
        return 0.0
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def _children() -> list[int]:
    """Processes of this one's, those that have ended and were not waited for too."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may itself have spaces and brackets.
            parent = path.read_text().rpartition(")")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):  # As above.
            continue
        if int(parent) == os.getpid():
            found.append(int(path.parent.name))
    return found


def make_data(config: SoakConfig) -> Dataset:
    """The phantom, or ChestX-ray14's first images, of which an epoch has `every` batches.

    Raises:
      UsageError: there are too few images, or workers for images that are in memory.
    """
    images = config.every * config.batch_size
    if config.data_dir is None:
        if config.workers:
            raise UsageError(
                f"--workers {config.workers}: the phantom is all in memory; add --data-dir"
            )
        return make_phantom(size=config.size, train=images, val=128, test=128)
    data = load_chestxray14(config.data_dir, size=config.size)
    if len(data.train) < images:
        raise UsageError(
            f"--every {config.every} times --batch-size {config.batch_size}: {config.data_dir} has "
            f"{len(data.train)} training images; choose less"
        )
    train: Any = data.train.images
    fewer = dataclasses.replace(train, names=train.names[:images])
    return dataclasses.replace(data, train=Split(fewer, data.train.labels[:images]))


def soak(config: SoakConfig, folder: Path) -> list[dict[str, Any]]:
    """Trains in `folder`; one row per evaluation, whose "steps" are the updates before it.

    Raises:
      UsageError: too few evaluations to judge, or what `make_data` raises.
    """
    for name in ("steps", "every", "batch_size", "size"):
        if (value := getattr(config, name)) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: choose 1 or more")
    epochs = config.steps // config.every
    if epochs <= WARM_UP:
        raise UsageError(
            f"--steps {config.steps} with --every {config.every}: {epochs} evaluations, of which "
            f"the first {WARM_UP} are the warm-up; choose more steps"
        )
    recipe = dataclasses.replace(
        RECIPES["released"],
        batch_size=config.batch_size,
        learning_rate=0.01,
        merging_epochs=epochs,
    )
    data = make_data(config)
    devices = tuple(jax.local_devices()[:1])
    model = create_model(config.model, data.num_classes, width=config.width, axis_name=DATA_AXIS)
    shape = (config.size, config.size, len(recipe.mean))
    params, batch_stats = init_variables(model, shape, seed=0)
    kernels = conv_kernels(model, shape)
    if not 0 <= config.skip < len(kernels):
        raise UsageError(
            f"--skip {config.skip}: {config.model} has {len(kernels)} convolutions; choose 0 to "
            f"{len(kernels) - 1}"
        )
    deep, optimizer = deep_kernels(kernels, skip=config.skip), make_optimizer(recipe)
    common = {"multi_label": data.multi_label, "devices": devices}
    rule = MergeRule(threshold=0.1)
    setup = TrainContext(
        dataset=data,
        recipe=recipe,
        devices=devices,
        optimizer=optimizer,
        eval_step=make_eval_step(model, recipe, **common),
        kernels=kernels,
        workers=config.workers,
    )
    stage = StageConfig(
        arm="inmerge",
        seed=0,
        number=1,
        folder=folder,
        epochs=epochs,
        learning_rate=recipe.learning_rate,
        train_step=make_train_step(model, optimizer, recipe, kernels=deep, rule=rule, **common),
        deep=deep,
    )
    with Watch(config.batch_size * config.steps) as watch:
        train_stage(setup, stage, params, batch_stats, watch)
    steps = range(config.every, config.steps + 1, config.every)
    return [{"steps": step, **row} for step, row in zip(steps, watch.rows, strict=True)]


def judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the figures after the warm-up are beside those within it, and whether that is allowed.

    Returns:
      "memory": of the process and of its workers, the lowest and highest share by which resident
        memory differs from that at the warm-up's end (workers may have less: they end with their
        last batch); "grown": how far the counts rise above their highest within it, TensorStore's
        threads aside, which have a limit; "passed".
    """
    early, later = rows[:WARM_UP], rows[WARM_UP:]
    memory = {}
    for name in MEMORY:
        if base := early[-1][name]:
            changes = [row[name] / base - 1 for row in later]
            memory[name] = [round(min(changes), 4), round(max(changes), 4)]
    grown = {name: max(r[name] for r in later) - max(r[name] for r in early) for name in COUNTS}
    passed = (
        all(high <= GROWTH for _, high in memory.values())
        and memory["resident_mb"][0] >= -GROWTH
        and max(grown.values()) <= 0
        and max(row["tensorstore_threads"] for row in rows) <= POOL_LIMIT
    )
    return {"memory": memory, "grown": grown, "passed": passed}


def markdown(stored: dict[str, Any]) -> str:
    """Some of the stored rows, and the verdict."""
    rows, verdict = stored["rows"], stored["verdict"]
    options = stored["options"]
    memory = {name: MEMORY[name] for name in verdict["memory"]}
    counts = {name: label for name, label in COUNTS.items() if any(row[name] for row in rows)}
    names = {**counts, "tensorstore_threads": "TensorStore's threads"}
    source = "the phantom, in memory"
    if options["data_dir"] is not None:
        source = f"ChestX-ray14's images, from shards by {options['workers']} worker processes"
    heads = ("after step", *memory.values(), *names.values())
    lines = [f"On {source}, {options['batch_size']} a batch:\n", f"| {' | '.join(heads)} |"]
    lines.append("| ---: " * len(heads) + "|")
    for index, row in enumerate(rows, 1):
        if index <= 2 or index % 5 == 0:
            held = " | ".join(f"{row[name]:,.0f} MB" for name in memory)
            lines.append(
                f"| {row['steps']:,} | {held} | "
                + " | ".join(f"{row[name]:,}" for name in names)
                + " |"
            )
    stayed = ", ".join(
        f"{memory[name]} within {low:+.1%} and {high:+.1%} of what it was there"
        for name, (low, high) in verdict["memory"].items()
    )
    grown = ", ".join(f"{label} {verdict['grown'][name]:+d}" for name, label in counts.items())
    return (
        "\n".join(lines) + f"\n\nAfter step {rows[WARM_UP - 1]['steps']:,}, {stayed}; the highest "
        f"counts, beside the highest up to there: {grown}. "
        f"{'Passed' if verdict['passed'] else '**Not passed**'}.\n\n"
        f"Measured on {measured_on([stored['environment']])}.\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the soak; 0 where nothing grew, 1 where something did, 2 on bad input."""
    config = tyro.cli(SoakConfig, prog="python -m experiments.reliability.soak", args=arguments)
    configure_malloc()
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = soak(config, Path(folder))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen = {name: value for name, value in vars(config).items() if name != "output"}
    chosen["data_dir"] = config.data_dir and str(config.data_dir)
    verdict = judge(rows)
    stored = {"options": chosen, "verdict": verdict, "rows": rows, "environment": machine()}
    write_json(config.output, stored)
    print(markdown(stored), end="")
    return 0 if verdict["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
