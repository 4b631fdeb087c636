import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from inmerge_jax import in_model_merging, merge_kernels
from inmerge_jax.data import Split, eval_batches, train_batch
from inmerge_jax.training import train_step as steps
from inmerge_jax.training.checkpointing import restore_checkpoint, save_checkpoint
from inmerge_jax.training.parallel import broadcast_to_devices, replicate, shard_batch, unreplicate
from inmerge_jax.training.recipes import RECIPES
from inmerge_jax.training.train_step import (
    MERGING,
    example_losses,
    flip,
    make_optimizer,
    new_state,
    normalise,
    zero_totals,
)
from tests.long import long_unless
from tests.training import tiny


def train(count, devices, recipe=tiny.RECIPE, rule=None, multi_label=False, weights=None):
    devices = tuple(jax.local_devices()[:devices])
    dataset = tiny.make_dataset(multi_label=multi_label)
    state = new_state(*(weights or tiny.init()), make_optimizer(recipe), recipe.learning_rate)
    state = replicate(state, devices)
    totals = replicate(zero_totals(0 if rule is None else len(tiny.kernels())), devices)
    root = broadcast_to_devices(jax.random.key(3), devices)
    step = tiny.train_step(devices, recipe, rule, multi_label)
    losses = []
    for number in range(count):
        batch = train_batch(dataset.train, seed=1, step=number, batch_size=recipe.batch_size)
        state, totals = step(state, totals, shard_batch(batch, devices), root)
        losses.append(float(unreplicate(totals).loss))
    return state, totals, losses


@pytest.mark.parametrize(
    ("devices", "multi_label"),
    long_unless([(8, False)], [(2, False), (4, False), (8, False), (8, True)]),
)
def test_more_devices_train_the_same(devices, multi_label):
    one, one_totals, one_losses = train(4, 1, rule=tiny.ALWAYS, multi_label=multi_label)
    many, totals, losses = train(4, devices, rule=tiny.ALWAYS, multi_label=multi_label)
    np.testing.assert_allclose(losses, one_losses, rtol=1e-5)
    np.testing.assert_array_equal(unreplicate(totals).merged, unreplicate(one_totals).merged)
    assert unreplicate(totals).merged.sum() > 0
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        assert len(a) == devices
        np.testing.assert_allclose(a[0], b[0], rtol=2e-4, atol=2e-6)


