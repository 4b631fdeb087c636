"""One process at a time writes a run's folder, however the one before it ended."""

import errno
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from inmerge_jax import locking
from inmerge_jax.cli.options import parse_config
from inmerge_jax.cli.train import main
from inmerge_jax.errors import UsageError
from inmerge_jax.training.experiment import run_experiment
from inmerge_jax.training.preemption import TrainingInterrupted
from inmerge_jax.training.run_spec import make_run_spec
from inmerge_jax.training.workdir import lock, open_workdir
from tests.training.lock_holder import another_process

CONFIG = {"seeds": [0]}
HOLDER = """
import sys
from pathlib import Path
from inmerge_jax.training.workdir import open_workdir

with open_workdir(Path(sys.argv[1]), {"seeds": [0]}):
    print("held", flush=True)
    sys.stdin.read()
"""


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_another_process_is_named_and_no_obstacle_once_it_is_killed(tmp_path):
    folder = tmp_path / "run"
    with another_process(HOLDER, folder) as process:
        before = contents(folder)
        for options in ({}, {"resume": True}, {"overwrite": True}):
            words = re.escape(f"{folder} is in use: process {process.pid} on ")
            with (
                pytest.raises(UsageError, match=words),
                open_workdir(folder, CONFIG, **options),
            ):
                raise AssertionError
        assert contents(folder) == before
        process.send_signal(signal.SIGKILL)
        process.wait()
        with open_workdir(folder, CONFIG, resume=True) as opened:
            assert opened == folder
            assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.long
def test_a_process_that_waits_gets_the_folder_as_soon_as_it_is_free(tmp_path):
    with another_process(HOLDER, tmp_path) as process, ThreadPoolExecutor(1) as pool:

        def take():
            with locking.lock(tmp_path, wait=True):
                return process.poll()

        waiting = pool.submit(take)
        time.sleep(0.3)
        assert not waiting.done()
        process.kill()
        process.wait()
        assert waiting.result(20) == -signal.SIGKILL


def test_a_folder_is_free_again_after_the_block_and_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), lock(tmp_path):
            with pytest.raises(UsageError, match=f"process {os.getpid()} on"), lock(tmp_path):
                raise AssertionError
            raise KeyError
    with open_workdir(tmp_path, CONFIG):
        pass


def test_overwriting_keeps_the_lock(tmp_path):
    with open_workdir(tmp_path, CONFIG):
        pass
    with open_workdir(tmp_path, CONFIG, overwrite=True):
        assert sorted(os.listdir(tmp_path)) == [".lock", "config.json", "environment.json"]
        with pytest.raises(UsageError, match="in use"), lock(tmp_path):
            raise AssertionError


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (["thesis.tex"], {}, "holds files but no run"),
        (["config.json", "environment.json", "results.json"], {"resume": True}, "finished run"),
        ([], {"resume": True}, "there is no run"),
    ],
)
def test_a_refused_folder_is_left_as_it_is(tmp_path, names, options, words):
    for name in names:
        (tmp_path / name).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=words), open_workdir(tmp_path, CONFIG, **options):
        raise AssertionError
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match="cannot write .*choose another folder$"),
        lock(tmp_path / "file" / "inside"),
    ):
        raise AssertionError


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="has no locks"), lock(tmp_path):
        pass


@pytest.mark.long
def test_a_second_start_of_a_run_is_refused_and_the_first_continues(tmp_path, capsys):
    options = "--model vgg11 --width 0.05 --skip 4 --devices 1 --compilation-cache-dir None".split()
    options += "--phantom.train 128 --phantom.val 32 --phantom.test 32 --output".split()
    options.append(str(tmp_path / "run"))
    seen = []

    def second_start():
        if not seen:
            before = contents(tmp_path)
            status = [main([*options, *more]) for more in ([], ["--resume"], ["--overwrite"])]
            seen.append((status, contents(tmp_path) == before))
        return True

    with pytest.raises(TrainingInterrupted):
        run_experiment(make_run_spec(parse_config(options)), second_start)
    assert seen[0] == ([2, 2, 2], True)
    assert capsys.readouterr().err.count(f"is in use: process {os.getpid()} on") == 3
    with pytest.raises(TrainingInterrupted):
        run_experiment(make_run_spec(parse_config([*options, "--resume"])), lambda: True)
