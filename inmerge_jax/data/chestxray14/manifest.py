"""A build's manifest.json: the content of the folder, with hashes that detect changes.

The manifest has a checksum of its content, and the hashes of TFDS's two JSON files.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inmerge_jax.errors import UsageError
from inmerge_jax.files import read_json_with_checksum, write_json_with_checksum

MANIFEST, INDEX = "manifest.json", "index.npz"
FORMAT = 2
_SEAL = "seal"
# The lists of shards and features, without which no record can be read or decoded.
METADATA = ("dataset_info.json", "features.json")


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes the manifest of a finished build, with its format and its checksum."""
    write_json_with_checksum(folder / MANIFEST, {"format": FORMAT, **content}, _SEAL)


def metadata_hashes(records: Path) -> dict[str, str]:
    """SHA-256 of TFDS's JSON files in the folder of the records."""
    return {name: _digest(records / name) for name in METADATA}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a finished build.

    Raises:
      UsageError: the manifest was changed, or has an unknown format.
    """
    path, remedy = folder / MANIFEST, f"delete {folder} and build the data set again"
    manifest = read_json_with_checksum(path, remedy, key=_SEAL)
    if manifest["format"] != FORMAT:
        raise UsageError(
            f"{path} is of another version of this program, its format is {manifest['format']}; "
            f"delete {folder} and build the data set again"
        )
    return manifest


def check_metadata(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UsageError if one of TFDS's JSON files is not what the build wrote."""
    for name, digest in manifest["metadata_sha256"].items():
        path = folder / manifest["records"] / name
        if not path.is_file():
            raise UsageError(f"{path} is missing; delete {folder} and build the data set again")
        if _digest(path) != digest:
            raise _damaged(path, "its content is not what was written", folder)


def check_shards(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UsageError if the length of a shard has changed.

    Its content has checksums that are verified on reading.
    """
    for name, shard in manifest["shards"].items():
        path = folder / manifest["records"] / name
        if not path.is_file():
            raise UsageError(f"{path} is missing; delete {folder} and build the data set again")
        size = path.stat().st_size
        if size != shard["bytes"]:
            raise UsageError(
                f"{path} was cut short or changed: it has {size:,} bytes, {shard['bytes']:,} when "
                f"it was built; delete {folder} and build the data set again"
            )


def read_index(folder: Path, manifest: Mapping[str, Any]) -> bytes:
    """Reads index.npz.

    Raises:
      UsageError: the file is missing, or not what the build wrote.
    """
    path = folder / INDEX
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != manifest["index_sha256"]:
        raise UsageError(f"{path} is missing or damaged; delete {folder}, build the data set again")
    return data


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _damaged(path: Path, why: str, folder: Path) -> UsageError:
    return UsageError(f"{path} is damaged: {why}; delete {folder} and build the data set again")
