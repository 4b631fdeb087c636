"""A disk that fills up while a run writes: the run says so, and goes on once there is room."""

import dataclasses
import errno
import gc
import os
import time

import numpy as np
import pytest

from inmerge_jax.cli.train import main
from inmerge_jax.errors import UsageError
from inmerge_jax.training import checkpointing, train
from inmerge_jax.training.checkpointing import checkpoint_epochs, save_checkpoint
from tests.long import LONG
from tests.training import tiny
from tests.training.disk import look_away, small_disk
from tests.training.test_checkpointing import valid
from tests.training.test_train import evidence, run

COMMAND = (
    "--size 16 --phantom.train 32 --phantom.val 8 --phantom.test 8 --model vgg11 --width 0.1 "
    "--skip 4 --batch-size 16 --epochs 3 --merging-epochs 1 --arms backbone --devices 1"
).split()


def full_at(monkeypatch, save):
    """Lets the disk be full at that save of a checkpoint, counted from 1."""
    write, calls = checkpointing.ocp.CheckpointManager.save, []

    def failing(manager, *args, **kwargs):
        calls.append(args)
        if len(calls) == save:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(manager, *args, **kwargs)

    monkeypatch.setattr(checkpointing.ocp.CheckpointManager, "save", failing)


@pytest.mark.parametrize(
    "stopped", [pytest.param(False, marks=LONG), True], ids=["epoch", "mid-epoch"]
)
def test_a_stage_resumes_from_the_last_valid_checkpoint(tmp_path, monkeypatch, stopped):
    run(tmp_path / "whole")
    folder, setup = tmp_path / "parts", tiny.make_setup()
    full_at(monkeypatch, 2)
    setup = dataclasses.replace(setup, should_stop=tiny.after(8)) if stopped else setup
    place = folder / "mid_epoch" / "4" if stopped else folder / "checkpoints" / "2"
    with pytest.raises(UsageError, match=f"cannot write {place}: No space left.*make room"):
        run(folder, setup=setup)
    assert valid(folder / "checkpoints") == (folder / "checkpoints" / "1", ())
    assert os.listdir(place.parent) == ([] if stopped else ["1"])
    _, text = run(folder)
    assert "resumes from epoch 1 of 3\n" in text and "damaged" not in text
    assert evidence(folder) == evidence(tmp_path / "whole")


@LONG
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_write_continues_after_the_error(tmp_path, monkeypatch, caplog):
    # Orbax writes all arrays at once, and does not wait for the others when one finds no room.
    look_away(monkeypatch)
    sizes = (10, 1_000, 20_000, 50_000) * 8
    rng = np.random.default_rng(0)
    tree = {f"a{i}": rng.normal(size=size).astype(np.float32) for i, size in enumerate(sizes)}
    with small_disk(tmp_path / "disk", megabytes=6) as disk:
        ballast, folder = disk / "ballast", disk / "checkpoints"
        for room in (0, 100_000, 1_000_000, 2_000_000):
            ballast.unlink(missing_ok=True)
            ballast.write_bytes(bytes(os.statvfs(disk).f_bfree * os.statvfs(disk).f_frsize - room))
            with pytest.raises(UsageError, match="No space left"):
                save_checkpoint(folder, 1, tree, {})
            time.sleep(0.2)
            assert os.listdir(folder) == []
        ballast.unlink()
        save_checkpoint(folder, 1, tree, {})
        assert valid(folder) == (folder / "1", ())
    gc.collect()  # Of tasks that ended in an error nobody saw, asyncio speaks when they are freed.
    assert not caplog.records


@LONG
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_command_ends_with_status_2_and_resumes(tmp_path, monkeypatch, capsys):
    # Nobody looks for room first, so the disk is full in the middle of the write.
    look_away(monkeypatch)
    append = train.append_metrics

    def fill_up(path, line):
        append(path, line)
        free = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
        if line["epoch"] == 2:
            ballast.write_bytes(bytes(max(free - 100_000, 0)))

    with small_disk(tmp_path / "disk", megabytes=8) as disk:
        ballast, output = disk / "ballast", disk / "run"
        command = [*COMMAND, "--output", str(output)]
        with monkeypatch.context() as patched:
            patched.setattr(train, "append_metrics", fill_up)
            assert main(command) == 2
        said = capsys.readouterr().err
        place = output / "seed0" / "backbone" / "checkpoints"
        assert f"error: cannot write {place / '2'}: No space left" in said
        assert "make room" in said and "--resume continues" in said
        assert os.listdir(place) == ["1"] and valid(place) == (place / "1", ())
        ballast.unlink()
        assert main([*command, "--resume"]) == 0
        assert "resumes from epoch 1 of 3" in capsys.readouterr().out
        assert 3 in checkpoint_epochs(place)
