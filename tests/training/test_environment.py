"""What a process runs on, and what of it may change a training's bits."""

import copy
import json
import shlex
import subprocess
import sys

import jax
import pytest

from inmerge_jax.training.environment import _git, diff_environments, environment, processor

TRAINING = (
    "--data phantom --phantom.train 64 --phantom.val 32 --phantom.test 32 --model vgg11 "
    "--width 0.05 --skip 4 --epochs 1 --merging-epochs 1 --batch-size 32 --devices 1"
)


@pytest.mark.long
def test_a_second_start_of_a_training_command_compiles_nothing(tmp_path):
    command = [sys.executable, "-m", "inmerge_jax.cli.main", "train", *TRAINING.split()]
    command += ["--compilation-cache-dir", str(tmp_path / "cache")]
    programs = []
    for run in ("first", "second"):
        subprocess.run([*command, "--output", str(tmp_path / run)], check=True, cwd=tmp_path)
        # Every program that is compiled is stored, see `enable_compilation_cache`.
        programs.append({path.name for path in (tmp_path / "cache").glob("*-cache")})
    assert programs[0] == programs[1] != set()


def test_environment_describes_this_process():
    found = json.loads(json.dumps(environment()))
    assert found["packages"]["jax"] == jax.__version__ and "orbax-checkpoint" in found["packages"]
    assert found["devices"] == {"backend": "cpu", "count": 8, "kinds": ["cpu"], "processes": 1}
    assert found["command"] == shlex.join(sys.orig_argv)
    assert found["variables"]["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (
            "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n"
            "flags\t\t: sse avx avx2 fma\n\nprocessor\t: 1\nmodel name\t: Other\n",
            "AMD EPYC, family 25, model 1, avx2",
        ),
        ("model name : Xeon\nflags : avx avx2 avx512f\n", "Xeon, avx512f"),
        ("processor : 0\nCPU part : 0xd0c\n", None),
        (None, None),
    ],
)
def test_processor(tmp_path, cpuinfo, expected):
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert processor(tmp_path / "cpuinfo") == expected


def test_git_commit_and_dirt(tmp_path):
    def git(*words):
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    unknown = {"commit": None, "dirty": None}
    assert _git(tmp_path) == unknown
    git("init", "-q")
    (tmp_path / "environment.py").write_text("1")
    assert _git(tmp_path) == unknown
    git("add", ".")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert _git(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "result").write_text("1")
    assert _git(tmp_path) == {"commit": commit, "dirty": False}
    for name in ("experiments/results/one.json", "docs/one.md", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
        git("add", name)
    assert _git(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "environment.py").write_text("2")
    assert _git(tmp_path) == {"commit": commit, "dirty": True}


def test_environment_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment()["git"] == {"commit": None, "dirty": None}


def test_only_changes_that_may_affect_the_bits_are_reported():
    before = environment() | {"git": {"commit": "a", "dirty": False}}
    before["variables"] = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    assert diff_environments(before, before) == ()
    now = copy.deepcopy(before)
    now |= {"started": "later", "command": "another", "python": "4", "platform": "another"}
    now["devices"] |= {"count": 4}
    now["variables"] = {"JAX_PLATFORMS": "cpu"}
    now["packages"] |= {"torch": "1"}
    assert diff_environments(before, now) == ()
    now["git"]["dirty"] = True
    assert diff_environments(before, now) == ("commit: a there, a with changes now",)
    now["git"]["dirty"] = False
    now["devices"] |= {"processes": 2}
    assert diff_environments(before, now) == ("processes: 1 there, 2 now",)
    now["devices"] |= {"processes": 1}
    now |= {"cpus": 96, "processor": "Z80"}
    now["devices"] |= {"kinds": ["TPU v5e"]}
    now["variables"] |= {"XLA_FLAGS": "--xla_a"}
    now["packages"] |= {"flax": "1"}
    del now["packages"]["optax"]
    now["git"]["commit"] = "b"
    del before["processor"]
    assert diff_environments(before, now) == (
        f"cores: {before['cpus']} there, 96 now",
        "devices: cpu there, TPU v5e now",
        f"flax: {before['packages']['flax']} there, 1 now",
        f"optax: {before['packages']['optax']} there, absent now",
        "commit: a there, b now",
        "processor: absent there, Z80 now",
        "XLA_FLAGS: absent there, --xla_a now",
    )
