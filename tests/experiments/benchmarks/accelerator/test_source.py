"""The digest of the source finds its commit, also where the history was left behind."""

import shutil
import subprocess

import pytest

from experiments.benchmarks.accelerator.source import commit_of, source_digest


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    (root / "inmerge_jax" / "data").mkdir(parents=True)
    (root / "inmerge_jax" / "data" / "a.py").write_text("A = 1\n")
    (root / "README.md").write_text("one\n")

    def git(*words):
        identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
        done = subprocess.run(
            ["git", "-C", str(root), *identity, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    return root, git


def test_a_copy_without_history_has_the_digest_of_its_commit(checkout, tmp_path):
    root, git = checkout
    first = git("rev-parse", "HEAD")
    copy = shutil.copytree(root, tmp_path / "copy", ignore=shutil.ignore_patterns(".git"))
    assert commit_of(source_digest(copy), root) == first
    (root / "inmerge_jax" / "b.py").write_text("B = 2\n")
    git("add", "-A")
    git("commit", "-qm", "second")
    assert commit_of(source_digest(copy), root) == first
    assert commit_of(source_digest(root), root) == git("rev-parse", "HEAD")


def test_text_that_is_no_code_does_not_count(checkout):
    root, git = checkout
    before = source_digest(root)
    (root / "README.md").write_text("two\n")
    assert source_digest(root) == before
    git("commit", "-qam", "text")
    assert commit_of(before, root) == git("rev-parse", "HEAD")


@pytest.mark.parametrize("change", ["content", "name"])
def test_changed_code_has_no_commit(change, checkout):
    root, _ = checkout
    path = root / "inmerge_jax" / "data" / "a.py"
    if change == "content":
        path.write_text("A = 2\n")
    else:
        path.rename(path.with_name("c.py"))
    assert commit_of(source_digest(root), root) is None
