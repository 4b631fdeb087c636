"""A network per device: each has the bits that it has alone, whatever its neighbours do."""

import dataclasses

import jax
import numpy as np
import pytest

from inmerge_jax import MergeRule, deep_kernels
from inmerge_jax.models import create_model
from inmerge_jax.training.init import conv_kernels, init_variables
from inmerge_jax.training.parallel import DATA_AXIS, broadcast_to_devices, replicate, shard_batch
from inmerge_jax.training.recipes import RECIPES
from inmerge_jax.training.train_step import make_optimizer, make_train_step, new_state, zero_totals
from tests.long import long_unless

RECIPE = dataclasses.replace(
    RECIPES["released"], batch_size=8, mean=(0.5,), std=(0.25,), flip=True, weight_decay=0.1
)
RULE = MergeRule(probability=0.5, threshold=-1.0, alpha=0.8, partner="nearest")
NETWORKS = {
    "batch normalisation": ("vgg11_bn", "small", 16),
    "dropout": ("vgg11", "imagenet", 32),
    "residual": ("resnet18", "small", 16),
}


def batch(seed, size):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (8, size, size, 1), dtype=np.uint8),
        "label": rng.integers(0, 3, 8).astype(np.int32),
        "index": np.arange(8, dtype=np.int32) + 8 * seed,
    }


def together(trees, devices):
    """One tree per device as one, and each alone again."""
    stacked = jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *trees)
    return jax.tree.map(lambda x: shard_batch({"x": x}, devices)["x"][:, 0], stacked)


@pytest.mark.parametrize("network", long_unless("batch normalisation".__eq__, list(NETWORKS)))
def test_networks_beside_each_other_are_those_alone(network):
    name, stem, size = NETWORKS[network]
    model = create_model(name, 3, stem=stem, width=0.02, axis_name=DATA_AXIS)
    deep = deep_kernels(conv_kernels(model, (size, size, 1)), skip=4)
    optimizer = make_optimizer(RECIPE)
    given = {"multi_label": False, "kernels": deep, "rule": RULE}
    devices = tuple(jax.local_devices()[:3])
    states = [
        new_state(*init_variables(model, (size, size, 1), seed), optimizer, 0.1)
        for seed in range(3)
    ]
    keys = [jax.random.key(seed) for seed in range(3)]

    step = make_train_step(
        model, optimizer, RECIPE, devices=devices, independent_replicas=True, **given
    )
    state, totals = together(states, devices), replicate(zero_totals(len(deep)), devices)
    roots = jax.random.wrap_key_data(together([jax.random.key_data(k) for k in keys], devices))
    for number in range(2):
        batches = together([batch(seed + 3 * number, size) for seed in range(3)], devices)
        state, totals = step(state, totals, batches, roots)
    found = jax.device_get((state, totals))

    own = devices[2:]
    step = make_train_step(model, optimizer, RECIPE, devices=own, **given)
    state, totals = replicate(states[2], own), replicate(zero_totals(len(deep)), own)
    for number in range(2):
        one = shard_batch(batch(2 + 3 * number, size), own)
        state, totals = step(state, totals, one, broadcast_to_devices(keys[2], own))
    assert totals.merged.sum() > 0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves((state, totals)), strict=True):
        assert a[2].tobytes() == np.asarray(b)[0].tobytes()
    first = jax.tree.leaves(found[0].params)[0]
    assert not np.array_equal(first[0], first[2])
