"""Checkpoints by Orbax's `CheckpointManager`, with a manifest that detects damage.

A checkpoint folder, local or in a bucket, holds one folder per epoch:

    <epoch>/state/         the arrays, named by their dotted path in the tree
    <epoch>/meta/          values of the caller; shape and dtype of every array
    <epoch>/manifest.json  size and hash of every file; written last

`<stage>/mid_epoch/<updates>` holds the checkpoint of a run that was interrupted within an epoch:
the train state and the totals of that epoch. It is deleted once the epoch has its own checkpoint.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from inmerge_jax import buckets, files
from inmerge_jax.buckets import in_bucket
from inmerge_jax.errors import UsageError
from inmerge_jax.training.train_step import Totals, TrainState

T = TypeVar("T")

MANIFEST, MID_EPOCH = "manifest.json", "mid_epoch"
TEMPORARY = ".orbax-checkpoint-tmp"
"""Part of the name of a local checkpoint that is being written."""
PROBE = ".probe-"
"""Start of the name of a folder that only tests whether checkpoints can be written."""
_SHOWN = 5


class DamagedCheckpointError(UsageError):
    """A checkpoint is missing, or its files are not what was written."""


def save_checkpoint(
    folder: Path,
    epoch: int,
    tree: Any,
    meta: dict[str, Any],
    *,
    keep: Collection[int] | None = None,
    checksums: bool = True,
) -> Path:
    """Writes a checkpoint to `folder/<epoch>` and returns that path.

    A crash or a power failure leaves a complete checkpoint, or one without a manifest, which
    counts as absent. One that exists is deleted first, because Orbax writes no epoch twice; the
    trainer only replaces one that is damaged or incomplete, or of a stage that starts again. Only
    one process may write at a time.

    Args:
      folder: folder of the checkpoints; created if missing.
      epoch: number of the epoch, 0 or more.
      tree: a pytree of arrays and Python numbers, stored bit for bit. Sharded arrays are gathered.
      meta: JSON-serializable values.
      keep: the epochs whose checkpoints are kept; None for all.
      checksums: whether there is a manifest.

    Raises:
      UsageError: the files cannot be written, for example on a full disk. Nothing of this
        checkpoint remains, and those of other epochs are untouched.
      ValueError: a leaf is not an array (for typed keys, use `jax.random.key_data`).
    """
    arrays = {name: _array(name, leaf) for name, leaf in _named_leaves(tree).items()}
    about = {"arrays": {name: _shape_dtype(array) for name, array in arrays.items()}}
    about |= {"checksums": checksums, "meta": meta}
    # Converted first: after an error in a save, Orbax's threads go on writing.
    items = {"meta": ocp.args.JsonSave(json.loads(json.dumps(about)))}
    # Orbax refuses empty arrays; their description is complete.
    if stored := {name: array for name, array in arrays.items() if array.size}:
        items["state"] = ocp.args.PyTreeSave(stored)
    path = folder / str(int(epoch))
    try:
        with _storage_errors():
            _make_room(folder, sum(array.nbytes for array in arrays.values()))
            with _manager(folder, keep, cleanup=True) as manager:
                if epoch in manager.all_steps():
                    manager.delete(epoch)
                manager.save(epoch, args=ocp.args.Composite(**items), force=True)
            files.sync_all(path)
            if checksums:
                files.write_json_with_checksum(path / MANIFEST, {"files": _hashes(path)})
    except OSError as error:
        if not in_bucket(folder):
            _remove_incomplete(folder, path if checksums else None)
        raise files.write_error(path, error) from error
    return path


def _remove_incomplete(folder: Path, path: Path | None) -> None:
    """Deletes what a failed save has left in a local folder, and `path` if it has no manifest."""
    # Orbax's threads go on for a moment after an error, and create their folders again.
    for _ in range(5):
        incomplete = [path] if path and not (path / MANIFEST).exists() else []
        for left in (*folder.glob(f"*{TEMPORARY}*"), *incomplete):
            shutil.rmtree(left, ignore_errors=True)
        time.sleep(0.05)


def restore_checkpoint(path: Path, template: Any) -> tuple[Any, dict[str, Any]]:
    """Verifies a checkpoint, and restores its tree in NumPy arrays and numbers, and its meta.

    Args:
      path: path of the checkpoint, as returned by `save_checkpoint`.
      template: a pytree of the same structure, whose leaves (arrays, `jax.ShapeDtypeStruct`s or
        Python numbers) have the same shapes and dtypes.

    Raises:
      UsageError: the checkpoint has another structure; the message names the entries that differ.
      DamagedCheckpointError: the checkpoint or one of its files is missing, truncated or changed.
    """
    about, leaves = _verified(path), _named_leaves(template)
    _check_structure(path, about["arrays"], leaves)
    arrays = _read(path, about["arrays"])
    values = [_like(leaf, arrays[name]) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(template), values), about["meta"]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, by their dotted path in the tree; see `restore_checkpoint`."""
    return _read(path, _verified(path)["arrays"])


