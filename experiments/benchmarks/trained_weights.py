"""Deep weights of a trained VGG19, for the benchmark of a merge."""

import dataclasses

import jax
import numpy as np

from inmerge_jax import deep_kernels
from inmerge_jax.data import make_phantom, train_batches
from inmerge_jax.models import create_model
from inmerge_jax.models.units import find_units
from inmerge_jax.training.init import init_variables
from inmerge_jax.training.parallel import (
    DATA_AXIS,
    broadcast_to_devices,
    choose_devices,
    prefetch_to_device,
    replicate,
    unreplicate,
)
from inmerge_jax.training.recipes import RECIPES
from inmerge_jax.training.train_step import make_optimizer, make_train_step, new_state, zero_totals

RATE = 0.02
"""Learning rate of SGD, at which VGG19 learns from random weights; the recipe has 0.1."""


def train_vgg19(*, updates: int, width: float = 1.0, batch: int = 64) -> tuple[list, list[float]]:
    """Trains VGG19 with batch normalization on the phantom at 28 px with SGD.

    Args:
      updates: number of updates.
      width: factor on the number of channels.
      batch: batch size.

    Returns:
      The weights of the last six convolutions, float32 (3, 3, c, c); and the mean loss of the first
      and of the last tenth of the updates.
    """
    devices = choose_devices(1)
    data = make_phantom(size=28, train=max(1024, batch), val=8, test=8)
    recipe = dataclasses.replace(RECIPES["released"], learning_rate=RATE, batch_size=batch)
    model = create_model("vgg19_bn", data.num_classes, width=width, axis_name=DATA_AXIS)
    shape = (28, 28, len(recipe.mean))
    params, batch_stats = init_variables(model, shape, seed=0)
    deep = deep_kernels(find_units(model, shape, ("kernels",)), skip=10)
    optimizer = make_optimizer(recipe)
    step = make_train_step(model, optimizer, recipe, multi_label=False, devices=devices)
    state = replicate(new_state(params, batch_stats, optimizer, RATE), devices)
    totals, root = (
        replicate(zero_totals(0), devices),
        broadcast_to_devices(jax.random.key(0), devices),
    )
    losses = [0.0]
    batches = train_batches(data.train, seed=0, batch_size=batch, start=0, stop=updates)
    for images in prefetch_to_device(batches, devices):
        state, totals = step(state, totals, images, root)
        losses.append(float(unreplicate(totals).loss))
    each, tenth = np.diff(losses), max(1, updates // 10)
    leaves = dict(jax.tree_util.tree_leaves_with_path(unreplicate(state.params)))
    ends = [float(each[:tenth].mean()), float(each[-tenth:].mean())]
    return [leaves[kernel.path] for kernel in deep][-6:], ends
