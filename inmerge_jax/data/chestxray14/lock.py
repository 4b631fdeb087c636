"""One build at a time: two would delete each other's records."""

import contextlib
import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from inmerge_jax.errors import InputError

LOCK = ".building"


@contextlib.contextmanager
def only_build(output: Path, console: Console) -> Iterator[None]:
    """Holds the lock of a build's output folder, which is made where absent.

    The system lets go of it when the process ends, however that comes about.

    Raises:
      InputError: another process builds there; it is named.
      OSError: the folder or the file of the lock cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / LOCK
    handle = _acquire(path, output, console)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        # Removed before it is let go, so that nobody removes the file of the next build.
        path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path, output: Path, console: Console) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            other = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
            os.close(handle)
            raise InputError(
                f"--output {output}: {other} builds there now; wait until it has ended, or choose "
                "another folder"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                os.close(handle)
                raise
            console.print(
                f"the file system of {output} has no locks: start no second build there",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            return handle
        if _is_at(handle, path):
            return handle
        os.close(handle)  # The build that held it has removed it meanwhile.


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
