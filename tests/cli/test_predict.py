"""A finished run predicts: in a user's script, and as a CSV with `inmerge predict`."""

import csv
import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from inmerge_jax.cli import export, predict
from inmerge_jax.cli.options import parse_config
from inmerge_jax.data import DataConfig, Dataset, Split, load_dataset
from inmerge_jax.data.folder import open_files
from inmerge_jax.errors import UsageError
from inmerge_jax.training.experiment import run_experiment
from inmerge_jax.training.load import (
    LoadedRun,
    Preprocessing,
    Threshold,
    load_run,
    youden_threshold,
)
from inmerge_jax.training.metrics import read_scores
from inmerge_jax.training.run_spec import make_run_spec
from tests.data.test_folder import make_csv

PAGE = Path(__file__).parents[2] / "docs" / "weights.md"
DATA = (
    "--phantom.train 8 --phantom.val 12 --phantom.test 10 --phantom.findings mass effusion nodule "
    "--phantom.multi-label --size 16"
).split()
REST = (
    "--model vgg11 --width 0.0625 --recipe released --batch-size 8 --devices 1 --epochs 1 "
    "--merging-epochs 1 --arms inmerge --skip 6 --threshold -1 --compilation-cache-dir None "
    "--learning-rate 0.01 --seeds 3"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A multi-label run whose network reads three channels, with the seed 3."""
    folder = tmp_path_factory.mktemp("runs") / "scans"
    config = parse_config([*DATA, *REST, "--output", str(folder)])
    run_experiment(make_run_spec(config))
    return folder


@pytest.fixture(scope="module")
def dataset():
    return load_dataset(parse_config(DATA).data)


def stored_scores(run, split, arm="inmerge"):
    (path,) = (run / "seed3" / arm / "scores").glob(f"*_{split}_*")
    return read_scores(path)


def test_load_run_predicts_the_stored_scores(run, dataset):
    loaded = load_run(run)
    scores = loaded.predict(dataset.test.images, batch_size=4)  # 4, 4 and 2 images
    np.testing.assert_allclose(scores, stored_scores(run, "test"), rtol=0, atol=1e-5)
    assert loaded.classes == dataset.classes and loaded.multi_label
    backbone = load_run(run, "backbone", seed=3).predict(dataset.test.images)
    np.testing.assert_allclose(backbone, stored_scores(run, "test", "backbone"), rtol=0, atol=1e-5)
    assert np.abs(backbone - scores).max() > 1e-4

    x = loaded.preprocessing(dataset.test.images)
    assert x.shape == (10, 16, 16, 3)
    logits = loaded.model.apply(loaded.variables, x, train=False)
    np.testing.assert_allclose(jax.nn.sigmoid(logits), scores, rtol=0, atol=1e-5)
    assert loaded.predict(dataset.test.images[:0]).shape == (0, 3)


def test_the_sample_of_the_documentation_runs(run, dataset, monkeypatch):
    monkeypatch.chdir(run.parents[0])
    (run.parents[0] / "runs").symlink_to(".")
    (run.parents[0] / "new_scans").mkdir()
    for number, image in enumerate(dataset.test.images):
        Image.fromarray(image[..., 0]).save(f"new_scans/{number:02}.png")
    (sample,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(sample, names := {})
    np.testing.assert_allclose(names["scores"], stored_scores(run, "test"), rtol=0, atol=1e-5)


def test_the_commands_of_the_documentation_parse():
    lines = re.findall(r"^ {4}inmerge predict (.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(lines) >= 2
    for line in lines:
        assert predict.parse_config(shlex.split(line)).to.suffix == ".csv"


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_predict_writes_scores_and_decisions(run, tmp_path, capsys):
    file = tmp_path / "new" / "scores.csv"
    assert predict.main([str(run), "--to", str(file)]) == 0
    text = capsys.readouterr().out
    assert "10 images of phantom (test), seed 3 inmerge epoch 1" in text
    header, *rows = read_csv(file)
    assert header[:5] == ["split", "image", "mass", "effusion", "nodule"]
    assert [row[:2] for row in rows] == [["test", str(k)] for k in range(10)]
    scores = np.array([row[2:5] for row in rows], float)
    np.testing.assert_allclose(scores, stored_scores(run, "test"), rtol=0, atol=1e-5)

    thresholds = load_run(run).thresholds()
    assert list(thresholds) == ["mass", "effusion", "nodule"]
    for column, (name, found) in enumerate(thresholds.items()):
        assert header[5 + column] == f"{name} >= {found.value}"
        assert f"{name}: threshold {found.value}, sensitivity" in text
        decided = [int(row[5 + column]) for row in rows]
        assert decided == (scores[:, column] >= found.value).astype(int).tolist()
    for row in rows:
        names = [name for name, one in zip(thresholds, row[5:8], strict=True) if one == "1"]
        assert row[8] == "|".join(names)

    assert predict.main([str(run), "--to", str(file)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    command = [str(run), "--to", str(file), "--overwrite", "--split", "all", "--arm", "backbone"]
    assert predict.main([*command, "--phantom.test", "5"]) == 0
    splits = [row[0] for row in read_csv(file)[1:]]
    assert splits == ["train"] * 8 + ["val"] * 12 + ["test"] * 5


def test_a_users_own_images_are_scored_with_their_names(run, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (12, 20, 24), np.uint8)
    lines = ["path,mass,effusion,nodule"]
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.png")
        lines.append(f"{number:02}.png,{number % 2},{number // 2 % 2},{number // 4 % 2}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    command = [str(run), "--data", f"folder:{tmp_path / 'labels.csv'}", "--split", "all"]
    assert predict.main([*command, "--to", str(tmp_path / "scores.csv")]) == 0
    rows = read_csv(tmp_path / "scores.csv")[1:]
    assert sorted(row[1] for row in rows) == [f"{number:02}.png" for number in range(12)]
    data = DataConfig(name=f"folder:{tmp_path / 'labels.csv'}", size=16)
    scores = load_run(run).predict(load_dataset(data).test.images)
    found = [[float(score) for score in row[2:5]] for row in rows if row[0] == "test"]
    np.testing.assert_allclose(found, scores, rtol=0, atol=1e-6)


def test_images_without_labels_are_scored(run, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16), np.uint8)
    (tmp_path / "a").mkdir()
    names = ["a/0.png", "a/1.png", "b.PNG"]
    for name, pixels in zip(names, images, strict=True):
        Image.fromarray(pixels).save(tmp_path / name)
    file = tmp_path / "scores.csv"
    command = [str(run), "--to", str(file), "--overwrite", "--images"]
    assert predict.main([*command, str(tmp_path)]) == 0
    assert "3 images of" in capsys.readouterr().out
    rows = read_csv(file)[1:]
    assert [row[:2] for row in rows] == [["", name] for name in names]
    found = [[float(score) for score in row[2:5]] for row in rows]
    scores = load_run(run).predict(images[..., None])
    np.testing.assert_allclose(found, scores, rtol=0, atol=1e-6)
    assert predict.main([*command, str(tmp_path / "b.PNG")]) == 0
    assert [row[1] for row in read_csv(file)[1:]] == ["b.PNG"]
    (tmp_path / "b.PNG").write_bytes(b"")
    assert predict.main([*command, str(tmp_path)]) == 2
    assert "b.PNG" in capsys.readouterr().err and len(read_csv(file)) == 2
    assert "no file or folder" in error_of([*command, str(tmp_path / "nothing")], capsys)
    (tmp_path / "empty").mkdir()
    assert "no PNG or JPEG" in error_of([*command, str(tmp_path / "empty")], capsys)
    assert "leave out --data" in error_of([*command, str(tmp_path), "--split", "val"], capsys)


def test_data_that_does_not_fit_the_run_is_refused(run, tmp_path, capsys):
    file = tmp_path / "scores.csv"

    def error(*options):
        assert predict.main([str(run), "--to", str(file), *options]) == 2
        return capsys.readouterr().err

    message = error("--phantom.findings", "mass", "nodule")
    assert "the classes mass, nodule" in message and "mass, effusion, nodule" in message
    assert "--size 16" in error("--size", "32")
    assert "--seed 7: the run in" in error("--seed", "7")
    assert "--arm finetune: the run in" in error("--arm", "finetune")
    assert "holds no run" in error_of([str(tmp_path), "--to", str(file)], capsys)
    (tmp_path / "config.json").write_text('{"hidden_size": 768}')
    said = error_of([str(tmp_path), "--to", str(file)], capsys)
    assert "holds no run: its config.json has no seeds, arms or model" in said
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "results.json").unlink()
    assert "--resume" in error_of([str(unfinished), "--to", str(file)], capsys)
    (tmp_path / "a file").touch()
    assert "a file" in error("--to", str(tmp_path / "a file" / "scores.csv"))
    assert not file.exists()


def error_of(arguments, capsys):
    assert predict.main(arguments) == 2
    return capsys.readouterr().err


def test_images_that_do_not_fit_are_refused():
    preprocessing = Preprocessing(8, 3, (0.5,), (0.5,))
    grey = np.full((2, 8, 8, 1), 255, np.uint8)
    np.testing.assert_array_equal(preprocessing(grey), np.ones((2, 8, 8, 3)))
    for images in (grey[:, :4], grey[0], grey.astype(np.float32), np.repeat(grey, 2, -1)):
        with pytest.raises(UsageError, match=r"needs uint8 \(n, 8, 8, 3\)"):
            preprocessing(images)


def test_the_threshold_has_the_highest_youden_index():
    labels = np.array([0, 0, 0, 1, 0, 1, 1])
    scores = np.array([0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.7])
    found = youden_threshold(labels, scores)
    assert found == pytest.approx((0.25, 1, 0.75))  # the threshold 0.5 has 2 / 3 and 1
    best = max(
        (scores[labels == 1] >= cut).mean() + (scores[labels == 0] < cut).mean()
        for cut in np.linspace(0, 1, 101)
    )
    assert found.sensitivity + found.specificity == pytest.approx(best)
    assert youden_threshold(np.ones(3, int), np.arange(3.0)) is None
    assert youden_threshold(np.array([1, 0]), np.array([0.5, 0.5])).value == 0.5


@pytest.mark.parametrize(
    ("task", "classes", "scores", "expected"),
    [
        ("multi-class", "abc", [0.2, 0.5, 0.3], ["b"]),
        ("binary-class", "ab", [0.6, 0.4], [1, "b"]),  # above the threshold of 0.3
        ("multi-label, binary-class", "abc", [0.6, 0.4, 0.1], [1, 1, 0, "a|b"]),
    ],
)
def test_decisions_of_each_task(task, classes, scores, expected):
    run = LoadedRun(None, {}, None, tuple(classes), task, None)
    names = {"multi-class": "", "binary-class": "b"}.get(task, "abc")
    thresholds = {name: Threshold(0.3, 1.0, 1.0) for name in names}
    assert predict._decided(run, thresholds, np.array(scores, np.float32)) == expected


def test_colour_images_are_refused_by_a_network_that_reads_grey_ones():
    def split(channels):
        return Split(np.zeros((2, 8, 8, channels), np.uint8), np.zeros(2, np.int32))

    parts = dict.fromkeys(("train", "val", "test"), split(3))
    colour = Dataset("x", 8, "binary-class", ("a", "b"), **parts, source="a test")
    run = LoadedRun(None, {}, Preprocessing(8, 1, (0.5,), (0.5,)), ("a", "b"), colour.task, None)
    with pytest.raises(UsageError, match="3 channels, and the network reads 1: .*`channels=1`"):
        predict._check_dataset(run, colour)
    other = dataclasses.replace(run, task="multi-label, binary-class")
    with pytest.raises(UsageError, match="choose a data set with the same classes"):
        predict._check_dataset(other, colour)


def test_images_have_their_names_where_the_data_set_knows_them(run, dataset, tmp_path, monkeypatch):
    names = tuple(f"patient/{k}.png" for k in range(10))
    named = dataclasses.replace(dataset.test, names=names)
    monkeypatch.setattr(
        predict, "load_dataset", lambda *_: dataclasses.replace(dataset, test=named)
    )
    assert predict.main([str(run), "--to", str(tmp_path / "a.csv")]) == 0
    assert tuple(row[1] for row in read_csv(tmp_path / "a.csv")[1:]) == names
    with pytest.raises(ValueError, match="10 images but 9 names"):
        dataclasses.replace(dataset.test, names=names[1:])


GREY = "--size 12 --batch-size 4 --workers 0".split()


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A run on 12-bit images that a CSV names by absolute paths."""
    root = tmp_path_factory.mktemp("scans")
    rows = []
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 4096, (12, 12)).astype(np.uint16)
        path = root / "there" / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
        rows.append([path, "ab"[number % 2]])
    make_csv(root, rows, ["path", "label"])
    options = [*REST, *GREY, "--data", f"folder:{root / 'labels.csv'}", "--output"]
    run_experiment(make_run_spec(parse_config([*options, str(root / "run")])))
    return root


