"""One training step: its state, the per-device update, and the evaluation step.

Each step is a function of what a single device holds. `jax.pmap` maps it with the axis name `AXIS`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from inmerge_jax.merging import Kernel, MergeRule, MergeStats, merge_kernels
from inmerge_jax.merging.backends import supports_pallas
from inmerge_jax.training.parallel import AXIS, broadcast
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


MERGING, DROPOUT, FLIPPING, VALIDATION = range(4)
"""Purposes: a step's keys are fold_in(fold_in(root, step), purpose)."""


Treatment = Callable[[Any, jax.Array, jax.Array, Any], tuple[Any, MergeStats]]
"""treatment(params, key, step, numbers): the weights that an update begins with, and the counts."""


class Totals(NamedTuple):
    """Sums over the steps of an epoch; they stay on the devices until somebody asks.

    Attributes:
      loss: float32 scalar, sum of the steps' mean losses.
      steps: int32 scalar.
      selected: int32 (layers,), kernels that were drawn.
      merged: int32 (layers,), kernels that were mixed with a partner.
      similarity: float32 (layers,), sum of the merged pairs' similarities.
    """

    loss: Any
    steps: Any
    selected: Any
    merged: Any
    similarity: Any


def zero_totals(layers: int) -> Totals:
    """Totals of no step, for a stage that merges `layers` layers (0 where it does not merge)."""
    count = jnp.zeros(layers, jnp.int32)
    return Totals(jnp.float32(0), jnp.int32(0), count, count, jnp.zeros(layers, jnp.float32))


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    *,
    multi_label: bool,
    devices: tuple[jax.Device, ...],
    kernels: tuple[Kernel, ...] = (),
    rule: MergeRule | None = None,
    treatment: Treatment | None = None,
    numbers: Any = None,
    steps_per_call: int = 1,
    accumulate: int = 1,
    positive_weights: Any = None,
    apart: bool = False,
    networks: int = 1,
    fused: bool = True,
) -> Callable[..., tuple[TrainState, Totals]]:
    """One update: merge, forward, backward, mean over the devices, update, totals.

    Args:
      model: made with `axis_name=AXIS`, so that batch statistics span the devices.
      optimizer: of `make_optimizer`.
      recipe: its normalisation and flip.
      multi_label: sigmoid and binary cross-entropy instead of softmax and cross-entropy.
      devices: what the step runs on.
      kernels: what to merge.
      rule: how; with None no merging is in the program.
      treatment: what is done to the weights in place of merging them: a control, say.
      numbers: a tree that the treatment is given on every call; not part of the program, so that
        treatments which differ in their numbers alone share one. The step takes another such tree
        as its last argument.
      steps_per_call: above 1, the step is that many updates in a row: each array of `batch` has an
        axis of steps after that of devices. For GPU and TPU; see `config.check_steps_per_call`.
      accumulate: above 1, the gradient is the mean over that many equal parts of a device's rows,
        one after the other. The parts of the same number on all devices are one batch for batch
        normalisation, whose running statistics then move that often in an update.
      positive_weights: float32 (labels,), see `example_losses`.
      apart: every device trains a network of its own, by a key of its own: nothing is averaged
        over the devices. `model` has to have `axis_index_groups`, as those of `create_model`.
      networks: above 1, the step trains that many networks at once, each on its own batches and by
        its own key: `state`, `totals` and `batch` have an axis of networks after that of devices,
        and `root` is as many keys.
      fused: on TPUs from v4 on, merge each layer in one Pallas kernel, see `merge_kernels`.

    Returns:
      step(state, totals, batch, root) -> (state, totals). Every argument but `root` has a leading
      axis of devices; `root` is one key for all, so that all replicas merge the same kernels, and
      has that axis, too, where they are `apart`. `state` is donated; `totals` is not, so that the
      host may read an earlier step's.
    """

    def gradient(params: Any, batch_stats: Any, batch: Any, key: jax.Array, part: Any = 0) -> Any:
        images = normalise(batch["image"], recipe)
        if recipe.flip:
            images = flip(images, batch["index"], jax.random.fold_in(key, FLIPPING))
        dropout = jax.random.fold_in(key, DROPOUT)
        dropout = dropout if accumulate == 1 else jax.random.fold_in(dropout, part)

        def mean_loss(params: Any) -> Any:
            logits, updated = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout},
            )
            losses = example_losses(logits, batch["label"], multi_label, positive_weights)
            return jnp.mean(losses), updated.get("batch_stats", {})

        (loss, updated), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
        return loss, updated, grads

    def accumulated(params: Any, batch_stats: Any, batch: Any, key: jax.Array) -> Any:
        def one(carry: Any, part: Any) -> Any:
            total, batch_stats, grads = carry
            loss, batch_stats, more = gradient(params, batch_stats, part[0], key, part[1])
            return (total + loss, batch_stats, jax.tree.map(jnp.add, grads, more)), None

        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
        zeros = (jnp.zeros(()), batch_stats, jax.tree.map(jnp.zeros_like, params))
        # XLA's CPU backend is slow at convolutions in loops, so there the loop is written out.
        unroll = accumulate if devices[0].platform == "cpu" else 1
        (loss, batch_stats, grads), _ = lax.scan(
            one, zeros, (parts, jnp.arange(accumulate)), unroll=unroll
        )
        loss, grads = jax.tree.map(lambda x: x / accumulate, (loss, grads))
        return loss, batch_stats, grads

    # Groups of one device: so that each does the same arithmetic as it does alone.
    groups = tuple((place,) for place in range(len(devices))) if apart else None
    if apart:
        model = model.clone(axis_index_groups=groups)
    if rule is not None:
        treatment = functools.partial(_merge, kernels, rule, _implementation(fused, devices))

    def step(
        state: TrainState, totals: Totals, batch: Any, root: jax.Array, numbers: Any = None
    ) -> Any:
        key = jax.random.fold_in(root, state.step)
        params = state.params
        if treatment is not None:
            merging_key = jax.random.fold_in(key, MERGING)
            params, stats = treatment(params, merging_key, state.step, numbers)
            totals = _counted(totals, stats)

        if accumulate == 1:
            loss, batch_stats, grads = gradient(params, state.batch_stats, batch, key)
        else:
            loss, batch_stats, grads = accumulated(params, state.batch_stats, batch, key)
        loss, grads = lax.pmean((loss, grads), AXIS, axis_index_groups=groups)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        params = optax.apply_updates(params, updates)

        totals = totals._replace(loss=totals.loss + loss, steps=totals.steps + 1)
        return TrainState(state.step + 1, params, batch_stats, opt_state), totals

    def steps(
        state: TrainState, totals: Totals, batches: Any, root: jax.Array, numbers: Any = None
    ) -> Any:
        def one(carry: tuple[TrainState, Totals], batch: Any) -> Any:
            return step(*carry, batch, root, numbers), None

        carry, _ = lax.scan(one, (state, totals), batches, length=steps_per_call)
        return carry

    body = step if steps_per_call == 1 else steps
    if networks > 1:
        body = jax.vmap(body, in_axes=(0, 0, 0, 0, *([] if numbers is None else [None])))
    axes = (0, 0, 0, 0 if apart else None, *([] if numbers is None else [None]))
    mapped = jax.pmap(body, axis_name=AXIS, in_axes=axes, devices=devices, donate_argnums=0)
    if numbers is None:
        return mapped

    def given(
        state: TrainState, totals: Totals, batch: Any, root: jax.Array, numbers: Any = numbers
    ) -> tuple[TrainState, Totals]:
        return mapped(state, totals, batch, root, broadcast(numbers, devices))

    return given


