import dataclasses

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from inmerge_jax.data import DataConfig, PhantomConfig
from inmerge_jax.errors import UsageError
from inmerge_jax.training.config import ModelConfig, RecipeConfig, TrainConfig
from inmerge_jax.training.recipes import loss_weights
from inmerge_jax.training.resolve import resolve_recipe
from inmerge_jax.training.run_spec import make_run_spec
from inmerge_jax.training.train_step import example_losses
from tests.training import tiny

LABELS = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]], np.uint8)


def config(multi_label, **changes):
    phantom = PhantomConfig(train=40, val=8, test=8, multi_label=multi_label)
    return TrainConfig(
        data=DataConfig(size=16, phantom=phantom),
        model=ModelConfig(name="vgg16", width=0.05),
        recipe=RecipeConfig(name="medmnist", batch_size=8, pos_weight=3.0),
        **changes,
    )


def test_weights_are_the_ratio_of_the_training_images_capped():
    recipe = dataclasses.replace(tiny.RECIPE, pos_weight=3.0)
    np.testing.assert_allclose(loss_weights(recipe, LABELS, 3), [1.5, 3.0, 1.0])
    assert loss_weights(tiny.RECIPE, LABELS, 3) is None


def test_the_loss_is_pytorchs_with_pos_weight():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 3)).astype(np.float32)
    weights = np.array([1.5, 3, 1], np.float32)
    found = example_losses(logits, LABELS.astype(np.float32), True, weights)
    loss = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights), reduction="none")
    expected = loss(torch.tensor(logits), torch.tensor(LABELS, dtype=torch.float32)).mean(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_balanced_weights_are_those_of_scikit_learn():
    labels = np.repeat([0, 2, 3], [5, 3, 12]).astype(np.int32)
    recipe = dataclasses.replace(tiny.RECIPE, class_weights="balanced")
    weights = loss_weights(recipe, labels, 4)
    present = np.unique(labels)
    expected = compute_class_weight("balanced", classes=present, y=labels)
    np.testing.assert_allclose(weights[present], expected, rtol=1e-6)
    assert weights[1] == 1 and weights[labels].mean() == pytest.approx(1)

    logits = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    loss = torch.nn.CrossEntropyLoss(weight=torch.tensor(weights), reduction="none")
    expected = loss(torch.tensor(logits), torch.tensor(labels, dtype=torch.int64))
    np.testing.assert_allclose(example_losses(logits, labels, False, weights), expected, rtol=1e-5)


def test_the_option_reaches_the_data_and_is_refused_elsewhere():
    plan = make_run_spec(config(multi_label=True))
    weights = loss_weights(plan.recipe, plan.dataset.train.labels, 5)
    assert 1 < weights.max() <= 3
    with pytest.raises(UsageError, match="`pos_weight` 3.0 is for multi-label data"):
        make_run_spec(config(multi_label=False))
    with pytest.raises(UsageError, match="`pos_weight` 0"):
        resolve_recipe(RecipeConfig(name="medmnist", pos_weight=0.0))


def test_worker_processes_are_for_files():
    with pytest.raises(UsageError, match="`workers` 2: phantom is in memory"):
        make_run_spec(dataclasses.replace(config(multi_label=True), workers=2))
    with pytest.raises(UsageError, match="`workers` -1"):
        make_run_spec(dataclasses.replace(config(multi_label=True), workers=-1))
    assert make_run_spec(config(multi_label=True)).workers == 0
