"""A run's folder belongs to one process at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inmerge_jax import locking
from inmerge_jax.training.runfolder import CONFIG, cannot_write, check_open, open_run


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
    locking.require_free(folder)
    check_open(folder, config, resume=resume, overwrite=overwrite)
    with hold(folder):
        yield open_run(folder, config, resume=resume, overwrite=overwrite)


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """`locking.hold`, of which a folder that cannot be written is bad input."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locking.hold(folder))
        except OSError as error:
            raise cannot_write(folder, error, begun=(folder / CONFIG).exists()) from error
        yield
