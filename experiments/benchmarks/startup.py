"""Runs a command and counts the programs that XLA compiles for it.

`python -m experiments.benchmarks.startup COUNTS.json MODULE OPTION ...` runs
`python -m MODULE OPTION ...` and writes to COUNTS.json how many programs were requested, how many
came from the persistent compilation cache and how many were compiled.
"""

import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.timing import Row, Target, ratio_row
from inmerge_jax.files import write_json

_ROOT = Path(__file__).parents[2]
PROGRAM = "/jax/core/compile/backend_compile_duration"
"""Event of a program that is compiled or loaded from the cache."""
_HIT = "/jax/compilation_cache/cache_hits"


def cache_rows(module: str, options: Sequence[str]) -> list[Row]:
    """Times two starts of a command that share a new compilation cache.

    Args:
      module: module whose `main` takes a list of options, including `--compilation-cache-dir` and
        `--output`.
      options: all other options.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        options = [
            *options,
            "--compilation-cache-dir",
            str(place / "cache"),
            "--output",
            str(place / "run"),
        ]
        starts = [measure_start(module, options, place / "counts.json") for _ in range(2)]
    first, second = starts
    seconds = {"first start": [first["seconds"]], "second start": [second["seconds"]]}
    note = (
        f"python -m {module} {' '.join(options[:-4])}; programs: {first['compiled']} compiled by "
        f"the first start of {first['programs']} asked for, {second['compiled']} by the second of "
        f"{second['programs']}; compiling or loading them took "
        f"{first['seconds_compiling_or_loading']:.1f} s, then "
        f"{second['seconds_compiling_or_loading']:.1f} s"
    )
    compiled = second["compiled"]
    return [
        Row(
            name="second start of a training command",
            quantity="programs recompiled",
            value=compiled,
            low=compiled,
            high=compiled,
            target=Target("at most", 0),
            seconds=seconds,
            note=note,
        ),
        ratio_row("complete tiny command", seconds, "first start", "second start", note=note),
    ]


def measure_start(module: str, options: Sequence[str], counts: Path) -> dict[str, Any]:
    """Runs the module in a new process; returns its seconds and the contents of COUNTS.json.

    Raises:
      subprocess.CalledProcessError: the process failed; the error's notes have its output.
    """
    counts = counts.resolve()
    command = [
        sys.executable,
        "-m",
        "experiments.benchmarks.startup",
        str(counts),
        module,
        *options,
    ]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT)
    seconds = time.perf_counter() - start
    try:
        done.check_returncode()
    except subprocess.CalledProcessError as error:
        error.add_note(done.stdout + done.stderr)
        raise
    return {"seconds": seconds, **json.loads(counts.read_bytes())}


def main(arguments: Sequence[str]) -> int:
    """Runs the module's `main` with its options; returns its status."""
    counts, module, *options = arguments
    import jax.monitoring

    events: Counter[str] = Counter()
    seconds: Counter[str] = Counter()

    def count(event: str, **_: Any) -> None:
        events[event] += 1

    def add(event: str, duration: float, **_: Any) -> None:
        events[event] += 1
        seconds[event] += duration

    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(add)
    status = importlib.import_module(module).main(options)
    programs, hits = events[PROGRAM], events[_HIT]
    write_json(
        Path(counts),
        {
            "programs": programs,
            "from_cache": hits,
            "compiled": programs - hits,
            "seconds_compiling_or_loading": seconds[PROGRAM],
        },
    )
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