@pytest.mark.long
def test_in_float64_eight_devices_train_as_one_to_rounding():
    """Float32 can't show it after ten steps: rounding flips decisions of a ReLU."""
    with jax.enable_x64(True):
        weights = jax.tree.map(np.float64, tiny.init())
        (one, _, losses), (many, _, others) = (
            train(10, devices, rule=tiny.ALWAYS, weights=weights) for devices in (1, 8)
        )
        np.testing.assert_allclose(others, losses, rtol=1e-6)  # Sums of losses are float32.
        for a, b in zip(*(jax.tree.leaves(state.params) for state in (many, one)), strict=True):
            assert a.dtype == np.float64
            np.testing.assert_allclose(a[0], b[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("devices", long_unless([8], [2, 4, 8]))
def test_replicas_are_bit_equal_after_fifty_merging_steps(devices):
    state, totals, losses = train(50, devices, rule=tiny.ALWAYS)
    assert unreplicate(totals).merged.sum() > 50 and np.isfinite(losses).all()
    for leaf in jax.tree.leaves((state, totals)):
        leaf = np.asarray(leaf)
        assert len(leaf) == devices and all(np.array_equal(leaf[0], other) for other in leaf[1:])


@pytest.mark.long
def test_a_treatment_takes_the_place_of_merging_and_its_numbers_are_no_part_of_the_program():
    devices = tuple(jax.local_devices()[:2])
    traces = []

    def transform(params, key, step, hyperparams):
        traces.append(1)
        rule = dataclasses.replace(tiny.ALWAYS, probability=hyperparams["probability"])
        return merge_kernels(params, key, tiny.kernels(), rule)

    def after(probability, **given):
        step = steps.make_train_step(
            tiny.Net(),
            make_optimizer(tiny.RECIPE),
            tiny.RECIPE,
            multi_label=False,
            devices=devices,
            kernels=tiny.kernels(),
            **given,
        )
        optimizer = make_optimizer(tiny.RECIPE)
        state = new_state(*tiny.init(), optimizer, tiny.RECIPE.learning_rate)
        batch = train_batch(
            tiny.make_dataset().train, seed=1, step=0, batch_size=tiny.RECIPE.batch_size
        )
        state, totals = step(
            replicate(state, devices),
            replicate(zero_totals(2), devices),
            shard_batch(batch, devices),
            broadcast_to_devices(jax.random.key(3), devices),
        )
        return unreplicate((state.params, totals))

    treated = after(0.5, param_transform=transform, hyperparams={"probability": 0.5})
    merged = after(0.5, rule=tiny.ALWAYS)
    for a, b in zip(jax.tree.leaves(treated), jax.tree.leaves(merged), strict=True):
        np.testing.assert_array_equal(a, b)
    none = after(0.0, param_transform=transform, hyperparams={"probability": 0.0})
    assert none[1].merged.sum() == 0 < treated[1].merged.sum()


def test_merging_happens_before_the_forward_pass_and_nowhere_else():
    recipe = dataclasses.replace(tiny.RECIPE, flip=False)
    merged, totals, losses = train(1, 1, recipe, rule=tiny.ALWAYS)
    params, batch_stats = tiny.init()
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), MERGING)
    params = jax.tree.map(jnp.asarray, params)
    params, stats = merge_kernels(params, key, tiny.kernels(), tiny.ALWAYS)

    devices = tuple(jax.local_devices()[:1])
    state = new_state(params, batch_stats, make_optimizer(recipe), recipe.learning_rate)
    batch = train_batch(tiny.make_dataset().train, seed=1, step=0, batch_size=recipe.batch_size)
    plain, plain_totals = tiny.train_step(devices, recipe)(
        replicate(state, devices),
        replicate(zero_totals(0), devices),
        shard_batch(batch, devices),
        broadcast_to_devices(jax.random.key(3), devices),
    )
    assert losses == [pytest.approx(float(unreplicate(plain_totals).loss), rel=1e-6)]
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    totals = unreplicate(totals)
    np.testing.assert_array_equal(totals.merged, stats.merged)
    np.testing.assert_array_equal(totals.selected, stats.selected)
    np.testing.assert_allclose(totals.similarity, stats.similarity * stats.merged, rtol=1e-5)


@pytest.mark.long
def test_the_optax_transformation_goes_through_the_same_step_and_a_checkpoint(tmp_path):
    devices = tuple(jax.local_devices()[:2])
    merging = in_model_merging(tiny.kernels(), tiny.ALWAYS, jax.random.key(5))

    @optax.inject_hyperparams
    def injected(learning_rate):
        return optax.chain(optax.sgd(learning_rate, momentum=0.9), merging)

    optimizer = injected(learning_rate=0.05)
    step = steps.make_train_step(
        tiny.Net(), optimizer, tiny.RECIPE, multi_label=False, devices=devices
    )
    start = new_state(*tiny.init(), optimizer, 0.05)
    totals, root = (
        replicate(zero_totals(0), devices),
        broadcast_to_devices(jax.random.key(3), devices),
    )
    data = tiny.make_dataset().train

    def run(state, numbers):
        state, sums = replicate(state, devices), totals
        for number in numbers:
            batch = train_batch(data, seed=1, step=number, batch_size=16)
            state, sums = step(state, sums, shard_batch(batch, devices), root)
        return unreplicate(state)

    whole = run(start, range(4))
    path = save_checkpoint(tmp_path, 2, run(start, range(2)), {})
    resumed = run(restore_checkpoint(path, start)[0], range(2, 4))
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    stats = whole.opt_state.inner_state[-1].stats
    assert stats.selected.min() > 0 and (stats.merged == stats.selected).all()


