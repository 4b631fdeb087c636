"""The command from its start to its imported results, in processes of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from experiments.benchmarks.accelerator import command, page
from experiments.benchmarks.accelerator.command import main
from experiments.benchmarks.accelerator.grids import GRIDS
from experiments.benchmarks.accelerator.session import PARTS, read_part
from experiments.study import archive
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_json

ROOT = Path(__file__).parents[4]
OPTIONAL = ("filelock", "grain", "tensorflow_datasets", "medmnist")
# Importing what the command may not need fails.
BLOCKED = """
import runpy, sys
for name in {blocked}:
    sys.modules[name] = None
runpy.run_module("experiments.accelerator", run_name="__main__", alter_sys=True)
"""


def required(names):
    """Distributions and, in turn, those that they require, without extras."""
    found, waiting = set(), list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        for requirement in map(Requirement, metadata.requires(name) or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def test_the_command_starts_with_the_documented_packages():
    page = (ROOT / "docs" / "performance.md").read_text()
    listed = re.search(r"^- `(jax [^`]*)`", page, re.MULTILINE)[1].split()
    # Of PyTorch, SciPy asks whether sys.modules has it.
    documented = required([*listed, "torch"])
    blocked = {
        module
        for module, packages in metadata.packages_distributions().items()
        if documented.isdisjoint(map(canonicalize_name, packages))
        and not module.startswith(("_", "inmerge_jax"))
    }
    assert "grain" in blocked
    started = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(blocked=blocked), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert started.returncode == 0, started.stderr


def start(folder, *words, minutes=5):
    command = ["--tiny", "--grid", "phantom", "--minutes", str(minutes), "--output", str(folder)]
    command += ["--cache", os.environ["JAX_COMPILATION_CACHE_DIR"]]
    return subprocess.Popen(
        [sys.executable, "-c", BLOCKED.format(blocked=OPTIONAL), *command, *words],
        cwd=ROOT,
        # Most of the time would go into compilers: PyTorch's does nothing, XLA's does not optimize.
        env={
            **os.environ,
            "TORCHDYNAMO_DISABLE": "1",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder of results from a run that was killed and continued; both outputs."""
    folder = tmp_path_factory.mktemp("accelerator")
    process = start(folder)
    for _ in range(1200):
        part = read_part(folder, "correctness")
        if (part and len(part["cases"]) >= 3) or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    first = process.communicate()[0]
    kept = read_part(folder, "correctness")["cases"]
    process = start(folder)
    second = process.communicate()[0]
    assert process.returncode == 0, second
    return folder, first, kept, second


@pytest.mark.long
def test_a_run_that_is_cut_off_is_continued(measured):
    folder, first, kept, second = measured
    assert len(kept) >= 3
    found = read_part(folder, "correctness")["cases"]
    for name, case in kept.items():
        assert found[name] == case
        assert f"correctness: {name} (" in first and f"correctness: {name} (" not in second


@pytest.mark.long
def test_all_parts_are_measured_and_summarised(measured):
    folder, _, _, second = measured
    for part in PARTS:
        found = read_part(folder, part)
        assert found["cases"] and not found["failed"] and not found["skipped"], part
        assert found["devices"] == 8 and found["tiny"] is True
    lines = page.summary(folder)
    assert second.splitlines()[-len(lines) :] == lines and len(lines) <= page.LINES
    files = [path for path in folder.iterdir() if path.is_file()]
    assert len(files) <= 8 and max(path.stat().st_size for path in files) < 16 * 2**20


@pytest.mark.long
def test_results_are_imported(measured, tmp_path, monkeypatch):
    folder, *_ = measured
    with pytest.raises(UsageError, match="tiny sizes"):
        page.import_folder(folder, tmp_path)
    monkeypatch.setattr(page, "commit_of", lambda digest: None)
    with pytest.raises(UsageError, match="none of this checkout's last commits"):
        page.import_folder(folder, tmp_path, tiny=True)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(page, "commit_of", lambda digest: "c" * 40)
    assert page.import_folder(folder, tmp_path, tiny=True) == 0
    (place,) = (tmp_path / "accelerator").iterdir()
    assert place.name == "cpu-cccccccccc"
    for part in page.PUBLISHED:
        stored = json.loads((place / f"{part}.json").read_bytes())
        assert stored["commit"] == "c" * 40 and "command" not in stored["environment"]
    stored = archive.read(tmp_path)
    trials = list(GRIDS["phantom"].trials())
    assert {trial.hash for trial in trials} == set(stored.records)
    scores = stored.scores(trials[0])
    assert scores.dtype == np.float32 and np.isfinite(scores).all()
    assert "TINY SIZES" in page.markdown(tmp_path)


@pytest.mark.long
def test_a_folder_of_mixed_results_is_not_imported(measured, tmp_path):
    folder, *_ = measured
    for part in ("merge", "step"):
        write_json(tmp_path / f"{part}.json", read_part(folder, part))
    other = {**read_part(folder, "correctness"), "source": "d" * 64}
    write_json(tmp_path / "correctness.json", other)
    with pytest.raises(UsageError, match="of other source code or another device"):
        page.import_folder(tmp_path, tmp_path / "results", tiny=True)
    with pytest.raises(UsageError, match="holds no results"):
        page.import_folder(tmp_path / "nothing", tmp_path / "results", tiny=True)


@pytest.mark.long
def test_the_time_ends_the_run(tmp_path):
    began = time.monotonic()
    process = start(tmp_path, minutes=0.2)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert time.monotonic() - began < 60
    assert "the time is over" in output or "skipped in" in output
    assert read_part(tmp_path, "correctness")["cases"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "0"], "--minutes 0: choose a positive number"),
        (["--minutes", "nan"], "--minutes nan: choose a positive number"),
        (
            ["--grid", "none"],
            "--grid none: unknown; choose one of medmnist, small, learning_rates, pretrained",
        ),
        (["--data-dir", "missing"], "breastmnist.npz is missing; give the folder"),
        (["--import", "missing"], "missing holds no results"),
    ],
)
def test_bad_input_is_refused_before_any_time_is_spent(words, message, tmp_path, capsys):
    began = time.monotonic()
    assert main(["--output", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert time.monotonic() - began < 5
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_folder_of_another_commit_is_refused(measured, tmp_path, capsys):
    folder, *_ = measured
    write_json(tmp_path / "merge.json", {**read_part(folder, "merge"), "source": "d" * 64})
    assert main(["--tiny", "--grid", "phantom", "--output", str(tmp_path)]) == 2
    assert "merge.json has source dddd" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["merge.json"]


@pytest.mark.parametrize(
    ("given", "used"), [("cuda", "cuda,cpu"), ("tpu,cpu", "tpu,cpu"), ("", ""), (None, None)]
)
def test_the_cpu_is_there_as_reference_where_platforms_are_named(given, used, monkeypatch):
    config = type("Config", (), {"jax_platforms": given})()
    config.update = lambda name, value: setattr(config, name, value)
    monkeypatch.setattr(command.jax, "config", config)
    command._include_cpu()
    assert config.jax_platforms == used
