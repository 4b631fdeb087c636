"""One training step: the train state, the update on each device, and the evaluation step.

Each step is written for what a single device holds and is mapped by `jax.pmap` over the axis
`DATA_AXIS`.
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
from inmerge_jax.training.augment import augment, augment_masks
from inmerge_jax.training.parallel import DATA_AXIS, broadcast_to_devices
from inmerge_jax.training.recipes import Recipe


class TrainState(NamedTuple):
    """Everything that a training step reads and writes, and a checkpoint stores.

    Attributes:
      step: int32 scalar, number of updates in this stage.
      params: float32 tree.
      batch_stats: float32 tree; {} for a network without batch normalisation.
      opt_state: optimizer state, with the learning rate in `hyperparams["learning_rate"]`.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any


class Averages(NamedTuple):
    """State of `average_weights`: the averages, and the updates so far."""

    average: Any
    count: jax.Array


def average_weights(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the weights; the last in its chain.

    The average of the first n updates has decay min(decay, n / (n + 9)), as in TensorFlow's
    `ExponentialMovingAverage(num_updates)`, so that a short stage is not all its first weights.
    """

    def init(params: Any) -> Averages:
        return Averages(params, jnp.zeros([], jnp.int32))

    def update(updates: Any, state: Averages, params: Any = None) -> tuple[Any, Averages]:
        count = state.count + 1
        stays = jnp.minimum(decay, count / (count + 9))
        moved = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: stays * a + (1 - stays) * p, state.average, moved)
        return updates, Averages(average, count)

    return optax.GradientTransformation(init, update)


def with_averages_of(state: TrainState, other: TrainState) -> TrainState:
    """The state with another one's averages of weights, if the optimizer keeps any."""

    def is_average(entry: Any) -> bool:
        return isinstance(entry, Averages)

    def choose(own: Any, others: Any) -> Any:
        return others if is_average(own) else own

    kept = jax.tree.map(choose, state.opt_state, other.opt_state, is_leaf=is_average)
    return state._replace(opt_state=kept)


def averaged(state: TrainState) -> TrainState:
    """The state with the averages of `average_weights` in place of the weights."""
    return state._replace(params=optax.tree.get(state.opt_state, "average"))


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """PyTorch's SGD or Adam with coupled L2; the learning rate is part of the state.

    Args:
      recipe: names the optimizer and its hyperparameters, and whether the weights are averaged.
    """
    last = [] if recipe.average_weights is None else [average_weights(recipe.average_weights)]

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
    """The state before a stage's first update, with a fresh optimizer, in NumPy arrays."""
    opt_state = jax.device_get(jax.jit(optimizer.init)(params))
    state = TrainState(np.int32(0), params, batch_stats, opt_state)
    return set_learning_rate(state, learning_rate)


def set_learning_rate(state: TrainState, learning_rate: float) -> TrainState:
    """`state` with another learning rate; `state` may be replicated over devices."""
    old = state.opt_state.hyperparams["learning_rate"]
    if isinstance(old, jax.Array):
        new = jax.device_put(np.full(old.shape, learning_rate, old.dtype), old.sharding)
    else:
        new = np.asarray(learning_rate, old.dtype)
    hyperparams = {**state.opt_state.hyperparams, "learning_rate": new}
    return state._replace(opt_state=state.opt_state._replace(hyperparams=hyperparams))


MERGING, DROPOUT, FLIPPING, VALIDATION, AUGMENTATION = range(5)
"""Purposes of a step's keys, which are `fold_in(fold_in(root, step), purpose)`."""


ParamTransform = Callable[[Any, jax.Array, jax.Array, Any], tuple[Any, MergeStats]]
"""param_transform(params, key, step, hyperparams) -> (params, stats)."""


class Totals(NamedTuple):
    """Sums over the steps of an epoch, kept on the devices.

    Attributes:
      loss: float32 scalar, sum of the steps' mean losses.
      steps: int32 scalar, number of steps.
      selected: int32 (layers,), kernels that were selected for merging.
      merged: int32 (layers,), kernels that were merged with a partner.
      similarity: float32 (layers,), sum of the merged pairs' similarities.
    """

    loss: Any
    steps: Any
    selected: Any
    merged: Any
    similarity: Any


def zero_totals(layers: int) -> Totals:
    """Totals of zero steps, for a stage that merges `layers` layers (0 without merging)."""
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
    rule: MergeRule | Callable[[jax.Array], MergeRule] | None = None,
    param_transform: ParamTransform | None = None,
    hyperparams: Any = None,
    steps_per_execution: int = 1,
    grad_accum_steps: int = 1,
    pos_weight: Any = None,
    networks: int = 1,
    pallas: bool = True,
) -> Callable[..., tuple[TrainState, Totals]]:
    """Builds the training step: merge, forward, backward, all-reduce, update, totals.

    Args:
      model: the network, created with `axis_name=DATA_AXIS` so that batch statistics span the
        devices.
      optimizer: the result of `make_optimizer`.
      recipe: supplies the normalisation, the flip and the augmentation.
      multi_label: use sigmoid and binary cross-entropy instead of softmax and cross-entropy. The
        loss of masks follows from their shape, see `example_losses`.
      devices: the devices that the step runs on.
      kernels: the kernels to merge.
      rule: the merging rule, or a function from the number of updates so far to it; None compiles a
        program without merging.
      param_transform: replaces the merge by another transformation of the parameters.
      hyperparams: a tree passed to `param_transform` on every call as an argument of the program,
        so that transforms that differ only in it share one program. The returned step accepts
        another such tree as its last argument.
      steps_per_execution: number of updates per call. Above 1, each array of `batch` has an axis
        of steps after the device axis. For GPU and TPU, see `resolve.check_steps_per_execution`.
      grad_accum_steps: number of equal microbatches that each device splits its rows into; the
        gradient is their mean. Batch normalisation sees microbatch k of all devices as one batch,
        and updates its running statistics once per microbatch.
      pos_weight: float32 (classes,), weights of the loss, see `example_losses`.
      networks: above 1, the step trains that many networks at once, each on its own batches and
        with its own key: `state`, `totals` and `batch` have a network axis after the device axis,
        and `root` has one key per network.
      pallas: on TPU v4 and newer, merge each layer in one Pallas kernel, see `merge_kernels`.

    Returns:
      step(state, totals, batch, root) -> (state, totals). All arguments have a leading device axis,
      except `root`, which is one key for all devices, so that all replicas merge the same kernels.
      `state` is donated; `totals` is not, so that the host may read the totals of an earlier step.
    """

    def gradient(params: Any, batch_stats: Any, batch: Any, key: jax.Array, part: Any = 0) -> Any:
        pixels = batch["image"]
        if not recipe.augment.is_off:
            augmenting = jax.random.fold_in(key, AUGMENTATION)
            pixels = augment(pixels, batch["index"], augmenting, recipe.augment)
        images = normalise(pixels, recipe)
        labels = batch["label"]
        if labels.ndim > 2 and not recipe.augment.is_off:
            labels = augment_masks(labels, batch["index"], augmenting, recipe.augment)
        if recipe.flip:
            flipping = jax.random.fold_in(key, FLIPPING)
            images = flip(images, batch["index"], flipping)
            if labels.ndim > 2:
                labels = flip(labels[..., None], batch["index"], flipping)[..., 0]
        dropout = jax.random.fold_in(key, DROPOUT)
        dropout = dropout if grad_accum_steps == 1 else jax.random.fold_in(dropout, part)

        def mean_loss(params: Any) -> Any:
            logits, updated = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout},
            )
            losses = example_losses(logits, labels, multi_label, pos_weight)
            return jnp.mean(losses), updated.get("batch_stats", {})

        (loss, updated), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
        return loss, updated, grads

    def accumulated(params: Any, batch_stats: Any, batch: Any, key: jax.Array) -> Any:
        def one(carry: Any, part: Any) -> Any:
            total, batch_stats, grads = carry
            loss, batch_stats, more = gradient(params, batch_stats, part[0], key, part[1])
            return (total + loss, batch_stats, jax.tree.map(jnp.add, grads, more)), None

        parts = jax.tree.map(lambda x: x.reshape(grad_accum_steps, -1, *x.shape[1:]), batch)
        zeros = (jnp.zeros(()), batch_stats, jax.tree.map(jnp.zeros_like, params))
        # XLA's CPU backend runs convolutions in loops slowly, so the loop is unrolled there.
        unroll = grad_accum_steps if devices[0].platform == "cpu" else 1
        (loss, batch_stats, grads), _ = lax.scan(
            one, zeros, (parts, jnp.arange(grad_accum_steps)), unroll=unroll
        )
        loss, grads = jax.tree.map(lambda x: x / grad_accum_steps, (loss, grads))
        return loss, batch_stats, grads

    if rule is not None:
        param_transform = functools.partial(
            _merge, kernels, rule, _merge_implementation(pallas, devices)
        )

    def step(
        state: TrainState, totals: Totals, batch: Any, root: jax.Array, hyperparams: Any = None
    ) -> Any:
        key = jax.random.fold_in(root, state.step)
        params = state.params
        if param_transform is not None:
            merging_key = jax.random.fold_in(key, MERGING)
            params, stats = param_transform(params, merging_key, state.step, hyperparams)
            totals = _add_merges(totals, stats)

        if grad_accum_steps == 1:
            loss, batch_stats, grads = gradient(params, state.batch_stats, batch, key)
        else:
            loss, batch_stats, grads = accumulated(params, state.batch_stats, batch, key)
        loss, grads = lax.pmean((loss, grads), DATA_AXIS)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        params = optax.apply_updates(params, updates)

        totals = totals._replace(loss=totals.loss + loss, steps=totals.steps + 1)
        return TrainState(state.step + 1, params, batch_stats, opt_state), totals

    def steps(
        state: TrainState, totals: Totals, batches: Any, root: jax.Array, hyperparams: Any = None
    ) -> Any:
        def one(carry: tuple[TrainState, Totals], batch: Any) -> Any:
            return step(*carry, batch, root, hyperparams), None

        carry, _ = lax.scan(one, (state, totals), batches, length=steps_per_execution)
        return carry

    body = step if steps_per_execution == 1 else steps
    if networks > 1:
        body = jax.vmap(body, in_axes=(0, 0, 0, 0, *([] if hyperparams is None else [None])))
    axes = (0, 0, 0, None, *([] if hyperparams is None else [None]))
    mapped = jax.pmap(body, axis_name=DATA_AXIS, in_axes=axes, devices=devices, donate_argnums=0)
    if hyperparams is None:
        return mapped

    def given(
        state: TrainState,
        totals: Totals,
        batch: Any,
        root: jax.Array,
        hyperparams: Any = hyperparams,
    ) -> tuple[TrainState, Totals]:
        return mapped(state, totals, batch, root, broadcast_to_devices(hyperparams, devices))

    return given