def test_without_a_rule_merging_is_not_in_the_program(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("merged")

    monkeypatch.setattr(steps, "merge_kernels", forbidden)
    monkeypatch.setattr(tiny, "train_step", tiny.train_step.__wrapped__)
    train(1, 1)
    with pytest.raises(AssertionError, match="merged"):
        train(1, 1, rule=tiny.ALWAYS)


def test_the_state_is_donated_and_the_totals_are_not():
    devices = tuple(jax.local_devices()[:1])
    state = new_state(*tiny.init(), make_optimizer(tiny.RECIPE), 0.1)
    state, totals = replicate(state, devices), replicate(zero_totals(0), devices)
    batch = train_batch(tiny.make_dataset().train, seed=1, step=0, batch_size=16)
    step = tiny.train_step(devices)
    step(
        state, totals, shard_batch(batch, devices), broadcast_to_devices(jax.random.key(0), devices)
    )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(totals))


def test_padded_evaluation_equals_one_batch_without_padding():
    setup = tiny.make_setup()
    images = setup.dataset.val
    params, batch_stats = tiny.init()
    state = replicate(new_state(params, batch_stats, setup.optimizer, 0.1), setup.devices)
    assert len(list(eval_batches(images, 16))) == 2 and len(images) % 16
    scores, loss = setup.evaluate(state, images)

    logits = tiny.Net().apply(
        {"params": params, "batch_stats": batch_stats},
        normalise(jnp.asarray(images.images), setup.recipe),
        train=False,
    )
    np.testing.assert_allclose(scores, jax.nn.softmax(logits), rtol=1e-5, atol=1e-6)
    assert loss == pytest.approx(float(example_losses(logits, images.labels, False).mean()))


def test_evaluation_of_fewer_examples_than_devices():
    devices = tuple(jax.local_devices())
    step = tiny.eval_step(devices)
    setup = dataclasses.replace(tiny.make_setup(), devices=devices, eval_step=step)
    state = replicate(new_state(*tiny.init(), setup.optimizer, 0.1), devices)
    images = setup.dataset.val
    few = Split(images.images[:3], images.labels[:3])
    scores, loss = setup.evaluate(state, few)
    everything, _ = setup.evaluate(state, images)
    np.testing.assert_allclose(scores, everything[:3], rtol=1e-6)
    picked = scores[np.arange(3), few.labels]
    assert loss == pytest.approx(float(-np.log(picked).mean()), rel=1e-5)


def test_flips_belong_to_examples_not_to_places():
    images = np.random.default_rng(0).normal(size=(64, 4, 5, 1)).astype(np.float32)
    index = np.arange(100, 164)
    key = jax.random.key(0)
    out = np.asarray(flip(images, index, key))
    mirrored = np.array([np.array_equal(a, b[:, ::-1]) for a, b in zip(out, images, strict=True)])
    same = np.array([np.array_equal(a, b) for a, b in zip(out, images, strict=True)])
    assert np.all(mirrored ^ same) and 16 < mirrored.sum() < 48

    order = np.random.default_rng(1).permutation(64)
    np.testing.assert_array_equal(flip(images[order], index[order], key), out[order])
    other = np.asarray(flip(images, index, jax.random.key(1)))
    assert not np.array_equal(other, out)


def test_normalisation():
    grey = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_allclose(
        normalise(jnp.asarray(grey), RECIPES["medmnist"])[..., 0].ravel(),
        np.arange(256) / 127.5 - 1,
        atol=1e-6,
    )
    released = RECIPES["released"]
    three = normalise(jnp.asarray(grey), released)
    assert three.shape == (1, 16, 16, 3)
    np.testing.assert_allclose(
        three[0, 0, 5], (5 / 255 - np.array(released.mean)) / np.array(released.std), rtol=1e-5
    )
    assert normalise(jnp.zeros((1, 2, 2, 3), jnp.uint8), RECIPES["medmnist"]).shape[-1] == 3


def test_losses():
    logits = np.array([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]], np.float32)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = example_losses(logits, np.array([0, 2], np.int32), multi_label=False)
    np.testing.assert_allclose(found, -np.log([p[0, 0], p[1, 2]]), rtol=1e-5)

    labels = np.array([[1, 0, 1], [0, 0, 0]], np.float32)
    s = 1 / (1 + np.exp(-logits))
    expected = -(labels * np.log(s) + (1 - labels) * np.log(1 - s)).mean(-1)
    found = example_losses(logits, labels, multi_label=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
