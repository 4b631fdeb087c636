"""Kills training and a data-set build at seeded random moments, resumes, and compares every bit.

A moment is drawn uniformly; where a phase is named, such as an evaluation, the kill waits from then
on until the process is in it. What the process is doing is read off its Python stack just before.
Orbax writes in threads and long calls, during which Python tells no stack: a checkpoint's write
is seen by the folder that it fills, and the kill comes a random time later, while that is there.
The stored rows are kept: the same command runs those that are missing.
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.benchmarks.timing import machine, measured_on
from experiments.reliability.emulator import cloud_storage
from experiments.reliability.jobs import (
    LONGER,
    TRAINING,
    Job,
    building,
    training,
    write_radiographs,
)
from inmerge_jax.buckets import as_path, in_bucket
from inmerge_jax.errors import UsageError
from inmerge_jax.files import read_json_object, remove_tree, write_json
from inmerge_jax.reporting.tables import markdown_rows
from inmerge_jax.training.checkpointing import TEMPORARY

_ROOT = Path(__file__).parents[2]
STEP, EVALUATION, CHECKPOINT = "step", "evaluation", "checkpoint write"
REDUCING, SHARDS, VERIFYING = "reducing images", "writing shards", "verifying"
_AIMS = {
    "training": [None] * 4 + [STEP] * 4 + [EVALUATION] * 3 + [CHECKPOINT] * 4,
    "build": [None, None, REDUCING, SHARDS, VERIFYING],
}
ROWS = tuple((name, phase) for name, phases in _AIMS.items() for phase in phases)
"""What each kill is aimed at; None is whatever comes."""
BUCKET_ROWS = tuple(("bucket", phase) for phase in (None, STEP, EVALUATION, CHECKPOINT, CHECKPOINT))
"""The same of a training whose folder is in Cloud Storage."""

# The first of these whose functions are on the stack; the last is used if there is none.
_PHASES = {
    "compilation": {"compile_or_get_cached", "backend_compile_and_load"},
    CHECKPOINT: {"save_checkpoint", "prune"},
    EVALUATION: {"evaluate", "evaluate_merging", "compute_metrics"},
    "reading a checkpoint": {"restore_checkpoint", "newest"},
    "similarity of kernels": {"_similarity"},
    "scores and results": {"write_scores", "write_json", "append_metrics", "write_report"},
    "between epochs": {
        "run_on_primary",
        "replicate",
        "unreplicate",
        "new_state",
        "set_learning_rate",
    },
    STEP: {"train_stage"},
    "data and network": {"make_run_spec", "run_experiment"},
    VERIFYING: {"_verify"},
    SHARDS: {"_write_records"},
    REDUCING: {"reduce_parts"},
    "labels and lists": {"build"},
    "start or end": set(),
}
_STARTER = """
import os, runpy, signal, sys

stack = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)

def note(_, frame):
    lines = []
    while frame is not None:
        lines.append(frame.f_code.co_filename + "\\t" + frame.f_code.co_name)
        frame = frame.f_back
    os.write(stack, ("\\n".join(lines) + "\\n\\n").encode())

signal.signal(signal.SIGUSR1, note)
open(sys.argv[1] + ".ready", "w").close()
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
_UNFINISHED = f"*/*/checkpoints/[0-9]*{TEMPORARY}*"
"""Where in a run's folder a checkpoint is while it is written."""
_WRITE = 0.06
"""Seconds within which a kill comes once a checkpoint's write has begun."""
_PATIENCE = 0.1
"""Seconds that a process may take to tell its stack: Python does so between two calls of C code."""


@dataclass(frozen=True)
class Kill:
    """What a kill has met.

    Attributes:
      seconds: from the start of the process's own code to the kill.
      doing: the phase.
      innermost: the innermost function of this project on the main thread's stack.
      unfinished: files of the checkpoint that was being written; None where none was.
    """

    seconds: float
    doing: str
    innermost: str
    unfinished: int | None = None


def run(job: Job, *more: str) -> str:
    """Runs the command to its end and returns what it said.

    Raises:
      RuntimeError: its status is not 0.
    """
    command = [sys.executable, "-m", job.module, *job.options, *more]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def kill(job: Job, moment: float, phase: str | None, later: float = 0.0) -> Kill | None:
    """Starts the command and kills it in `phase`, at `moment` or after; None where it ended first.

    Args:
      job: what to start.
      moment: seconds since the start of its own code.
      phase: one of those above; None for whatever it is in.
      later: seconds from where a checkpoint's write has begun, if that is the phase.
    """
    with _started(job) as (process, stack):
        began = time.monotonic()
        time.sleep(moment)
        while process.poll() is None:
            # In a bucket nothing has a temporary name, so that the stack has to tell.
            if phase == CHECKPOINT and not in_bucket(job.output):
                if not any(job.output.glob(_UNFINISHED)):
                    time.sleep(0.0005)
                    continue
                time.sleep(later)
                frames, doing = [], CHECKPOINT
            else:
                frames = _frames(process, stack)
                doing = _phase(frames)
            if phase in (None, doing):
                process.send_signal(signal.SIGKILL)
                process.wait()
                ended, left = time.monotonic() - began, unfinished(job.output)
                if not frames and phase == CHECKPOINT and left is None:
                    return None
                ours = [name for file, name in frames if file.startswith(str(_ROOT))]
                return Kill(ended, doing, ours[0] if ours else "", left)
    return None


