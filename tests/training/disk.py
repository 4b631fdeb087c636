"""A real file system that is soon full."""

import contextlib
import os
import shutil
import subprocess

import pytest


def look_away(monkeypatch):
    """Lets the disk seem to have room, so that it turns out to be full in the middle of a write."""
    usage = shutil.disk_usage(".")._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


@contextlib.contextmanager
def small_disk(folder, megabytes):
    """`folder`, made and mounted with so much room; skips where that is not allowed."""
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root and mount")
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs"]
    done = subprocess.run([mount, *options, folder], capture_output=True)
    if done.returncode:
        pytest.skip(f"mount refused: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
