"""A build's manifest.json: what the folder holds, and hashes that show what was changed since.

It is sealed by a hash of its own content, and has those of TFDS's two JSON files. One of format 1,
which earlier versions wrote, has neither: it is read as it is, as long as no key is missing.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inmerge_jax.errors import UsageError
from inmerge_jax.files import (
    read_json_object,
    read_json_with_checksum,
    write_json_with_checksum,
)

MANIFEST, INDEX = "manifest.json", "index.npz"
FORMAT, _UNSEALED = 2, 1
_SEAL = "seal"
# Without its list of shards no record can be read, without its features none can be decoded.
METADATA = ("dataset_info.json", "features.json")
_KEYS = {
    *("split", "size", "counts", "full_counts", "selection_sha256", "files_sha256"),
    *("patients", "positives", "records", "shards", "index_sha256", "content_sha256"),
}


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes the manifest of a finished build, with its format and its checksum."""
    write_json_with_checksum(folder / MANIFEST, {"format": FORMAT, **content}, _SEAL)


def metadata_hashes(records: Path) -> dict[str, str]:
    """The SHA-256 of each of TFDS's JSON files in the folder of the records."""
    return {name: _digest(records / name) for name in METADATA}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished build.

    Raises:
      UsageError: it was changed since it was written, or is of another version of the program.
    """
    path, remedy = folder / MANIFEST, f"delete {folder} and build the data set anew"
    version = read_json_object(path, remedy).get("format")
    manifest = read_json_with_checksum(path, remedy, key=_SEAL, required=version == FORMAT)
    if version not in (FORMAT, _UNSEALED):
        raise UsageError(
            f"{path} is of another version of this program, its format is {version}; delete "
            f"{folder} and build the data set anew"
        )
    if missing := sorted(_KEYS - manifest.keys()):
        raise _damaged(path, f"{missing[0]} is missing", folder)
    return manifest


def check_metadata(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UsageError where one of TFDS's JSON files is not what the build wrote."""
    for name, digest in manifest.get("metadata_sha256", {}).items():
        path = folder / manifest["records"] / name
        if not path.is_file():
            raise UsageError(f"{path} is missing; delete {folder} and build the data set anew")
        if _digest(path) != digest:
            raise _damaged(path, "its content is not what was written", folder)


def check_shards(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UsageError where a shard is not as long as it was.

    What is in it has hashes that reading verifies.
    """
    for name, shard in manifest["shards"].items():
        path = folder / manifest["records"] / name
        if not path.is_file():
            raise UsageError(f"{path} is missing; delete {folder} and build the data set anew")
        size = path.stat().st_size
        if size != shard["bytes"]:
            raise UsageError(
                f"{path} was cut short or changed: it has {size:,} bytes, {shard['bytes']:,} when "
                f"it was built; delete {folder} and build the data set anew"
            )


def read_index(folder: Path, manifest: Mapping[str, Any]) -> bytes:
    """The content of index.npz.

    Raises:
      UsageError: it is missing or not what the build wrote.
    """
    path = folder / INDEX
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != manifest["index_sha256"]:
        raise UsageError(f"{path} is missing or damaged; delete {folder}, build the data set anew")
    return data


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _damaged(path: Path, why: str, folder: Path) -> UsageError:
    return UsageError(f"{path} is damaged: {why}; delete {folder} and build the data set anew")
