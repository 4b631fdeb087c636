"""What a run needs up to its end, checked or provided before it starts."""

import atexit
import importlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

from inmerge_jax.buckets import in_bucket
from inmerge_jax.errors import UsageError

RUN_MODULES = (
    "inmerge_jax.training.experiment",
    "inmerge_jax.reporting.html_report",
    "inmerge_jax.reporting.runs",
    "inmerge_jax.reporting.tables",
    "orbax.checkpoint",
    "filelock",
)
"""Modules that import every package that a run uses up to its report, or late in it."""


def require_modules(*names: str) -> None:
    """Imports modules; raises UsageError with the remedy if a package that they need is missing."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            package = (error.name or name).partition(".")[0]
            raise UsageError(
                f"the package {package} cannot be imported ({error}); install what training and "
                'its report need: pip install "inmerge-jax[train]"'
            ) from error


def require_writable(folder: Path) -> None:
    """Checks that a run can write its folder, which need not exist.

    Raises:
      UsageError: the folder, or the first existing one above it, cannot be written; or its name
        cannot be passed to Orbax, which needs UTF-8.
    """
    if in_bucket(folder):
        return
    place = folder.absolute()
    try:
        str(place).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"`output` {str(folder)!a}: the name has characters outside this system's encoding "
            f"{sys.getfilesystemencoding()}; set PYTHONUTF8=1, or choose a name of ASCII characters"
        ) from error
    while not place.exists():
        place = place.parent
    reason = "" if os.access(place, os.W_OK | os.X_OK) else "Permission denied"
    if reason := reason if place.is_dir() else "Not a directory":
        raise UsageError(
            f"`output` {folder}: cannot write {place}: {reason}; give rights there, or choose "
            "another folder"
        )


def prepare_process() -> None:
    """Configures this process: allocator, output encoding, home folder.

    The allocator comes first, see `configure_malloc`.
    Characters that the encoding of stdout or stderr lacks are escaped. In a container, a user
    without HOME and without an entry in the password database gets a temporary home folder.
    """
    from inmerge_jax.training.environment import configure_malloc

    configure_malloc()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # Not in a notebook.
            stream.reconfigure(errors="backslashreplace")
    try:
        Path.home()
    except RuntimeError:
        home = tempfile.mkdtemp(prefix="inmerge-")
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        os.environ["HOME"] = home
        print(
            f"no home folder: downloads and compiled programs stay in {home} until the end of the "
            "run; set HOME to keep them",
            file=sys.stderr,
        )
