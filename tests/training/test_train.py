import dataclasses
import io
import itertools
import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from inmerge_jax import files, kernel_similarity
from inmerge_jax.data import Split
from inmerge_jax.errors import UsageError
from inmerge_jax.progress import Progress
from inmerge_jax.training import train
from inmerge_jax.training.checkpointing import (
    checkpoint_epochs,
    read_arrays,
    read_meta,
    restore_checkpoint,
)
from inmerge_jax.training.metrics import compute_metrics, read_scores
from inmerge_jax.training.metrics_file import read_metrics
from inmerge_jax.training.preemption import TrainingInterrupted
from inmerge_jax.training.stage_results import read_result
from inmerge_jax.training.train import NonFiniteLossError, train_stage
from inmerge_jax.training.train_step import make_optimizer, new_state
from tests.long import LONG
from tests.training import tiny

MERGING = [tiny.ALWAYS, None]


def run(folder, *, setup=None, rule=None, **changes):
    """Trains a stage and returns its result and all that was printed."""
    setup = setup or tiny.make_setup()
    stage = tiny.make_stage(folder, setup.recipe, rule, **changes)
    text = io.StringIO()
    with Progress(1000, Console(file=text, soft_wrap=True)) as progress:
        result = train_stage(setup, stage, *tiny.init(), progress)
    return result, text.getvalue()


def evidence(folder):
    """What no interruption may change: bytes of arrays, scores, masks; metrics but for timings."""
    timings = {"seconds", "images_per_second"}
    lines = read_metrics(folder / "metrics.jsonl")
    lines = [{k: v for k, v in line.items() if k not in timings} for line in lines]
    found = [path for kind in ("scores", "masks") for path in (folder / kind).glob("*.*")]
    files = {path.name: path.read_bytes() for path in found}
    assert files
    state = {}
    for epoch in checkpoint_epochs(folder / "checkpoints"):
        arrays = read_arrays(folder / "checkpoints" / str(epoch))
        state[epoch] = {name: array.tobytes() for name, array in arrays.items()}
    return lines, files, state


def restore(folder, epoch):
    fresh = new_state(*tiny.init(), make_optimizer(tiny.RECIPE), 0.1)
    state, _ = restore_checkpoint(folder / "checkpoints" / str(epoch), fresh)
    return state


def interrupt_at(monkeypatch, step):
    """Stops training from its start as Ctrl-C would, before that step."""
    ahead = train.prefetch_to_device

    def interrupted(*args):
        yield from itertools.islice(ahead(*args), step)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "prefetch_to_device", interrupted)
    return lambda: monkeypatch.setattr(train, "prefetch_to_device", ahead)


def check_resumption(folder, monkeypatch, train_in, step, train_resumed=None):
    """Trains in `folder`, interrupted before that step and resumed; compares with one go.

    Returns the folders of the resumed and of the uninterrupted stage.
    """
    resumed, uninterrupted = folder / "resumed", folder / "uninterrupted"
    train_in(uninterrupted)
    resume = interrupt_at(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        train_in(resumed)
    resume()
    (train_resumed or train_in)(resumed)
    assert evidence(resumed) == evidence(uninterrupted)
    return resumed, uninterrupted


def test_a_stage_leaves_its_evidence(tmp_path):
    result, _ = run(tmp_path, rule=tiny.ALWAYS)
    setup = tiny.make_setup()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["step"] for line in lines] == [3, 6, 9]
    assert lines[0]["kernels"] == [8, 8]
    # threshold -1: what is selected merges.
    assert lines[0]["selected"] == lines[0]["merged"] and sum(lines[0]["merged"]) > 0
    assert all(-1 <= s <= 1 for line in lines for s in line["similarity"])

    assert result == read_result(tmp_path)
    assert result["merged"] == [sum(line["merged"][i] for line in lines) for i in range(2)]
    assert result["layers"] == [kernel.name for kernel in tiny.kernels()]
    assert result["steps"] == 9 and result["warnings"] == []
    losses = [line["val_loss"] for line in lines]
    assert result["best_epoch"] == 1 + losses.index(min(losses))
    for name, images in (("val", setup.dataset.val), ("test", setup.dataset.test)):
        scores = read_scores(tmp_path / result["scores"][name])
        metrics = compute_metrics(images.labels, scores, "multi-class")
        assert [metrics.auc, metrics.acc] == pytest.approx(
            [result[name]["auc"], result[name]["acc"]]
        )
    similarity = json.loads((tmp_path / "similarity.json").read_text())
    assert [layer["name"] for layer in similarity["before"]] == result["layers"]
    assert similarity["before"] != similarity["after"]
    assert set(checkpoint_epochs(tmp_path / "checkpoints")) == {result["best_epoch"], 3}


