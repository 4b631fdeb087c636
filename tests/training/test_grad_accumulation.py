"""Less memory and less precision where they are asked for: parts of a batch, remat, bfloat16."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inmerge_jax import find_kernels, merge_kernels
from inmerge_jax.cli.options import parse_config
from inmerge_jax.data import train_batch
from inmerge_jax.errors import UsageError
from inmerge_jax.models import create_model
from inmerge_jax.models.densenet import DenseNet
from inmerge_jax.training import experiment, train_step
from inmerge_jax.training.parallel import (
    DATA_AXIS,
    broadcast_to_devices,
    replicate,
    shard_batch,
    unreplicate,
)
from inmerge_jax.training.run_spec import make_run_spec
from inmerge_jax.training.train_step import (
    TrainState,
    make_optimizer,
    make_train_step,
    new_state,
    zero_totals,
)
from tests.long import LONG
from tests.training import tiny

DEVICES = tuple(jax.local_devices()[:2])
SMALL = ["--size", "16", "--phantom.train", "32", "--phantom.val", "16", "--phantom.test", "16"]


class Plain(nn.Module):
    """Without batch normalisation."""

    @nn.compact
    def __call__(self, x, *, train):
        for _ in range(2):
            x = nn.relu(nn.Conv(8, (3, 3), (2, 2))(x))
        return nn.Dense(tiny.CLASSES)(x.mean((1, 2)))


def init(model, size=8):
    variables = model.init(jax.random.key(0), jnp.zeros((1, size, size, 1)), train=False)
    return jax.device_get((variables["params"], variables.get("batch_stats", {})))


def kernels_of(model, size=8):
    params, batch_stats = init(model, size)

    def forward(params, x):
        return model.apply({"params": params, "batch_stats": batch_stats}, x, train=False)

    return find_kernels(forward, params, jnp.zeros((1, size, size, 1)))


def prepared(model, recipe=tiny.RECIPE, rule=None, size=8, **options):
    """The step and its arguments but for the batch."""
    kernels = () if rule is None else kernels_of(model, size)
    optimizer = make_optimizer(recipe)
    step = make_train_step(
        model,
        optimizer,
        recipe,
        multi_label=False,
        devices=DEVICES,
        kernels=kernels,
        rule=rule,
        **options,
    )
    state = new_state(*init(model, size), optimizer, recipe.learning_rate)
    state, totals = (replicate(x, DEVICES) for x in (state, zero_totals(len(kernels))))
    return step, state, totals, broadcast_to_devices(jax.random.key(3), DEVICES)


def batches(count, size=16):
    train = tiny.make_dataset().train
    return [train_batch(train, seed=1, step=step, batch_size=size) for step in range(count)]


def train(model, given, **options):
    step, state, totals, root = prepared(model, **options)
    for batch in given:
        state, totals = step(state, totals, shard_batch(batch, DEVICES), root)
    return unreplicate(state), unreplicate(totals)


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=LONG)])
def test_microbatches_train_as_the_full_batch_without_batch_statistics(parts):
    whole, expected = train(Plain(), batches(4), rule=tiny.ALWAYS)
    state, totals = train(Plain(), batches(4), rule=tiny.ALWAYS, grad_accum_steps=parts)
    assert totals.steps == 4 and totals.loss == pytest.approx(expected.loss, rel=1e-5)
    np.testing.assert_array_equal(totals.merged, expected.merged)
    assert totals.merged.sum() > 0, "once per update"
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@LONG
def test_batch_normalisation_sees_each_part_on_its_own():
    still = dataclasses.replace(tiny.RECIPE, learning_rate=0.0, flip=False)
    (batch,) = batches(1)
    # A device's first part is the first half of its rows.
    halves = [np.r_[0:4, 8:12], np.r_[4:8, 12:16]]
    halves = [{name: x[rows] for name, x in batch.items()} for rows in halves]
    apart, expected = train(tiny.Net(), halves, recipe=still)
    state, totals = train(tiny.Net(), [batch], recipe=still, grad_accum_steps=2)
    assert totals.loss == pytest.approx(expected.loss / 2, rel=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (state.batch_stats, apart.batch_stats)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    whole, _ = train(tiny.Net(), [batch], recipe=still)
    assert not np.allclose(
        *(x.batch_stats["BatchNorm_1"]["mean"] for x in (state, whole)), rtol=1e-3
    )


@LONG
def test_remat_gives_the_same_gradients_in_less_memory_without_more_collectives():
    model = DenseNet((4,), tiny.CLASSES, growth=8)
    # XLA's CPU backend drops the barriers before what is computed again, and then shares it with
    # the forward pass. GPU and TPU keep them, and so does this.
    barriers = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    params, batch_stats = init(model, 32)
    images = jax.random.normal(jax.random.key(1), (8, 32, 32, 1))

    def gradient(model):
        def loss(params, images):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return jnp.square(logits).sum(), updated

        return jax.value_and_grad(loss, has_aux=True)

    found, memory, sums = [], [], []
    for chosen in (model, model.clone(remat=True)):
        compiled = jax.jit(gradient(chosen)).lower(params, images).compile(barriers)
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
        found.append(compiled(params, images))
        spread = jax.pmap(
            gradient(chosen.clone(axis_name=DATA_AXIS)), axis_name=DATA_AXIS, devices=DEVICES
        )
        halves = images.reshape(2, 4, *images.shape[1:])
        sums.append(str(jax.make_jaxpr(spread)(replicate(params, DEVICES), halves)).count(" psum"))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    assert memory[1] < 0.8 * memory[0], memory
    assert sums[1] == sums[0] > 0
    both = (model, model.clone(remat=True))
    names = [[kernel.path for kernel in kernels_of(each, 32)] for each in both]
    assert names[0] == names[1] and len(names[0]) == 9


@LONG
@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
def test_bfloat16_is_for_activations_alone(name, monkeypatch):
    merged = set()

    def watch(params, *rest, **form):
        merged.update(leaf.dtype.name for leaf in jax.tree.leaves(params))
        return merge_kernels(params, *rest, **form)

    monkeypatch.setattr(train_step, "merge_kernels", watch)
    model = create_model(name, tiny.CLASSES, width=1 / 16, dtype=jnp.bfloat16)
    optimizer, float32, index = make_optimizer(tiny.RECIPE), jnp.float32, jnp.int32
    image = jax.ShapeDtypeStruct((1, 16, 16, 1), float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    params, batch_stats = variables["params"], variables["batch_stats"]

    def forward(params, batch_stats, x):
        return model.apply({"params": params, "batch_stats": batch_stats}, x, train=False)

    kernels = find_kernels(forward, params, batch_stats, image)
    step = make_train_step(
        model,
        optimizer,
        tiny.RECIPE,
        multi_label=False,
        devices=DEVICES,
        kernels=kernels,
        rule=tiny.ALWAYS,
        grad_accum_steps=2,
    )
    state = jax.eval_shape(
        lambda p, b: TrainState(index(0), p, b, optimizer.init(p)), params, batch_stats
    )
    totals = jax.eval_shape(lambda: zero_totals(len(kernels)))
    rows = {"image": ((16, 16, 1), jnp.uint8), "label": ((), index), "index": ((), index)}
    batch = {key: jax.ShapeDtypeStruct((4, *shape), dtype) for key, (shape, dtype) in rows.items()}
    state, totals, batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), (state, totals, batch)
    )
    root = jax.eval_shape(lambda: jax.random.key(0))
    after, counted = jax.eval_shape(step, state, totals, batch, root)
    assert merged == {"float32"}
    assert after == state and counted == totals, "shapes and dtypes"
    assert {x.dtype.name for x in jax.tree.leaves((after, counted))} == {"float32", "int32"}
    text = str(jax.make_jaxpr(forward)(params, batch_stats, image))
    convolutions = re.findall(r":(\w+)\[[\d,]*\] = conv_general_dilated", text)
    assert set(convolutions) == {"bf16"} and len(convolutions) >= len(kernels)
    assert jax.eval_shape(forward, params, batch_stats, image).dtype == float32


@LONG
def test_the_options_reach_the_step_and_the_network(monkeypatch):
    plan = make_run_spec(
        parse_config([*SMALL, *"--batch-size 16 --grad-accum-steps 2 --devices 2".split()])
    )
    given = []
    monkeypatch.setattr(experiment, "make_train_step", lambda *args, **rest: given.append(rest))
    experiment._steps(plan, tiny.make_setup())
    assert [rest["grad_accum_steps"] for rest in given] == [2, 2]
    options = "--batch-size 16 --model densenet121 --width 0.1 --remat".split()
    assert make_run_spec(parse_config([*SMALL, *options])).model.remat


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--batch-size 16 --devices 2 --grad-accum-steps 3", "16 images|multiple of 6"),
        ("--grad-accum-steps 0", "`grad_accum_steps` 0: choose 1 or more"),
        ("--remat --batch-size 16", "`remat` is for densenet121"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        make_run_spec(parse_config([*SMALL, *options.split()]))
