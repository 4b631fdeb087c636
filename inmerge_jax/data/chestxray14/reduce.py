"""Reducing images in parallel processes, in parts that a killed build does not lose.

A part is one zip file of up to `IMAGES_PER_PART` finished PNGs, written whole or not at all. Its
name is a hash of what it was made from, so a part that is there is a part that is done.
"""

import hashlib
import json
import multiprocessing
import statistics
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

from inmerge_jax.data.chestxray14.images import image_size, reduce_image
from inmerge_jax.data.workers import end_with_parent
from inmerge_jax.errors import UsageError
from inmerge_jax.files import DAMAGED_ARCHIVE, write_bytes
from inmerge_jax.progress import Progress

IMAGES_PER_PART = 64
_FORMAT = 1
"""Raise it whenever the same files would make other PNGs."""


@dataclass(frozen=True)
class Part:
    """Some images of one split, and the zip file that has them, or will.

    Attributes:
      rows: int64, of the labels.
      sources: the images' files, in the order of `rows`.
      path: of the zip file.
    """

    rows: np.ndarray
    sources: tuple[Path, ...]
    path: Path

    def __len__(self) -> int:
        return len(self.sources)

    def read(self) -> Iterator[bytes]:
        """The finished PNGs, in the order of `rows`; zip checks the checksum of each.

        Raises:
          UsageError: the file was damaged since it was written.
        """
        try:
            with zipfile.ZipFile(self.path) as archive:
                for source in self.sources:
                    yield archive.read(source.name)
        except (*DAMAGED_ARCHIVE, KeyError) as error:
            raise UsageError(f"{self.path} is damaged: {error}; delete it, build again") from error


@dataclass(frozen=True)
class Reduced:
    """What the reduction did.

    Attributes:
      parts: by split.
      images: how many were reduced now; those of an earlier, interrupted build are not counted.
      busy: seconds that the processes spent on these, all of them together.
      workers: how many processes there were.
    """

    parts: Mapping[str, Sequence[Part]]
    images: int
    busy: float
    workers: int

    @property
    def images_per_second(self) -> float:
        """Of all processes together while they work, without their start; NaN for no image."""
        return self.images * self.workers / self.busy if self.busy else float("nan")


def plan_parts(
    rows: Mapping[str, np.ndarray], sources: Sequence[Path | None], size: int, folder: Path
) -> dict[str, list[Part]]:
    """Cuts each split into parts.

    Args:
      rows: int64, by split.
      sources: the image's file by row; None only for rows that are not in `rows`.
      size: of the PNGs, in pixels.
      folder: for the zip files.
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
    """Makes every part that is not there yet, in `workers` processes.

    Raises:
      UsageError: an image is damaged or of the wrong size, or a process was killed; parts that
        were done stay.
    """
    every = [part for some in parts.values() for part in some]
    todo = [part for part in every if not part.path.exists()]
    if not todo:
        return Reduced(parts, 0, 0.0, workers)
    expected = _usual_size([source for part in every for source in part.sources])
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


def _usual_size(sources: Sequence[Path]) -> tuple[int, int]:
    """The most frequent width and height of nine images, so that one wrong image is no measure."""
    return statistics.mode(map(image_size, sources[:: -(-len(sources) // 9)]))


def _results(
    todo: Sequence[Part], size: int, expected: tuple[int, int], workers: int
) -> Iterator[tuple[int, float]]:
    """What `reduce_part` returns for each part, as they get done; one worker is this process."""
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


def reduce_part(part: Part, size: int, expected: tuple[int, int]) -> tuple[int, float]:
    """Makes one part; returns how many images it has, and the seconds that they took.

    Raises:
      UsageError: see `images.reduce_image`; or the file cannot be written.
    """
    started = time.perf_counter()
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for source in part.sources:
            # A fixed time stamp: the same images make the same bytes.
            name = zipfile.ZipInfo(source.name, (1980, 1, 1, 0, 0, 0))
            archive.writestr(name, reduce_image(source, size, expected))
    try:
        write_bytes(part.path, buffer.getvalue())
    except OSError as error:
        raise UsageError(
            f"cannot write {part.path}: {error.strerror or error}; make room or give rights there, "
            "then build again: what is done is kept"
        ) from error
    return len(part), time.perf_counter() - started
