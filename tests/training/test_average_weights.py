"""`--average-weights`: the average of the weights is what is evaluated, kept and exported."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from inmerge_jax.cli.options import parse_config
from inmerge_jax.errors import UsageError
from inmerge_jax.training.checkpointing import restore_checkpoint
from inmerge_jax.training.load import FinishedStage
from inmerge_jax.training.metrics import read_scores
from inmerge_jax.training.metrics_file import read_metrics
from inmerge_jax.training.recipes import RECIPES
from inmerge_jax.training.resolve import config_dict, resolve_recipe
from inmerge_jax.training.run_spec import make_run_spec
from inmerge_jax.training.stage_results import read_tested
from inmerge_jax.training.train_step import (
    Averages,
    averaged,
    make_optimizer,
    new_state,
    normalise,
    with_averages_of,
)
from tests.training import tiny
from tests.training.test_train import run


def test_averages_are_those_of_the_weights_after_each_update():
    recipe = dataclasses.replace(RECIPES["medmnist"], learning_rate=0.1, average_weights=0.9)
    optimizer = make_optimizer(recipe)
    params = {"w": np.ones(3, np.float32)}
    state = new_state(params, {}, optimizer, 0.1)
    average = np.ones(3)
    for count in range(1, 60):
        grads = {"w": jnp.array([1.0, -2.0, 0.5]) * count}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        state = state._replace(params=params, opt_state=opt_state)
        stays = min(0.9, count / (count + 9))
        average = stays * average + (1 - stays) * np.asarray(params["w"])
    np.testing.assert_allclose(averaged(state).params["w"], average, rtol=1e-5)
    assert np.abs(average - params["w"]).max() > 0.1


@pytest.mark.long
def test_the_average_is_tested_and_kept(tmp_path):
    recipe = dataclasses.replace(tiny.RECIPE, average_weights=0.9)
    average = tmp_path / "seed0" / "inmerge"
    result, _ = run(average, setup=tiny.make_setup(recipe), rule=tiny.ALWAYS)
    run(tmp_path / "plain", rule=tiny.ALWAYS)
    lines = [read_metrics(path / "metrics.jsonl") for path in (average, tmp_path / "plain")]
    for one, other in zip(*lines, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert one["val_loss"] != other["val_loss"]
    fresh = new_state(*tiny.init(), make_optimizer(recipe), 0.1)
    state, _ = restore_checkpoint(average / "checkpoints" / str(result["best_epoch"]), fresh)
    params = averaged(state).params
    assert {name.split(".")[0] for name in read_tested(average)} == {"params"}
    loaded = FinishedStage(tmp_path, "inmerge", 0, {}, result).variables()
    jax.tree.map(np.testing.assert_array_equal, loaded["params"], params)
    jax.tree.map(np.testing.assert_array_equal, loaded["batch_stats"], state.batch_stats)
    images = normalise(jnp.asarray(tiny.make_dataset().test.images), recipe)
    variables = {"params": params, "batch_stats": state.batch_stats}
    logits = tiny.Net().apply(variables, images, train=False)
    scores = read_scores(average / result["scores"]["test"])
    np.testing.assert_allclose(scores, jax.nn.softmax(logits), rtol=1e-4, atol=1e-6)


def test_it_is_part_of_the_configuration_where_it_is_given():
    def kept(options):
        config = parse_config(options.split())
        return config_dict(config, resolve_recipe(config.recipe), 1)["recipe"]

    assert "average_weights" not in kept("")
    assert kept("--average-weights 0.99")["average_weights"] == 0.99
    with pytest.raises(UsageError, match=r"`average_weights` 1\.0: choose a number in \(0, 1\)"):
        kept("--average-weights 1")
    tiny_run = "--phantom.train 40 --size 16 --model vgg16 --batch-size 8 --devices 1".split()
    with pytest.raises(UsageError, match="validation merges the weights themselves"):
        options = ["--preset", "released", "--average-weights", "0.9"]
        make_run_spec(parse_config([*tiny_run, *options]))


def test_averages_outlive_a_restart_of_the_optimizer():
    recipe = dataclasses.replace(RECIPES["released"], average_weights=0.9)
    optimizer = make_optimizer(recipe)
    before = new_state({"w": np.ones(3, np.float32)}, {}, optimizer, 0.1)
    grads = {"w": jnp.array([1.0, -2.0, 0.5])}
    updates, opt_state = optimizer.update(grads, before.opt_state, before.params)
    params = jax.tree.map(jnp.add, before.params, updates)
    trained = before._replace(params=params, opt_state=opt_state)
    restarted = with_averages_of(new_state(params, {}, optimizer, 0.01), trained)
    found, expected = (s.opt_state.inner_state[-1] for s in (restarted, trained))
    assert isinstance(found, Averages) and found.count == 1
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.abs(averaged(restarted).params["w"] - params["w"]).max() > 0
    assert not np.any(optax.tree.get(restarted.opt_state, "trace")["w"])
    plain = make_optimizer(dataclasses.replace(recipe, average_weights=None))
    fresh = new_state(params, {}, plain, 0.01)
    jax.tree.map(np.testing.assert_array_equal, with_averages_of(fresh, fresh), fresh)
