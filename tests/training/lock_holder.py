"""A process that holds a lock while a test tries to take it."""

import contextlib
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


@contextlib.contextmanager
def another_process(script, *arguments):
    """Runs `script`, from the moment that it prints "held"; it is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()