def _merge(
    kernels: tuple[Kernel, ...],
    rule: MergeRule,
    implementation: Any,
    params: Any,
    key: jax.Array,
    step: Any,
    _: Any,
) -> tuple[Any, MergeStats]:
    """The treatment that the project is about."""
    return merge_kernels(params, key, kernels, rule, implementation=implementation)


def _implementation(fused: bool, devices: tuple[jax.Device, ...]) -> Any:
    """The form of the merge for these devices; see `merge_kernels`."""
    return "tpu" if fused and supports_pallas(devices[0]) else "auto"


def make_eval_step(
    model: nn.Module,
    recipe: Recipe,
    *,
    multi_label: bool,
    devices: tuple[jax.Device, ...],
    positive_weights: Any = None,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Scores and loss of one batch, with the running batch statistics and without merging.

    Returns:
      step(params, batch_stats, batch) -> (scores, losses): probabilities (devices, n, classes) and
      per-example losses (devices, n), float32; rows where batch["mask"] is 0 have loss 0.
    """

    def step(params: Any, batch_stats: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        return _score(model, recipe, multi_label, positive_weights, params, batch_stats, batch)

    return jax.pmap(step, axis_name=AXIS, devices=devices)


def make_merging_eval_step(
    model: nn.Module,
    recipe: Recipe,
    *,
    multi_label: bool,
    devices: tuple[jax.Device, ...],
    kernels: tuple[Kernel, ...],
    rule: MergeRule,
    positive_weights: Any = None,
    fused: bool = True,
) -> Callable[..., tuple[TrainState, Totals, tuple[jax.Array, jax.Array]]]:
    """One merge and then the evaluation of one image, as the released code validates.

    The merging key is folded from the updates so far, `VALIDATION` and the image's index, so a
    resumed run merges the same kernels.

    Returns:
      step(state, totals, batch, root) -> (state, totals, (scores, losses)), with the results of
      `make_eval_step`. Every device holds the same batch of one image, merges alike and gets the
      same scores; `state` is donated.
    """
    implementation = _implementation(fused, devices)

    def step(state: TrainState, totals: Totals, batch: Any, root: jax.Array) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(root, state.step), VALIDATION)
        key = jax.random.fold_in(key, batch["index"][0])
        params, stats = merge_kernels(
            state.params, key, kernels, rule, implementation=implementation
        )
        scored = _score(
            model, recipe, multi_label, positive_weights, params, state.batch_stats, batch
        )
        totals = _counted(totals, stats)._replace(steps=totals.steps + 1)
        return state._replace(params=params), totals, scored

    return jax.pmap(
        step, axis_name=AXIS, in_axes=(0, 0, 0, None), devices=devices, donate_argnums=0
    )


def _counted(totals: Totals, stats: MergeStats) -> Totals:
    return totals._replace(
        selected=totals.selected + stats.selected,
        merged=totals.merged + stats.merged,
        similarity=totals.similarity + stats.similarity * stats.merged,
    )


def _score(
    model: nn.Module,
    recipe: Recipe,
    multi_label: bool,
    positive_weights: Any,
    params: Any,
    batch_stats: Any,
    batch: Any,
) -> tuple[jax.Array, jax.Array]:
    """Probabilities (n, classes) and losses (n,), 0 where the mask is."""
    images = normalise(batch["image"], recipe)
    logits = model.apply({"params": params, "batch_stats": batch_stats}, images, train=False)
    scores = jax.nn.sigmoid(logits) if multi_label else jax.nn.softmax(logits)
    losses = example_losses(logits, batch["label"], multi_label, positive_weights)
    return scores, jnp.where(batch["mask"] > 0, losses, 0)


def normalise(images: jax.Array, recipe: Recipe) -> jax.Array:
    """uint8 (n, h, w, c) to float32, (x / 255 - mean) / std; grey to 3 channels if mean has 3."""
    x = images.astype(jnp.float32) / 255
    if len(recipe.mean) == 3 and x.shape[-1] == 1:
        x = jnp.repeat(x, 3, axis=-1)
    return (x - jnp.array(recipe.mean)) / jnp.array(recipe.std)


def flip(images: jax.Array, index: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2, by a key of its own `index`."""

    def mirrored(i: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, i))

    chosen = jax.vmap(mirrored)(index)
    return jnp.where(chosen[:, None, None, None], images[:, :, ::-1], images)


def example_losses(
    logits: jax.Array, labels: jax.Array, multi_label: bool, positive_weights: Any = None
) -> jax.Array:
    """Cross-entropy of each example, float32 (n,); the mean over the labels if multi-label.

    With `positive_weights`, float32 (labels,), the loss of a label that is 1 counts that often, as
    with the `pos_weight` of PyTorch's BCEWithLogitsLoss.
    """
    if multi_label:
        losses = optax.sigmoid_binary_cross_entropy(logits, labels)
        if positive_weights is not None:
            losses = losses * jnp.where(labels > 0, positive_weights, 1)
        return losses.mean(-1)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
