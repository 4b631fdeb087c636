"""The command `python -m experiments.accelerator`; see `docs/performance.md`."""

import argparse
import math
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

# Before jax is imported: PyTorch needs memory on the same device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from experiments.benchmarks.accelerator import correctness, merge_cost, page, train_step, trials
from experiments.benchmarks.accelerator.grids import GRIDS
from experiments.benchmarks.accelerator.session import (
    PARTS,
    Session,
    check_folder,
    describe_machine,
    say,
)
from inmerge_jax.errors import UsageError
from inmerge_jax.training.environment import configure_malloc, enable_compilation_cache

_DESCRIPTION = """
Checks and measures the project on this machine's accelerator within a given time.

The parts run in this order: correctness, merge (what one merge costs), step (the training step
next to PyTorch's), trials (of the study, at full length). Each result is written when it is there,
so a run that is cut off keeps what it has; the same command continues it, and tries again what
failed. What does not fit into the time is skipped and reported. No network is used.
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.accelerator",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=8, help="time for all parts together (default: 8)")
    add(
        "--output",
        type=Path,
        default=Path("runs/accelerator"),
        metavar="DIR",
        help="folder of the results: a JSON file for each part, and the trials' scores",
    )
    add(
        "--parts",
        nargs="+",
        choices=tuple(PARTS),
        default=tuple(PARTS),
        metavar="PART",
        help=f"parts to run: {', '.join(PARTS)} (default: all)",
    )
    add(
        "--grid",
        default="medmnist",
        metavar="NAME",
        help=f"list of trials: {', '.join(GRIDS)} (default: medmnist)",
    )
    add(
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="folder with medmnist/, which holds the npz files (default: data)",
    )
    add(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder of compiled programs, so that a second run starts sooner (default: cache in "
        "the output folder)",
    )
    add("--tiny", action="store_true", help="tiny sizes, to check that every part runs")
    add(
        "--import",
        dest="imported",
        type=Path,
        metavar="DIR",
        help="run nothing: add the results in DIR to experiments/results, and write "
        "docs/performance.md",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
      0 when all that was run succeeded; 1 when a case failed, or a result is wrong; 2 on bad input.
    """
    options = parse(arguments)
    try:
        if options.imported is not None:
            return page.import_folder(options.imported)
        return run(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Checks the options, runs the parts, and prints the summary.

    Raises:
      UsageError: bad options, missing data, or a folder that does not fit.
    """
    if not (options.minutes > 0 and math.isfinite(options.minutes)):
        raise UsageError(f"--minutes {options.minutes:g}: choose a positive number")
    if options.grid not in GRIDS:
        raise UsageError(f"--grid {options.grid}: unknown; choose one of {', '.join(GRIDS)}")
    grid = GRIDS[options.grid]
    if "trials" in options.parts:
        trials.check_data(grid, options.data_dir)
    session = Session(options.output, 60 * options.minutes, options.tiny)
    _include_cpu()
    configure_malloc()
    session.around = describe_machine(options.tiny)
    check_folder(session.folder, session.around)
    enable_compilation_cache(options.cache or session.folder / "cache")
    run_part = {
        "correctness": lambda: correctness.measure(session),
        "merge": lambda: merge_cost.measure(session),
        "step": lambda: train_step.measure(session),
        "trials": lambda: trials.measure(session, grid, options.data_dir),
    }
    parts = [part for part in PARTS if part in options.parts]
    stop = _end_on_time(session, parts)
    # What an earlier run stored informs the estimates, also where its part is not run again.
    for part in PARTS:
        session.enters(part, run=part in parts)
    for part in parts:
        run_part[part]()
        jax.clear_caches()
    stop.cancel()
    say("\n".join(page.summary(session.folder)))
    return int(page.any_failed(session.folder))


def _include_cpu() -> None:
    """Adds the CPU, the reference of the first part, where JAX_PLATFORMS names others alone."""
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    if platforms and "cpu" not in platforms.split(","):
        jax.config.update("jax_platforms", f"{platforms},cpu")


def _end_on_time(session: Session, parts: Sequence[str]) -> threading.Timer:
    """Ends the process when the time is over, also inside a compilation; cancel it before.

    Estimates decide what is begun. This is for those that were wrong: finished cases are stored.
    """

    def end() -> None:
        session.cut_off(parts)
        say("\n".join([*page.summary(session.folder), "the time is over; a case was cut off"]))
        os._exit(int(page.any_failed(session.folder)))

    timer = threading.Timer(max(0.0, session.left("trials")), end)
    timer.daemon = True
    timer.start()
    return timer


if __name__ == "__main__":
    sys.exit(main())
