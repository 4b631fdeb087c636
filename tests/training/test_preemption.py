"""Stopped at any moment and resumed, a stage does every update once, to the same end."""

import dataclasses
import os
import shutil
import signal

import jax
import pytest

from inmerge_jax.training.checkpointing import checkpoint_epochs
from inmerge_jax.training.metrics_file import read_metrics
from inmerge_jax.training.preemption import PreemptionHandler, TrainingInterrupted
from inmerge_jax.training.train_step import make_merging_eval_step
from tests.long import LONG, long_unless
from tests.training import tiny
from tests.training.test_train import evidence, run


class Counted:
    """A training step that counts its calls."""

    def __init__(self, step):
        self.step, self.calls = step, 0

    def __call__(self, *args):
        self.calls += 1
        return self.step(*args)


def merging_eval():
    devices = tuple(jax.local_devices()[:1])
    options = {"multi_label": False, "devices": devices}
    return make_merging_eval_step(
        tiny.Net(), tiny.RECIPE, kernels=tiny.kernels(), rule=tiny.ALWAYS, **options
    )


PLATEAU = dataclasses.replace(tiny.RECIPE, tolerance=1, epochs=5, learning_rate=1.0)
CASES = {
    "backbone": ({}, 3 * 3, (5, 8)),
    "inmerge": ({"rule": tiny.ALWAYS}, 3 * 3, (7,)),
    "plateau": ({"setup": tiny.make_setup(PLATEAU)}, 5 * 3, (5,)),
    "released": ({"rule": tiny.ALWAYS, "merging_eval_step": None}, 3 * 3, (26,)),
}


@pytest.mark.parametrize("name", long_unless(["released"], CASES))
def test_stopped_again_and_again_is_bit_identical_and_repeats_no_update(tmp_path, name):
    options, updates, patience = CASES[name]
    if "merging_eval_step" in options:
        options = options | {"merging_eval_step": merging_eval()}
    setup = options.get("setup", tiny.make_setup())
    options = {key: value for key, value in options.items() if key != "setup"}
    run(tmp_path / "whole", setup=setup, **options)
    if name == "plateau":
        lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
        assert min(line["learning_rate"] for line in lines) < 1, "the optimizer started afresh"
    stage = tiny.make_stage(tmp_path, setup.recipe, options.get("rule"))
    for asks in patience:
        folder, step, stops = tmp_path / str(asks), Counted(stage.train_step), 0
        while not (folder / "result.json").exists():
            stopping = dataclasses.replace(setup, should_stop=tiny.after(asks))
            try:
                run(folder, setup=stopping, train_step=step, **options)
            except TrainingInterrupted:
                stops += 1
            assert stops < 50
        assert stops >= 2 and step.calls == updates
        assert evidence(folder) == evidence(tmp_path / "whole")
        assert checkpoint_epochs(folder / "mid_epoch") == []


def test_an_interruption_reports_its_checkpoint_and_resumption_its_epoch(tmp_path):
    stopping = dataclasses.replace(tiny.make_setup(), should_stop=tiny.after(0))
    with pytest.raises(TrainingInterrupted, match=r"after update 0 of epoch 1$"):
        run(tmp_path, setup=stopping)
    assert not (tmp_path / "mid_epoch").exists()
    stopping = dataclasses.replace(tiny.make_setup(), should_stop=tiny.after(8))
    with pytest.raises(
        TrainingInterrupted, match=r"after update 1 of epoch 2, saved in .*/mid_epoch/4$"
    ):
        run(tmp_path, setup=stopping)
    for _ in range(2):  # Stopped before its first update, it keeps what was kept before.
        with pytest.raises(TrainingInterrupted, match=r"after update 1 of epoch 2$"):
            run(tmp_path, setup=dataclasses.replace(stopping, should_stop=tiny.after(0)))
    _, text = run(tmp_path)
    assert "seed 0 backbone: resumes from epoch 1 of 3, update 1 of the next" in text


def test_a_notice_is_given_once(tmp_path):
    stopping = dataclasses.replace(tiny.make_setup(), should_stop=tiny.after(2))
    with pytest.raises(TrainingInterrupted):
        run(tmp_path, setup=stopping, notices=("nothing merges",))
    result, _ = run(tmp_path, notices=("nothing merges",))
    assert result["warnings"] == ["nothing merges"]


@pytest.mark.parametrize("broken", ["mid_epoch/4", pytest.param("checkpoints/1", marks=LONG)])
def test_a_damaged_checkpoint_is_reported_and_skipped(tmp_path, broken):
    run(tmp_path / "whole")
    stopping = dataclasses.replace(tiny.make_setup(), should_stop=tiny.after(8))
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "parts", setup=stopping)
    shutil.rmtree(tmp_path / "parts" / broken / "state")
    result, text = run(tmp_path / "parts")
    assert f"{broken} is damaged" in text and f"{broken} is damaged" in result["warnings"][0]
    assert f"resumes from epoch {int(broken == 'mid_epoch/4')} of 3\n" in text
    assert evidence(tmp_path / "parts") == evidence(tmp_path / "whole")


def test_signals_are_noted_and_only_a_second_ctrl_c_interrupts(capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with PreemptionHandler() as stop:
        assert not stop() and stop.signal is None
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop() and stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert capfd.readouterr().err.count("SIGTERM: stopping after this update") == 1
    with PreemptionHandler() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
    assert "Ctrl-C again" in capfd.readouterr().err


def test_a_signal_is_noted_though_nobody_can_read_the_message():
    reader, writer = os.pipe()
    os.close(reader)
    kept = os.dup(2)
    os.dup2(writer, 2)
    try:
        with PreemptionHandler() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(writer)
    assert stop.signal == signal.SIGTERM