def test_moved_images_keep_their_splits_and_others_are_named(scans, tmp_path, capsys):
    shutil.copytree(scans / "there", tmp_path / "here")
    rows = [[tmp_path / "here" / f"{n:02}.png", "ab"[n % 2]] for n in range(24)]
    moved = make_csv(tmp_path, rows, ["path", "label"])

    def test_names(*options):
        to = tmp_path / "a.csv"
        assert predict.main([str(scans / "run"), "--to", str(to), "--overwrite", *options]) == 0
        return [Path(row[1]).name for row in read_csv(to)[1:]], capsys.readouterr().out

    own, said = test_names()
    assert "not the data set" not in said
    assert test_names("--data", f"folder:{moved}") == (own, said)
    make_csv(tmp_path, rows[:20], ["path", "label"])
    assert "is not the data set of the run" in test_names("--data", f"folder:{moved}")[1]
    csv_file = scans / "labels.csv"
    before = csv_file.read_text()
    csv_file.write_text("\n".join(before.splitlines()[:-2]) + "\n")
    assert predict.main([str(scans / "run"), "--to", str(tmp_path / "b.csv")]) == 2
    assert "has changed since it was trained" in capsys.readouterr().err
    csv_file.write_text(before)


def test_16_bit_images_are_scaled_as_those_of_the_training(scans, tmp_path):
    run = load_run(scans / "run")
    shape = run.preprocessing
    assert shape.bits == 12
    dark = np.full((12, 12), 100, np.uint16)
    Image.fromarray(dark).save(tmp_path / "dark.png")
    images = open_files(tmp_path, size=12, channels=1, bits=shape.bits)
    assert images[0].max() == round(100 * 255 / 4095)
    scores = run.predict(images[:])
    to = tmp_path / "a.csv"
    assert predict.main([str(scans / "run"), "--images", str(tmp_path), "--to", str(to)]) == 0
    np.testing.assert_allclose([float(x) for x in read_csv(to)[1][2:4]], scores[0], rtol=1e-5)
    Image.fromarray(dark * 100).save(tmp_path / "dark.png")
    with pytest.raises(UsageError, match="other images 0 to 4095"):
        open_files(tmp_path, size=12, channels=1, bits=shape.bits)[0]


def test_an_export_says_what_the_file_does_not_hold(run, scans, tmp_path, capsys):
    """Colour by the recipe of ImageNet's normalisation, and the run's own classes."""
    assert export.main([str(run), "--to", str(tmp_path / "a.safetensors")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == [
        "  inputs: 16 px, (x / 255 - mean) / std with mean 0.485 0.456 0.406 and std 0.229 0.224 "
        "0.225",
        "  outputs: mass, effusion, nodule",
    ]
    assert export.main([str(scans / "run"), "--to", str(tmp_path / "b.safetensors")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  outputs: a, b"
    (found := tmp_path / "run").mkdir()
    shutil.copytree(run, found, dirs_exist_ok=True)
    (found / "results.json").unlink()  # As of a run whose other seeds are still trained.
    assert export.main([str(found), "--to", str(tmp_path / "c.safetensors")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
