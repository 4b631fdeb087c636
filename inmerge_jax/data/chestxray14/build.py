"""Builds the data set: reduces images in parallel, writes shards, verifies; resumable.

The output folder holds the TFDS folder, `index.npz` (names, labels and patients in the order of
the records), `manifest.json`, which marks a finished build, and `speed.json`, if the build was not
interrupted.
"""

import contextlib
import functools
import hashlib
import io
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from inmerge_jax.data.chestxray14.images import find_images
from inmerge_jax.data.chestxray14.labels import (
    ALL_IMAGES,
    FINDINGS,
    Labels,
    find_labels,
    read_labels,
    some,
)
from inmerge_jax.data.chestxray14.manifest import (
    INDEX,
    MANIFEST,
    check_metadata,
    check_shards,
    metadata_hashes,
    read_index,
    read_manifest,
    write_manifest,
)
from inmerge_jax.data.chestxray14.reduce import Part, Reduced, plan_parts, reduce_parts
from inmerge_jax.data.chestxray14.splits import PARTS, assign, check_patients
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_bytes, write_json
from inmerge_jax.locking import lock
from inmerge_jax.progress import Progress

REDUCED, RECORDS, SPEED = "reduced", "records", "speed.json"


@dataclass(frozen=True)
class Request:
    """The data set to build.

    Attributes:
      images: NIH's folder, `images_*/images/*.png` or flat.
      labels: Data_Entry_2017*.csv(.gz), or its folder.
      split: chexnet, nih_official or patient_hash.
      lists: folder of the split's lists; None for patient_hash.
      size: height and width of the reduced images in pixels.
      output: folder for the data set.
      workers: number of processes that reduce images.
      allow_missing: build without the images that are missing.
    """

    images: Path
    labels: Path
    split: str
    lists: Path | None
    size: int
    output: Path
    workers: int
    allow_missing: bool = False


@dataclass(frozen=True)
class Built:
    """The result of a build.

    Attributes:
      manifest: the content of manifest.json.
      reduced: the reduction of images; None if the data set was already finished.
      write_seconds: duration of writing and verifying the shards.
    """

    manifest: dict[str, Any]
    reduced: Reduced | None
    write_seconds: float

    @property
    def rates(self) -> dict[str, Any] | None:
        """Images per second of reducing, and of writing with verifying; None without any."""
        if self.reduced is None or not self.reduced.images:
            return None
        images = sum(self.manifest["counts"].values())
        return {
            "images": images,
            "reduced": self.reduced.images,
            "workers": self.reduced.workers,
            "reducing": self.reduced.images_per_second,
            "writing": images / self.write_seconds,
        }

    def verified(self) -> str:
        """Describes what was verified, and when."""
        images = f"{sum(self.manifest['counts'].values()):,} images and their labels"
        if self.reduced is None:
            return (
                f"{images} were verified by the build; lengths of shards and hashes of the other "
                "files are unchanged"
            )
        return f"verified: {images}, no patient in two splits"

    def speed(self) -> str:
        """Describes the speed, extrapolated to all of ChestX-ray14."""
        if self.rates is None or self.reduced is None:
            return "no image was reduced: all were reduced before"
        reducing, writing = self.rates["reducing"], self.rates["writing"]
        hours = ALL_IMAGES * (1 / reducing + 1 / writing) / 3600
        return (
            f"reduced {self.reduced.images:,} images at {reducing:,.1f} images/s in "
            f"{self.reduced.workers} processes (start-up not counted), wrote and verified "
            f"{writing:,.0f} images/s; extrapolated, {ALL_IMAGES:,} such images take {hours:.1f} h"
        )


