"""The folder of one run: who may open it, and its configuration."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inmerge_jax import locking
from inmerge_jax.buckets import as_path
from inmerge_jax.errors import UsageError
from inmerge_jax.files import json_round_trip, read_json_object, remove, write_errors, write_json
from inmerge_jax.locking import LOCK
from inmerge_jax.training.checkpointing import PROBE, check_folder
from inmerge_jax.training.environment import diff_environments, environment

CONFIG, ENVIRONMENT, RESULTS = "config.json", "environment.json", "results.json"

_DATA_PATHS = ("data.data_dir", "data.file")
"""Locations of images, which may change. Their content is identified by data.content_sha256, or by
MedMNIST's MD5 and the size."""
_FOLDER = '"folder:'
"""Start of the field data.name, as JSON, where the rest of the name is such a location."""


def prepare_workdir(
    folder: Path | str, config: dict[str, Any], *, resume: bool = False, overwrite: bool = False
) -> Path:
    """Prepares the folder of a run and returns it.

    A new run writes environment.json and config.json. A resumed run must have the same config; it
    appends its environment to the list "resumed" in environment.json. `overwrite` deletes all files
    in the folder, provided that it holds config.json and environment.json.

    Args:
      folder: folder of the run, local or in a bucket; need not exist.
      config: nested dicts of JSON values, paths and NumPy values, without fields that may differ
        between a run and its continuation (such as `resume`).
      resume: continue the unfinished run in `folder`.
      overwrite: replace the run in `folder`.

    Raises:
      UsageError: both options are given; the folder is a file or holds other files; it holds a
        finished run and `overwrite` is False; it holds an unfinished run and neither option is
        given; there is nothing to resume; or the config differs (the message lists the fields).
    """
    folder, config = as_path(folder), json_round_trip(config)
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
    state = check_state(folder, resume=resume, overwrite=overwrite)
    if resume:
        _check_same(folder, json_round_trip(config))
    return state


def check_state(folder: Path, *, resume: bool = False, overwrite: bool = False) -> str:
    """`check_workdir` without the comparison of configurations."""
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
    return state


def diff_configs(old: dict[str, Any], new: dict[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Fields in which two configs differ: dotted name, old value, new value, as JSON.

    Lists are compared as a whole. The value of a missing field is "absent". The locations of the
    images are not compared.
    """
    before, after = (dict(_fields(json_round_trip(one))) for one in (old, new))
    unread = list(_DATA_PATHS)
    if all(found.get("data.name", "").startswith(_FOLDER) for found in (before, after)):
        unread.append("data.name")
    names = [*before, *(name for name in after if name not in before)]
    return tuple(
        (name, before.get(name, "absent"), after.get(name, "absent"))
        for name in names
        if before.get(name, "absent") != after.get(name, "absent") and name not in unread
    )


def _state(folder: Path) -> str:
    """Returns the state, "empty", "unfinished" or "finished"; raises if it is no run."""
    if not folder.exists():
        return "empty"
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file; choose a folder for the run")
    names = {entry.name for entry in folder.iterdir()}
    # Left by a start that was killed before it wrote config.json.
    started = (ENVIRONMENT, f".{ENVIRONMENT}.", f".{CONFIG}.", LOCK, PROBE)
    if all(name.startswith(started) for name in names):
        return "empty"
    if not {CONFIG, ENVIRONMENT} <= names:
        raise UsageError(
            f"{folder} holds files but no run ({CONFIG} and {ENVIRONMENT}); choose another folder, "
            "or empty it"
        )
    return "finished" if RESULTS in names else "unfinished"


def _start(folder: Path, config: dict[str, Any]) -> Path:
    with write_errors(folder, begun=False):
        write_json(folder / ENVIRONMENT, environment())
        write_json(folder / CONFIG, config)
    return folder


def _clear(folder: Path) -> None:
    # results.json first: after an interruption, it is an unfinished run. environment.json last:
    # with that alone, the folder counts as empty.
    rank = {RESULTS: 0, CONFIG: 2, ENVIRONMENT: 3}
    entries = [entry for entry in folder.iterdir() if entry.name != LOCK]  # Which is held.
    for entry in sorted(entries, key=lambda entry: rank.get(entry.name, 1)):
        remove(entry)


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
    with write_errors(folder):
        write_json(folder / ENVIRONMENT, noted)


def _read_object(path: Path) -> dict[str, Any]:
    return read_json_object(path, "give `overwrite` to start again, or choose another folder")


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and (value or not name):
        for key, inner in value.items():
            yield from _fields(inner, f"{name}.{key}" if name else key)
    else:
        yield name, json.dumps(value)


@contextlib.contextmanager
def open_workdir(
    folder: Path | str, config: dict[str, Any], *, resume: bool = False, overwrite: bool = False
) -> Iterator[Path]:
    """`prepare_workdir` with an exclusive lock on the folder while the context is open.

    Raises:
      UsageError: another process holds the lock; else see `prepare_workdir`.
    """
    folder = as_path(folder)
    # Checked first, so that a refused start leaves the folder unchanged, without a lock file.
    locking.require_free(folder)
    check_workdir(folder, config, resume=resume, overwrite=overwrite)
    with lock(folder):
        check_output(folder)
        yield prepare_workdir(folder, config, resume=resume, overwrite=overwrite)


def check_output(folder: Path) -> None:
    """Checks that a run can write its checkpoints to a folder and read them; leaves nothing there.

    Raises:
      UsageError: the folder cannot be written or read, or holds something else than a run.
    """
    with write_errors(folder, begun=False):
        _state(folder)
    check_folder(folder)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """`locking.lock`, with a UsageError if the folder cannot be written."""
    with contextlib.ExitStack() as held:
        with write_errors(folder, begun=(folder / CONFIG).exists()):
            held.enter_context(locking.lock(folder))
        yield
