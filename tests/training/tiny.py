"""A network, a data set and a recipe small enough for training in a test."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from inmerge_jax import MergeRule, find_kernels
from inmerge_jax.data import Dataset, Split
from inmerge_jax.training.parallel import DATA_AXIS
from inmerge_jax.training.recipes import RECIPES
from inmerge_jax.training.train import StageConfig, TrainContext
from inmerge_jax.training.train_step import make_eval_step, make_optimizer, make_train_step

CLASSES = 3
RECIPE = dataclasses.replace(
    RECIPES["released"],
    batch_size=16,
    epochs=3,
    merging_epochs=3,
    learning_rate=0.05,
    mean=(0.5,),
    std=(0.25,),
)
ALWAYS = MergeRule(probability=0.5, threshold=-1.0, alpha=0.8)
NEVER = MergeRule(probability=1.0, threshold=1.0, alpha=0.8)


class Net(nn.Module):
    classes: int = CLASSES

    @nn.compact
    def __call__(self, x, *, train):
        for _ in range(2):
            x = nn.Conv(8, (3, 3), (2, 2))(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=DATA_AXIS)(x)
            x = nn.relu(x)
        return nn.Dense(self.classes)(x.mean((1, 2)))


def make_split(rng, count, multi_label=False, channels=1):
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    images = rng.integers(0, 100, (count, 8, 8, channels)).astype(np.uint8)
    images[:, :, :4] += (50 * labels)[:, None, None, None].astype(np.uint8)
    if multi_label:
        labels = np.eye(CLASSES, dtype=np.uint8)[labels]
    return Split(images, labels)


def make_dataset(train=40, val=22, test=19, multi_label=False):
    rng = np.random.default_rng(0)
    return Dataset(
        name="tiny",
        size=8,
        task="multi-label, binary-class" if multi_label else "multi-class",
        classes=("a", "b", "c"),
        train=make_split(rng, train, multi_label),
        val=make_split(rng, val, multi_label),
        test=make_split(rng, test, multi_label),
        source="drawn by a test",
    )


def init(seed=0):
    variables = Net().init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)), train=False)
    return jax.device_get((variables["params"], variables["batch_stats"]))


def kernels():
    def forward(params, batch_stats, x):
        return Net().apply({"params": params, "batch_stats": batch_stats}, x, train=False)

    return find_kernels(forward, *init(), jnp.zeros((1, 8, 8, 1)))


@functools.cache
def train_step(devices, recipe=RECIPE, rule=None, multi_label=False):
    merging = {} if rule is None else {"kernels": kernels(), "rule": rule}
    return make_train_step(
        Net(),
        make_optimizer(recipe),
        recipe,
        multi_label=multi_label,
        devices=devices,
        **merging,
    )


@functools.cache
def eval_step(devices, recipe=RECIPE):
    return make_eval_step(Net(), recipe, multi_label=False, devices=devices)


def make_setup(recipe=RECIPE, dataset=None):
    devices = tuple(jax.local_devices()[:1])
    return TrainContext(
        dataset=dataset or make_dataset(),
        recipe=recipe,
        devices=devices,
        optimizer=make_optimizer(recipe),
        eval_step=eval_step(devices, recipe),
        kernels=kernels(),
    )


def make_stage(folder, recipe=RECIPE, rule=None, **changes):
    stage = StageConfig(
        arm="backbone" if rule is None else "inmerge",
        seed=0,
        number=0 if rule is None else 1,
        folder=folder,
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        train_step=train_step(tuple(jax.local_devices()[:1]), recipe, rule),
        deep=() if rule is None else kernels(),
    )
    return dataclasses.replace(stage, **changes)


def after(asks):
    """`should_stop` that says so from that time of asking on."""
    count = itertools.count()
    return lambda: next(count) >= asks


def raising(error):
    """A function that raises `error`, whatever its arguments."""

    def fail(*_, **__):
        raise error

    return fail
