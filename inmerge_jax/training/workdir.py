"""The folder of one run: who may open it, its configuration, and its metrics."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from inmerge_jax import locking
from inmerge_jax.errors import UsageError
from inmerge_jax.files import json_sha256, write_bytes, write_json
from inmerge_jax.locking import LOCK
from inmerge_jax.training.environment import diff_environments, environment

CONFIG, ENVIRONMENT, RESULTS = "config.json", "environment.json", "results.json"

_DATA_PATHS = ("data.data_dir", "data.file")
"""Where images lie. What they are, data.content_sha256 says, or MedMNIST's MD5 of name and size."""


def prepare_workdir(
    folder: Path | str, config: dict[str, Any], *, resume: bool = False, overwrite: bool = False
) -> Path:
    """Makes `folder` ready for the run that `config` describes, and returns it.

    A new run writes environment.json and config.json there. A resumed one needs the same config
    and adds its environment to the list "resumed" in environment.json. `overwrite` empties the
    folder first, other files in it too, provided that it holds config.json and environment.json.

    Args:
      folder: the run's folder; need not exist.
      config: nested dicts of what JSON can hold, paths and NumPy values too. Leave out what may
        differ when a run is resumed: `resume` itself, say.
      resume: go on with the unfinished run in `folder`.
      overwrite: delete the run in `folder` and start anew.

    Raises:
      UsageError: both options given; the folder is a file or holds something else than a run; it
        holds a finished run (results.json) without `overwrite`; an unfinished one with neither
        option; nothing to resume; another config, whose differing fields are listed.
    """
    folder, config = Path(folder), _plain(config)
    state = check_workdir(folder, config, resume=resume, overwrite=overwrite)
    if resume:
        _note_resumed(folder)
        return folder
    if state != "empty":
        _clear(folder)
    return _start(folder, config)


def environment_changes(folder: Path) -> tuple[str, ...]:
    """Changes since the run began that may affect its bits, see `diff_environments`.

    Raises:
      UsageError: environment.json is damaged.
    """
    noted = _read_object(folder / ENVIRONMENT)
    return diff_environments(noted, noted["resumed"][-1]) if "resumed" in noted else ()


def check_workdir(
    folder: Path, config: dict[str, Any], *, resume: bool = False, overwrite: bool = False
) -> str:
    """Raises what `prepare_workdir` would raise, and changes nothing.

    Returns:
      "empty", "unfinished" or "finished".
    """
    if resume and overwrite:
        raise UsageError("`resume` and `overwrite` exclude each other: give one of them")
    state = _state(folder)
    if state == "empty":
        if resume:
            raise UsageError(
                f"`resume`: there is no run in {folder}; leave it out to start one there"
            )
        return state
    if overwrite:
        return state
    if state == "finished":
        raise UsageError(
            f"{folder} holds a finished run ({RESULTS}); choose another folder, or give "
            "`overwrite` to replace it"
        )
    if not resume:
        raise UsageError(
            f"{folder} holds an unfinished run; give `resume` to continue it, `overwrite` to "
            "replace it, or choose another folder"
        )
    _check_same(folder, _plain(config))
    return state


_RENAMED = {
    "accumulate": "grad_accum_steps",
    "recipe.positive_weights": "recipe.pos_weight",
}
"""Fields of config.json under the names that earlier versions wrote, and today's names."""


