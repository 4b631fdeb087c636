"""Checkpoints that are complete or absent, and that are verified when they are read.

A checkpoint folder holds one folder per epoch:

    <epoch>/tree/          the arrays, written by Orbax
    <epoch>/meta.json      values that the caller stores with them
    <epoch>/manifest.json  size and SHA-256 of every file; name, shape and dtype of every array

`<stage>/mid_epoch/<updates>` holds the checkpoint of a run that was interrupted within an epoch:
the train state and the totals of that epoch. It is deleted once the epoch has its own checkpoint.
"""

import asyncio
import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from inmerge_jax.errors import UsageError
from inmerge_jax.files import (
    read_json_with_checksum,
    sync,
    sync_all,
    write_json,
    write_json_with_checksum,
)
from inmerge_jax.training.train_step import Totals, TrainState
from inmerge_jax.training.workdir import write_error

_TREE, _META, _MANIFEST = "tree", "meta.json", "manifest.json"
TEMPORARY = ".writing-"
MID_EPOCH = "mid_epoch"
_SEAL = "seal"
_SHOWN = 5
_REMEDY = "restore an earlier checkpoint, or rerun this stage"


class DamagedCheckpointError(UsageError):
    """A checkpoint is missing, or its files are not what was written."""


def save_checkpoint(folder: Path, epoch: int, tree: Any, meta: dict[str, Any]) -> Path:
    """Writes a checkpoint to `folder/<epoch>`, replacing an existing one; returns that path.

    The checkpoint is written to a temporary folder and renamed once it is complete, so a crash or
    a power failure leaves no partial checkpoint. The next save removes leftovers. Only one process
    may write at a time.

    Args:
      folder: folder of the checkpoints; created if missing.
      epoch: number of the epoch, 0 or more.
      tree: a pytree of arrays and Python numbers, stored bit for bit. Sharded arrays are gathered.
      meta: JSON-serializable values.

    Raises:
      UsageError: the files cannot be written, for example on a full disk. Nothing of this
        checkpoint remains, and earlier ones are untouched.
      ValueError: a leaf is not an array (for typed keys, use `jax.random.key_data`).
    """
    arrays = {name: _array(name, leaf) for name, leaf in _named_leaves(tree).items()}
    folder, path = Path(folder), Path(folder) / str(int(epoch))
    temporary = folder.absolute() / f"{TEMPORARY}{epoch}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_temporaries(folder)
        _check_room(folder, sum(array.nbytes for array in arrays.values()))
        temporary.mkdir()
        _write_arrays(temporary / _TREE, arrays)
        write_json(temporary / _META, meta)
        write_json_with_checksum(temporary / _MANIFEST, _manifest(temporary, arrays), _SEAL)
        sync_all(temporary)
        _put(temporary, path)
        sync(folder)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        _remove_temporaries(folder)
    return path


