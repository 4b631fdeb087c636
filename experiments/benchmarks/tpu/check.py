"""Compiles the training step for TPUs, on a machine without one, and shows what merging adds.

Memory, FLOPs, bytes accessed and collectives are the compiler's counts for one chip. Nothing is
timed.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console

from experiments.benchmarks.tpu.compile import Case, environment, fingerprints, need_libtpu
from experiments.benchmarks.tpu.limits import Row, failures
from experiments.benchmarks.tpu.table import tables
from inmerge_jax.errors import UsageError
from inmerge_jax.files import read_json_object, write_json

STEPS = ("plain", "random", "nearest")
STACK = 512 * 2**20
RESNET18 = Case("resnet18", "small", 28, "v5e:2x2", "plain")
STEPS_BASE = (
    RESNET18,
    replace(RESNET18, topology="v6e:2x2"),
    Case("vgg19", "imagenet", 224, "v5e:2x2", "plain"),
    replace(RESNET18, topology="v5e:16x16"),
    replace(RESNET18, topology="v6e:16x16"),
    Case("resnet50", "imagenet", 224, "v5e:2x2", "plain"),
    Case("densenet121", "imagenet", 224, "v5e:2x2", "plain"),
    Case("vgg19", "imagenet", 224, "v6e:2x2", "plain"),
    replace(RESNET18, topology="v5e:4x4"),
    Case("vgg19", "imagenet", 224, "v5e:4x4", "plain"),
    replace(RESNET18, steps_per_call=4),
)
CASES = tuple(replace(base, step=step) for base in STEPS_BASE for step in STEPS)


@dataclass(frozen=True)
class TpuCheckConfig:
    """Compiles the training step for TPU topologies and compares it with and without merging.

    Needs libtpu, but no TPU; `make tpu-check` installs it into a separate folder. Cases with a
    stored row of the same program and versions are skipped, so an interrupted run can be repeated.
    The exit status is 1 if a limit is exceeded.

    Attributes:
      output: JSON file for the results.
      only: Parts of the names of the cases to compile, such as resnet18 or v6e:2x2. The output file
        keeps the rows of other cases.
      small: Only ResNet-18 at 28 px on four v5e chips.
      overwrite: Compile cases that have a stored row again.
      jobs: Cases compiled at once. Each takes one core, and up to 8 GB for DenseNet-121.
      dry_run: Compile nothing; check and print the stored rows.
      stale: Compile nothing; fail if a case has no stored row, or one of another program or other
        compiler versions.
    """

    output: Path = Path("experiments/results/tpu_check.json")
    only: tuple[str, ...] = ()
    small: bool = False
    overwrite: bool = False
    jobs: int = 1
    dry_run: bool = False
    stale: bool = False


def chosen_cases(config: TpuCheckConfig) -> list[Case]:
    """The cases that the options select.

    Raises:
      UsageError: a part of a name matches no case, or no case is selected.
    """
    for part in config.only:
        if not any(part in case.name for case in CASES):
            raise UsageError(f"--only {part}: no case has it in its name, such as {CASES[0].name}")
    cases = CASES[: len(STEPS)] if config.small else CASES
    chosen = [c for c in cases if not config.only or any(part in c.name for part in config.only)]
    if not chosen:
        raise UsageError(f"--only {' '.join(config.only)}: none of the --small cases has it")
    return chosen


def compile_cases(config: TpuCheckConfig) -> None:
    """Compiles each case in a separate process and saves its row when it finishes.

    Raises:
      UsageError: libtpu is missing, `jobs` is below 1, or the output file can't be read or written.
      RuntimeError: a process failed for another reason than a compilation error.
    """
    if config.jobs < 1:
        raise UsageError(f"--jobs {config.jobs}: at least 1 case is compiled at a time")
    need_libtpu()
    _deep_stack()
    stored = {} if config.overwrite else read(config.output)
    errors = []
    with ThreadPoolExecutor(config.jobs) as pool:
        waiting = {
            pool.submit(
                _compiled, case, config, stored.get(case.name, {}).get("fingerprint", "")
            ): case.name
            for case in chosen_cases(config)
        }
        try:
            for done in as_completed(waiting):
                if done.cancelled():
                    continue
                if error := done.exception():
                    # Running compilations may have taken long, so their rows are kept.
                    errors.append(error)
                    pool.shutdown(wait=False, cancel_futures=True)
                    continue
                _save(done.result(), waiting[done], config.output)
        finally:
            pool.shutdown(cancel_futures=True)
    if errors:
        raise errors[0]


def _compiled(case: Case, config: TpuCheckConfig, known: str) -> Row | None:
    """The row of a case, compiled in a process; None if its program is `known`.

    Raises:
      RuntimeError: the process failed for another reason than a compilation error.
    """
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "row.json"
        command = [
            sys.executable,
            "-m",
            "experiments.benchmarks.tpu.compile",
            "--output",
            str(part),
        ]
        for name, value in vars(case).items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        command += ["--known", known] if known else []
        done = subprocess.run(
            command, env=environment(os.environ), capture_output=True, text=True, check=False
        )
        if done.returncode < 0:
            reason = f"the compiler crashed, signal {-done.returncode}"
            crash = {"fingerprint": "", "chips": "", "compiles": False, "reason": reason}
            return {**vars(case), **crash}
        if done.returncode:
            raise RuntimeError(
                f"{case.name}: {' '.join(command)} failed "
                f"with status {done.returncode}:\n{done.stderr[-2000:]}"
            )
        return json.loads(part.read_bytes()) if part.exists() else None


def _save(row: Row | None, name: str, output: Path) -> None:
    """Adds a row to the output file, in the order of `CASES`, and prints it; None: no change.

    Raises:
      UsageError: the file can't be read or written.
    """
    if row is None:
        print(f"{name}: unchanged", flush=True)
        return
    stored = read(output) | {name: row}
    ordered = {case.name: stored[case.name] for case in CASES if case.name in stored}
    try:
        write_json(output, ordered)
    except OSError as error:
        raise UsageError(f"--output {output}: {error}; choose another file") from error
    said = f"{row['compile_seconds']} s" if row["compiles"] else row["reason"]
    print(f"{name}: {said}", flush=True)


def stale_cases(config: TpuCheckConfig) -> list[str]:
    """Names of the chosen cases without a stored row of the current program.

    Raises:
      UsageError: libtpu is missing, or the output file can't be read.
    """
    need_libtpu()
    os.environ.update(environment(os.environ))
    stored, cases = read(config.output), chosen_cases(config)
    return [
        case.name
        for case, current in zip(cases, fingerprints(cases), strict=True)
        if stored.get(case.name, {}).get("fingerprint") != current
    ]


def _deep_stack() -> None:
    """Raises the stack limit of child processes; the compiler recurses deeply on large programs."""
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = STACK if most == resource.RLIM_INFINITY else min(STACK, most)
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, most))


def read(path: Path) -> dict[str, Row]:
    """The rows of a file by name; {} if the file does not exist.

    Raises:
      UsageError: the file isn't JSON, or can't be read.
    """
    try:
        return read_json_object(path, "remove it, or choose another --output")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"--output {path}: {error}; remove it or choose another file") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
      0; 1 if a limit is exceeded or a stored row is stale; 2 on bad input.
    """
    config = tyro.cli(
        TpuCheckConfig, prog="python -m experiments.benchmarks.tpu.check", args=arguments
    )
    try:
        if config.stale:
            stale = stale_cases(config)
            for name in stale:
                print(f"STALE: {name}: run make tpu-check", file=sys.stderr)
            if not stale:
                print(f"{config.output}: all rows are up to date")
            return int(bool(stale))
        if not config.dry_run:
            compile_cases(config)
        rows = read(config.output)
        missing = [case.name for case in chosen_cases(config) if case.name not in rows]
        if missing:
            raise UsageError(f"{config.output} has no row of {missing[0]}: leave --dry-run out")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for table in tables(rows, [case.name for case in chosen_cases(config)]):
        Console().print(table)
    failed = failures(rows)
    for text in failed:
        print(f"FAILED: {text}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
