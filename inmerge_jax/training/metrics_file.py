"""metrics.jsonl: one line of JSON for each epoch of a stage."""

import json
import os
from pathlib import Path
from typing import Any

from inmerge_jax.buckets import in_bucket
from inmerge_jax.errors import UsageError
from inmerge_jax.files import json_round_trip, json_sha256, write_bytes, write_errors


def append_metrics(path: Path, record: dict[str, Any]) -> None:
    """Appends `record` to a file as one line of JSON; creates the file and its folder.

    Nothing can be appended to an object in a bucket, so that one is replaced.

    Raises:
      UsageError: the line cannot be written, for example on a full disk; the file is unchanged.
    """
    line = json.dumps(json_round_trip(record)).encode() + b"\n"
    with write_errors(path):
        if in_bucket(path):
            write_bytes(path, (path.read_bytes() if path.exists() else b"") + line)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                if (written := file.write(line)) != len(line):
                    # A nearly full disk accepts a part without an error; the rest then raises one.
                    file.write(line[written:])
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file in order; [] if there is none. Skips a partial last line.

    Raises:
      UsageError: a line other than the last is not a JSON object.
    """
    return [record for _, record in _complete_lines(path)]


def truncate_metrics(path: Path, epoch: int, sha256: str | None = None) -> None:
    """Removes every record after `epoch`, and a partial last line.

    The remaining lines are kept byte for byte. The file is replaced atomically, or left untouched
    if nothing is removed.

    Args:
      path: the metrics file.
      epoch: last epoch to keep.
      sha256: `json_sha256` of the records to keep, as they were written; None if unknown.

    Raises:
      UsageError: a line other than the last is not a JSON object with a number "epoch"; or the
        remaining records are not one for each epoch from 1 to `epoch`, or have another hash. The
        best epoch and the learning rate would be wrong.
    """
    kept = [(line, found) for line, found in _complete_lines(path) if _epoch(path, found) <= epoch]
    epochs = [record["epoch"] for _, record in kept]
    if epochs != list(range(1, epoch + 1)):
        raise UsageError(
            f"{path} has the epochs {epochs}, but the run has finished {epoch}; "
            f"{_retrain_remedy(path)}"
        )
    if sha256 is not None and json_sha256([record for _, record in kept]) != sha256:
        raise UsageError(
            f"{path} was changed after its {epoch} epochs were trained; they determine the best "
            f"epoch and the learning rate: {_retrain_remedy(path)}"
        )
    data = b"".join(line for line, _ in kept)
    if path.exists() and path.read_bytes() != data:
        with write_errors(path):
            write_bytes(path, data)


def _complete_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            found.append((line + b"\n", record))
        elif number < len(lines):
            raise UsageError(f"{path}, line {number} is damaged; {_retrain_remedy(path)}")
    return found


def _epoch(path: Path, record: dict[str, Any]) -> int:
    if not isinstance(record.get("epoch"), int):
        raise UsageError(f"{path} holds a line without its epoch; {_retrain_remedy(path)}")
    return record["epoch"]


def _retrain_remedy(path: Path) -> str:
    return (
        f"restore the file, or delete the folder {path.parent} and give `resume` to retrain that "
        "stage"
    )
