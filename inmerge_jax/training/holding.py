"""One process at a time writes a folder.

The lock is the system's, on the file `.lock` in there. It ends with the process, however that ends,
so the file may stay; it says who held it last.
"""

import contextlib
import errno
import fcntl
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from inmerge_jax.errors import InputError
from inmerge_jax.training.runfolder import LOCK, cannot_write, check_open, open_run

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def hold_run(
    folder: Path | str, config: dict[str, Any], *, resume: bool = False, overwrite: bool = False
) -> Iterator[Path]:
    """`open_run` of a folder that is this process's alone until the block ends.

    Raises:
      InputError: another process holds it; else see `open_run`.
    """
    folder = Path(folder)
    # Asked first, because a refused start leaves the folder as it is, without a lock in it.
    _require_free(folder)
    check_open(folder, config, resume=resume, overwrite=overwrite)
    with hold(folder):
        yield open_run(folder, config, resume=resume, overwrite=overwrite)


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keeps other processes, and other calls, from holding `folder` until the block ends.

    Args:
      folder: created where absent.

    Raises:
      InputError: another process holds it, which is named; or it can't be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / LOCK, "a+"))
            _lock(folder, file)
            file.truncate(0)
            file.write(f"{os.getpid()} on {platform.node()}\n")
            file.flush()
        except OSError as error:
            raise cannot_write(folder, error) from error
        yield


def _require_free(folder: Path) -> None:
    path = folder / LOCK
    if path.is_file():
        with open(path) as file:
            _lock(folder, file)


def _lock(folder: Path, file: IO[str]) -> None:
    """Locks the open file until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise InputError(
            f"{folder} is in use: process {file.read().strip()} writes it; wait until that ends, "
            "or choose another folder"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"{folder}: its file system has no locks ({error.strerror}); see to it yourself that "
            "nothing else writes there",
            stacklevel=2,
        )
