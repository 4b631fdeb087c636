"""Variants of the merge rule, among which question 4 searches: treatments of the kind "variant"."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.study import treatments
from experiments.study.trials import Treatment
from inmerge_jax import Kernel, MergeRule, MergeStats, merge_kernels
from inmerge_jax.merging import tie
from inmerge_jax.merging.merge import cosines, draw_pairs, nearest, unit_vectors
from inmerge_jax.merging.rule import NOT_COMPARED, effective_threshold
from inmerge_jax.merging.units import as_rows, from_rows, group_weights
from inmerge_jax.training.rule_schedule import only_every


class Numbers(NamedTuple):
    """The parameters of a variant that are arguments of its compiled step."""

    rule: MergeRule
    every: Any
    until: Any


def numbers(variant: Treatment, steps: int, epochs: int) -> Numbers:
    """The parameters of a variant.

    Args:
      variant: a treatment.
      steps: number of updates per epoch.
      epochs: number of epochs.
    """
    partner = "random" if variant.partner == "random" else "nearest"
    rule, every = treatments.numbers(dataclasses.replace(variant, partner=partner), steps)
    return Numbers(rule, every, jnp.int32(round(variant.until * steps * epochs)))


def selection(variant: Treatment, kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """The weights that merge, with those that are mixed along with them.

    Args:
      variant: a treatment.
      kernels: the convolutions of a `models.resnet.ResNet`, in execution order.
    """
    if variant.layers == "deep":
        kernels = treatments.selection(variant, kernels)
    if variant.along == "kernel":
        return kernels
    found: list[Kernel] = []
    weights = {kernel.name: kernel for kernel in kernels}
    for kernel in kernels:
        block, _, layer = kernel.name.removesuffix("/kernel").rpartition("/")
        also = _norm(kernel)
        if variant.along == "consumer":
            consumer = weights.get(f"{block}/conv2/kernel")
            if not block or layer != "conv1" or consumer is None:
                continue
            also.append(dataclasses.replace(consumer, out_axis=2))
        # The label is the kernel's name, so that draws are those of the kernel alone.
        found += tie([kernel, *also], kernel.name, compared=lambda one, own=kernel: one is own)
    return tuple(found)


def _norm(kernel: Kernel) -> list[Kernel]:
    """Scale and bias of the batch normalization that follows a convolution."""
    *block, layer, _ = kernel.path
    norm = jax.tree_util.DictKey(layer.key.replace("conv", "bn"))
    shape = (kernel.shape[kernel.out_axis],)
    return [
        Kernel((*block, norm, jax.tree_util.DictKey(leaf)), shape, 0) for leaf in ("scale", "bias")
    ]


def make_variant(variant: Treatment, kernels: Sequence[Kernel]) -> Any:
    """A `train_step.ParamTransform` of this variant, to be given `Numbers`.

    Args:
      variant: its partner and layers; all else is in `Numbers`.
      kernels: of `selection`.
    """
    groups = group_weights(kernels)

    def merge(params: Any, key: jax.Array, step: jax.Array, numbers: Numbers) -> Any:
        rule = only_every(numbers.rule, numbers.every, step)
        probability = jnp.where(step < numbers.until, rule.probability, 0)
        rule = dataclasses.replace(rule, probability=probability)
        merged, stats = merge_kernels(params, key, kernels, rule)
        if variant.partner != "mutual" and variant.layers == "deep":
            return merged, stats
        old, new = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (params, merged))
        similar = [_nearest(old[members[0].path], members[0]) for members in groups]
        layers = jnp.ones(len(groups), bool)
        if variant.layers == "redundant":
            excess = [_redundancy(*one) for one in zip(groups, similar, strict=True)]
            layers = jnp.stack(excess) >= jnp.median(jnp.stack(excess))
        counts = []
        for members, (partner, cosine), layer in zip(groups, similar, layers, strict=True):
            # The decisions of `merge_kernels`, which does not return them.
            selected, _ = draw_pairs(key, members[0], rule)
            compared = jnp.where(selected, cosine, NOT_COMPARED)
            mixed = selected & (compared > effective_threshold(rule.threshold, compared))
            allowed = layer & jnp.ones(len(partner), bool)
            if variant.partner == "mutual":
                allowed &= partner[partner] == jnp.arange(len(partner))
            for one in members:
                before, after = (as_rows(tree[one.path], one) for tree in (old, new))
                mask = jnp.expand_dims(allowed, (0, *range(2, before.ndim)))
                new[one.path] = from_rows(jnp.where(mask, after, before), one)
            mixed &= allowed
            total = jnp.sum(mixed, dtype=jnp.int32)
            mean = jnp.sum(jnp.where(mixed, cosine, 0)) / jnp.maximum(total, 1)
            counts.append((jnp.sum(selected & layer, dtype=jnp.int32), total, mean))
        leaves = [new[path] for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        stats = MergeStats(stats.kernels, *map(jnp.stack, zip(*counts, strict=True)))
        return jax.tree.unflatten(jax.tree.structure(params), leaves), stats

    return merge


def _nearest(weight: jax.Array, kernel: Kernel) -> tuple[jax.Array, jax.Array]:
    """Each kernel's most similar other one, and their similarity."""
    partner, cosine = nearest(cosines(unit_vectors([as_rows(weight, kernel)[0]])))
    return partner, jnp.minimum(cosine, 1)


def _redundancy(members: Sequence[Kernel], similar: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean similarity to the nearest kernel, relative to that of random kernels.

    The largest of n cosines of random vectors in d dimensions is about sqrt(2 log(n) / d).
    """
    kernel = members[0]
    entries = math.prod(kernel.shape) // kernel.count
    return jnp.mean(similar[1]) * math.sqrt(entries / (2 * math.log(kernel.count)))
