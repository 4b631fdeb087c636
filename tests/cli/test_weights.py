"""A network of torchvision's trains here with merging and goes back."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest

from inmerge_jax.cli import export, train
from inmerge_jax.cli.options import parse_config
from inmerge_jax.errors import UsageError
from inmerge_jax.training import experiment
from inmerge_jax.training.experiment import _results
from inmerge_jax.training.metrics import read_scores
from inmerge_jax.training.run_spec import make_run_spec
from inmerge_jax.training.train_step import normalise

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")

from experiments.oracles.torch_networks import create_network  # noqa: E402

CLASSES = 3
DATA = (
    "--phantom.train 4 --phantom.val 4 --phantom.test 4 --phantom.findings mass effusion "
    "--batch-size 4 --devices 1 --epochs 1 --merging-epochs 1 --arms inmerge "
    "--compilation-cache-dir None"
).split()
RESNET = (
    "--model resnet18 --width 0.125 --size 16 --arms finetune "
    "--recipe released --learning-rate 0.01"
).split()


def save(network, path):
    torch.save(network.state_dict(), path)
    return ["--init-from", str(path)]


@pytest.mark.long
def test_vgg19_trains_here_with_merging_and_goes_back_to_torchvision(tmp_path, capsys):
    from inmerge_jax.models import create_model
    from inmerge_jax.models.torchvision import from_state_dict, read_state_dict

    torch.manual_seed(0)
    network = torchvision.models.vgg19(weights=None, num_classes=CLASSES)
    started = network.state_dict()["features.34.weight"].numpy().copy()
    given = save(network, tmp_path / "vgg19.pth")
    run, file = tmp_path / "run", tmp_path / "trained.pth"
    options = "--model vgg19 --stem imagenet --size 32 --recipe released --learning-rate 1e-4"
    rule = "--probability 1 --threshold -1"
    command = [*DATA, *given, *options.split(), *rule.split(), "--output", str(run)]
    assert train.main(command) == 0
    results = json.loads((run / "results.json").read_text())
    digest = hashlib.sha256((tmp_path / "vgg19.pth").read_bytes()).hexdigest()
    assert results["model"]["init_sha256"] == digest
    assert sum(results["arms"]["inmerge"][0]["merged"]) > 0

    assert export.main([str(run), "--to", str(file)]) == 0
    assert "vgg19 with the imagenet stem" in capsys.readouterr().out
    assert export.main([str(run), "--to", str(file)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    trained = torch.load(file, weights_only=True)
    assert np.abs(trained["features.34.weight"].numpy() - started).max() > 1e-3
    network.load_state_dict(trained, strict=True)
    images = np.random.default_rng(0).normal(size=(2, 64, 96, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = network.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    variables = from_state_dict("vgg19", read_state_dict(file))
    model = create_model("vgg19", CLASSES, stem="imagenet")
    ours = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_a_file_that_does_not_fit_is_named_before_anything_is_written(tmp_path, capsys):
    network = create_network("vgg11", 7, stem="small", size=16, width=0.125)
    given = save(network, tmp_path / "vgg11.ckpt")
    options = [*DATA, "--width", "0.125", "--size", "16", "--output", str(tmp_path / "run")]
    options += ["--skip", "0"]
    assert train.main([*options, *given, "--model", "vgg13"]) == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "vgg11.ckpt") in message and "lower --init-min-match" in message
    assert message.count("\n") < 20
    options += ["--model", "vgg11"]
    assert train.main([*options, "--init-from", str(tmp_path / "none.pth")]) == 2
    assert "none.pth: No such file" in capsys.readouterr().err
    assert train.main([*options, *given, "--init-min-match", "90"]) == 2
    assert "--init-min-match 90" in capsys.readouterr().err
    assert train.main([*options, "--replace-head"]) == 2
    assert "--init-from" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_the_run_says_and_stores_what_was_loaded(tmp_path, capsys, monkeypatch):
    network = create_network("vgg11", 7, stem="small", size=16, width=0.125)
    given = save(network, tmp_path / "vgg11.bin")
    options = [*DATA, *given, "--model", "vgg11", "--width", "0.125", "--size", "16", "--skip", "0"]
    spec = make_run_spec(parse_config(options))  # grey images, one channel
    report = spec.init_report
    assert report.loaded == 14 and len(report.initialized) == 4
    stored = _results(spec, {"backbone": []})
    assert stored["init"]["initialized"] == report.initialized
    values = stored["model"]
    digest = hashlib.sha256((tmp_path / "vgg11.bin").read_bytes()).hexdigest()
    assert values["init_sha256"] == digest and "init_min_match" not in values

    def stop(*_):
        raise UsageError("stopped by the test")

    monkeypatch.setattr(experiment, "run_experiment", stop)
    assert train.main(options) == 2
    text = capsys.readouterr().out
    assert "14 of 18 entries, 99.9% of the convolution weights" in text
    assert "initialized at random: " in text and "classifier.bias, classifier.weight" in text
    assert "it would fit with --channels 3" in text


def test_export_says_what_there_is(tmp_path, capsys):
    assert export.main([str(tmp_path), "--to", str(tmp_path / "a.pth")]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert export.main([str(tmp_path), "--to", str(tmp_path / "a.onnx")]) == 2
    assert "ends in one of .safetensors" in capsys.readouterr().err


@pytest.fixture(scope="module")
def resnet_run(tmp_path_factory):
    """A narrow ResNet's run with the arms backbone and finetune."""
    run = tmp_path_factory.mktemp("runs") / "resnet"
    jax.config.update("jax_disable_most_optimizations", True)  # they take most of the time here
    assert train.main([*DATA, *RESNET, "--output", str(run)]) == 0
    jax.config.update("jax_disable_most_optimizations", False)
    return run


