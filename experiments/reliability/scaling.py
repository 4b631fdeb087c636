"""The same merging steps on 1, 2, 4 and 8 simulated devices, and in two processes.

Simulated devices share this machine's cores, so their times say nothing of real ones; what is shown
is that the training is the same, and what the devices send each other.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from experiments.benchmarks.timing import measured_on
from experiments.reliability.scaling_step import params_file
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_json

CASES = ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2))
"""Devices and processes."""
DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class ScalingConfig:
    """Trains the same steps on simulated devices, one process after another, and compares them.

    Attributes:
      output: JSON file for the results.
      steps: Updates of each.
      keep: Folder for what each case leaves, so that an interrupted command goes on there.
    """

    output: Path = Path("experiments/results/scaling.json")
    steps: int = 10
    keep: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None


def measure(steps: int, keep: Path | None) -> list[dict[str, Any]]:
    """A row for each case, compared with one device and with one process of as many devices.

    The row is of float32, with the same comparisons in float64 under "float64".
    """
    if steps < 2:
        raise UsageError(f"--steps {steps}: choose 2 or more")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if keep is None else keep
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--keep {folder}: {error}; choose another folder") from error
        found: dict[tuple[str, int, int], Any] = {}
        for devices, processes in CASES:
            both = {}
            for dtype in DTYPES:
                row, params = _case(folder, devices, processes, steps, dtype)
                found[dtype, devices, processes] = row["losses"], params
                for name, other in (("one_device", (1, 1)), ("one_process", (devices, 1))):
                    mine, theirs = found[dtype, devices, processes], found[(dtype, *other)]
                    row[name] = _differences(mine, theirs)
                both[dtype] = row
            kept = ("one_device", "one_process", "replicas_equal", "processes_equal", "merged")
            double = {name: both["float64"][name] for name in kept}
            rows.append({**both["float32"], "float64": double})
            print(f"{devices} devices, {processes} processes: done", flush=True)
    return rows


def _case(
    folder: Path, devices: int, processes: int, steps: int, dtype: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What one case left, started if it has not been, and the parameters of its first process."""
    output = folder / f"{devices}-{processes}-{steps}-{dtype}.json"
    files = [params_file(output, number) for number in range(processes)]
    if not all(path.exists() for path in (output, *files)):
        _start(output, devices, processes, steps, dtype)
    row = json.loads(output.read_bytes())
    params, *others = (dict(np.load(path)) for path in files)
    row["processes_equal"] = all(
        np.array_equal(params[name], other[name]) for other in others for name in params
    )
    return row, params


def _start(output: Path, devices: int, processes: int, steps: int, dtype: str) -> None:
    """Runs the steps; raises CalledProcessError where a process fails."""
    flags = f"--xla_force_host_platform_device_count={devices // processes}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.reliability.scaling_step"]
    command += ["--output", str(output), "--steps", str(steps), "--dtype", dtype]
    started = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for number in range(processes):
        meeting = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(processes)]
        meeting += ["--process-id", str(number)]
        started.append(
            subprocess.Popen(
                command + (meeting if processes > 1 else []),
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    for process in started:
        said, _ = process.communicate()
        if process.returncode:
            sys.stderr.buffer.write(said)
            raise subprocess.CalledProcessError(process.returncode, process.args)


def _differences(found: Any, other: Any) -> dict[str, float]:
    """Largest relative difference of a step's loss, and largest of a parameter, by when."""
    (losses, params), (other_losses, other_params) = found, other
    largest = {name: float(np.abs(params[name] - other_params[name]).max()) for name in params}
    return {
        "loss": float(np.max(np.abs(np.divide(losses, other_losses) - 1))),
        "first": max(value for name, value in largest.items() if name.startswith("first")),
        "parameter": max(value for name, value in largest.items() if name.startswith("last")),
    }


HEADINGS = (
    "devices",
    "processes",
    "updates within 1e-6",
    "weights after one update, from one device",
    "loss, from one device",
    "weights, from one device",
    "weights, from one process",
    "the same in float64: loss",
    "weights, from one device",
    "weights, from one process",
    "replicas",
    "collectives",
    "their MB",
    "added by merging",
    "step",
)


def cells(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """One line of the table for each row."""
    for row in rows:
        counts = {
            name: [sum(kind[what] for kind in kinds.values()) for what in ("count", "bytes")]
            for name, kinds in row["collectives"].items()
        }
        number, size = counts["merging"]
        apart = np.abs(np.divide(row["losses"], rows[0]["losses"]) - 1) > 1e-6
        agreeing = int(np.argmax(apart)) if apart.any() else len(apart)
        more = [a - b for a, b in zip(counts["merging"], counts["plain"], strict=True)]
        double = row["float64"]
        processes = [_process_difference(one, row["processes"]) for one in (row, double)]
        equal = all(
            one[what] for one in (row, double) for what in ("replicas_equal", "processes_equal")
        )
        yield [
            str(row["devices"]),
            str(row["processes"]),
            str(agreeing),
            f"{row['one_device']['first']:.1e}",
            f"{row['one_device']['loss']:.1e}",
            f"{row['one_device']['parameter']:.1e}",
            processes[0],
            f"{double['one_device']['loss']:.1e}",
            f"{double['one_device']['parameter']:.1e}",
            processes[1],
            "same bits" if equal else "**differ**",
            str(number),
            f"{size / 1e6:.2f}",
            f"{more[0]}, {more[1]} bytes",
            f"{1000 * np.median(row['step_seconds']):.0f} ms",
        ]


def _process_difference(row: Mapping[str, Any], processes: int) -> str:
    """How far the weights are from one process's; "" where there is only one."""
    if processes == 1:
        return ""
    size = row["one_process"]["parameter"]
    return "same bits" if size == 0 else f"{size:.1e}"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for docs/scaling.md."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + " ---: |" * len(HEADINGS)]
    lines += ["| " + " | ".join(line) + " |" for line in cells(rows)]
    steps, merged = rows[0]["steps"], {row["merged"] for row in rows}
    counts = " or ".join(f"{count:,}" for count in sorted(merged))
    lines += ["", f"{steps} updates; {counts} kernels merged in each row."]
    lines += ["", f"Measured on {measured_on(row['machine'] for row in rows)}."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 2 on bad input."""
    config = tyro.cli(
        ScalingConfig, prog="python -m experiments.reliability.scaling", args=arguments
    )
    try:
        rows = measure(config.steps, config.keep)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(config.output, rows)
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
