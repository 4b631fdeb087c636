"""The training step and inference, exported once for TPU, CUDA and CPU, are the same functions."""

import itertools

import jax
import numpy as np
import pytest
from jax import export

from inmerge_jax import MergeRule, deep_kernels
from inmerge_jax.models import create_model
from inmerge_jax.models.units import find_units
from inmerge_jax.training.init import init_variables
from inmerge_jax.training.parallel import DATA_AXIS, broadcast_to_devices, replicate, shard_batch
from inmerge_jax.training.train_step import make_optimizer, make_train_step, new_state, zero_totals
from tests.training import tiny

PLATFORMS = ("tpu", "cuda", "cpu")
SHAPE = (16, 16, 3)


def network(name):
    model = create_model(name, tiny.CLASSES, width=0.05, axis_name=DATA_AXIS)
    return model, *init_variables(model, SHAPE, seed=0)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "partner"),
    itertools.product(["resnet18", "vgg16"], ["random", "nearest"]),
)
def test_the_exported_training_step_is_the_step(name, partner):
    devices = tuple(jax.local_devices()[:1])
    model, params, batch_stats = network(name)
    kernels = deep_kernels(find_units(model, SHAPE, ("kernels",)), skip=4)
    optimizer = make_optimizer(tiny.RECIPE)
    step = make_train_step(
        model,
        optimizer,
        tiny.RECIPE,
        multi_label=False,
        devices=devices,
        kernels=kernels,
        rule=MergeRule(probability=0.5, threshold=-1.0, partner=partner),
    )
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, *SHAPE), np.uint8),
        "label": rng.integers(0, tiny.CLASSES, 8, np.int32),
        "index": np.arange(8, dtype=np.int32),
    }

    def arguments():
        state = replicate(new_state(params, batch_stats, optimizer, 0.05), devices)
        totals = replicate(zero_totals(len(kernels)), devices)
        return state, totals, shard_batch(batch, devices), jax.random.key_data(jax.random.key(3))

    def with_key_data(state, totals, batch, data):
        return jax.tree.leaves(step(state, totals, batch, jax.random.wrap_key_data(data)))

    exported = export.export(jax.jit(with_key_data), platforms=PLATFORMS)(*arguments())
    assert exported.platforms == PLATFORMS
    found = exported.call(*arguments())
    state, totals, batch, _ = arguments()
    root = broadcast_to_devices(jax.random.key(3), devices)
    state, totals = step(state, totals, batch, root)
    assert int(totals.merged.sum()) > 0
    for a, b in zip(found, jax.tree.leaves((state, totals)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vgg16"])
def test_exported_inference_is_inference(name):
    model, params, batch_stats = network(name)

    @jax.jit
    def infer(params, batch_stats, images):
        variables = {"params": params, "batch_stats": batch_stats}
        return jax.nn.softmax(model.apply(variables, images, train=False))

    images = np.random.default_rng(0).random((5, *SHAPE), np.float32)
    exported = export.export(infer, platforms=PLATFORMS)(params, batch_stats, images)
    assert exported.platforms == PLATFORMS
    expected = infer(params, batch_stats, images)
    np.testing.assert_allclose(exported.call(params, batch_stats, images), expected, atol=1e-6)