def read_meta(path: Path) -> dict[str, Any]:
    """Verifies a checkpoint and returns its meta; see `restore_checkpoint`."""
    return _verified(path)["meta"]


def newest(folder: Path, read: Callable[[Path], T]) -> tuple[T | None, tuple[str, ...]]:
    """Reads the undamaged checkpoint of the highest epoch.

    Args:
      folder: folder of the checkpoints.
      read: called with the path of a checkpoint; raises `DamagedCheckpointError` if it is damaged.

    Returns:
      What `read` returned, or None; and one message for each damaged checkpoint of a higher epoch.
    """
    epochs, damaged = checkpoint_epochs(folder), []
    for epoch in reversed(epochs):
        path = folder / str(epoch)
        try:
            return read(path), tuple(damaged)
        except DamagedCheckpointError as error:
            # The write of the last one may have been interrupted before its manifest.
            if epoch != epochs[-1] or (path / MANIFEST).exists():
                damaged.append(str(error))
    return None, tuple(damaged)


def checkpoint_epochs(folder: Path) -> list[int]:
    """The epochs of all checkpoints in `folder`, including damaged ones, in ascending order."""
    if not folder.is_dir():
        return []
    with _manager(folder) as manager:
        return sorted(manager.all_steps())


def prune(folder: Path, keep: Collection[int]) -> None:
    """Deletes the checkpoints in `folder` whose epoch is not in `keep`."""
    if folder.is_dir():
        with _manager(folder) as manager:
            for epoch in {*manager.all_steps()} - {*keep}:
                manager.delete(epoch)


@functools.cache
def check_folder(folder: Path) -> None:
    """Writes a small checkpoint into `folder`, reads it back and removes it; once per process.

    Raises:
      UsageError: the folder cannot be written, or its name is one that Orbax cannot read.
    """
    refused = UsageError(
        f"{folder}: checkpoints in a folder of this name cannot be read back; choose one without "
        "[ ] * ? and \\ in its path"
    )
    if os.sep == "/" and "\\" in os.fspath(buckets.absolute(folder)):
        raise refused  # Tensorstore would write to a subfolder instead.
    place = folder / f"{PROBE}{uuid.uuid4().hex}"
    new = [
        path for path in (folder, *folder.parents) if not in_bucket(folder) and not path.exists()
    ]
    try:
        read_arrays(save_checkpoint(place, 0, {"probe": np.zeros(1)}, {}))
    except DamagedCheckpointError as error:
        raise refused from error
    finally:
        files.remove_tree(place)
        # Another run may have begun in one of them.
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()


