"""The presets: what merges under each, and validation that merges as the released code's does."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inmerge_jax import find_kernels, merge_kernels
from inmerge_jax.cli.options import parse_config
from inmerge_jax.cli.train import main
from inmerge_jax.errors import UsageError
from inmerge_jax.models import create_model
from inmerge_jax.training import train as loop
from inmerge_jax.training.evaluation import evaluate_merging
from inmerge_jax.training.parallel import broadcast_to_devices, replicate, unreplicate
from inmerge_jax.training.presets import NO_PRESET, PRESETS, select_units
from inmerge_jax.training.recipes import RECIPES
from inmerge_jax.training.resolve import resolve_recipe, resolve_rule
from inmerge_jax.training.run_spec import make_run_spec
from inmerge_jax.training.train_step import (
    VALIDATION,
    example_losses,
    make_merging_eval_step,
    new_state,
    normalise,
    zero_totals,
)
from tests.long import LONG, long_unless
from tests.training import tiny
from tests.training.test_train import check_resumption, run

TINY = (
    "--phantom.train 32 --phantom.val 6 --phantom.test 8 --size 16 --width 0.05 --batch-size 8 "
    "--epochs 1 --merging-epochs 1 --learning-rate 0.001 --devices 1 --compilation-cache-dir None"
).split()


def kernels_of(name):
    model = create_model(name, 3, width=0.05)
    images = jnp.zeros((1, 28, 28, 3))
    variables = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))

    def forward(params, rest, x):
        return model.apply({"params": params, **rest}, x, train=False)

    rest = {name: tree for name, tree in variables.items() if name != "params"}
    return find_kernels(forward, variables["params"], rest, images)


def test_presets_are_data_that_the_options_resolve_to():
    assert set(PRESETS) == {"paper", "released", "released_intent"}
    for name, preset in PRESETS.items():
        config = parse_config(["--preset", name])
        assert resolve_recipe(config.recipe) == RECIPES["released"]
        rule = resolve_rule(config.rule)
        assert rule.partner == preset.partner == ("nearest" if name == "paper" else "random")
        assert (rule.probability, rule.threshold, rule.alpha) == (0.3, 0.3, 0.8)
        assert preset.merge_in_validation == (name != "paper")
    given = parse_config("--preset paper --partner random --recipe medmnist".split())
    assert (given.rule.partner, given.recipe.name) == ("random", "medmnist")
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["paper"].partner = "random"


@pytest.mark.parametrize("preset", [NO_PRESET, *PRESETS.values()])
def test_a_vgg_merges_the_convolutions_after_the_first_ten(preset):
    for name, count in (("vgg16", 3), ("vgg19", 6), ("vgg19_bn", 6)):
        kernels = kernels_of(name)
        chosen, notice = select_units(preset, name, kernels, 10)
        assert chosen == kernels[10:] and len(chosen) == count and not notice


@pytest.mark.parametrize(
    "name", ["resnet18", *(pytest.param(n, marks=LONG) for n in ("resnet50", "densenet121"))]
)
@pytest.mark.parametrize("skip", [pytest.param(0, marks=LONG), 10])
def test_released_merges_nothing_in_resnets_and_densenets(name, skip):
    kernels = kernels_of(name)
    chosen, notice = select_units(PRESETS["released"], name, kernels, skip)
    if name == "densenet121" and skip == 0:
        assert chosen == kernels[:1] and not notice
        return
    assert chosen == () and f"merges nothing in {name}" in notice


@pytest.mark.parametrize(
    ("name", "blocks"),
    long_unless([("resnet18", 8)], [("resnet18", 8), ("resnet34", 16), ("resnet50", 16)]),
)
def test_intent_is_conv2_of_the_blocks_after_the_first(name, blocks):
    chosen, notice = select_units(PRESETS["released_intent"], name, kernels_of(name), 6)
    assert len(chosen) == blocks - 6 and not notice
    assert all(kernel.name.endswith("/conv2/kernel") for kernel in chosen)
    places = [kernel.name.split("/")[0] for kernel in chosen]
    assert places == sorted(places)
    assert places[0] == ("layer4_0" if name == "resnet18" else "layer2_3")
    with pytest.raises(UsageError, match=f"{name} has {blocks} residual blocks"):
        select_units(PRESETS["released_intent"], name, kernels_of(name), blocks)


@LONG
def test_what_was_meant_for_a_densenet_is_not_made_up():
    with pytest.raises(UsageError, match="are unknown"):
        select_units(PRESETS["released_intent"], "densenet121", kernels_of("densenet121"), 10)


def merging_eval(devices):
    return make_merging_eval_step(
        tiny.Net(),
        tiny.RECIPE,
        multi_label=False,
        devices=devices,
        kernels=tiny.kernels(),
        rule=tiny.ALWAYS,
    )


@LONG
@pytest.mark.parametrize("count", long_unless(lambda count: count > 1, [1, 8]))
def test_image_k_is_evaluated_after_k_merges(count):
    devices = tuple(jax.local_devices()[:count])
    setup, (params, stats) = tiny.make_setup(), tiny.init()
    images, root = setup.dataset.val, jax.random.key(5)
    fresh = new_state(params, stats, setup.optimizer, 0.1)._replace(step=np.int32(7))
    state, totals, scores, loss = evaluate_merging(
        merging_eval(devices),
        replicate(fresh, devices),
        replicate(zero_totals(len(tiny.kernels())), devices),
        images,
        broadcast_to_devices(root, devices),
        devices,
    )
    key = jax.random.fold_in(jax.random.fold_in(root, 7), VALIDATION)
    params, merged, losses = jax.tree.map(jnp.asarray, params), 0, []

    @jax.jit
    def merge(params, key):
        return merge_kernels(params, key, tiny.kernels(), tiny.ALWAYS)

    @jax.jit
    def evaluate(params, image):
        variables = {"params": params, "batch_stats": stats}
        return tiny.Net().apply(variables, normalise(image, setup.recipe), train=False)

    for index in range(len(images)):
        params, counts = merge(params, jax.random.fold_in(key, index))
        merged += counts.merged
        logits = evaluate(params, images.images[index : index + 1])
        np.testing.assert_allclose(scores[index], jax.nn.softmax(logits)[0], rtol=1e-4, atol=1e-6)
        losses.append(example_losses(logits, images.labels[index : index + 1], False)[0])
    assert loss == pytest.approx(float(np.mean(losses)), rel=1e-5)
    np.testing.assert_array_equal(totals.merged, merged)
    assert totals.steps == len(images) and merged.sum() > len(images)
    assert int(unreplicate(state).step) == 7
    for ours, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        for copy in np.asarray(ours):
            np.testing.assert_allclose(copy, expected, rtol=1e-5, atol=1e-6)


def test_validation_merges_are_in_the_checkpoint_and_counted(tmp_path):
    step = merging_eval(tuple(jax.local_devices()[:1]))
    plain, _ = run(tmp_path / "plain", rule=tiny.ALWAYS)
    result, text = run(tmp_path / "merging", rule=tiny.ALWAYS, merging_eval_step=step)
    lines = loop.read_metrics(tmp_path / "merging" / "metrics.jsonl")
    assert [line["val_passes"] for line in lines] == [22, 22, 22]
    assert result["val_passes"] == 66 and plain["val_passes"] == 0
    assert sum(result["val_merged"]) == sum(sum(line["val_merged"]) for line in lines) > 66
    assert result["val_merged"] == result["val_selected"] and plain["val_merged"] == []
    assert f"{sum(result['val_merged'])} in validation" in text
    first = [
        loop.read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("plain", "merging")
    ]
    assert first[0]["train_loss"] == first[1]["train_loss"]
    assert first[0]["val_loss"] != first[1]["val_loss"]
    # Training goes on from the weights that validation merged.
    second = [loop.read_metrics(tmp_path / n / "metrics.jsonl")[1] for n in ("plain", "merging")]
    assert second[0]["train_loss"] != second[1]["train_loss"]


@LONG
def test_a_resumed_run_merges_the_same_in_validation(tmp_path, monkeypatch):
    step = merging_eval(tuple(jax.local_devices()[:1]))

    def train_in(folder):
        run(folder, rule=tiny.ALWAYS, merging_eval_step=step)

    check_resumption(tmp_path, monkeypatch, train_in, 4)


@LONG
def test_released_on_a_vgg_merges_in_validation_and_reports_it(tmp_path, capsys):
    options = "--model vgg16 --preset released --threshold -1 --arms inmerge".split()
    assert main([*TINY, *options, "--output", str(tmp_path / "run")]) == 0
    (result,) = json.loads((tmp_path / "run" / "results.json").read_text())["arms"]["inmerge"]
    assert result["val_passes"] == 6 and sum(result["val_merged"]) > 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["preset"] == "released" and stored["rule"]["partner"] == "random"
    assert stored["recipe"]["schedule"] == "plateau"
    said = " ".join(capsys.readouterr().out.split())  # Wrapped lines end in a space.
    assert f"by seed: {sum(result['val_merged']):,}." in said


@LONG
def test_released_on_a_resnet_runs_merges_nothing_and_says_why(tmp_path, capsys):
    options = "--model resnet18 --preset released --arms inmerge".split()
    assert main([*TINY, *options, "--output", str(tmp_path / "run")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "WARNING: the released code merges nothing in resnet18" in printed
    assert "NOTHING WAS MERGED: there was no layer to merge in" in printed
    (result,) = json.loads((tmp_path / "run" / "results.json").read_text())["arms"]["inmerge"]
    assert result["merged"] == [] and "one level deeper" in result["warnings"][0]


def test_an_intent_that_leaves_nothing_is_refused():
    with pytest.raises(UsageError, match=r"`skip` 10.*8 residual blocks; choose 0 to 7"):
        make_run_spec(parse_config([*TINY, "--model", "resnet18", "--preset", "released_intent"]))