def _merge(
    kernels: tuple[Kernel, ...],
    rule: MergeRule | Callable[[jax.Array], MergeRule],
    implementation: Any,
    params: Any,
    key: jax.Array,
    step: Any,
    _: Any,
) -> tuple[Any, MergeStats]:
    """In-model merging as a `ParamTransform`."""
    rule = rule(step) if callable(rule) else rule
    return merge_kernels(params, key, kernels, rule, implementation=implementation)


def _merge_implementation(pallas: bool, devices: tuple[jax.Device, ...]) -> Any:
    """The implementation of the merge for these devices, see `merge_kernels`."""
    return "tpu" if pallas and supports_pallas(devices[0]) else "auto"


def make_eval_step(
    model: nn.Module,
    recipe: Recipe,
    *,
    multi_label: bool,
    devices: tuple[jax.Device, ...],
    pos_weight: Any = None,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Builds the evaluation step: running batch statistics, no merging.

    Returns:
      step(params, batch_stats, batch) -> (scores, losses): probabilities (devices, n, classes) and
      per-example losses (devices, n), float32; rows where batch["mask"] is 0 have loss 0. Of a
      segmenter, the scores are masks, uint8 (devices, n, ...), of the most probable classes.
    """

    def step(params: Any, batch_stats: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        return _score(model, recipe, multi_label, pos_weight, params, batch_stats, batch)

    return jax.pmap(step, axis_name=DATA_AXIS, devices=devices)


def make_batch_stats_step(
    model: nn.Module, recipe: Recipe, devices: tuple[jax.Device, ...]
) -> Callable[..., Any]:
    """Builds the step that updates the batch statistics alone, see `recompute_batch_stats`.

    Images are not augmented. In the networks here, dropout follows the last batch normalisation, so
    its fixed key has no effect.

    Returns:
      step(params, batch_stats, batch) -> batch_stats, all with a leading device axis. The batch is
      that of all devices.
    """

    def step(params: Any, batch_stats: Any, batch: Any) -> Any:
        _, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            normalise(batch["image"], recipe),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        return updated["batch_stats"]

    return jax.pmap(step, axis_name=DATA_AXIS, devices=devices)


def make_merging_eval_step(
    model: nn.Module,
    recipe: Recipe,
    *,
    multi_label: bool,
    devices: tuple[jax.Device, ...],
    kernels: tuple[Kernel, ...],
    rule: MergeRule,
    pos_weight: Any = None,
    pallas: bool = True,
) -> Callable[..., tuple[TrainState, Totals, tuple[jax.Array, jax.Array]]]:
    """Builds the released code's validation step: one merge, then the evaluation of one image.

    The merging key is folded from the number of updates, `VALIDATION` and the image's index, so a
    resumed run merges the same kernels.

    Returns:
      step(state, totals, batch, root) -> (state, totals, (scores, losses)), with scores and losses
      as in `make_eval_step`. Every device gets the same batch of one image and the same key, and
      returns the same scores. `state` is donated.
    """
    implementation = _merge_implementation(pallas, devices)

    def step(state: TrainState, totals: Totals, batch: Any, root: jax.Array) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(root, state.step), VALIDATION)
        key = jax.random.fold_in(key, batch["index"][0])
        params, stats = merge_kernels(
            state.params, key, kernels, rule, implementation=implementation
        )
        scored = _score(model, recipe, multi_label, pos_weight, params, state.batch_stats, batch)
        totals = _add_merges(totals, stats)._replace(steps=totals.steps + 1)
        return state._replace(params=params), totals, scored

    return jax.pmap(
        step, axis_name=DATA_AXIS, in_axes=(0, 0, 0, None), devices=devices, donate_argnums=0
    )


def _add_merges(totals: Totals, stats: MergeStats) -> Totals:
    return totals._replace(
        selected=totals.selected + stats.selected,
        merged=totals.merged + stats.merged,
        similarity=totals.similarity + stats.similarity * stats.merged,
    )


def _score(
    model: nn.Module,
    recipe: Recipe,
    multi_label: bool,
    pos_weight: Any,
    params: Any,
    batch_stats: Any,
    batch: Any,
) -> tuple[jax.Array, jax.Array]:
    """Probabilities (n, classes) or masks, and losses (n,) that are 0 where the mask is 0."""
    images = normalise(batch["image"], recipe)
    logits = model.apply({"params": params, "batch_stats": batch_stats}, images, train=False)
    scores = predictions(logits, multi_label)
    losses = example_losses(logits, batch["label"], multi_label, pos_weight)
    return scores, jnp.where(batch["mask"] > 0, losses, 0)


def predictions(logits: jax.Array, multi_label: bool) -> jax.Array:
    """Probabilities, float32 (n, classes); of a segmenter's logits masks, uint8 (n, ...)."""
    if logits.ndim > 2:
        return jnp.argmax(logits, -1).astype(jnp.uint8)
    return jax.nn.sigmoid(logits) if multi_label else jax.nn.softmax(logits)


def normalise(images: jax.Array, recipe: Recipe) -> jax.Array:
    """What a network reads, float32: (x / 255 - mean) / std of images and volumes.

    Grey ones get 3 channels if `mean` has 3. Signals (n, time, c) and tables (n, features) have
    their own units: (x - mean) / std.
    """
    x = images.astype(jnp.float32)
    if x.ndim > 3:
        x = x / 255
        if len(recipe.mean) == 3 and x.shape[-1] == 1:
            x = jnp.repeat(x, 3, axis=-1)
    return (x - jnp.array(recipe.mean)) / jnp.array(recipe.std)


def flip(images: jax.Array, index: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors each image or volume left to right with probability 1/2.

    The key of each is folded from its `index`.
    """

    def mirrored(i: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, i))

    chosen = jax.vmap(mirrored)(index)[(slice(None), *(None,) * (images.ndim - 1))]
    return jnp.where(chosen, images[..., ::-1, :], images)


def example_losses(
    logits: jax.Array, labels: jax.Array, multi_label: bool, pos_weight: Any = None
) -> jax.Array:
    """Cross-entropy per example, float32 (n,); for multi-label data, its mean over the labels.

    Of masks, it is the mean over the pixels, plus the soft Dice loss 1 - D. D is the mean over the
    classes c but the background of (2 sum(p_c y_c) + 1) / (sum(p_c) + sum(y_c) + 1), with sums over
    the pixels of one example, probabilities p_c, and y_c 1 where the mask is c, else 0. The ones
    define D where a class is absent.

    Args:
      logits: float32 (n, classes); for masks (n, height, width, classes) or with a depth.
      labels: int32 (n,), or float32 (n, classes) of 0 and 1 for multi-label data, or masks uint8
        (n, height, width) or with a depth.
      multi_label: whether an example may have several labels.
      pos_weight: float32 (classes,). For multi-label data, factor on the loss of labels that are
        1, as `pos_weight` of PyTorch's BCEWithLogitsLoss; else, factor on the loss of the examples
        of a class.
    """
    if logits.ndim > 2:
        return _mask_losses(logits, labels)
    if multi_label:
        losses = optax.sigmoid_binary_cross_entropy(logits, labels)
        if pos_weight is not None:
            losses = losses * jnp.where(labels > 0, pos_weight, 1)
        return losses.mean(-1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses if pos_weight is None else losses * jnp.asarray(pos_weight)[labels]


def _mask_losses(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """Cross-entropy and soft Dice loss of masks, see `example_losses`."""
    pixels = tuple(range(1, masks.ndim))
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, masks.astype(jnp.int32))
    found = jax.nn.softmax(logits)[..., 1:]
    true = jax.nn.one_hot(masks, logits.shape[-1])[..., 1:]
    both = jnp.sum(found * true, pixels)
    dice = (2 * both + 1) / (jnp.sum(found, pixels) + jnp.sum(true, pixels) + 1)
    return jnp.mean(entropy, pixels) + 1 - jnp.mean(dice, -1)
