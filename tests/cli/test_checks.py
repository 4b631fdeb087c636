"""Runs in environments that people have, and what is refused before any training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inmerge_jax.buckets import as_path
from inmerge_jax.cli import checks
from inmerge_jax.cli.train import main
from inmerge_jax.errors import UsageError

REPOSITORY = Path(__file__).parents[2]
BARE_SYSTEM = """
import importlib, os, pkgutil, pwd, signal, sys

# As on Windows.
sys.modules["fcntl"] = sys.modules["resource"] = None
del signal.pthread_sigmask

# As a user of a container that has no entry in the password database.
def unknown(_):
    raise KeyError
pwd.getpwuid = unknown

import inmerge_jax
for module in pkgutil.walk_packages(inmerge_jax.__path__, "inmerge_jax."):
    importlib.import_module(module.name)
from inmerge_jax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
OPTIONS = (
    "--size 16 --phantom.train 32 --phantom.val 1 --phantom.test 32 --model vgg11 --width 0.05 "
    "--skip 4 --batch-size 16 --epochs 2 --merging-epochs 1 --arms backbone --devices 1"
).split()


def python(*arguments, without=(), **variables):
    """Runs Python from another folder, as from a notebook's cell that starts a command."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    for name in without:
        env.pop(name, None)
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def bare_run(tmp_path_factory):
    """A run without a home, fcntl, a backend or UTF-8, and with one class in validation."""
    folder = tmp_path_factory.mktemp("bare") / "run"
    done = python(
        *("-c", BARE_SYSTEM, "train", *OPTIONS, "--output", str(folder)),
        without=["HOME"],
        MPLBACKEND="module://missing.backend",
        LC_ALL="C",
        PYTHONCOERCECLOCALE="0",
        PYTHONUTF8="0",
        PYTHONIOENCODING="ascii",
    )
    return folder, done


@pytest.mark.long
def test_a_run_needs_no_home_no_backend_no_unix_module_and_no_utf_8(bare_run):
    folder, done = bare_run
    assert done.returncode == 0, done.stderr
    assert "no home folder: downloads and compiled programs stay in " in done.stderr
    assert "has no locks: start no second process there" in done.stderr
    assert "mean \\xb1 sd over seeds" in done.stdout and done.stdout.isascii()
    assert "±" in (folder / "table.md").read_text() and (folder / "report.html").exists()
    home = done.stderr.split("programs stay in ")[1].split()[0]
    assert not Path(home).exists()


@pytest.mark.long
def test_a_log_file_has_a_line_per_epoch(bare_run):
    lines = [line for line in bare_run[1].stdout.splitlines() if "val loss" in line]
    names = ["seed 0 backbone 1/2", "seed 0 backbone 2/2"]
    assert [line.split("  ")[0] for line in lines] == names


@pytest.mark.long
def test_with_one_class_in_validation_the_loss_selects_the_epoch_and_the_run_says_so(bare_run):
    folder, done = bare_run
    said = "their AUC is undefined; the epoch with the lowest validation loss is tested"
    assert f"{said}\n" in done.stdout and done.stdout.count(said) == 1
    assert said in (folder / "report.html").read_text()
    stage = folder / "seed0" / "backbone"
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines]
    assert [line["val_auc"] for line in lines] == [None, None] and losses[0] != losses[1]
    result = json.loads((stage / "result.json").read_text())
    assert result["best_epoch"] == 1 + losses.index(min(losses))
    assert any(said in warning for warning in result["warnings"])


MISSING = """
import sys
from inmerge_jax.cli import checks

def taken(*tops):
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in tops}

for package in sys.argv[1:]:
    taken("inmerge_jax")
    kept = taken(package)
    sys.modules[package] = None
    try:
        checks.require_modules(*checks.RUN_MODULES)
    except ValueError as error:
        print(error)
    del sys.modules[package]
    sys.modules.update(kept)
"""


@pytest.mark.long
def test_a_missing_package_is_named_with_its_remedy():
    names = ("matplotlib", "jinja2", "rich", "sklearn", "orbax", "flax", "filelock")
    done = python("-c", MISSING, *names)
    lines = done.stdout.splitlines()
    assert len(lines) == len(names), done.stdout + done.stderr
    for name, line in zip(names, lines, strict=True):
        assert line.startswith(f"the package {name} cannot be imported ("), line
        assert line.endswith('pip install "inmerge-jax[train]"'), line


def test_packages_are_checked_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "inmerge_jax.reporting.html_report", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["--output", str(tmp_path / "run"), "--compilation-cache-dir", "None"]) == 2
    assert capsys.readouterr().err.startswith("error: the package jinja2 cannot be imported")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    output = str(tmp_path / "file" / "run")
    monkeypatch.setattr("inmerge_jax.training.run_spec.load_dataset", pytest.fail)
    assert main(["--output", output, "--compilation-cache-dir", "None"]) == 2
    words = f"error: --output {output}: cannot write {tmp_path / 'file'}: Not a directory; give"
    assert words in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match=f"cannot write {tmp_path}: Permission denied"):
        checks.require_writable(tmp_path / "new" / "run")
    assert checks.require_writable(as_path("gs://bucket/run")) is None


def test_folders_that_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (".", "run", "runs/new", tmp_path / "new"):
        assert checks.require_writable(Path(folder)) is None
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_the_encoding_lacks_is_refused(tmp_path):
    name = os.fsdecode(b"l\xc3\xa4uft").encode().decode("ascii", "surrogateescape")
    with pytest.raises(UsageError, match=r"l\\udcc3\\udca4uft'.* PYTHONUTF8=1, or choose a name"):
        checks.require_writable(tmp_path / name)


def test_a_backend_that_is_installed_stays_chosen():
    code = "import inmerge_jax.reporting, matplotlib; print(matplotlib.get_backend())"
    assert python("-c", code, MPLBACKEND="svg").stdout == "svg\n"