def restore_latest(
    folder: Path, fresh: TrainState, zeros: Totals
) -> tuple[TrainState, Totals, dict[str, Any], tuple[str, ...]]:
    """Restores the newest undamaged checkpoint of a stage, or its initial state.

    Args:
      folder: the stage's folder.
      fresh: the state before the stage's first update, in NumPy arrays.
      zeros: the totals of no step.

    Returns:
      The train state; the sums over the finished updates of the next epoch; "epoch" (number of
      finished epochs), "seconds" (of these updates), "warnings" and "history_sha256" (of the
      records of the finished epochs; None at epoch 0); and one message for each damaged checkpoint
      that was passed over.

    Raises:
      UsageError: the checkpoint belongs to another model or optimizer.
    """
    checkpoints = folder / "checkpoints"
    state, totals = fresh, zeros
    meta: dict[str, Any] = {"epoch": 0, "warnings": [], "history_sha256": None, "seconds": 0.0}
    found, damaged = newest(checkpoints, lambda path: restore_checkpoint(path, fresh))
    if found is not None:
        try:
            if found[1]["best_epoch"] != found[1]["epoch"]:
                restore_checkpoint(checkpoints / str(found[1]["best_epoch"]), fresh)
            state, meta = found[0], meta | found[1]
        except DamagedCheckpointError as error:
            damaged += (str(error),)
    within, more = newest(folder / MID_EPOCH, lambda path: restore_checkpoint(path, (fresh, zeros)))
    if within is not None and within[1]["epoch"] == meta["epoch"]:
        (state, totals), meta = within[0], meta | within[1]
    return state, totals, meta, damaged + more


def save_preemption_checkpoint(
    folder: Path, state: TrainState, totals: Totals, meta: dict[str, Any], checksums: bool
) -> Path | None:
    """Saves the state within an epoch; returns the checkpoint's path, None if it was there.

    Args:
      folder: the stage's folder.
      state: after the last update, in NumPy arrays.
      totals: sums over the updates of the epoch so far, in NumPy arrays.
      meta: "epoch", "seconds" and "warnings", see `restore_latest`.
      checksums: see `save_checkpoint`.

    Raises:
      UsageError: the files cannot be written.
    """
    place, step = folder / MID_EPOCH, int(state.step)
    # A stage that is interrupted again before its next update has this very state saved already.
    there = newest(place, lambda path: (path, read_meta(path)))[0]
    if not totals.steps or (there is not None and there[0] == place / str(step)):
        return None
    keep = {step}
    if there is not None and there[1]["epoch"] == meta["epoch"]:
        # Deleted once this one is complete: the process may be killed before.
        keep.add(int(there[0].name))
    path = save_checkpoint(place, step, (state, totals), meta, keep=keep, checksums=checksums)
    prune(place, {step})
    return path


