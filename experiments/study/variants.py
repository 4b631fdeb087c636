"""Variants of the merge rule, among which question 4 searches: treatments of the kind "variant"."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.study import treatments
from experiments.study.trials import Treatment
from inmerge_jax import Kernel, MergeRule, merge_kernels
from inmerge_jax.merging import tie
from inmerge_jax.merging.merge import cosines, nearest, unit_vectors
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
        allowed = [jnp.ones(members[0].count, bool) for members in groups]
        if variant.partner == "mutual":
            allowed = [partner[partner] == jnp.arange(len(partner)) for partner, _ in similar]
        if variant.layers == "redundant":
            means = jnp.stack([jnp.mean(cosine) for _, cosine in similar])
            most = means >= jnp.median(means)
            allowed = [mask & layer for mask, layer in zip(allowed, most, strict=True)]
        counts, total = [], []
        for members, mask, (_, cosine) in zip(groups, allowed, similar, strict=True):
            rows = [as_rows(tree[members[0].path], members[0])[0] for tree in (old, new)]
            changed = mask & jnp.any(rows[0] != rows[1], axis=range(1, rows[0].ndim))
            counts.append(jnp.sum(changed, dtype=jnp.int32))
            total.append(jnp.sum(jnp.where(changed, cosine, 0)))
            for one in members:
                kept, mixed = (as_rows(tree[one.path], one) for tree in (old, new))
                beside = jnp.expand_dims(mask, (0, *range(2, kept.ndim)))
                new[one.path] = from_rows(jnp.where(beside, mixed, kept), one)
        leaves = [new[path] for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        mean = jnp.stack(total) / jnp.maximum(jnp.stack(counts), 1)
        stats = stats._replace(merged=jnp.stack(counts), similarity=mean)
        return jax.tree.unflatten(jax.tree.structure(params), leaves), stats

    return merge


def _nearest(weight: jax.Array, kernel: Kernel) -> tuple[jax.Array, jax.Array]:
    """Each kernel's most similar other one, and their similarity."""
    return nearest(cosines(unit_vectors([as_rows(weight, kernel)[0]])))
