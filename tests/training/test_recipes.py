import dataclasses
import math

import pytest

from inmerge_jax.training.recipes import RECIPES, best_epoch, next_learning_rate


def rates(recipe, losses, start=0.1):
    """The rate of every epoch, and the epochs that start with a fresh optimizer."""
    history, fresh = [], []
    for loss in losses:
        rate, restart = next_learning_rate(recipe, start, len(losses), history)
        if restart:
            fresh.append(len(history) + 1)
        history.append({"learning_rate": rate, "val_loss": loss})
    return [line["learning_rate"] for line in history], fresh


def test_milestones_of_the_benchmark():
    found, fresh = rates(RECIPES["medmnist"], [1.0] * 100, start=1e-3)
    expected = [1e-3] * 50 + [1e-4] * 25 + [1e-5] * 25
    assert found == pytest.approx(expected)
    assert fresh == []


def test_milestones_follow_a_stage_of_another_length():
    found, _ = rates(RECIPES["medmnist"], [1.0] * 10, start=1.0)
    assert found == pytest.approx([1.0] * 5 + [0.1] * 3 + [0.01] * 2)


def test_plateau_fires_at_every_further_epoch_without_improvement():
    # Lowest loss at epoch 2; epochs 3..12 bring no lower one, 13 does.
    losses = [2.0, 1.0, *[1.5] * 10, 0.5, 0.6, 0.6]
    found, fresh = rates(RECIPES["released"], losses)
    # Epoch 10 is the first with 8 epochs since the best, so epoch 11 is the first at a tenth.
    expected = [0.1] * 10 + [0.01, 0.001] + [0.0001] * 3
    assert found == pytest.approx(expected)
    assert fresh == [11, 12, 13]


def test_plateau_counts_from_the_first_of_equal_losses():
    _, fresh = rates(RECIPES["released"], [1.0] * 10)
    assert fresh == [10]


def test_plateau_tolerance_can_be_changed():
    recipe = dataclasses.replace(RECIPES["released"], tolerance=2, factor=0.5)
    found, fresh = rates(recipe, [1.0, 2.0, 2.0, 2.0])
    assert found == pytest.approx([0.1, 0.1, 0.1, 0.05])
    assert fresh == [4]


@pytest.mark.parametrize(
    ("select", "values", "expected"),
    [
        ("val_auc", [0.5, 0.7, 0.7, 0.6], 2),
        ("val_loss", [0.5, 0.3, 0.4, 0.3], 2),
        ("val_auc", [None, 0.2, math.nan], 2),
        ("val_loss", [None, math.nan], 1),
    ],
)
def test_best_epoch_is_the_first_of_equals_and_never_an_undefined_one(select, values, expected):
    assert best_epoch([{select: value} for value in values], select) == expected


def test_recipes_hold_the_published_numbers():
    medmnist, released = RECIPES["medmnist"], RECIPES["released"]
    assert (medmnist.optimizer, medmnist.learning_rate, medmnist.batch_size) == ("adam", 1e-3, 128)
    assert (medmnist.epochs, medmnist.weight_decay, medmnist.flip) == (100, 0.0, False)
    assert (medmnist.mean, medmnist.std, medmnist.select) == ((0.5,), (0.5,), "val_auc")
    assert (released.optimizer, released.learning_rate, released.momentum) == ("sgd", 0.1, 0.9)
    assert (released.weight_decay, released.batch_size, released.tolerance) == (1e-4, 324, 8)
    assert (released.epochs, released.merging_epochs, released.flip) == (30, 10, True)
    assert (released.select, len(released.mean)) == ("val_loss", 3)


def test_without_any_auc_the_loss_selects_the_epoch():
    losses = [0.5, 0.2, 0.2, 0.4]
    history = [{"val_auc": None, "val_loss": loss} for loss in losses]
    assert best_epoch(history, "val_auc") == 2
    history[3]["val_auc"] = 0.1
    assert best_epoch(history, "val_auc") == 4