def build(request: Request, console: Console) -> Built:
    """Builds the data set in `request.output`, or completes an interrupted build.

    Raises:
      UsageError: labels, lists, images or the folder are invalid, or another build uses the folder.
    """
    if request.workers < 1 or request.size < 1:
        raise UsageError(
            f"`workers` {request.workers}, `size` {request.size}: each must be 1 or more"
        )
    output = Path(request.output).expanduser()
    labels = read_labels(find_labels(request.labels))
    wanted = assign(request.split, labels, request.lists)
    rows, sources = _present(request, labels, wanted, console)
    parts = plan_parts(rows, sources, request.size, output / REDUCED)
    identity = _identity(request, labels, wanted, rows, parts)
    manifest = _finished(output, identity)
    if manifest is not None and not (output / REDUCED).exists():
        return Built(manifest, None, 0.0)
    with contextlib.ExitStack() as stack:
        with _writing(output):
            stack.enter_context(lock(output, functools.partial(_say, console)))
        return _build(request, output, labels, rows, parts, identity, console)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _build(
    request: Request,
    output: Path,
    labels: Labels,
    rows: Mapping[str, np.ndarray],
    parts: Mapping[str, Sequence[Part]],
    identity: Mapping[str, Any],
    console: Console,
) -> Built:
    """Completes the build, unless another process has just finished it."""
    manifest = _finished(output, identity)
    if manifest is not None:
        shutil.rmtree(output / REDUCED, ignore_errors=True)
        return Built(manifest, None, 0.0)
    reduced = reduce_parts(parts, request.size, workers=request.workers, console=console)
    started = time.perf_counter()
    folder = _write_records(request, output, labels, reduced, console)
    content = {**identity, **_verify(folder, output, labels, rows, console)}
    with _writing(output):
        write_manifest(output, content)
    manifest = read_manifest(output)
    seconds = time.perf_counter() - started
    shutil.rmtree(output / REDUCED)
    built = Built(manifest, reduced, seconds)
    if built.rates is not None and built.rates["reduced"] == built.rates["images"]:
        with _writing(output):
            write_json(output / SPEED, built.rates)
    return built


def summary(manifest: Mapping[str, Any]) -> Table:
    """Table of images, patients and positive images per finding in every split."""
    table = Table(
        title=f"ChestX-ray14, split {manifest['split']}, {manifest['size']} px",
        title_justify="left",
    )
    for index, column in enumerate(("", *PARTS)):
        table.add_column(column, justify="right" if index else "left")
    for name, counts in (
        ("images", manifest["counts"]),
        ("of", manifest["full_counts"]),
        ("patients", manifest["patients"]),
    ):
        table.add_row(name, *(f"{counts[part]:,}" for part in PARTS), end_section=name != "images")
    for finding in FINDINGS:
        table.add_row(finding, *(f"{manifest['positives'][part][finding]:,}" for part in PARTS))
    return table


def _present(
    request: Request, labels: Labels, wanted: Mapping[str, np.ndarray], console: Console
) -> tuple[dict[str, np.ndarray], list[Path | None]]:
    """The rows that have an image, and each row's file; raises if images are missing."""
    found = find_images(request.images)
    sources = [found.get(name) for name in labels.names]
    rows, missing = {}, []
    for part, chosen in wanted.items():
        there = np.array([sources[row] is not None for row in chosen.tolist()], bool)
        rows[part] = chosen[there]
        missing += [labels.names[row] for row in chosen[~there].tolist()]
    total = sum(map(len, wanted.values()))
    if missing and not request.allow_missing:
        raise UsageError(
            f"`images` {request.images}: {some(missing, 'image')} of the {total:,} in the split "
            f"{request.split} are missing; fetch them, or build without them (`allow_missing`)"
        )
    empty = [part for part, chosen in rows.items() if not len(chosen)]
    if empty:
        raise UsageError(
            f"`images` {request.images} has no image of {' and '.join(empty)} in the split "
            f"{request.split}; give more images, or choose another `split`"
        )
    used = sum(map(len, rows.values()))
    unused = f"; {len(found) - used:,} other PNGs are not used" if len(found) > used else ""
    console.print(
        f"{used:,} of the {total:,} images in the split {request.split} are there{unused}",
        highlight=False,
        soft_wrap=True,
    )
    return rows, sources


def _identity(
    request: Request,
    labels: Labels,
    wanted: Mapping[str, np.ndarray],
    rows: Mapping[str, np.ndarray],
    parts: Mapping[str, Sequence[Part]],
) -> dict[str, Any]:
    """Identifies the data set; images by name, size and modification time."""
    digest = hashlib.sha256()
    for part in PARTS:
        digest.update(part.encode())
        for row in rows[part].tolist():
            digest.update(f"{labels.names[row]} {labels.patients[row]} ".encode())
            digest.update(labels.findings[row].tobytes())
    files = "".join(part.path.stem for some in parts.values() for part in some)
    counts = {part: len(rows[part]) for part in PARTS}
    full = {part: len(wanted[part]) for part in PARTS}
    return {
        "split": request.split,
        "size": request.size,
        "counts": counts,
        "full_counts": full,
        "selection_sha256": digest.hexdigest(),
        "files_sha256": hashlib.sha256(files.encode()).hexdigest(),
    }


