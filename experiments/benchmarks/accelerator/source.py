"""Which source code a result belongs to, also where the code was copied without its history."""

import hashlib
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[3]
_FOLDERS = ("inmerge_jax", "experiments")
_COMMITS = 200


def source_digest(root: Path = ROOT) -> str:
    """SHA-256 over the names and contents of all Python files that a measurement may import."""
    files = sorted(path for folder in _FOLDERS for path in (root / folder).rglob("*.py"))
    return _digest({path.relative_to(root).as_posix(): _blob(path.read_bytes()) for path in files})


def commit_of(digest: str, root: Path = ROOT) -> str | None:
    """The newest commit of the checkout, of the last 200, whose files have this digest.

    None where there is no such commit: the code had changes, or belongs to another checkout.
    """
    for commit in _git(root, "rev-list", f"--max-count={_COMMITS}", "HEAD").split():
        blobs = {}
        for line in _git(root, "ls-tree", "-r", commit, "--", *_FOLDERS).splitlines():
            described, path = line.split("\t")
            if path.endswith(".py"):
                blobs[path] = described.split()[2]
        if _digest(blobs) == digest:
            return commit
    return None


def _digest(blobs: Mapping[str, str]) -> str:
    lines = "".join(f"{blob} {path}\n" for path, blob in sorted(blobs.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _blob(data: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
    )
    return done.stdout