def diff_configs(old: dict[str, Any], new: dict[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Dotted name, old value and new value, as JSON, of every field in which two configs differ.

    Lists are compared as wholes; a field that one of them lacks reads "absent" there. Folder and
    file of the images are passed over: the same images may lie elsewhere by now.
    """
    before = {_RENAMED.get(name, name): value for name, value in _fields(_plain(old))}
    after = dict(_fields(_plain(new)))
    names = [*before, *(name for name in after if name not in before)]
    return tuple(
        (name, before.get(name, "absent"), after.get(name, "absent"))
        for name in names
        if before.get(name, "absent") != after.get(name, "absent") and name not in _DATA_PATHS
    )


def append_metrics(path: Path, record: dict[str, Any]) -> None:
    """Adds `record` to `path` as one line of JSON; creates the file and its folder.

    Raises:
      UsageError: where the line can't be written (a full disk, say); the file is as it was.
    """
    line = json.dumps(_plain(record)).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                if (written := file.write(line)) != len(line):
                    # A nearly full disk takes a part without an error; the rest then gives one.
                    file.write(line[written:])
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise write_error(path, error) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file in order; [] where it is absent; a torn last line is left out.

    Raises:
      UsageError: a line, not the last, is not a JSON object.
    """
    return [record for _, record in _complete_lines(path)]


def truncate_metrics(path: Path, epoch: int, sha256: str | None = None) -> None:
    """Drops every record after `epoch` and a torn last line.

    What stays is kept byte for byte; the file is replaced whole, or untouched where nothing goes.

    Args:
      path: the metrics file.
      epoch: the last one to keep.
      sha256: `json_sha256` of the records that stay, as they were written; None where unknown.

    Raises:
      UsageError: a line, not the last, is not a JSON object with a number "epoch"; or what stays
        is not one record for each epoch from 1 to `epoch`, or not of that hash, so that the best
        epoch and the learning rate would come out wrong.
    """
    kept = [(line, found) for line, found in _complete_lines(path) if _epoch(path, found) <= epoch]
    epochs = [record["epoch"] for _, record in kept]
    if epochs != list(range(1, epoch + 1)):
        raise UsageError(
            f"{path} has lines of the epochs {epochs}, where the run has done {epoch}; "
            f"{_retrain_remedy(path)}"
        )
    if sha256 is not None and json_sha256([record for _, record in kept]) != sha256:
        raise UsageError(
            f"{path} was changed since its {epoch} epochs were trained, and they decide the best "
            f"epoch and the learning rate; {_retrain_remedy(path)}"
        )
    data = b"".join(line for line, _ in kept)
    if path.exists() and path.read_bytes() != data:
        try:
            write_bytes(path, data)
        except OSError as error:
            raise write_error(path, error) from error


def write_error(path: Path, error: OSError, *, begun: bool = True) -> UsageError:
    """The error for a file that the system would not let us write, with reason and remedy.

    Args:
      path: of the file.
      error: the system's.
      begun: whether there is a run that can be resumed.
    """
    reason = error.strerror or str(error)
    before = "; earlier files are intact, and `resume` continues the run" if begun else ""
    return UsageError(
        f"cannot write {path}: {reason}; make room or give rights there, or choose another "
        f"folder{before}"
    )


def _state(folder: Path) -> str:
    """Tells "empty", "unfinished" or "finished"; raises where the folder is no run's."""
    if not folder.exists():
        return "empty"
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file; choose a folder for the run")
    names = {entry.name for entry in folder.iterdir()}
    # What a start that was killed before it wrote config.json leaves behind.
    started = (ENVIRONMENT, f".{ENVIRONMENT}.", f".{CONFIG}.", LOCK)
    if all(name.startswith(started) for name in names):
        return "empty"
    if not {CONFIG, ENVIRONMENT} <= names:
        raise UsageError(
            f"{folder} holds files but no run ({CONFIG} and {ENVIRONMENT}); nothing in it was "
            f"touched: choose another folder, or empty it yourself"
        )
    return "finished" if RESULTS in names else "unfinished"


def _start(folder: Path, config: dict[str, Any]) -> Path:
    try:
        write_json(folder / ENVIRONMENT, environment())
        write_json(folder / CONFIG, config)
    except OSError as error:
        raise write_error(folder, error, begun=False) from error
    return folder


def _clear(folder: Path) -> None:
    # results.json goes first and config.json last: cut short, the folder is an unfinished run.
    rank = {RESULTS: 0, ENVIRONMENT: 2, CONFIG: 3}
    entries = [entry for entry in folder.iterdir() if entry.name != LOCK]  # Which is held.
    for entry in sorted(entries, key=lambda entry: rank.get(entry.name, 1)):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _check_same(folder: Path, config: dict[str, Any]) -> None:
    differing = diff_configs(_read_object(folder / CONFIG), config)
    if differing:
        lines = "".join(f"\n  {name}: {old} there, {new} now" for name, old, new in differing)
        raise UsageError(
            f"`resume`: {folder} was started with another configuration:{lines}\n"
            "give the same values, or choose another folder"
        )


def _note_resumed(folder: Path) -> None:
    noted = _read_object(folder / ENVIRONMENT)
    noted["resumed"] = [*noted.get("resumed", []), environment()]
    try:
        write_json(folder / ENVIRONMENT, noted)
    except OSError as error:
        raise write_error(folder, error) from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(
            f"{path} is damaged: {error}; give `overwrite` to start again, or choose another folder"
        ) from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} is not the file of a run: it holds no JSON object")
    return value


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and (value or not name):
        for key, inner in value.items():
            yield from _fields(inner, f"{name}.{key}" if name else key)
    else:
        yield name, json.dumps(value)


def _plain(value: Any) -> Any:
    """What JSON gives back for `value`, so that a config compares equal to its file."""

    def convert(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, np.generic | np.ndarray) or hasattr(value, "__array__"):
            return np.asarray(value).tolist()
        raise TypeError(f"{value!r} of type {type(value).__name__} can't go into a JSON file")

    return json.loads(json.dumps(value, default=convert))


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


@contextlib.contextmanager
def open_workdir(
    folder: Path | str, config: dict[str, Any], *, resume: bool = False, overwrite: bool = False
) -> Iterator[Path]:
    """`prepare_workdir` of a folder that is this process's alone until the block ends.

    Raises:
      UsageError: another process holds it; else see `prepare_workdir`.
    """
    folder = Path(folder)
    # Asked first, because a refused start leaves the folder as it is, without a lock in it.
    locking.require_free(folder)
    check_workdir(folder, config, resume=resume, overwrite=overwrite)
    with lock(folder):
        yield prepare_workdir(folder, config, resume=resume, overwrite=overwrite)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """`locking.lock`, of which a folder that cannot be written is bad input."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locking.lock(folder))
        except OSError as error:
            raise write_error(folder, error, begun=(folder / CONFIG).exists()) from error
        yield
