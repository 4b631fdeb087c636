"""`--recompute-batch-stats`: what is evaluated, exported, resumed, and left alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from inmerge_jax.cli import export
from inmerge_jax.cli.options import parse_config
from inmerge_jax.cli.train import main
from inmerge_jax.data import train_batch
from inmerge_jax.errors import UsageError
from inmerge_jax.models.torchvision import from_state_dict, read_state_dict
from inmerge_jax.training.metrics import read_scores
from inmerge_jax.training.metrics_file import read_metrics
from inmerge_jax.training.resolve import config_dict, resolve_recipe
from inmerge_jax.training.run_spec import make_run_spec
from inmerge_jax.training.stage_results import TESTED, read_tested
from inmerge_jax.training.train import batch_seed
from inmerge_jax.training.train_step import make_batch_stats_step, normalise
from tests.training import tiny
from tests.training.test_train import check_resumption, restore, run

TINY = (
    "--phantom.train 40 --phantom.val 8 --phantom.test 8 --size 16 "
    "--width 0.05 --batch-size 8 --skip 3"
)


def setup(devices=1, recipe=tiny.RECIPE):
    chosen = tuple(jax.local_devices()[:devices])
    step = make_batch_stats_step(tiny.Net(), recipe, chosen)
    context = dataclasses.replace(tiny.make_setup(recipe), devices=chosen, batch_stats_step=step)
    return dataclasses.replace(context, eval_step=tiny.eval_step(chosen, recipe))


def recompute(folder, devices=1, **options):
    recipe = dataclasses.replace(tiny.RECIPE, **options)
    context = setup(devices, recipe)
    step = tiny.train_step(context.devices, recipe, tiny.ALWAYS)
    return run(
        folder,
        setup=context,
        rule=tiny.ALWAYS,
        train_step=step,
        recompute_batch_stats=True,
    )[0]


def expected(params, batches=3):
    """The mean of the batches' own statistics, which an update from zero holds a tenth of."""
    zeros = jax.tree.map(jnp.zeros_like, tiny.init()[1])

    def update(images):
        variables = {"params": params, "batch_stats": zeros}
        return tiny.Net().apply(variables, images, train=True, mutable=["batch_stats"])[1]

    found = []
    for number in range(batches):
        batch = train_batch(
            tiny.make_dataset().train, seed=batch_seed(0, 1), step=number, batch_size=16
        )
        images = normalise(jnp.asarray(batch["image"]), tiny.RECIPE)[None]
        found.append(jax.vmap(update, axis_name="devices")(images))
    return flatten_dict(jax.tree.map(lambda *x: 10 * np.mean(x, (0, 1)), *found), sep=".")


@pytest.mark.long
def test_every_evaluation_uses_them_and_training_does_not(tmp_path):
    plain, _ = run(tmp_path / "plain", rule=tiny.ALWAYS)
    result = recompute(tmp_path / "renewed")
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "renewed")]
    for one, other in zip(*lines, strict=True):
        assert one["train_loss"] == other["train_loss"] and one["merged"] == other["merged"]
        assert one["val_loss"] != other["val_loss"]
    states = [restore(tmp_path / name, 3) for name in ("plain", "renewed")]
    jax.tree.map(np.testing.assert_array_equal, *states)

    state = restore(tmp_path / "renewed", result["best_epoch"])
    found, ours = read_tested(tmp_path / "renewed"), expected(state.params)
    assert set(found) == set(ours)
    for name in ours:
        np.testing.assert_allclose(found[name], ours[name], rtol=2e-5, atol=1e-6)
    variables = {"params": state.params, "batch_stats": {}}
    for name, values in found.items():
        _, layer, entry = name.split(".")
        variables["batch_stats"].setdefault(layer, {})[entry] = values
    images = normalise(jnp.asarray(tiny.make_dataset().test.images), tiny.RECIPE)
    logits = tiny.Net().apply(variables, images, train=False)
    scores = read_scores(tmp_path / "renewed" / result["scores"]["test"])
    np.testing.assert_allclose(scores, jax.nn.softmax(logits), rtol=1e-4, atol=1e-6)
    assert not (tmp_path / "plain" / TESTED).exists() and plain["epochs"] == 3


@pytest.mark.long
def test_the_number_of_batches_is_as_given(tmp_path):
    result = recompute(tmp_path, batch_stats_batches=1)
    ours = expected(restore(tmp_path, result["best_epoch"]).params, batches=1)
    for name, values in read_tested(tmp_path).items():
        np.testing.assert_allclose(values, ours[name], rtol=2e-5, atol=1e-6)


@pytest.mark.long
def test_more_devices_find_the_same(tmp_path):
    for devices in (1, 2):
        recompute(tmp_path / str(devices), devices)
    one, two = (read_tested(tmp_path / name) for name in "12")
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-3, atol=1e-5)


@pytest.mark.long
def test_interrupted_and_resumed_is_bit_identical(tmp_path, monkeypatch):
    folders = check_resumption(tmp_path, monkeypatch, recompute, 4)
    files = [(folder / TESTED).read_bytes() for folder in folders]
    assert files[0] == files[1]


def test_an_older_runs_configuration_is_the_same():
    kept = config_dict(config := parse_config([]), resolve_recipe(config.recipe), 1)
    assert "recompute_batch_stats" not in kept["recipe"]
    config = parse_config("--recompute-batch-stats all --batch-stats-batches 9".split())
    kept = config_dict(config, resolve_recipe(config.recipe), 1)["recipe"]
    assert (kept["recompute_batch_stats"], kept["batch_stats_batches"]) == ("all", 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model vgg11 --recompute-batch-stats all", "vgg11 has no batch normalisation"),
        ("--model vgg11_bn --recompute-batch-stats all --preset released", "statistics cannot fol"),
        ("--model vgg11_bn --batch-stats-batches 3", "give `recompute_batch_stats=all` too"),
        (
            "--model vgg11_bn --recompute-batch-stats all --batch-stats-batches 0",
            "choose 1 or more",
        ),
    ],
)
def test_what_has_no_effect_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        make_run_spec(parse_config([*TINY.split(), *options.split()]))


@pytest.mark.long
def test_the_arms_are_as_chosen_and_the_tested_statistics_are_exported(tmp_path):
    options = "--model vgg11_bn --threshold -1 --epochs 1 --merging-epochs 1 --devices 1"
    options += " --recompute-batch-stats inmerge --compilation-cache-dir None"
    run, file = tmp_path / "run", tmp_path / "w.safetensors"
    assert main([*TINY.split(), *options.split(), "--output", str(run)]) == 0
    found = {arm: read_tested(run / "seed0" / arm) for arm in ("finetune", "inmerge")}
    assert not found["finetune"] and found["inmerge"]
    assert export.main([str(run), "--to", str(file)]) == 0
    variables = from_state_dict(
        "vgg11_bn", read_state_dict(file), stem="small", num_classes=6, channels=1, width=0.05
    )
    exported = flatten_dict({"batch_stats": variables["batch_stats"]}, sep=".")
    assert all(np.array_equal(exported[name], found["inmerge"][name]) for name in exported)
