"""Measures input throughput: `inmerge data measure`."""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from inmerge_jax.data import Split, train_batches
from inmerge_jax.data.chestxray14.build import SPEED
from inmerge_jax.data.chestxray14.images import Usual, find_images, reduce_image, usual
from inmerge_jax.data.chestxray14.labels import ALL_IMAGES
from inmerge_jax.data.chestxray14.records import load_chestxray14
from inmerge_jax.data.workers import end_with_parent
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_json

_FILES = 8
"""Files that each process reduces between two looks at the clock."""


@dataclasses.dataclass(frozen=True)
class Rate:
    """Throughput of one measurement: images, seconds and number of worker processes."""

    workers: int
    images: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "images_per_second": self.images / self.seconds}


def measure(
    data_dir: Path, images: Path | None, output: Path, batch_size: int, seconds: float
) -> None:
    """Measures input throughput, prints it and writes it to a file.

    Args:
      data_dir: folder of a built ChestX-ray14.
      images: folder of original images to reduce; None leaves that out.
      output: JSON file to write.
      batch_size: images per batch.
      seconds: duration of each measurement.

    Raises:
      UsageError: an argument is invalid, or a worker process was killed.
    """
    from inmerge_jax.training.environment import environment

    if not 0 < seconds < math.inf:
        raise UsageError(f"`seconds` {seconds}: give a time above 0")
    data = load_chestxray14(data_dir)
    paths = [] if images is None else sorted(find_images(images).values())
    building = read_speed(data_dir.expanduser() / SPEED)
    output = output.expanduser()
    check_output(output)
    found: dict[str, Any] = {
        "data": data.title,
        "size": data.size,
        "batch_size": batch_size,
        "reading": [
            read_rate(data.train, batch_size, workers, seconds).to_dict() for workers in (0, 1, 2)
        ],
    }
    if paths:
        pixels = usual(paths)[:2]
        found["reducing"] = {
            "from": list(pixels),
            "to": data.size,
            "files": len(paths),
            "rates": [
                reduce_rate(paths, data.size, workers, seconds).to_dict() for workers in (1, 2)
            ],
        }
    if building is not None:
        found["building"] = building
    found["environment"] = environment()
    console = Console()
    console.print(table(found))
    try:
        write_json(output, found)
    except OSError as error:
        raise _cannot_write(output, error.strerror or str(error)) from error
    console.print(f"stored in {output}", highlight=False)


def read_speed(path: Path) -> dict[str, Any] | None:
    """Rates of the build, None for an interrupted one.

    Raises:
      UsageError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        speed = json.loads(path.read_bytes())
        return {**speed, "images": int(speed["images"]), "writing": float(speed["writing"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged: {error}; delete it, or build again") from error


def check_output(path: Path) -> None:
    """Creates the folder of an output file.

    Raises:
      UsageError: the file cannot be written.
    """
    if path.is_dir():
        raise _cannot_write(path, "it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, f"{error.filename}: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _cannot_write(path, f"no right to write in {path.parent}")


def _cannot_write(path: Path, why: str) -> UsageError:
    return UsageError(f"`output` {path} cannot be written: {why}; choose another file")


def read_rate(split: Split, batch_size: int, workers: int, seconds: float) -> Rate:
    """Reads training batches for about `seconds`, after a few warm-up batches."""
    batches = train_batches(split, seed=0, batch_size=batch_size, workers=workers)
    for _ in range(2 + 2 * workers):
        next(batches)
    started, count = time.perf_counter(), 0
    while not count or time.perf_counter() - started < seconds:
        count += len(next(batches)["index"])
    taken = time.perf_counter() - started
    batches.close()
    return Rate(workers, count, taken)


def reduce_rate(paths: list[Path], size: int, workers: int, seconds: float) -> Rate:
    """Reduces the files in turn, again and again, for about `seconds` after a warm-up.

    Raises:
      UsageError: an image is damaged; a process was killed.
    """
    spawn = multiprocessing.get_context("spawn")
    expected = usual(paths)
    with ProcessPoolExecutor(workers, spawn, end_with_parent) as pool:
        turns = itertools.cycle(paths)

        def some() -> int:
            """Reduces a few files, and returns their number."""
            files = list(itertools.islice(turns, _FILES * workers))
            sizes, wanted = [size] * len(files), [expected] * len(files)
            return len(list(pool.map(_reduced_bytes, files, sizes, wanted)))

        try:
            some()
            started, count = time.perf_counter(), 0
            while not count or time.perf_counter() - started < seconds:
                count += some()
            return Rate(workers, count, time.perf_counter() - started)
        except BrokenProcessPool as error:
            raise UsageError(
                f"one of the {workers} processes that reduce images was killed, usually for lack "
                "of memory; measure again with more memory"
            ) from error


def _reduced_bytes(path: Path, size: int, expected: Usual) -> int:
    return len(reduce_image(path, size, expected))


def rows(stored: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Table rows: measurement, processes, images per second, hours for all of ChestX-ray14."""
    found = []
    for rate in stored["reading"]:
        what = f"reading and decoding at {stored['size']} px, batch {stored['batch_size']}"
        workers = f"{rate['workers']}" if rate["workers"] else "0 (threads)"
        found.append((what, workers, rate["images_per_second"]))
    reducing, building = stored.get("reducing", {"rates": []}), stored.get("building")
    for rate in reducing["rates"]:
        what = f"reducing {' x '.join(map(str, reducing['from']))} to {reducing['to']} px"
        found.append((what, f"{rate['workers']}", rate["images_per_second"]))
    if building is not None:
        writing = building["writing"]
        what = (
            f"writing and verifying records of {stored['size']} px, {building['images']:,} images"
        )
        found.append((what, "1", writing))
        for rate in reducing["rates"]:
            whole = 1 / (1 / rate["images_per_second"] + 1 / writing)
            found.append(("both, one after the other as a build does", f"{rate['workers']}", whole))
    return [
        (what, workers, f"{rate:,.1f}", f"{ALL_IMAGES / rate / 3600:.2f} h")
        for what, workers, rate in found
    ]


COLUMNS = ("", "worker processes", "images/s", f"{ALL_IMAGES:,} images, extrapolated")


def table(stored: dict[str, Any]) -> Table:
    """The stored rates for the terminal."""
    drawn = Table(title=stored["data"], title_justify="left")
    for index, column in enumerate(COLUMNS):
        drawn.add_column(column, justify="right" if index else "left")
    for row in rows(stored):
        drawn.add_row(*row)
    return drawn
