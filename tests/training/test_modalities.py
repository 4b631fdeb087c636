"""Tables, signals and volumes: training, resumption, report and prediction."""

import csv
import json
import re

import numpy as np
import pytest

from inmerge_jax.cli import export, predict, report, train
from inmerge_jax.cli.options import parse_config
from inmerge_jax.data import load_dataset
from inmerge_jax.errors import UsageError
from inmerge_jax.training.experiment import run_experiment
from inmerge_jax.training.load import load_run
from inmerge_jax.training.metrics import read_scores
from inmerge_jax.training.run_spec import make_run_spec
from inmerge_jax.training.train import TrainingInterrupted
from tests.long import LONG

COMMON = (
    "--devices 1 --batch-size 16 --epochs 1 --merging-epochs 1 --arms inmerge --skip 0 "
    "--threshold -1 --compilation-cache-dir None"
).split()


@pytest.fixture(scope="module")
def signals(tmp_path_factory):
    """A file of waves whose frequency is their class."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    time = np.arange(32) / 32
    waves = np.sin(2 * np.pi * ((1 + labels)[:, None] * time + rng.random((60, 1))))
    waves += rng.normal(0, 0.3, waves.shape)
    path = tmp_path_factory.mktemp("signals") / "waves.csv"
    np.savetxt(path, np.column_stack([labels, waves]), delimiter=",", fmt="%.6g")
    return path


def run(folder, *options):
    assert train.main([*COMMON, *options, "--output", str(folder)]) == 0
    return json.loads((folder / "results.json").read_text())["dataset"]


def stored_scores(folder, arm="inmerge"):
    (path,) = (folder / "seed0" / arm / "scores").glob("*_test_*")
    return read_scores(path)


def check_life(folder, options, capsys):
    """The stored scores are those of `load_run` and `inmerge predict`, and the report is made."""
    data = load_dataset(parse_config([*options, "--output", "x"]).data)
    loaded = load_run(folder)
    scores = loaded.predict(data.test.images, batch_size=7)
    np.testing.assert_allclose(scores, stored_scores(folder), rtol=0, atol=1e-5)
    file = folder.parent / f"{folder.name}.csv"
    capsys.readouterr()
    assert predict.main([str(folder), "--to", str(file)]) == 0
    with open(file, newline="") as opened:
        header, *rows = csv.reader(opened)
    assert header[:2] == ["split", data.modality]
    found = np.array([row[2 : 2 + len(data.classes)] for row in rows], float)
    np.testing.assert_allclose(found, scores, rtol=0, atol=1e-5)
    names = range(len(rows)) if data.test.names is None else data.test.names
    assert [row[1] for row in rows] == [str(name) for name in names]
    said = capsys.readouterr().out
    assert report.main([str(folder)]) == 0
    page = (folder / "report.html").read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert " px" not in text and " images" not in text
    return said, page, text


def error_of(command, arguments, capsys):
    capsys.readouterr()
    assert command.main(arguments) == 2
    return capsys.readouterr().err


def test_a_table(tmp_path, capsys, signals):
    options = "--data breast_cancer --model mlp --width 0.25 --learning-rate 0.01".split()
    folder = tmp_path / "run"
    stored = run(folder, *options)
    assert "breast-cancer 30 features, 399/57/113 rows; mlp" in capsys.readouterr().out
    assert stored["modality"] == "table" and len(stored["features"]) == 30
    assert not (folder / "samples.npz").exists()
    said, page, text = check_life(folder, options, capsys)
    assert "113 rows of breast-cancer (test)" in said and "validation rows" in said
    assert "Sample" not in page and "113 test rows" in text and "30 features" in text
    result = json.loads((folder / "seed0" / "inmerge" / "result.json").read_text())
    assert result["test"]["auc"] > 0.9 and sum(result["merged"]) > 0

    target = ["--to", str(tmp_path / "x.csv")]
    error = error_of(predict, [str(folder), *target, "--data", f"signals:{signals}"], capsys)
    assert "has signals, and the run was trained on rows" in error
    rng = np.random.default_rng(0)
    header = ["label", *(f"f{k}" for k in range(30))]
    rows = [[("malignant", "benign")[k % 2], *rng.random(30)] for k in range(12)]
    other = tmp_path / "other.csv"
    other.write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]))
    error = error_of(predict, [str(folder), *target, "--data", f"table:{other}"], capsys)
    assert "the classes benign, malignant" in error
    assert "name their data set" in error_of(
        predict, [str(folder), *target, "--images", str(tmp_path)], capsys
    )
    error = error_of(export, [str(folder), "--to", str(tmp_path / "x.pth")], capsys)
    assert "mlp" in error and not (tmp_path / "x.pth").exists()


RESNET = "--model resnet18 --width 0.03125 --skip 18".split()


def interrupt_and_resume(folder, options):
    """Ends a run after its second update, as Ctrl-C does, and finishes it."""
    calls = iter(range(100))
    spec = make_run_spec(parse_config([*COMMON, *options, "--output", str(folder)]))
    with pytest.raises(TrainingInterrupted):
        run_experiment(spec, lambda: next(calls) >= 2)
    assert not (folder / "results.json").exists()
    return run(folder, *options, "--resume")


@LONG
def test_a_resumed_run_on_signals(tmp_path, capsys, signals):
    folder, options = tmp_path / "run", ["--data", f"signals:{signals}", *RESNET]
    stored = interrupt_and_resume(folder, options)
    said = capsys.readouterr().out
    assert "signals-waves 32 samples, 42/6/12 signals; resnet18" in said and "resumes from" in said
    assert stored["modality"] == "signal" and "features" not in stored
    said, page, text = check_life(folder, options, capsys)
    assert "12 signals of signals-waves (test)" in said
    assert "Sample signals" in text and 'aria-label="Signals: 1"' in page and "<img" not in page
    assert "32 samples" in text
    with np.load(folder / "samples.npz") as samples:
        assert samples["images"].shape == (8, 32, 1) and samples["images"].dtype == np.float32


@LONG
def test_a_resumed_run_on_signals_is_bit_identical(tmp_path, signals):
    options = ["--data", f"signals:{signals}", *RESNET, "--recompute-batch-stats", "all"]
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    run(uninterrupted, *options)
    interrupt_and_resume(resumed, options)
    for arm in ("backbone", "inmerge"):
        expected = stored_scores(uninterrupted, arm)
        np.testing.assert_array_equal(stored_scores(resumed, arm), expected)


@LONG
def test_a_medmnist_file_of_volumes(tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 24), ("val", 8), ("test", 8)):
        labels = np.arange(count) % 2
        volumes = rng.integers(0, 100, (count, 28, 28, 28)) + 100 * labels[:, None, None, None]
        arrays[f"{split}_images"] = volumes.astype(np.uint8)
        arrays[f"{split}_labels"] = labels[:, None].astype(np.uint8)
    np.savez(tmp_path / "nodulemnist3d.npz", **arrays)
    options = ["--data", "nodulemnist3d", "--data-dir", str(tmp_path), "--allow-unverified"]
    options += RESNET
    with pytest.warns(UserWarning, match="NoduleMNIST3D"):
        assert run(tmp_path / "run", *options)["modality"] == "volume"
        check_life(tmp_path / "run", options, capsys)


@LONG
def test_a_state_space_network_on_signals(tmp_path, capsys, signals):
    options = ["--data", f"signals:{signals}", "--model", "mamba_tiny", "--width", "0.125"]
    run(tmp_path / "run", *options)
    check_life(tmp_path / "run", options, capsys)
    error = error_of(export, [str(tmp_path / "run"), "--to", str(tmp_path / "x.pth")], capsys)
    assert "mamba_tiny" in error


@LONG
def test_volumes(tmp_path, capsys):
    options = "--data phantom3d --size 16 --phantom.train 16 --phantom.val 6 --phantom.test 6"
    options = [*options.split(), *"--phantom.findings mass".split()]
    options += RESNET
    folder = tmp_path / "run"
    stored = run(folder, *options, "--flip", "True")
    assert "phantom3d 16 voxels a side, 16/6/6 volumes" in capsys.readouterr().out
    assert stored["modality"] == "volume"
    said, _, text = check_life(folder, options, capsys)
    assert "6 volumes of phantom3d (test)" in said and "the middle slices" in text
    data = load_dataset(parse_config(options).data)
    with np.load(folder / "samples.npz") as samples:
        first = np.flatnonzero(data.train.labels == 0)[0]
        np.testing.assert_array_equal(samples["images"][0], data.train.images[first, 8])
    error = error_of(
        predict, [str(folder), "--to", str(tmp_path / "x.csv"), "--size", "20"], capsys
    )
    assert "volumes of 20 voxels a side, and the run was trained at 16 voxels" in error


def test_a_network_for_another_modality_is_refused_with_both_names(signals, tmp_path):
    for options, message in (
        (["--data", "phantom", "--model", "mlp"], "`model` mlp does not read images.* phantom"),
        (
            ["--data", f"signals:{signals}", "--model", "vit_tiny"],
            "vit_tiny does not read signals, which `data` signals-waves has: choose one of resn",
        ),
        (["--data", "breast_cancer"], "resnet18 does not read tables.*breast-cancer has"),
        (["--data", "breast_cancer", "--model", "mlp", "--flip", "True"], "`flip`: .* tables"),
        (
            ["--data", "breast_cancer", "--model", "mlp", "--augment.crop", "2"],
            "`augment.crop`: breast-cancer has tables; leave it out",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            make_run_spec(parse_config([*options, *COMMON, "--output", str(tmp_path / "x")]))