def unfinished(output: Path) -> int | None:
    """The files of the checkpoint that is being written in a run's folder; None where none is."""
    for folder in () if in_bucket(output) else output.glob(_UNFINISHED):
        return sum(path.is_file() for path in folder.rglob("*"))
    return None


def _phase(frames: list[tuple[str, str]]) -> str:
    if not frames:
        return "one long call, such as an import or a compilation"
    functions = {name for _, name in frames}
    return next((phase for phase, some in _PHASES.items() if some & functions), "start or end")


def kill_and_resume(
    job: Job, moment: float, phase: str | None, whole: dict[str, Any], later: float = 0.0
) -> dict:
    """The row of one kill: see `kill`; and what the resumed command has in common with `whole`."""
    while (killed := kill(job, moment, phase, later)) is None:
        moment, later = 0.8 * moment, 0.8 * later  # It, or the checkpoint, ended before that.
        remove_tree(job.output)
    there = {path.name for path in job.output.glob("*")}
    backbone = any(job.output.glob("seed*/backbone/result.json"))
    resumed_from = "nothing was left to do"
    if job.finished not in there:
        said = run(job, *(job.resume if {"config.json", "environment.json"} <= there else ()))
        found = re.findall(
            "(?:: resumes from|reducing images:) (epoch.*|.* are there already)", said
        )
        if "results.json" in there:
            found = ["the results"]
        elif "no image was reduced" in said:
            found = ["the reduced images"]
        start = "the finished backbone" if backbone else "the beginning"
        resumed_from = "; ".join(found) or start
    row = {"command": job.module, **dataclasses.asdict(killed), "resumed_from": resumed_from}
    evidence = job.evidence(job.output)
    row["differences"] = sorted(
        name for name in whole.keys() | evidence.keys() if whole.get(name) != evidence.get(name)
    )
    remove_tree(job.output)
    return row


@contextlib.contextmanager
def _started(job: Job) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The process once its own code begins, and the file that its stack goes to on SIGUSR1."""
    with tempfile.TemporaryDirectory() as folder:
        stack = Path(folder) / "stack"
        command = [sys.executable, "-c", _STARTER, str(stack), job.module, *job.options]
        quiet = subprocess.DEVNULL
        with subprocess.Popen(command, cwd=_ROOT, stdout=quiet, stderr=quiet) as process:
            try:
                while not Path(f"{stack}.ready").exists():
                    time.sleep(0.001)
                yield process, stack
            finally:
                process.kill()


def _frames(process: subprocess.Popen[bytes], stack: Path) -> list[tuple[str, str]]:
    """File and function of the main thread's frames, innermost first; [] where it does not tell."""
    before, asked = stack.stat().st_size, time.monotonic()
    process.send_signal(signal.SIGUSR1)
    while process.poll() is None and time.monotonic() - asked < _PATIENCE:
        told = stack.read_bytes()[before:].decode()
        if told.endswith("\n\n"):
            return [tuple(line.split("\t")) for line in told.split("\n\n")[-2].splitlines()]
        time.sleep(0.001)
    return []


@dataclass(frozen=True)
class KillsConfig:
    """Kills training and a data-set build at random moments, resumes, and compares every bit.

    Attributes:
      seed: Selects the moments.
      bucket: Kill a training in Cloud Storage, on an emulator that is started, instead.
      rows: How many of the kills to do; all of them by default.
      output: The JSON file; rows that it holds already, of the same seed, are not done again.
      work: Folder of the runs. The undisturbed ones stay there for the next start.
      minutes: After that time no further kill is begun.
    """

    seed: int = 0
    bucket: bool = False
    rows: int | None = None
    output: Path = Path("experiments/results/kills.json")
    work: Path = Path("runs/kills")
    minutes: float = 60


