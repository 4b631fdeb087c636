"""Re-estimated batch statistics, against NumPy."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.study import archive, batch_statistics, runner, stages
from experiments.study.analysis import Group
from experiments.study.trials import Backbone, Trial
from inmerge_jax.data import Split
from inmerge_jax.models.layers import BatchNorm
from inmerge_jax.training.recipes import RECIPES
from inmerge_jax.training.train_step import normalise


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return BatchNorm(train=train)(nn.Conv(3, (1, 1))(x))


def test_they_are_the_mean_of_the_full_batches_own():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (11, 5, 5, 3), np.uint8)
    recipe = dataclasses.replace(RECIPES["medmnist"], batch_size=4)
    model = Normalised()
    variables = model.init(jax.random.key(0), jnp.zeros((2, 5, 5, 3)), train=False)
    params, stats = variables["params"], jax.tree.map(lambda x: x + 7, variables["batch_stats"])
    found = batch_statistics.estimate(
        model, params, stats, Split(images, np.zeros(11, np.int32)), recipe
    )
    kernel, bias = params["Conv_0"]["kernel"][0, 0], params["Conv_0"]["bias"]
    batches = [np.asarray(normalise(images[at : at + 4], recipe)) @ kernel + bias for at in (0, 4)]
    one = found["BatchNorm_0"]
    means = np.mean([x.mean((0, 1, 2)) for x in batches], 0)
    variances = np.mean([x.var((0, 1, 2), ddof=1) for x in batches], 0)
    np.testing.assert_allclose(one["mean"], means, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one["var"], variances, rtol=1e-5)


def test_differences_are_paired_by_training():
    start = Backbone("breastmnist", "resnet18", 0, 1)
    values = {("merge", 0): 0.5, ("merge", 1): 0.75, ("any", 0): 0.25, ("any", 1): 0.25}
    arms, records = {}, {}
    for (arm, seed), value in values.items():
        learning_rate = 0.1 if arm == "merge" else 0.2
        trial = Trial(dataclasses.replace(start, seed=seed), arm, 1, learning_rate)
        arms.setdefault(arm, {})[seed] = trial
        kinds = {kind: {"auc": value, "acc": value / 2} for kind in batch_statistics.KINDS}
        records[trial.hash] = {batch_statistics.FIELD: kinds}
    group = Group("one", arms, archive.Archive(records))
    found = batch_statistics.differences([group, group], ("merge", "any"))
    assert found["renewed"]["auc"]["trials"] == 4
    assert found["renewed"]["auc"]["mean"] == 0.375 and found["running"]["acc"]["mean"] == 0.1875
    spread = batch_statistics.ranges([group])["one"]
    assert spread["renewed"]["auc"] == [0.25, 0.625]


@pytest.mark.long
def test_it_is_measured_and_stored(tmp_path):
    trial = Trial(Backbone("phantom", "vgg11_bn", 0, 1, 0.1))
    paths = stages.Paths(tmp_path, tmp_path / "runs", tmp_path / "results")
    runner.run_trials([trial], paths)
    dataset = stages.plan_of(trial, paths).dataset
    archive.keep(trial, paths.trial(trial), paths.results, dataset)
    assert not batch_statistics.measured(trial, archive.read(paths.results))
    batch_statistics.measure(trial, paths)
    stored = archive.read(paths.results)
    assert batch_statistics.measured(trial, stored)
    found = stored.records[trial.hash][batch_statistics.FIELD]
    assert found["running"]["auc"] == runner.read_result(paths.trial(trial))["val"]["auc"]
    assert found["renewed"]["loss"] != found["running"]["loss"]
