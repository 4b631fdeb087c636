import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from inmerge_jax.training.augment import AugmentConfig, augment, rotated, with_contrast
from inmerge_jax.training.parallel import replicate, shard_batch
from inmerge_jax.training.train_step import (
    make_optimizer,
    make_train_step,
    new_state,
    zero_totals,
)
from tests.training import tiny

ALL = AugmentConfig(crop=3, rotate=20, brightness=0.3, contrast=0.3)
IMAGES = np.random.default_rng(0).integers(0, 256, (16, 12, 12, 3), dtype=np.uint8)
INDEX = np.arange(100, 116, dtype=np.int32)


@functools.cache
def augmented(config):
    """`augment`, compiled."""
    return jax.jit(lambda images, index, key: augment(images, index, key, config))


def torch_image(image):
    return torch.tensor(np.array(image).transpose(2, 0, 1))


def test_an_image_is_changed_alike_in_every_batch_and_on_every_device():
    key = jax.random.key(3)
    out = np.asarray(augmented(ALL)(IMAGES, INDEX, key))
    assert len({image.tobytes() for image in out}) == 16
    order = np.random.default_rng(1).permutation(16)
    shuffled = augmented(ALL)(IMAGES[order], INDEX[order], key)
    np.testing.assert_array_equal(shuffled, out[order])
    devices = tuple(jax.local_devices())
    each = jax.pmap(lambda x, i: augment(x, i, key, ALL), devices=devices)
    batch = shard_batch({"image": IMAGES, "index": INDEX}, devices)
    spread = np.asarray(each(batch["image"], batch["index"]))
    np.testing.assert_allclose(spread.reshape(out.shape), out, atol=1e-3)
    assert not np.array_equal(augmented(ALL)(IMAGES, INDEX, jax.random.key(4)), out)
    assert not np.array_equal(augmented(ALL)(IMAGES, INDEX + 1, key), out)


def test_crops_are_windows_of_the_padded_image():
    out = np.asarray(augmented(AugmentConfig(crop=2))(IMAGES, INDEX, jax.random.key(0)))
    padded = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0)))
    offsets = []
    for image, wide in zip(out, padded, strict=True):
        found = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.array_equal(image, wide[y : y + 12, x : x + 12])
        ]
        assert len(found) == 1
        offsets += found
    assert len(set(offsets)) > 8


@pytest.mark.parametrize("degrees", [-33.0, 12.5, 90.0])
def test_rotation_is_torchvisions(degrees):
    expected = functional.rotate(
        torch_image(IMAGES[0]).float(), degrees, v2.InterpolationMode.BILINEAR
    )
    found = rotated(jnp.float32(IMAGES[0]), jnp.deg2rad(degrees))
    np.testing.assert_allclose(found, expected.numpy().transpose(1, 2, 0), atol=0.05)


@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_is_torchvisions(channels):
    image = np.float32(IMAGES[1, ..., :channels])
    expected = functional.adjust_contrast(torch_image(image) / 255, 1.4) * 255
    found = with_contrast(jnp.asarray(image), jnp.float32(1.4))
    np.testing.assert_allclose(found, expected.numpy().transpose(1, 2, 0), atol=0.05)


def test_draws_fill_their_range():
    flat = np.full((512, 2, 2, 1), 100, np.uint8)
    index = np.arange(512, dtype=np.int32)
    out = augmented(AugmentConfig(brightness=0.2))(flat, index, jax.random.key(0))
    factors = np.asarray(out)[:, 0, 0, 0] / 100
    assert factors.min() == pytest.approx(0.8, abs=0.01)
    assert factors.max() == pytest.approx(1.2, abs=0.01)
    assert factors.mean() == pytest.approx(1, abs=0.02)


def training(augment):
    """A training step, and its arguments before the key."""
    recipe = dataclasses.replace(tiny.RECIPE, augment=augment)
    devices = tuple(jax.local_devices()[:1])
    optimizer = make_optimizer(recipe)
    split = tiny.make_dataset().train
    batch = {"image": split.images[:8], "label": split.labels[:8], "index": INDEX[:8]}
    state = new_state(*tiny.init(), optimizer, 0.1)
    step = make_train_step(tiny.Net(), optimizer, recipe, multi_label=False, devices=devices)
    return step, (*replicate((state, zero_totals(0)), devices), shard_batch(batch, devices))


def lowered(augment):
    """The text of a training step's program."""
    step, arguments = training(augment)
    return step.lower(*arguments, jax.random.key(0)).as_text()


def test_a_resumed_run_draws_the_same():
    step, (state, totals, batch) = training(ALL)
    root = jax.random.key(0)
    state, totals = step(state, totals, batch, root)
    saved = jax.device_get((state, totals))
    straight = jax.device_get(step(state, totals, batch, root))
    devices = tuple(jax.local_devices()[:1])
    resumed = step(*replicate(jax.tree.map(lambda x: x[0], saved), devices), batch, root)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), straight)
    # The draws are those of the step, not of the first one again.
    first = saved[0]._replace(step=np.zeros_like(saved[0].step))
    other = step(*replicate(jax.tree.map(lambda x: x[0], (first, saved[1])), devices), batch, root)
    assert not np.array_equal(other[1].loss, straight[1].loss)


@pytest.mark.long
def test_the_program_without_augmentation_has_no_part_of_it():
    plain = lowered(AugmentConfig())
    assert lowered(AugmentConfig(crop=0, rotate=0.0, brightness=0.0, contrast=0.0)) == plain
    assert len(lowered(ALL)) > len(plain)