def _finished(output: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished build of the same data set; None if it is not finished."""
    path = output / MANIFEST
    if not path.exists():
        known = {REDUCED, RECORDS, INDEX}
        if output.exists() and not output.is_dir():
            raise UsageError(f"`output` {output} is a file; choose a folder")
        there = {entry.name for entry in output.iterdir()} if output.exists() else set()
        strange = sorted(name for name in there - known if not name.startswith("."))
        if strange:
            raise UsageError(
                f"`output` {output} holds {some(strange, 'other file')}; choose an empty folder"
            )
        return None
    manifest = read_manifest(output)
    differing = [name for name, value in identity.items() if manifest[name] != value]
    if differing:
        name = differing[0]
        if name == "files_sha256":
            raise UsageError(
                f"`output` {output} was built from other versions of these image files (size or "
                "modification time differ); delete it to build it again, or train on it as it is"
            )
        raise UsageError(
            f"`output` {output} holds another data set: its {name} is {manifest[name]}, not "
            f"{identity[name]}; choose another folder, or delete it"
        )
    check_metadata(output, manifest)
    check_shards(output, manifest)
    read_index(output, manifest)
    return manifest


def _write_records(
    request: Request, output: Path, labels: Labels, reduced: Reduced, console: Console
) -> Path:
    """Writes the shards with TFDS and returns their folder; discards an interrupted write."""
    import tensorflow_datasets as tfds

    from inmerge_jax.data.chestxray14.builder import ChestXray14

    shutil.rmtree(output / RECORDS, ignore_errors=True)
    images = sum(len(part) for parts in reduced.parts.values() for part in parts)
    tfds.disable_progress_bar()
    # TFDS reports what it does with print.
    quiet = contextlib.redirect_stdout(io.StringIO())
    with Progress(images, console, description="writing shards") as progress:

        def advance(count: int) -> None:
            progress.advance(count)
            if progress.due():
                progress.milestone()

        builder = ChestXray14(
            labels=labels,
            parts=reduced.parts,
            advance=advance,
            data_dir=output / RECORDS,
            config=ChestXray14.config_for(request.split, request.size),
        )
        with _writing(output), quiet:
            builder.download_and_prepare(file_format="array_record")
        progress.finish()
    return Path(builder.data_dir)


def _verify(
    folder: Path,
    output: Path,
    labels: Labels,
    rows: Mapping[str, np.ndarray],
    console: Console,
) -> dict[str, Any]:
    """Reads every record, compares it with the labels, and writes the index."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    skip = {"image": tfds.decode.SkipDecoding()}
    content, arrays, shards = hashlib.sha256(), {}, {}
    with Progress(sum(map(len, rows.values())), console, description="verifying") as progress:
        for part in PARTS:
            source = builder.as_data_source(part, decoders=skip)
            _require(len(source) == len(rows[part]), f"{len(source)} {part} images", output)
            for index, row in enumerate(rows[part].tolist()):
                example = source[index]
                name, patient = example["name"].decode(), int(example["patient"])
                same = name == labels.names[row] and patient == labels.patients[row]
                same &= np.array_equal(example["labels"], labels.findings[row])
                _require(same, f"{part} record {index}, {name}", output)
                content.update(f"{part} {name} ".encode() + example["labels"].tobytes())
                content.update(example["image"])
                progress.advance(1)
                if progress.due():
                    progress.milestone()
            arrays[f"{part}_names"] = np.array([labels.names[row] for row in rows[part].tolist()])
            arrays[f"{part}_labels"] = labels.findings[rows[part]]
            arrays[f"{part}_patients"] = labels.patients[rows[part]]
            for instruction in builder.info.splits[part].file_instructions:
                path = Path(instruction.filename)
                shards[path.name] = {
                    "split": part,
                    "records": instruction.examples_in_shard,
                    "bytes": path.stat().st_size,
                }
        progress.finish()
    check_patients({part: arrays[f"{part}_patients"] for part in PARTS}, str(output))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    with _writing(output):
        write_bytes(output / INDEX, buffer.getvalue())
    positives = {
        part: dict(zip(FINDINGS, arrays[f"{part}_labels"].sum(0).tolist(), strict=True))
        for part in PARTS
    }
    return {
        "patients": {part: len(np.unique(arrays[f"{part}_patients"])) for part in PARTS},
        "positives": positives,
        "records": str(folder.relative_to(output)),
        "shards": shards,
        "metadata_sha256": metadata_hashes(folder),
        "index_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "content_sha256": content.hexdigest(),
    }


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Turns an OSError, for example of a full disk, into a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write to {output}: {error.strerror or error}; make room or give rights "
            "there, then build again, which keeps what is done"
        ) from error


def _require(valid: bool, what: str, output: Path) -> None:
    if not valid:
        raise UsageError(f"{output} was written incorrectly: {what}; delete it and build again")