def _manager(folder: Path, keep: Collection[int] | None = None, cleanup: bool = False) -> Any:
    """Orbax's manager of a folder, for this process alone: no other one writes or waits."""
    alone, policies = jax.process_index(), ocp.checkpoint_managers
    options = ocp.CheckpointManagerOptions(
        create=False,
        save_root_metadata=False,
        lightweight_initialize=True,
        cleanup_tmp_directories=cleanup,
        # A checkpoint is complete before the run deletes what it replaces, and trains on.
        enable_async_checkpointing=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=alone, active_processes={alone}
        ),
        preservation_policy=policies.LatestN() if keep is None else policies.CustomSteps(keep),
    )
    return ocp.CheckpointManager(buckets.absolute(folder), options=options)


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    """Raises the errors of storage as OSError, and silences Orbax, which also logs them."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with buckets.bucket_errors():
            yield
    except ValueError as error:
        # Tensorstore's errors: the message holds the system's error code, or gRPC's as a word.
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        if re.match("[A-Z_]+: ", str(error)):
            raise OSError(errno.EIO, str(error).splitlines()[0]) from error
        raise
    finally:
        logger.setLevel(level)


def _make_room(folder: Path, needed: int) -> None:
    """Creates a local folder, and raises OSError if its disk has not as many bytes left."""
    if in_bucket(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        sizes = f"{needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free"
        raise OSError(errno.ENOSPC, f"No space left on device ({sizes})")


def _verified(path: Path) -> dict[str, Any]:
    """Verifies the files of a checkpoint; returns the description of its arrays, and its meta."""
    if not path.is_dir():
        raise DamagedCheckpointError(f"there is no checkpoint at {path}; choose another one")
    if complete := (path / MANIFEST).exists():
        _verify(path)
    about = _restore(path, meta=ocp.args.JsonRestore())["meta"]
    if about["checksums"] and not complete:
        raise _damaged(path, f"{MANIFEST} is missing")
    return about


def _read(path: Path, described: dict[str, Any]) -> dict[str, np.ndarray]:
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in described.items()}
    if any(array.size for array in arrays.values()):
        arrays |= _restore(path, state=ocp.args.PyTreeRestore())["state"]
    return arrays


def _restore(path: Path, **items: Any) -> Any:
    """Items of a checkpoint, read by Orbax, whose errors mean damage."""
    try:
        with _storage_errors(), _manager(path.parent) as manager:
            return manager.restore(int(path.name), args=ocp.args.Composite(**items))
    except (OSError, ValueError, KeyError) as error:
        if in_bucket(path) and isinstance(error, OSError) and error.errno == errno.EIO:
            raise UsageError(f"{path} cannot be read: {error.strerror}; try again") from error
        raise _damaged(path, f"{type(error).__name__}: {error}".splitlines()[0]) from error


def _hashes(path: Path) -> dict[str, list[Any]]:
    """Size and hash of every file but the manifest: SHA-256, or in a bucket its own hash."""
    if in_bucket(path):
        objects = buckets.bucket_files(path).items()
        found = {name: [x["size"], x.get("md5Hash") or x["crc32c"]] for name, x in objects}
    else:
        found = {}
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            with open(file, "rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            found[file.relative_to(path).as_posix()] = [file.stat().st_size, digest]
    return {name: value for name, value in found.items() if name != MANIFEST}


def _verify(path: Path) -> None:
    """Raises DamagedCheckpointError unless all files are those of the manifest."""
    try:
        manifest = files.read_json_with_checksum(path / MANIFEST, "it cannot be verified")
    except UsageError as error:
        raise _damaged(path, str(error)) from error
    found = _hashes(path)
    for name, (size, digest) in manifest["files"].items():
        if name not in found:
            raise _damaged(path, f"{name} is missing")
        if found[name][0] != size:
            raise _damaged(path, f"{name} has {found[name][0]} bytes instead of {size}")
        if found[name][1] != digest:
            raise _damaged(path, f"the content of {name} was changed")


def _damaged(path: Path, reason: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"the checkpoint {path} is damaged: {reason}; restore an earlier checkpoint, or rerun "
        "this stage"
    )


def _named_leaves(tree: Any) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "value"
        if name in named:
            raise ValueError(f"two entries of the tree have the name {name!r}; rename one")
        named[name] = leaf
    return named


def _array(name: str, leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError(f"{name} is a typed key; save jax.random.key_data of it")
    array = np.asarray(leaf)
    if array.dtype.hasobject or array.dtype.kind in "SU":
        raise ValueError(f"{name} is a {type(leaf).__name__}, not an array or a number")
    return array


def _like(leaf: Any, value: np.ndarray) -> Any:
    if isinstance(leaf, bool | int | float | complex):
        return value.item()
    return value[()] if isinstance(leaf, np.generic) else value


def _shape_dtype(leaf: Any) -> list[Any]:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return [list(leaf.shape), leaf.dtype.name]


def _check_structure(path: Path, stored: dict[str, Any], leaves: dict[str, Any]) -> None:
    def show(shape_dtype: list[Any] | None) -> str:
        if shape_dtype is None:
            return "nothing"
        return f"{shape_dtype[1]}[{','.join(map(str, shape_dtype[0]))}]"

    wanted = {name: _shape_dtype(leaf) for name, leaf in leaves.items()}
    names = [name for name in wanted | stored if wanted.get(name) != stored.get(name)]
    if names:
        lines = [
            f"{name}: {show(stored.get(name))} in the checkpoint, {show(wanted.get(name))} expected"
            for name in names[:_SHOWN]
        ]
        lines += [f"and {len(names) - _SHOWN} more"] * (len(names) > _SHOWN)
        raise UsageError(
            f"the checkpoint {path} belongs to another model or optimizer:\n  "
            + "\n  ".join(lines)
            + "\nuse the configuration it was written with, or start a new run"
        )
