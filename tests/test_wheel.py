"""The built wheel is enough for the command `inmerge`, outside the checkout."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment with the wheel; dependencies come from the one that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")

    def run(*command):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", "dist", str(ROOT))
    (wheel,) = (folder / "dist").glob("inmerge_jax-*.whl")
    run(sys.executable, "-m", "venv", "env")
    python = folder / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel))
    (installed,) = folder.glob("env/lib/python*/site-packages")
    # After the environment's own packages, and without the editable install of the checkout.
    (installed / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def inmerge(folder, *arguments):
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    command = [folder / "env" / "bin" / "inmerge", *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_quickstart_runs_from_the_wheel(environment):
    where = "import inmerge_jax; print(inmerge_jax.__file__)"
    python = environment / "env" / "bin" / "python"
    found = subprocess.run([python, "-c", where], cwd=environment, capture_output=True, text=True)
    assert found.stdout.startswith(str(environment)), found.stdout + found.stderr
    done = inmerge(environment, "quickstart")
    assert done.returncode == 0, done.stdout + done.stderr
    run = environment / "runs" / "quickstart"
    assert {"results.json", "report.html", "table.md"} <= {path.name for path in run.iterdir()}
    again = inmerge(environment, "report", "runs/quickstart")
    assert again.returncode == 0 and "report.html" in again.stdout
    exported = inmerge(environment, "export", "runs/quickstart", "--to", "weights.safetensors")
    assert exported.returncode == 0 and (environment / "weights.safetensors").exists()
