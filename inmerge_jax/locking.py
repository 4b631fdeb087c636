"""One process at a time writes a folder: a lock of the system's, which ends with its process."""

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
"""The file in the folder that is locked; that it is there says nothing."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def lock(folder: Path, say: Callable[[str], None] = warnings.warn) -> Iterator[None]:
    """Keeps other processes, and other calls, from holding `folder` until the block ends.

    Args:
      folder: created where absent.
      say: told where the file system has no locks, and nothing is kept from anybody.

    Raises:
      UsageError: another process holds it; it is named.
      OSError: the folder or the file of the lock cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    handle = _acquire(path, say)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        # Removed before it is let go, so that nobody removes the file of the next one.
        path.unlink(missing_ok=True)
        os.close(handle)


def require_free(folder: Path) -> None:
    """Raises UsageError where another process holds the folder; leaves no file behind."""
    path = folder / LOCK
    if path.is_file():
        handle = os.open(path, os.O_RDWR)
        try:
            _lock(path, handle)
        finally:
            os.close(handle)


def _acquire(path: Path, say: Callable[[str], None]) -> int:
    """The open file, locked and still at its place."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _lock(path, handle)
        except BaseException:
            os.close(handle)
            raise
        if not locked:
            say(f"the file system of {path.parent} has no locks: start nothing else there")
            return handle
        if _is_at(handle, path):
            return handle
        os.close(handle)  # Who held it has removed it meanwhile.


def _lock(path: Path, handle: int) -> bool:
    """Whether the open file is locked now; the file system may have no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        other = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
        raise UsageError(
            f"{path.parent} is in use: {other} writes there now; wait until it has ended, or "
            "choose another folder"
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
