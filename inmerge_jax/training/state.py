"""What training changes: the state of a network and its optimizer."""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from inmerge_jax.training.recipes import Recipe


class TrainState(NamedTuple):
    """Everything that a training step reads and writes, and a checkpoint holds.

    Attributes:
      step: int32 scalar, updates done in this stage.
      params: float32 tree.
      batch_stats: float32 tree; {} for a network without batch normalisation.
      opt_state: the optimizer's state; its `hyperparams["learning_rate"]` is the rate.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any


def make_optimizer(
    recipe: Recipe, *last: optax.GradientTransformation
) -> optax.GradientTransformation:
    """PyTorch's SGD or Adam with coupled L2, whose learning rate is a value in its state.

    Args:
      recipe: which one.
      last: what comes after it in the chain.
    """

    @optax.inject_hyperparams
    def optimizer(learning_rate: Any) -> optax.GradientTransformation:
        if recipe.optimizer == "adam":
            descent = optax.adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8)
        else:
            descent = optax.sgd(learning_rate, momentum=recipe.momentum or None)
        decay = [optax.add_decayed_weights(recipe.weight_decay)] if recipe.weight_decay else []
        return optax.chain(*decay, descent, *last) if decay or last else descent

    return optimizer(learning_rate=recipe.learning_rate)


def new_state(
    params: Any,
    batch_stats: Any,
    optimizer: optax.GradientTransformation,
    learning_rate: float,
) -> TrainState:
    """The state before a stage's first update, in NumPy arrays, with a fresh optimizer."""
    opt_state = jax.device_get(jax.jit(optimizer.init)(params))
    state = TrainState(np.int32(0), params, batch_stats, opt_state)
    return set_learning_rate(state, learning_rate)


def set_learning_rate(state: TrainState, learning_rate: float) -> TrainState:
    """`state` with another learning rate, whether or not it is replicated over devices."""
    old = state.opt_state.hyperparams["learning_rate"]
    if isinstance(old, jax.Array):
        new = jax.device_put(np.full(old.shape, learning_rate, old.dtype), old.sharding)
    else:
        new = np.asarray(learning_rate, old.dtype)
    hyperparams = {**state.opt_state.hyperparams, "learning_rate": new}
    return state._replace(opt_state=state.opt_state._replace(hyperparams=hyperparams))
