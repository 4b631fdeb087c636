"""Reduces images in parallel processes, in parts that survive an interruption.

A part is a zip file of up to `IMAGES_PER_PART` reduced PNGs, written atomically. Its name is a hash
of its sources, so an existing part is a finished part.
"""

import hashlib
import json
import multiprocessing
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from rich.console import Console

from inmerge_jax.data.chestxray14.images import Usual, reduce_image, usual
from inmerge_jax.data.workers import end_with_parent
from inmerge_jax.errors import UsageError
from inmerge_jax.files import DAMAGED_ARCHIVE, write_bytes
from inmerge_jax.progress import Progress

IMAGES_PER_PART = 64
_FORMAT = 1
"""Version of the reduction; increment it when the same files give other PNGs."""


@dataclass(frozen=True)
class Part:
    """Some images of one split, and the zip file of the reduced images.

    Attributes:
      rows: int64, rows of the labels.
      sources: files of the images, in the order of `rows`.
      path: path of the zip file.
    """

    rows: np.ndarray
    sources: tuple[Path, ...]
    path: Path

    def __len__(self) -> int:
        return len(self.sources)

    def read(self) -> Iterator[bytes]:
        """Yields the reduced PNGs in the order of `rows`, with verified checksums.

        Raises:
          UsageError: the file is damaged.
        """
        try:
            with zipfile.ZipFile(self.path) as archive:
                for source in self.sources:
                    yield archive.read(source.name)
        except (*DAMAGED_ARCHIVE, KeyError) as error:
            raise UsageError(
                f"{self.path} is damaged: {error}; delete it and build again"
            ) from error


@dataclass(frozen=True)
class Reduced:
    """The result of the reduction.

    Attributes:
      parts: parts by split.
      images: number of images that were reduced, without those of an earlier, interrupted build.
      busy: time that all processes together spent on them, in seconds.
      workers: number of processes.
    """

    parts: Mapping[str, Sequence[Part]]
    images: int
    busy: float
    workers: int

    @property
    def images_per_second(self) -> float:
        """Throughput of all processes together, without start-up; NaN if none was reduced."""
        return self.images * self.workers / self.busy if self.busy else float("nan")


def plan_parts(
    rows: Mapping[str, np.ndarray], sources: Sequence[Path | None], size: int, folder: Path
) -> dict[str, list[Part]]:
    """Divides each split into parts.

    Args:
      rows: int64 rows by split.
      sources: file of each row; None only for rows that are not in `rows`.
      size: height and width of the PNGs in pixels.
      folder: folder for the zip files.
    """
    parts: dict[str, list[Part]] = {}
    for split, chosen in rows.items():
        parts[split] = []
        for start in range(0, len(chosen), IMAGES_PER_PART):
            some = chosen[start : start + IMAGES_PER_PART]
            files = tuple(sources[row] for row in some.tolist())
            stats = [(path.name, path.stat()) for path in files]
            made_from = [_FORMAT, size, [(n, s.st_size, s.st_mtime_ns) for n, s in stats]]
            name = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:24]
            parts[split].append(Part(some, files, folder / f"{name}.zip"))
    return parts


def reduce_parts(
    parts: Mapping[str, Sequence[Part]], size: int, *, workers: int, console: Console
) -> Reduced:
    """Creates all missing parts, in `workers` processes.

    Raises:
      UsageError: an image is damaged or has the wrong size, or a process was killed; finished parts
        are kept.
    """
    every = [part for some in parts.values() for part in some]
    todo = [part for part in every if not part.path.exists()]
    if not todo:
        return Reduced(parts, 0, 0.0, workers)
    expected = usual([source for part in every for source in part.sources])
    done = sum(map(len, every)) - sum(map(len, todo))
    workers, busy = min(workers, len(todo)), 0.0
    total, what = sum(map(len, every)), "reducing images"
    with Progress(total, console, description=what, done=done) as progress:
        if done:
            progress.say(f"{what}: {done:,} of {total:,} are there already")
        for images, seconds in _results(todo, size, expected, workers):
            busy += seconds
            progress.advance(images)
            if progress.due():
                progress.milestone()
        progress.finish()
    return Reduced(parts, sum(map(len, todo)), busy, workers)


def _results(
    todo: Sequence[Part], size: int, expected: Usual, workers: int
) -> Iterator[tuple[int, float]]:
    """Yields the results of `reduce_part` as they finish; one worker is this process."""
    if workers == 1:
        yield from (reduce_part(part, size, expected) for part in todo)
        return
    # Spawned, not forked, because this process may have threads.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, end_with_parent) as pool:
        futures = [pool.submit(reduce_part, part, size, expected) for part in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise UsageError(
                f"one of the {workers} processes that reduce images was killed, usually for lack "
                "of memory; build again with fewer `workers`, which keeps what is done"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def reduce_part(part: Part, size: int, expected: Usual) -> tuple[int, float]:
    """Creates one part; returns its number of images and the duration in seconds.

    Raises:
      UsageError: see `images.reduce_image`; or the file cannot be written.
    """
    started = time.perf_counter()
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for source in part.sources:
            # A fixed time stamp, so that the same images give the same bytes.
            name = zipfile.ZipInfo(source.name, (1980, 1, 1, 0, 0, 0))
            archive.writestr(name, reduce_image(source, size, expected))
    try:
        write_bytes(part.path, buffer.getvalue())
    except OSError as error:
        raise UsageError(
            f"cannot write {part.path}: {error.strerror or error}; make room or give rights there, "
            "then build again, which keeps what is done"
        ) from error
    return len(part), time.perf_counter() - started
