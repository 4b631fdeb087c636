import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from inmerge_jax.training.recipes import RECIPES
from inmerge_jax.training.train_step import make_optimizer, new_state, set_learning_rate

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-2},
        {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0},
        {"optimizer": "adam", "weight_decay": 0.0},
        {"optimizer": "adam", "weight_decay": 1e-2},
    ],
)
def test_updates_equal_pytorch_through_a_change_of_rate(options):
    recipe = dataclasses.replace(RECIPES["medmnist"], learning_rate=0.1, **options)
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 4)).astype(np.float32)
    grads = rng.normal(size=(8, 5, 4)).astype(np.float32)

    weight = torch.nn.Parameter(torch.tensor(start.copy()))
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[recipe.optimizer]
    momentum = {"momentum": recipe.momentum} if recipe.optimizer == "sgd" else {}
    theirs = kind([weight], lr=0.1, weight_decay=recipe.weight_decay, **momentum)

    ours = make_optimizer(recipe)
    state = new_state(jnp.asarray(start), {}, ours, 0.1)
    for step, grad in enumerate(grads):
        if step == 4:
            theirs.param_groups[0]["lr"] = 0.01
            state = set_learning_rate(state, 0.01)
        weight.grad = torch.tensor(grad)
        theirs.step()
        updates, opt_state = ours.update(jnp.asarray(grad), state.opt_state, state.params)
        state = state._replace(
            params=optax.apply_updates(state.params, updates), opt_state=opt_state
        )
        np.testing.assert_allclose(state.params, weight.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_learning_rate_is_a_value_of_the_state():
    state = new_state({"w": np.ones(3, np.float32)}, {}, make_optimizer(RECIPES["released"]), 0.02)
    changed = set_learning_rate(state, 0.003)
    assert state.opt_state.hyperparams["learning_rate"] == np.float32(0.02)
    assert changed.opt_state.hyperparams["learning_rate"] == np.float32(0.003)
    assert jax.tree.structure(changed) == jax.tree.structure(state)
