"""Whole runs of `inmerge train` in processes of their own, killed and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.reliability import fault_injection, jobs
from inmerge_jax import files
from inmerge_jax.cli import export
from inmerge_jax.cli.options import parse_config
from inmerge_jax.cli.train import main
from inmerge_jax.data import images as decoding
from inmerge_jax.errors import UsageError
from inmerge_jax.training.checkpointing import read_arrays
from inmerge_jax.training.experiment import run_experiment
from inmerge_jax.training.load import find_stage
from inmerge_jax.training.metrics_file import read_metrics
from inmerge_jax.training.preemption import TrainingInterrupted
from inmerge_jax.training.run_spec import make_run_spec
from inmerge_jax.training.second_stage import begin_second_stage, weights_sha256
from tests.data.test_folder import make_folders
from tests.training import tiny

REPOSITORY = Path(__file__).parents[2]
SMALLER = "--model vgg11_bn --skip 4".split()


def command(output, *options, training=(*jobs.TRAINING, *SMALLER)):
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    start = [
        sys.executable,
        "-m",
        "experiments.train",
        "--output",
        str(output),
        "--compilation-cache-dir",
        cache,
    ]
    return [*start, *training, *options]


def train(output, *options):
    return subprocess.run(
        command(output, *options), cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )


def kill_mid_epoch(output, arm, *options, signals=(signal.SIGKILL,), epoch=1, **given):
    """Starts a run and signals it soon after the arm's checkpoint is complete; its output."""
    checkpoint = output / "seed7" / arm / "checkpoints" / str(epoch)
    with subprocess.Popen(
        command(output, *options, **given),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            deadline = time.monotonic() + 300
            while not checkpoint.exists():
                assert process.poll() is None, process.stdout.read().decode()
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(0.1)
            for number in signals:
                process.send_signal(number)
            said = process.communicate(timeout=100)[0].decode()
        finally:
            process.kill()
    status = -signals[0] if signals[0] == signal.SIGKILL else 128 + signals[0]
    assert process.returncode == status, said
    return said


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "reference"
    assert main(command(output)[3:]) == 0
    return output


ROWS = (
    "--data breast_cancer --model mlp --skip 0 --batch-size 32 --epochs 2 --merging-epochs 12 "
    "--arms inmerge --devices 1 --threshold 0.1 --seeds 7"
).split()


def test_killed_and_resumed_is_bit_identical(tmp_path, capsys):
    """On a table, whose network compiles in a second."""
    output = tmp_path / "resumed"
    kill_mid_epoch(output, "inmerge", training=ROWS)
    assert not (output / "seed7" / "inmerge" / "result.json").exists()
    assert main(command(output, "--resume", training=ROWS)[3:]) == 0
    said = capsys.readouterr().out
    assert "seed 7 inmerge: resumes from epoch" in said
    uninterrupted = tmp_path / "uninterrupted"
    config = parse_config(command(uninterrupted, training=ROWS)[3:])
    run_experiment(make_run_spec(config))
    assert jobs.run_evidence(output) == jobs.run_evidence(uninterrupted)


@pytest.mark.long
def test_killed_mid_epoch_and_resumed_is_bit_identical(reference, tmp_path, capsys):
    output = tmp_path / "resumed"
    kill_mid_epoch(output, "inmerge")
    assert main(command(output)[3:]) == 2
    assert "--resume" in capsys.readouterr().err
    assert not (output / "seed7" / "inmerge" / "result.json").exists()
    assert not (output / "results.json").exists()
    assert main(command(output, "--resume")[3:]) == 0
    said = capsys.readouterr().out
    assert "seed 7 inmerge: resumes from epoch" in said
    assert "seed 7 backbone" not in said.partition("Kernels merged")[0].replace("┃", "")
    assert jobs.run_evidence(output) == jobs.run_evidence(reference)


@pytest.mark.long
def test_killed_while_it_writes_a_checkpoint_and_resumed_is_bit_identical(reference, tmp_path):
    cache = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    job = jobs.training(tmp_path / "run", cache, *SMALLER)
    row = fault_injection.kill_and_resume(
        job, 0.0, fault_injection.CHECKPOINT, jobs.run_evidence(reference)
    )
    assert row["doing"] == fault_injection.CHECKPOINT and row["differences"] == []
    assert row["resumed_from"] in ("the beginning", "epoch 1 of 3")


@pytest.mark.long
def test_stopped_by_signals_and_resumed_is_bit_identical(reference, tmp_path):
    output = tmp_path / "resumed"
    said = kill_mid_epoch(output, "backbone", signals=(signal.SIGTERM, signal.SIGTERM))
    assert said.count("SIGTERM: stopping after this update") == 1
    assert "seed 7 backbone: stopped after update" in said and "--resume continues" in said
    (kept,) = (output / "seed7" / "backbone" / "mid_epoch").iterdir()
    assert 30 < int(kept.name) < 90 and f"saved in {kept}" in said
    said = kill_mid_epoch(output, "inmerge", "--resume", signals=(signal.SIGINT,), epoch=2)
    assert "seed 7 backbone: resumes from epoch" in said and "of the next" in said
    assert "seed 7 inmerge: stopped" in said
    done = train(output, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert jobs.run_evidence(output) == jobs.run_evidence(reference)


@pytest.mark.long
def test_a_run_from_a_file_of_weights_is_bit_identical_too(reference, tmp_path, capsys):
    file, resumed = tmp_path / "start.safetensors", tmp_path / "resumed"
    assert export.main([str(reference), "--to", str(file)]) == 0
    options = ["--init-from", str(file), *"--epochs 2 --merging-epochs 1".split()]
    kill_mid_epoch(resumed, "backbone", *options)
    assert not (resumed / "seed7" / "backbone" / "result.json").exists()
    kept = file.read_bytes()
    assert export.main([str(reference), "--arm", "backbone", "--to", str(file), "--overwrite"]) == 0
    assert main(command(resumed, *options, "--resume")[3:]) == 2
    assert "model.init_sha256" in capsys.readouterr().err
    file.write_bytes(kept)
    done = train(resumed, *options, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 7 backbone: resumes from epoch 1" in done.stdout
    assert main(command(tmp_path / "reference", *options)[3:]) == 0
    assert jobs.run_evidence(resumed) == jobs.run_evidence(tmp_path / "reference")
    first = [
        read_metrics(run / "seed7" / "backbone" / "metrics.jsonl") for run in (resumed, reference)
    ]
    assert first[0][0]["train_loss"] < first[1][0]["train_loss"], "it starts from the file"


@pytest.mark.long
def test_a_run_leaves_everything_that_its_report_needs(reference):
    names = {path.name for path in reference.iterdir()}
    files = {"config.json", "environment.json", "results.json", "report.html"}
    assert names >= files | {"samples.npz", "labels.npz", "seed7"}
    results = json.loads((reference / "results.json").read_text())
    assert list(results["arms"]) == ["backbone", "inmerge"] and results["seeds"] == [7]
    assert results["dataset"]["counts"] == {"train": 480, "val": 128, "test": 32}
    (inmerge,) = results["arms"]["inmerge"]
    assert len(inmerge["layers"]) == 4 and sum(inmerge["merged"]) > 0
    with np.load(reference / "samples.npz") as samples:
        assert len(samples["images"]) == len(samples["names"]) == len(samples["labels"])
        assert set(samples["names"]) == set(results["dataset"]["classes"])
    second = read_metrics(reference / "seed7" / "inmerge" / "metrics.jsonl")
    backbone = read_metrics(reference / "seed7" / "backbone" / "metrics.jsonl")
    (first,) = results["arms"]["backbone"]
    assert second[0]["learning_rate"] == backbone[first["best_epoch"] - 1]["learning_rate"]


@pytest.mark.long
def test_the_second_stage_starts_from_the_best_backbone_with_a_fresh_optimizer(reference):
    backbone = find_stage(reference, "backbone", 7)
    best, folder = backbone.variables(), reference / "seed7" / "inmerge"
    start = json.loads((folder / "start.json").read_text())
    assert start == {"sha256": weights_sha256(best["params"], best["batch_stats"])}
    lines = read_metrics(folder / "metrics.jsonl")
    arrays = read_arrays(folder / "checkpoints" / str(len(lines)))
    counts = [int(values) for name, values in arrays.items() if name.endswith(".count")]
    assert counts and set(counts) == {lines[-1]["step"]}


@pytest.mark.long
def test_a_finished_run_is_not_touched(reference, capsys):
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()}
    for options in ([], ["--resume"]):
        assert main(command(reference, *options)[3:]) == 2
        assert "--overwrite" in capsys.readouterr().err
    assert before == {
        path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()
    }


@pytest.mark.long
def test_a_run_that_only_lacks_its_report_gets_it(reference, tmp_path):
    output = Path(shutil.copytree(reference, tmp_path / "run"))
    for name in ("report.html", "table.md"):
        (output / name).unlink()
    assert main(command(output, "--resume")[3:]) == 0
    assert (output / "table.md").read_bytes() == (reference / "table.md").read_bytes()
    assert (output / "report.html").exists()


@pytest.mark.long
def test_a_damaged_result_ends_the_run_and_damaged_labels_its_report(reference, tmp_path, capsys):
    output = Path(shutil.copytree(reference, tmp_path / "run"))
    (output / "results.json").unlink()
    result = output / "seed7" / "inmerge" / "result.json"
    text = result.read_text()
    result.write_text(text.replace('"best_epoch": ', '"best_epoch": 1'))
    assert main(command(output, "--resume")[3:]) == 2
    assert f"{result} is damaged: its content is not" in capsys.readouterr().err
    assert not (output / "results.json").exists()
    result.write_text(text)
    assert main(command(output, "--resume")[3:]) == 0

    (output / "table.md").unlink()
    (output / "labels.npz").write_bytes((reference / "labels.npz").read_bytes()[:200])
    assert main(command(output, "--resume")[3:]) == 2
    assert "labels.npz is damaged" in (said := capsys.readouterr().err) and "delete" in said
    (output / "results.json").unlink()
    assert main(command(output, "--resume")[3:]) == 0
    assert (output / "table.md").read_bytes() == (reference / "table.md").read_bytes()


@pytest.mark.long
def test_a_second_stage_of_another_backbone_is_trained_again(reference, tmp_path, capsys):
    output = Path(shutil.copytree(reference, tmp_path / "run"))
    (output / "results.json").unlink()
    stage = output / "seed7" / "inmerge"
    start = json.loads((stage / "start.json").read_text())
    (stage / "start.json").write_text(json.dumps({"sha256": "0" * 64}))
    best = json.loads((output / "seed7" / "backbone" / "result.json").read_text())["best_epoch"]
    shutil.rmtree(output / "seed7" / "backbone" / "checkpoints" / str(best))
    assert main(command(output, "--resume")[3:]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "it had started from other weights than the backbone has now" in said
    arms = json.loads((output / "results.json").read_text())["arms"]
    assert "there is no checkpoint" in arms["backbone"][0]["warnings"][0]
    assert "other weights" in arms["inmerge"][0]["warnings"][0]
    assert json.loads((stage / "start.json").read_text()) == start
    for name in ("test", "merged"):
        known = json.loads((reference / "results.json").read_text())["arms"]["inmerge"][0]
        assert arms["inmerge"][0][name] == known[name]


@pytest.mark.parametrize("killed", [False, True])
def test_a_stage_is_deleted_only_if_it_started_from_other_weights(tmp_path, killed, monkeypatch):
    stage = tmp_path / "finetune"
    assert begin_second_stage(stage, "a", trained=True) is None
    (stage / "checkpoints").mkdir()
    assert begin_second_stage(stage, "a", trained=True) is None
    assert (stage / "checkpoints").exists()
    if killed:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(files, "remove", tiny.raising(KeyboardInterrupt))
            begin_second_stage(stage, "b", trained=True)
        assert (stage / "checkpoints").exists()
    assert "other weights" in begin_second_stage(stage, "b", trained=False)
    assert [path.name for path in stage.iterdir()] == ["start.json"]
    assert begin_second_stage(stage, "b", trained=False) is None


def test_a_stage_of_an_earlier_version_is_deleted_only_with_its_backbone(tmp_path):
    for trained in (False, True):
        stage = tmp_path / str(trained)
        (stage / "checkpoints").mkdir(parents=True)
        assert ("other weights" in (begin_second_stage(stage, "a", trained) or "")) is trained
        assert (stage / "checkpoints").exists() is not trained


@pytest.mark.long
def test_a_kill_while_a_lost_backbone_is_trained_again_does_not_finish_it(
    reference, tmp_path, capsys
):
    output = Path(shutil.copytree(reference, tmp_path / "run"))
    (output / "results.json").unlink()
    backbone = output / "seed7" / "backbone"
    best = json.loads((backbone / "result.json").read_text())["best_epoch"]
    shutil.rmtree(backbone / "checkpoints" / str(best))
    spec = make_run_spec(parse_config(command(output, "--resume")[3:]))
    with pytest.raises(TrainingInterrupted):
        run_experiment(spec, tiny.after(20))
    assert not (backbone / "result.json").exists()
    assert main(command(output, "--resume")[3:]) == 0
    arms = json.loads((output / "results.json").read_text())["arms"]
    known = json.loads((reference / "results.json").read_text())["arms"]
    for arm in arms:
        assert arms[arm][0]["test"] == known[arm][0]["test"]
    assert "trained again" in arms["backbone"][0]["warnings"][0]


def test_test_images_that_cannot_be_read_end_a_run_before_it_trains(tmp_path, monkeypatch, capsys):
    make_folders(tmp_path / "images", ending="png", shape=(16, 16, 3))
    monkeypatch.setattr(decoding, "IN_MEMORY", 0)
    output = tmp_path / "run"
    options = (
        f"--data folder:{tmp_path / 'images'} --model vgg11 --width 0.1 --skip 4 --batch-size 4"
    )
    options += f" --epochs 1 --merging-epochs 1 --devices 1 --workers 0 --output {output}"
    spec = make_run_spec(parse_config(options.split()))
    images = spec.dataset.test.images
    # A stop has not to wait for all of them.
    with pytest.raises(TrainingInterrupted, match="stopped before the first update"):
        run_experiment(spec, lambda: True)
    path = images.root / images.names[3]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UsageError, match=f"{path.name} is cut short or damaged"):
        run_experiment(make_run_spec(parse_config([*options.split(), "--resume"])))
    assert not (output / "seed0").exists()


@pytest.mark.long
def test_resuming_with_another_configuration_names_the_difference(reference, tmp_path, capsys):
    shutil.copytree(reference, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    assert main(command(tmp_path / "run", "--resume", "--alpha", "0.5")[3:]) == 2
    assert "rule.alpha: 0.8 there, 0.5 now" in capsys.readouterr().err


@pytest.mark.long
def test_resuming_under_other_conditions_is_said_and_kept_in_the_results(
    reference, tmp_path, capsys
):
    output = Path(shutil.copytree(reference, tmp_path / "run"))
    (output / "results.json").unlink()
    shutil.rmtree(output / "seed7" / "inmerge")
    started = json.loads((output / "environment.json").read_text())
    now = started["packages"]["jax"]
    started["packages"]["jax"] = "0.1.2"
    (output / "environment.json").write_text(json.dumps(started))
    assert main(command(output, "--resume")[3:]) == 0
    change = f"jax: 0.1.2 there, {now} now"
    said = " ".join(capsys.readouterr().out.split())
    assert "WARNING: the environment changed" in said and change in said
    arms = json.loads((output / "results.json").read_text())["arms"]
    assert arms["backbone"][0]["warnings"] == []
    (warning,) = arms["inmerge"][0]["warnings"]
    assert warning.endswith(change)
    assert change in " ".join((output / "report.html").read_text().split())
