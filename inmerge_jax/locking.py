"""Advisory folder lock (flock), released when the process exits."""

import contextlib
import errno
import fcntl
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from inmerge_jax.errors import UsageError

LOCK = ".lock"
"""Name of the locked file; its existence alone does not mean that the folder is locked."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def lock(folder: Path, say: Callable[[str], None] = warnings.warn) -> Iterator[None]:
    """Holds an exclusive lock on `folder` while the context is open.

    Args:
      folder: the folder; created if missing.
      say: receives a warning if the file system has no locks; the context opens without one.

    Raises:
      UsageError: another process holds the lock; the message names it.
      OSError: the folder or the lock file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    handle = _acquire(path, say)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        # Removed before the release, so that the next holder's file is not removed.
        path.unlink(missing_ok=True)
        os.close(handle)


def require_free(folder: Path) -> None:
    """Raises UsageError if another process holds the lock; creates no file."""
    path = folder / LOCK
    if path.is_file():
        handle = os.open(path, os.O_RDWR)
        try:
            _lock(path, handle)
        finally:
            os.close(handle)


def _acquire(path: Path, say: Callable[[str], None]) -> int:
    """Opens and locks the file; returns its descriptor."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _lock(path, handle)
        except BaseException:
            os.close(handle)
            raise
        if not locked:
            say(f"the file system of {path.parent} has no locks: start no second process there")
            return handle
        if _is_at(handle, path):
            return handle
        os.close(handle)  # The previous holder has removed it.


def _lock(path: Path, handle: int) -> bool:
    """Locks the open file; returns False if the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        other = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
        raise UsageError(
            f"{path.parent} is in use: {other} writes there; wait until it has ended, or choose "
            "another folder"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