def test_validation_decides_and_the_test_images_are_read_once(tmp_path, monkeypatch):
    setup = tiny.make_setup()
    read, evaluate = [], train.TrainContext.evaluate

    def watched(setup, state, images):
        read.append("test" if images is setup.dataset.test else "val")
        return evaluate(setup, state, images)

    monkeypatch.setattr(train.TrainContext, "evaluate", watched)
    run(tmp_path, setup=setup)
    assert read == ["val"] * 4 + ["test"]


@pytest.mark.parametrize("rule", MERGING, ids=["inmerge", "backbone"])
@pytest.mark.parametrize("step", [pytest.param(1, marks=LONG), pytest.param(4, marks=LONG), 8])
def test_interrupted_and_resumed_is_bit_identical(tmp_path, monkeypatch, rule, step):
    run(tmp_path / "whole", rule=rule)
    resume = interrupt_at(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", rule=rule)
    assert not (tmp_path / "parts" / "result.json").exists()
    resume()
    _, text = run(tmp_path / "parts", rule=rule)
    assert ("resumes from epoch" in text) == (step >= 3)
    assert evidence(tmp_path / "parts") == evidence(tmp_path / "whole")


@LONG
def test_plateau_restarts_the_optimizer_and_resumes_bit_identically(tmp_path, monkeypatch):
    recipe = dataclasses.replace(tiny.RECIPE, tolerance=1, epochs=5, learning_rate=1.0)
    setup = tiny.make_setup(recipe)
    run(tmp_path / "whole", setup=setup)
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert min(rates) < 1.0, "the test needs an epoch without improvement"
    resume = interrupt_at(monkeypatch, 3 * (1 + next(i for i, r in enumerate(rates) if r < 1)) - 1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", setup=setup)
    resume()
    run(tmp_path / "parts", setup=setup)
    assert evidence(tmp_path / "parts") == evidence(tmp_path / "whole")


def test_a_damaged_checkpoint_falls_back_to_the_latest_valid_one(tmp_path, monkeypatch):
    run(tmp_path / "whole")
    resume = interrupt_at(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    resume()
    folder = tmp_path / "parts" / "checkpoints"
    assert checkpoint_epochs(folder)[-1] == 2
    shutil.rmtree(folder / "2" / "state")
    result, text = run(tmp_path / "parts")
    assert "checkpoints/2 is damaged" in text and "resumes from epoch 1" in text
    assert any("is damaged" in warning for warning in result["warnings"])
    assert evidence(tmp_path / "parts") == evidence(tmp_path / "whole")


@LONG
@pytest.mark.parametrize("lost", [False, True])
def test_a_damaged_best_checkpoint_starts_the_stage_again(tmp_path, monkeypatch, lost):
    recipe = dataclasses.replace(tiny.RECIPE, epochs=4, select="val_auc")
    monkeypatch.setattr(train, "best_epoch", lambda history, select: 1)
    setup = tiny.make_setup(recipe)
    run(tmp_path / "whole", setup=setup)
    resume = interrupt_at(monkeypatch, 10)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", setup=setup)
    resume()
    folder = tmp_path / "parts" / "checkpoints"
    assert checkpoint_epochs(folder) == [1, 2, 3], "the newest two and the best are kept"
    if lost:
        shutil.rmtree(folder / "1")
    else:
        (folder / "1" / "meta" / "metadata").write_text("{}")
    result, text = run(tmp_path / "parts", setup=setup)
    said = "there is no checkpoint at" if lost else "is damaged"
    assert "resumes from epoch 0" in text and said in result["warnings"][0]
    assert evidence(tmp_path / "parts") == evidence(tmp_path / "whole")


def cut_short(monkeypatch, folder):
    """A stage stopped within its third epoch; what its metrics.jsonl is, and its text."""
    resume = interrupt_at(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    resume()
    path = folder / "metrics.jsonl"
    return path, path.read_text()


@LONG
def test_a_changed_loss_is_not_trained_on(tmp_path, monkeypatch):
    path, text = cut_short(monkeypatch, tmp_path / "parts")
    losses = [line["val_loss"] for line in read_metrics(path)]
    path.write_text(text.replace(f'"val_loss": {losses[0]}', '"val_loss": 9.9'))
    changed, before = path.read_bytes(), checkpoint_epochs(tmp_path / "parts" / "checkpoints")
    with pytest.raises(UsageError, match=r"metrics\.jsonl was changed.*best epoch.*delete the fol"):
        run(tmp_path / "parts")
    assert path.read_bytes() == changed
    assert checkpoint_epochs(tmp_path / "parts" / "checkpoints") == before
    path.write_text(text)
    run(tmp_path / "whole")
    run(tmp_path / "parts")
    assert evidence(tmp_path / "parts") == evidence(tmp_path / "whole")


def test_a_changed_loss_is_seen_where_the_newest_checkpoint_is_damaged_too(tmp_path, monkeypatch):
    path, text = cut_short(monkeypatch, tmp_path)
    (tmp_path / "checkpoints" / "2" / "manifest.json").unlink()
    first, second = text.splitlines(keepends=True)
    path.write_text(first.replace('"val_loss": ', '"val_loss": 1') + second)
    with pytest.raises(UsageError, match="after its 1 epochs"):
        run(tmp_path)
    path.write_text(first + second.replace('"val_loss": ', '"val_loss": 1'))
    _, text = run(tmp_path)
    assert "resumes from epoch 1" in text


def test_a_damaged_result_is_named(tmp_path):
    path = tmp_path / "result.json"
    assert read_result(tmp_path) is None
    result, _ = run(tmp_path, epochs=1)
    text = path.read_text()
    digits = f'"auc": {result["test"]["auc"]}'
    for broken in (
        text.replace(digits, '"auc": 0.999'),
        json.dumps(result),
        text[:100],
        "[]",
        "",
    ):
        path.write_text(broken)
        with pytest.raises(UsageError, match=r"result\.json (was changed|is damaged).*delete it"):
            read_result(tmp_path)
    path.unlink()  # The remedy.
    again, _ = run(tmp_path, epochs=1)
    assert again["test"] == result["test"] and read_result(tmp_path) == again


def test_a_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    recipe = dataclasses.replace(tiny.RECIPE, flip=False)
    setup = tiny.make_setup(recipe)
    step = tiny.train_step(setup.devices, recipe)
    poisoned = []

    def poisoning(state, totals, batch, root):
        poisoned.append(None)
        state, totals = step(state, totals, batch, root)
        if len(poisoned) == 8:
            totals = totals._replace(loss=totals.loss * np.nan)
        return state, totals

    with pytest.raises(NonFiniteLossError, match=r"nan in epoch 3.*checkpoints/2.*`learning_rate`"):
        run(tmp_path, setup=setup, train_step=poisoning)
    assert checkpoint_epochs(tmp_path / "checkpoints")[-1] == 2
    assert read_meta(tmp_path / "checkpoints" / "2")["epoch"] == 2
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert not (tmp_path / "result.json").exists()


def test_a_non_finite_loss_stops_within_the_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_CHECK_EVERY", 2)
    setup = tiny.make_setup(dataset=tiny.make_dataset(train=16 * 20))
    step, calls = tiny.train_step(setup.devices), []

    def poisoning(state, totals, batch, root):
        calls.append(None)
        state, totals = step(state, totals, batch, root)
        return state, totals._replace(loss=totals.loss * np.nan)

    with pytest.raises(NonFiniteLossError, match="nan in epoch 1"):
        run(tmp_path, setup=setup, train_step=poisoning)
    assert len(calls) == 4  # Two are in flight when the second one is checked.


def test_a_state_that_diverged_is_not_saved_on_a_signal(tmp_path):
    setup = dataclasses.replace(tiny.make_setup(), should_stop=tiny.after(2))
    step = tiny.train_step(setup.devices)

    def poisoning(*given):
        state, totals = step(*given)
        return state, totals._replace(loss=totals.loss * np.nan)

    with pytest.raises(NonFiniteLossError):
        run(tmp_path, setup=setup, train_step=poisoning)
    assert not (tmp_path / "mid_epoch").exists()


def test_a_kill_while_a_second_checkpoint_of_an_epoch_is_written_keeps_the_first(
    tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    def stopped(asks):
        setup = dataclasses.replace(tiny.make_setup(), should_stop=tiny.after(asks))
        with pytest.raises((TrainingInterrupted, Killed)):
            run(tmp_path, setup=setup)

    stopped(1)
    with monkeypatch.context() as patched:
        patched.setattr(files, "write_json_with_checksum", tiny.raising(Killed))
        stopped(1)
    assert len(checkpoint_epochs(tmp_path / "mid_epoch")) == 2
    _, text = run(tmp_path)
    assert "resumes from epoch 0 of 3, update 1 of the next" in text


def test_a_real_divergence_is_caught(tmp_path):
    recipe = dataclasses.replace(tiny.RECIPE, learning_rate=1e30)
    with pytest.raises(NonFiniteLossError, match="no epoch was finished"):
        run(tmp_path, setup=tiny.make_setup(recipe))
    assert checkpoint_epochs(tmp_path / "checkpoints") == []


def test_merging_nothing_warns_once_and_names_what_it_saw(tmp_path, monkeypatch):
    resume = interrupt_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, rule=tiny.NEVER)
    resume()
    params = restore(tmp_path, 1).params
    result, _ = run(tmp_path, rule=tiny.NEVER)
    (warning,) = result["warnings"]
    assert "merged none of the 48 selected kernels" in warning
    for kernel in tiny.kernels():
        assert kernel.name in warning
        (layer,) = kernel_similarity(params, (kernel,), quantiles=(0.5, 0.99))
        figures = (*layer.quantiles.values(), layer.maximum)
        assert f"{kernel.name}: " + ", ".join(f"{value:.3f}" for value in figures) in warning
    assert "lower threshold" in warning

    result, text = run(tmp_path / "merges", rule=tiny.ALWAYS)
    assert result["warnings"] == [] and "WARNING" not in text


def test_an_undefined_auc_becomes_null_and_training_continues(tmp_path):
    dataset = tiny.make_dataset()
    few = Split(dataset.val.images[:1], dataset.val.labels[:1])
    setup = tiny.make_setup(dataset=dataclasses.replace(dataset, val=few))
    result, _ = run(tmp_path, setup=setup)
    assert result["val"]["auc"] is None and result["val"]["undefined"] == 3
    assert "NaN" not in (tmp_path / "result.json").read_text()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_arms_of_one_seed_see_the_same_batches(tmp_path, monkeypatch):
    seen, train_batches = {}, train.train_batches
    setup = tiny.make_setup()
    for arm, number, seed in (("finetune", 1, 0), ("inmerge", 1, 0), ("x", 0, 0), ("y", 1, 1)):
        order = []

        def watched(*args, order=order, **kwargs):
            for batch in train_batches(*args, **kwargs):
                order.append(batch["index"].tolist())
                yield batch

        monkeypatch.setattr(train, "train_batches", watched)
        rule = tiny.ALWAYS if arm == "inmerge" else None
        run(tmp_path / arm, setup=setup, rule=rule, arm=arm, number=number, seed=seed, epochs=1)
        seen[arm] = order
    assert seen["finetune"] == seen["inmerge"] and len(seen["x"]) == 3
    assert seen["finetune"] != seen["x"] and seen["finetune"] != seen["y"]