def restore_checkpoint(path: Path, template: Any) -> tuple[Any, dict[str, Any]]:
    """Restores the tree and the meta of a checkpoint, and verifies the checksums of all files.

    Args:
      path: path of the checkpoint, as returned by `save_checkpoint`.
      template: a pytree of the same structure. Its leaves (arrays, `jax.ShapeDtypeStruct`s or
        Python numbers) give shapes and dtypes. A leaf that is a jax array, or has a sharding, is
        restored as a jax array with the same placement; others as NumPy arrays or numbers.

    Raises:
      UsageError: the checkpoint has another structure; the message names the entries that differ.
      DamagedCheckpointError: the checkpoint or one of its files is missing, truncated or changed.
    """
    path = Path(path)
    manifest = _verify(path)
    leaves = _named_leaves(template)
    _check_structure(path, manifest["arrays"], leaves)
    arrays = _read_arrays(path / _TREE, manifest["arrays"])
    values = [_like(leaf, arrays[name]) for name, leaf in leaves.items()]
    tree = jax.tree.unflatten(jax.tree.structure(template), values)
    return tree, json.loads((path / _META).read_bytes())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, by their dotted path in the tree.

    Raises:
      DamagedCheckpointError: the checkpoint or one of its files is missing, truncated or changed.
    """
    path = Path(path)
    return _read_arrays(path / _TREE, _verify(path)["arrays"])


def read_meta(path: Path) -> dict[str, Any]:
    """The meta of a checkpoint; verifies only that file.

    Raises:
      DamagedCheckpointError: the checkpoint is missing, or meta.json is not what was written.
    """
    path = Path(path)
    _check_file(path, _META, *_read_manifest(path)["files"][_META])
    return json.loads((path / _META).read_bytes())


def latest_valid_checkpoint(folder: Path) -> tuple[Path | None, tuple[str, ...]]:
    """Finds the undamaged checkpoint of the highest epoch; verifies the checksums of all files.

    Returns:
      Its path, or None; and one message for each damaged checkpoint of a higher epoch.
    """
    damaged = []
    for epoch in reversed(checkpoint_epochs(folder)):
        try:
            _verify(Path(folder) / str(epoch))
        except DamagedCheckpointError as error:
            damaged.append(str(error))
        else:
            return Path(folder) / str(epoch), tuple(damaged)
    return None, tuple(damaged)


def checkpoint_epochs(folder: Path) -> list[int]:
    """The epochs of all checkpoints in `folder`, including damaged ones, in ascending order."""
    if not Path(folder).is_dir():
        return []
    names = [entry.name for entry in Path(folder).iterdir() if entry.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def prune(folder: Path, keep: Collection[int]) -> None:
    """Deletes the checkpoints in `folder` whose epoch is not in `keep`."""
    folder = Path(folder)
    for epoch in checkpoint_epochs(folder):
        if epoch not in keep:
            # Renamed first: an interrupted deletion would look like damage.
            os.rename(folder / str(epoch), folder / f"{TEMPORARY}old-{epoch}")
    _remove_temporaries(folder)


def _put(temporary: Path, path: Path) -> None:
    if not path.exists():
        os.rename(temporary, path)
        return
    old = path.with_name(f"{TEMPORARY}old-{path.name}")
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(old, path)
        raise


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


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        sizes = f"{needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free"
        raise OSError(errno.ENOSPC, f"No space left on device ({sizes})")


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    # Orbax refuses empty arrays; the manifest describes them completely.
    stored = {name: array for name, array in arrays.items() if array.size}
    if not stored:
        return
    try:
        with _quiet_orbax():
            _checkpointer().save(path, stored)
    except ValueError as error:
        # Tensorstore raises system errors as ValueError with the error code in the message.
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        raise


def _read_arrays(path: Path, expected: dict[str, Any]) -> dict[str, np.ndarray]:
    arrays = {
        name: np.zeros(shape, dtype) for name, (shape, dtype) in expected.items() if 0 in shape
    }
    if len(arrays) < len(expected):
        with _quiet_orbax():
            arrays |= _checkpointer().restore(path.absolute())
    return arrays


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp
    from orbax.checkpoint.type_handlers import create_type_handler_registry

    # Weights hardly compress: zarr 2 in OCDBT without compression is the fastest of the eight
    # combinations to write and to read, and has few files. Only one process of a run writes; by
    # default Orbax would wait for all of them.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True,
        use_zarr3=False,
        use_compression=False,
        multiprocessing_options=alone,
        type_handler_registry=create_type_handler_registry((np.ndarray, _handler())),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


@functools.cache
def _handler() -> Any:
    """Orbax's handler of NumPy arrays; after an error it waits for the remaining writes.

    The original returns at the first error. The remaining writes then recreate folders that were
    removed, and asyncio reports that nothing awaits them.
    """
    from orbax.checkpoint.type_handlers import NumpyHandler

    class PatientNumpyHandler(NumpyHandler):
        async def _background_serialize(self, *args: Any, **kwargs: Any) -> None:
            try:
                await super()._background_serialize(*args, **kwargs)
            finally:
                # The event loop belongs to this save.
                others = asyncio.all_tasks() - {asyncio.current_task()}
                await asyncio.gather(*others, return_exceptions=True)

    return PatientNumpyHandler()


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    # Orbax's writer threads log the traceback twice before the same error is raised here.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _manifest(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {
        "files": {file.relative_to(path).as_posix(): _fingerprint(file) for file in files},
        "arrays": {name: [list(array.shape), array.dtype.name] for name, array in arrays.items()},
    }


def _fingerprint(file: Path) -> tuple[int, str]:
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return file.stat().st_size, digest


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise DamagedCheckpointError(f"there is no checkpoint at {path}; choose another one")
    file = path / _MANIFEST
    if not file.is_file():
        raise _damaged(path, f"{_MANIFEST} is missing")
    try:
        return read_json_with_checksum(file, _REMEDY, key=_SEAL, required=True)
    except UsageError as error:
        raise DamagedCheckpointError(f"the checkpoint {path} is damaged: {error}") from error


def _verify(path: Path) -> dict[str, Any]:
    manifest = _read_manifest(path)
    for name, (size, digest) in manifest["files"].items():
        _check_file(path, name, size, digest)
    return manifest


def _check_file(path: Path, name: str, size: int, digest: str) -> None:
    file = path / name
    if not file.is_file():
        raise _damaged(path, f"{name} is missing")
    found_size, found_digest = _fingerprint(file)
    if found_size != size:
        raise _damaged(path, f"{name} has {found_size} bytes instead of {size}")
    if found_digest != digest:
        raise _damaged(path, f"the content of {name} was changed")


def _damaged(path: Path, reason: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"the checkpoint {path} is damaged: {reason}; {_REMEDY}")


def _check_structure(path: Path, stored: dict[str, Any], leaves: dict[str, Any]) -> None:
    wanted = {name: _shape_dtype(leaf) for name, leaf in leaves.items()}
    problems = [
        *(f"{name}: only in the checkpoint" for name in stored if name not in wanted),
        *(f"{name}: not in the checkpoint" for name in wanted if name not in stored),
        *(
            f"{name}: {_describe(stored[name])} in the checkpoint, "
            f"{_describe(wanted[name])} expected"
            for name in wanted
            if name in stored and stored[name] != wanted[name]
        ),
    ]
    if problems:
        more = len(problems) - _SHOWN
        lines = [*problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]
        raise UsageError(
            f"the checkpoint {path} belongs to another model or optimizer:\n  "
            + "\n  ".join(lines)
            + "\nuse the configuration it was written with, or start a new run"
        )


def _shape_dtype(leaf: Any) -> list[Any]:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return [list(leaf.shape), leaf.dtype.name]


def _describe(shape_dtype: list[Any]) -> str:
    shape, dtype = shape_dtype
    return f"{dtype}[{','.join(map(str, shape))}]"


def _like(leaf: Any, value: np.ndarray) -> Any:
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, jax.Array):
        return jax.device_put(value, sharding if leaf.committed else None)
    if sharding is not None:
        return jax.device_put(value, sharding)
    if isinstance(leaf, bool | int | float | complex):
        return value.item()
    return value[()] if isinstance(leaf, np.generic) else value


def _remove_temporaries(folder: Path) -> None:
    if not folder.is_dir():
        return
    for left in list(folder.glob(f"{TEMPORARY}*")):
        shutil.rmtree(left, ignore_errors=True)


class RestorePoint(NamedTuple):
    """The point from which a stage trains.

    Attributes:
      state: train state, in NumPy arrays.
      epochs: number of finished epochs.
      totals: sums over the finished updates of the next epoch; `totals.steps` is their number.
      seconds: duration of these updates.
      warnings: the stage's warnings so far.
      history_sha256: hash of the records of metrics.jsonl at the last finished epoch; None at epoch
        0, or if the checkpoint was written by a version that did not store it.
      damaged: one message for each damaged checkpoint that was passed over.
    """

    state: TrainState
    epochs: int
    totals: Totals
    seconds: float
    warnings: list[str]
    history_sha256: str | None = None
    damaged: tuple[str, ...] = ()


def restore_latest(folder: Path, fresh: TrainState, zeros: Totals) -> RestorePoint:
    """Restores the newest undamaged checkpoint of a stage, or its initial state.

    Args:
      folder: the stage's folder.
      fresh: the state before the stage's first update, in NumPy arrays.
      zeros: the totals of no step.

    Raises:
      UsageError: the checkpoint belongs to another model or optimizer.
    """
    checkpoints = folder / "checkpoints"
    path, damaged = latest_valid_checkpoint(checkpoints)
    found, start = list(damaged), RestorePoint(fresh, 0, zeros, 0.0, [])
    if path is not None:
        state, meta = restore_checkpoint(path, fresh)
        try:
            restore_checkpoint(checkpoints / str(meta["best_epoch"]), fresh)
            noted = meta.get("history_sha256")
            start = RestorePoint(state, meta["epoch"], zeros, 0.0, meta["warnings"], noted)
        except DamagedCheckpointError as error:
            found.append(str(error))

    path, damaged = latest_valid_checkpoint(folder / MID_EPOCH)
    found += damaged
    if path is not None and read_meta(path)["epoch"] == start.epochs + 1:
        (state, totals), meta = restore_checkpoint(path, (fresh, zeros))
        start = start._replace(
            state=state, totals=totals, seconds=meta["seconds"], warnings=meta["warnings"]
        )
    return start._replace(damaged=tuple(found))


def save_preemption_checkpoint(
    folder: Path,
    epoch: int,
    totals: Totals,
    seconds: float,
    warnings: list[str],
    state: TrainState,
) -> Path | None:
    """Saves the state within an epoch; returns the checkpoint's path, None if it was there.

    Args:
      folder: the stage's folder.
      epoch: 1-based number of the epoch.
      totals: sums over the updates of the epoch so far, in NumPy arrays.
      seconds: duration of these updates.
      warnings: the stage's warnings so far.
      state: after the last of these updates, in NumPy arrays.

    Raises:
      UsageError: the files cannot be written.
    """
    mid_epoch, updates = folder / MID_EPOCH, int(state.step)
    # A stage that is interrupted again before its next update has this very state saved already.
    if not totals.steps or latest_valid_checkpoint(mid_epoch)[0] == mid_epoch / str(updates):
        return None
    meta = {"epoch": epoch, "seconds": seconds, "warnings": warnings}
    path = save_checkpoint(mid_epoch, updates, (state, totals), meta)
    prune(mid_epoch, {updates})
    return path


def delete_preemption_checkpoint(folder: Path) -> None:
    """Deletes the checkpoints within an epoch, once the epoch's own checkpoint is saved."""
    prune(folder / MID_EPOCH, ())