@pytest.mark.long
def test_the_finetune_arm_goes_to_the_benchmarks_resnet_with_its_scores(resnet_run, tmp_path):
    file = tmp_path / "resnet18_28_1.pth"
    command = [str(resnet_run), "--arm", "finetune", "--names", "medmnist", "--to", str(file)]
    assert export.main(command) == 0
    checkpoint = torch.load(file, weights_only=True)
    assert list(checkpoint) == ["net"] and "layer2.0.shortcut.0.weight" in checkpoint["net"]
    network = create_network("resnet18", CLASSES, stem="small", size=16, width=0.125)
    network.load_state_dict(checkpoint["net"], strict=True)

    plan = make_run_spec(parse_config([*DATA, *RESNET]))
    images = np.asarray(normalise(plan.dataset.test.images, plan.recipe))
    with torch.no_grad():
        logits = network.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    result = json.loads((resnet_run / "seed0" / "finetune" / "result.json").read_text())
    stored = read_scores(resnet_run / "seed0" / "finetune" / result["scores"]["test"])
    np.testing.assert_allclose(torch.softmax(logits, 1), stored, rtol=0, atol=1e-5)

    assert export.main([str(resnet_run), "--arm", "backbone", "--to", str(tmp_path / "b.pth")]) == 0
    backbone = torch.load(tmp_path / "b.pth", weights_only=True)
    assert not torch.equal(backbone["conv1.weight"], checkpoint["net"]["conv1.weight"])


@pytest.mark.long
def test_an_unfinished_run_or_an_arm_that_was_not_trained_is_not_exported(
    resnet_run, tmp_path, capsys
):
    file = tmp_path / "a.pth"
    assert export.main([str(resnet_run), "--to", str(file)]) == 2
    assert "--arm inmerge: the run in" in capsys.readouterr().err
    shutil.copytree(resnet_run, tmp_path / "run")
    (tmp_path / "run" / "seed0" / "finetune" / "result.json").unlink()
    assert export.main([str(tmp_path / "run"), "--arm", "finetune", "--to", str(file)]) == 2
    message = capsys.readouterr().err
    assert "finetune is not finished" in message and "--resume" in message
    assert not file.exists()
