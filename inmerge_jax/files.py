"""Atomic writes of files, and verified reads, locally and in buckets."""

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from inmerge_jax.buckets import as_path, bucket_errors, in_bucket
from inmerge_jax.errors import UsageError

DAMAGED_ARCHIVE = (
    ValueError,
    OSError,
    EOFError,
    MemoryError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
"""Exceptions of zipfile, zlib and NumPy on damaged archives and array headers."""

CHECKSUM = "sha256"
"""Name of the entry that holds the checksum of a JSON object."""


def remove_tree(folder: Path) -> None:
    """Deletes a folder and everything in it; does nothing if it is missing."""
    if folder.exists():
        if in_bucket(folder):
            folder.rmtree()  # type: ignore[attr-defined]  # Not a Path of the standard library.
        else:
            shutil.rmtree(folder)


def remove_entries(folder: Path, *keep: str) -> None:
    """Deletes all entries of a folder but those of the names `keep`."""
    for entry in folder.iterdir():
        if entry.name not in keep:
            remove(entry)


def remove(entry: Path) -> None:
    """Deletes a file, a link, or a folder and everything in it."""
    if entry.is_dir() and not (isinstance(entry, Path) and entry.is_symlink()):
        remove_tree(entry)
    else:
        entry.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to `path` atomically; creates the folder if it is missing.

    In a bucket, writing an object is atomic.

    Raises:
      OSError: the file cannot be written; an existing file is then unchanged.
    """
    path = as_path(path)
    if in_bucket(path):
        with bucket_errors():
            path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flushes a file or, except on Windows, a folder to disk (fsync)."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some mounts (object stores, network drives) cannot sync folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """Flushes a folder, everything in it, and its own entry to disk; nothing in a bucket."""
    if not in_bucket(folder):
        for path in (*folder.rglob("*"), folder, folder.parent):
            sync(path)


def write_error(path: Path, error: OSError, *, begun: bool = True) -> UsageError:
    """The error for a file that cannot be written, with reason and remedy.

    Args:
      path: path of the file.
      error: the error of the operating system.
      begun: whether there is a run to resume.
    """
    reason = error.strerror or str(error)
    before = "; earlier files are intact, and `resume` continues the run" if begun else ""
    return UsageError(
        f"cannot write {path}: {reason}; make room or give rights there, or choose another "
        f"folder{before}"
    )


@contextlib.contextmanager
def write_errors(path: Path, *, begun: bool = True) -> Iterator[None]:
    """Turns the errors of writing to `path`, local or in a bucket, into `write_error`."""
    try:
        with bucket_errors():
            yield
    except OSError as error:
        raise write_error(path, error, begun=begun) from error


def check_target(path: Path, *, overwrite: bool) -> None:
    """Checks that a file can be written, before the work for it begins; creates its folder.

    Raises:
      UsageError: it cannot be written, or it exists and `overwrite` is False.
    """
    with write_errors(path, begun=False):
        if path.exists() and not overwrite:
            raise UsageError(
                f"{path} exists; choose another name, or give `overwrite` to replace it"
            )
        if not in_bucket(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically, see `write_bytes`."""
    write_bytes(path, text.encode())


def read_text(path: Path) -> str:
    """Reads a text file, plain or gzipped.

    Raises:
      UsageError: the file is missing, damaged or not text.
    """
    try:
        data = Path(path).read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {path}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text: {error}; save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {error}; fetch it again") from error


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically, see `write_bytes`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def json_round_trip(value: Any) -> Any:
    """`value` as a JSON file gives it back, with which it compares equal.

    Paths become strings; arrays and their numbers, lists and numbers.
    """

    def convert(value: Any) -> Any:
        if isinstance(value, PurePath):
            return str(value)
        if isinstance(value, np.generic | np.ndarray) or hasattr(value, "__array__"):
            return np.asarray(value).tolist()
        raise TypeError(f"{value!r} of type {type(value).__name__} can't go into a JSON file")

    return json.loads(json.dumps(value, default=convert))


def json_sha256(value: Any) -> str:
    """SHA-256 of `value` as compact JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def write_json_with_checksum(path: Path, value: Mapping[str, Any], key: str = CHECKSUM) -> None:
    """Writes an object as JSON, with its SHA-256 as the entry `key`; see `write_json`."""
    write_json(path, {**value, key: json_sha256(value)})


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
      path: the file.
      remedy: what the error message advises.

    Raises:
      UsageError: the file holds no JSON object.
      OSError: it cannot be read.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} is damaged (it holds no JSON object): {remedy}")
    return value


def read_json_with_checksum(path: Path, remedy: str, *, key: str = CHECKSUM) -> dict[str, Any]:
    """Reads an object that `write_json_with_checksum` wrote, and verifies it.

    Args:
      path: the file.
      remedy: what the error message advises.
      key: entry that holds the checksum.

    Returns:
      The object without its checksum.

    Raises:
      UsageError: the file was cut short or changed.
      OSError: it cannot be read.
    """
    value = read_json_object(path, remedy)
    if value.pop(key, None) != json_sha256(value):
        raise UsageError(f"{path} is damaged: its content is not what was written; {remedy}")
    return value


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a compressed npz atomically, see `write_bytes`."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def read_arrays(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """Reads all arrays of an npz and verifies their checksums.

    Args:
      path: the file.
      remedy: what the error message advises.

    Raises:
      UsageError: the file is truncated or was changed.
    """
    try:
        # NumPy stops reading before zipfile would verify the checksum.
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: np.asarray(arrays[name]) for name in arrays.files}
    except DAMAGED_ARCHIVE as error:
        raise UsageError(
            f"{path} is damaged ({type(error).__name__}: {error}): {remedy}"
        ) from error