def main(arguments: list[str] | None = None) -> int:
    """Does what is missing; 0 where everything was identical, 2 on bad input, else 1."""
    config = tyro.cli(
        KillsConfig, prog="python -m experiments.reliability.fault_injection", args=arguments
    )
    rows = BUCKET_ROWS if config.bucket else ROWS
    count = len(rows) if config.rows is None else config.rows
    if not 1 <= count <= len(rows):
        print(f"error: --rows {count}: choose 1 to {len(rows)}", file=sys.stderr)
        return 2
    with emulated_bucket() if config.bucket else contextlib.nullcontext():
        return _kill_all(config, rows[:count])


def _kill_all(config: KillsConfig, rows: Sequence[tuple[str, str | None]]) -> int:
    own = {"seed": config.seed, "training": shlex.join([*TRAINING, *LONGER])}
    try:
        stored = read(config.output) if config.output.exists() else own
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in own.items():
        if stored.get(name) != value:
            print(
                f"error: {config.output} has rows of another {name}, {stored.get(name)}, not of "
                f"{value}; delete it, or choose another --output",
                file=sys.stderr,
            )
            return 2
    stored = {"seconds": {}, "rows": []} | stored
    began, place = time.monotonic(), config.work.absolute()
    done = {row["number"] for row in stored["rows"]}
    for index in (index for index in range(len(rows)) if index not in done):
        if not time.monotonic() - began <= 60 * config.minutes:
            break
        name, phase = rows[index]
        whole = _whole(name, place, stored["seconds"])
        share, later = np.random.default_rng([config.seed, index]).random(2)
        # A command begins with its start, where no phase that is aimed at comes.
        moment = stored["seconds"][name] * (share if phase is None else (1 + share) / 2)
        job = _job(name, place, "killed")
        remove_tree(job.output)
        row = kill_and_resume(job, moment, phase, whole, _WRITE * later)
        row = {"number": index, "aimed_at": phase or "any moment", **row, "machine": machine()}
        stored["rows"] = sorted([*stored["rows"], row], key=lambda row: row["number"])
        write_json(config.output, stored)
        print(json.dumps({k: v for k, v in row.items() if k != "machine"}), flush=True)
    differing = [row for row in stored["rows"] if row["differences"]]
    left = len(rows) - sum(row["number"] < len(rows) for row in stored["rows"])
    print(
        f"{len(stored['rows'])} kills, {len(differing)} with differences"
        + (f"; {left} are left, and the same command runs them" if left else "")
    )
    return 1 if differing or left else 0


def read(path: Path) -> dict[str, Any]:
    """The stored rows.

    Raises:
      UsageError: the file is damaged.
    """
    return read_json_object(path, "delete it, or choose another --output")


def markdown(stored: dict[str, Any]) -> str:
    """The rows as a Markdown table, and where they come from."""
    columns = ("command", "target phase", "killed after", "in", "resumed from", "identical")
    lines = []
    for row in stored["rows"]:
        doing = row["doing"] + (f" (`{row['innermost']}`)" if row["innermost"] else "")
        if row.get("unfinished") is not None:
            files = "1 file" if row["unfinished"] == 1 else f"{row['unfinished']} files"
            doing += f" ({files} of it there)"
        same = f"**no: {', '.join(row['differences'])}**" if row["differences"] else "yes"
        cells = (row["command"].rpartition(".")[2], row["aimed_at"], f"{row['seconds']:.2f} s")
        lines.append((*cells, doing, str(row["resumed_from"]), same))
    table = markdown_rows(columns, lines, "llrlll")
    return f"{table}\n\nKilled on {measured_on(row['machine'] for row in stored['rows'])}.\n"


@contextlib.contextmanager
def emulated_bucket() -> Iterator[None]:
    """An emulator of Cloud Storage with the bucket "kills", for this process and its children."""
    with cloud_storage("kills") as url:
        os.environ |= {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
        # Else gcsfs asks Google for the kind of bucket.
        os.environ |= {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_GCE_CHECK": "true"}
        yield


def _job(name: str, place: Path, output: str) -> Job:
    if name == "bucket":
        return training(as_path("gs://kills") / output, place / "cache")
    if name == "training":
        return training(place / output, place / "cache", *LONGER)
    images = place / "radiographs"
    return building(place / output, images if images.exists() else write_radiographs(images))


def _whole(name: str, place: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """The evidence of an undisturbed command; `seconds` gets what its second start takes."""
    jobs = [_job(name, place, f"{name}-{start}") for start in ("first", "second")]
    # Without seconds, what is there is of an earlier call, perhaps of another command.
    fresh = name not in seconds
    for job in jobs:
        if fresh or not (job.output / job.finished).exists():
            remove_tree(job.output)
            began = time.monotonic()
            run(job)
            seconds[name] = time.monotonic() - began
    first, second = (job.evidence(job.output) for job in jobs)
    if first != second:
        raise RuntimeError(f"two undisturbed runs of {jobs[0].module} differ")
    return second


if __name__ == "__main__":
    sys.exit(main())
