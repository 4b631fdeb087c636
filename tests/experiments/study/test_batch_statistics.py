"""Batch statistics that are estimated anew, against NumPy and PyTorch's running ones."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.study import batch_statistics, runner, stages
from experiments.study.cells import Backbone, Cell
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


@pytest.mark.long
def test_it_is_measured_once_for_each_cell_and_kept(tmp_path, capsys):
    cell = Cell(Backbone("phantom", "vgg11_bn", 0, 1, 0.1))
    places = stages.Places(tmp_path, tmp_path / "runs", tmp_path / "results")
    runner.run_cells([cell], places)
    assert not batch_statistics.measured(cell, places)
    batch_statistics.measure([cell], places)
    assert batch_statistics.measured(cell, places)
    found = json.loads((places.results / "study" / batch_statistics.FILE).read_bytes())
    assert list(found) == [cell.hash]
    running, renewed = found[cell.hash].values()
    assert running["auc"] == runner.read_result(places.cell(cell))["val"]["auc"]
    assert renewed["loss"] != running["loss"]
    capsys.readouterr()
    batch_statistics.measure([cell], places)
    assert not capsys.readouterr().out
