"""Atomic writes of files, verified reads, and files in Cloud Storage buckets."""

import base64
import contextlib
import errno
import fnmatch
import hashlib
import importlib.util
import io
import json
import logging
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

BUCKET = "gs://"
"""Start of the address of a file or folder in Cloud Storage."""


def as_path(path: str | os.PathLike[str]) -> Path:
    """The path object of a local path or of an address gs://bucket/name.

    The latter is an `etils.epath.Path`, which has the methods of `pathlib.Path`; `pathlib.Path`
    itself would collapse the two slashes.

    Raises:
      UsageError: the address is not one of Cloud Storage, or the package for it is missing.
    """
    text = os.fspath(path)
    if not text.startswith(BUCKET):
        if "://" in text:
            raise UsageError(f"{text}: of buckets only {BUCKET}BUCKET/NAME is read and written")
        return Path(text)
    if importlib.util.find_spec("gcsfs") is None:
        raise UsageError(
            f"{text}: buckets need the package gcsfs, which is missing; install it with "
            "pip install 'inmerge-jax[gcs]'"
        )
    import fsspec
    from etils import epath

    # Orbax's writes pass by fsspec, whose list of a folder would be outdated.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    # It logs the traceback of what it raises.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return epath.Path(text)


def path_registry() -> Any:
    """The rule for tyro's command lines that keeps addresses in buckets, see `as_path`."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    registry = ConstructorRegistry()
    spec = PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda texts: as_path(texts[0]),
        is_instance=lambda value: isinstance(value, PurePath),
        str_from_instance=lambda path: [str(path)],
    )
    registry.primitive_rule(lambda info: spec if info.type is Path else None)
    return registry


def absolute(path: Path) -> Path:
    """`path` as an absolute path; an address in a bucket is one."""
    return path if in_bucket(path) else path.absolute()


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is an address in Cloud Storage."""
    return os.fspath(path).startswith(BUCKET)


@contextlib.contextmanager
def bucket_errors() -> Iterator[None]:
    """Turns the errors of a bucket, such as missing rights, into OSError."""
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package not in ("gcsfs", "google", "requests", "aiohttp") or isinstance(error, OSError):
            raise
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


def local_copy(path: str | os.PathLike[str], pattern: str = "*") -> Path:
    """The local path of a file or folder: of a bucket, a verified copy in the user's cache.

    A copy is used again while the objects in the bucket have the same generations.

    Args:
      path: file or folder; a local path is returned as it is.
      pattern: which files of a folder are needed, matched on their path within it, such as
        `breastmnist*`.

    Raises:
      UsageError: there is no such object, it cannot be read, or it cannot be stored locally.
    """
    path = as_path(path)
    if not in_bucket(path):
        return path
    cache = cache_folder() / "buckets"
    try:
        with bucket_errors():
            objects = {
                key: info
                for key, info in bucket_files(path).items()
                if key == "." or fnmatch.fnmatch(key, pattern)
            }
            if not objects:
                which = "" if pattern == "*" else f" that matches {pattern}"
                raise UsageError(
                    f"{path}: there is nothing{which} in the bucket; check the address"
                )
            version = [[key, info["size"], info["generation"]] for key, info in objects.items()]
            place = cache / json_sha256([os.fspath(path), version])[:16] / path.name
            if not place.exists():
                _download(objects, place)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: there is no such bucket; check the address") from error
    except OSError as error:
        raise UsageError(
            f"{path} cannot be copied to {cache}: {error.strerror or error}; check the address, "
            "the rights to read it, and the room there"
        ) from error
    return place


def bucket_files(path: Path) -> dict[str, dict[str, Any]]:
    """What the bucket tells of each object in a folder, by its path in there; "." for `path`."""
    import fsspec

    bucket, name = fsspec.url_to_fs(os.fspath(path))
    found = bucket.find(name, detail=True)
    return {os.path.relpath(full, name): info for full, info in found.items()}


def _download(objects: Mapping[str, Mapping[str, Any]], place: Path) -> None:
    """Downloads and verifies objects, then gives their folder its name, the parent of `place`."""
    import fsspec

    temporary = place.parent.with_name(uuid.uuid4().hex)
    copies = {key: Path(os.path.normpath(temporary / place.name / key)) for key in objects}
    try:
        for copy in copies.values():
            copy.parent.mkdir(parents=True, exist_ok=True)
        bucket = fsspec.filesystem("gcs")
        bucket.get([info["name"] for info in objects.values()], [str(x) for x in copies.values()])
        for key, info in objects.items():
            with open(copies[key], "rb") as file:
                digest = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
            size = copies[key].stat().st_size
            # Objects that were composed of parts have no MD5.
            if size != info["size"] or info.get("md5Hash") not in (None, digest):
                raise OSError(errno.EIO, f"{info['name']} arrived damaged, with {size} bytes")
        try:
            os.rename(temporary, place.parent)
        except OSError:
            if not place.exists():  # Else another process was faster.
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cache_folder() -> Path:
    """The user's folder for files that can be made again; temporary if there is no home."""
    try:
        return Path("~/.cache/inmerge_jax").expanduser()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "inmerge_jax"


def remove_tree(folder: Path) -> None:
    """Deletes a folder and everything in it; does nothing if it is missing."""
    if folder.exists():
        folder.rmtree() if in_bucket(folder) else shutil.rmtree(folder)


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


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically, see `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically, see `write_bytes`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


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


def read_json_with_checksum(
    path: Path, remedy: str, *, key: str = CHECKSUM, required: bool = False
) -> dict[str, Any]:
    """Reads an object that `write_json_with_checksum` wrote, and verifies it.

    Args:
      path: the file.
      remedy: what the error message advises.
      key: entry that holds the checksum.
      required: whether a file without a checksum, as earlier versions wrote it, is an error.

    Returns:
      The object without its checksum.

    Raises:
      UsageError: the file was cut short or changed.
      OSError: it cannot be read.
    """
    value = read_json_object(path, remedy)
    if key not in value and not required:
        return value
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
