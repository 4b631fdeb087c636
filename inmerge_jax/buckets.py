"""Files in Cloud Storage buckets: their paths, errors, and verified local copies."""

import base64
import contextlib
import errno
import fnmatch
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from inmerge_jax.errors import UsageError

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


class BucketError(OSError):
    """A bucket cannot be reached, read or written."""


@contextlib.contextmanager
def bucket_errors() -> Iterator[None]:
    """Turns the errors of a bucket's packages, such as missing rights, into BucketError."""
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package not in ("gcsfs", "google", "requests", "aiohttp"):
            raise
        raise BucketError(errno.EIO, f"{type(error).__name__}: {error}") from error


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
            place = cache / _short_hash([os.fspath(path), version]) / path.name
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


def _short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
