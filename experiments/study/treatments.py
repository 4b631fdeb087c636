"""Changes of the weights before each update of a second stage: merging, and its controls.

The controls "any", "least", "noise" and "perturb" act on the kernels that the rule would merge in
their own weights, at the same steps; they differ in what a kernel is mixed with. They change the
same kernels in the first update, and other ones later, as their weights diverge:

    merge    K_i <- alpha K_i + (1 - alpha) K_j, K_j the rule's partner
    any      the same with a partner drawn from all others
    least    the same with the least similar of all others
    noise    K_i plus Gaussian noise of the length of the step that merging would take
    perturb  alpha K_i + (1 - alpha) |K_i| g, g Gaussian of length 1 (shrink and perturb, Ash and
             Adams 2020, arXiv 1910.08475, kernel by kernel)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.study.trials import Treatment
from inmerge_jax import Kernel, MergeRule, deep_kernels, merge_kernels, quantile
from inmerge_jax.training.rule_schedule import only_every

_CONTROL = 1


class Numbers(NamedTuple):
    """The parameters of a treatment that are arguments of its compiled step."""

    rule: MergeRule
    every: Any


def numbers(treatment: Treatment, steps: int) -> Numbers:
    """The parameters of a treatment; `steps` is the number of updates per epoch."""
    chosen = treatment
    threshold = chosen.threshold if chosen.quantile is None else quantile(chosen.quantile)
    rule = MergeRule(chosen.probability, threshold, chosen.alpha, chosen.partner)
    return Numbers(rule, jnp.int32(chosen.every or steps))


def selection(treatment: Treatment, kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """The kernels that merge: the deeper half if all convolutions would be skipped."""
    skip = treatment.skip if treatment.skip < len(kernels) else len(kernels) // 2
    return deep_kernels(kernels, skip=skip)


def make_treatment(kind: str, kernels: tuple[Kernel, ...]) -> Any:
    """A `steps.Treatment` of this kind, to be given `Numbers`."""

    def treat(params: Any, key: jax.Array, step: jax.Array, numbers: Numbers) -> Any:
        rule = only_every(numbers.rule, numbers.every, step)
        merged, stats = merge_kernels(params, key, kernels, rule)
        if kind == "merge":
            return merged, stats
        old, new = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (params, merged))
        for index, kernel in enumerate(kernels):
            draw = jax.random.fold_in(jax.random.fold_in(key, _CONTROL), index)
            rows = _rows(old[kernel.path], kernel), _rows(new[kernel.path], kernel)
            moved = _control(kind, *rows, rule.alpha, draw)
            new[kernel.path] = _from_rows(moved, kernel)
        leaves = [new[path] for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        return jax.tree.unflatten(jax.tree.structure(params), leaves), stats

    return treat


def _control(kind: str, old: jax.Array, merged: jax.Array, alpha: Any, key: jax.Array) -> jax.Array:
    """The kernels of a layer, (kernels, n), after the control in place of the merge."""
    count = len(old)
    length = jnp.linalg.norm(merged - old, axis=1, keepdims=True)
    if kind in ("noise", "perturb"):
        noise = jax.random.normal(key, old.shape)
        noise /= jnp.linalg.norm(noise, axis=1, keepdims=True)
        if kind == "noise":
            control = old + length * noise
        else:
            mine = jnp.linalg.norm(old, axis=1, keepdims=True)
            control = alpha * old + (1 - alpha) * mine * noise
    else:
        itself = jnp.arange(count)
        if kind == "any":
            other = jax.random.randint(key, (count,), 0, count - 1)
            other = jnp.where(other >= itself, other + 1, other)
        else:
            unit = old / jnp.maximum(jnp.linalg.norm(old, axis=1, keepdims=True), 1e-30)
            cosine = jnp.where(jnp.eye(count, dtype=bool), jnp.inf, unit @ unit.T)
            other = jnp.argmin(cosine, axis=1)
        control = alpha * old + (1 - alpha) * old[other]
    return jnp.where(length > 0, control, old)


def _rows(weight: jax.Array, kernel: Kernel) -> jax.Array:
    return jnp.moveaxis(weight, kernel.out_axis, 0).reshape(kernel.count, -1)


def _from_rows(rows: jax.Array, kernel: Kernel) -> jax.Array:
    others = [size for axis, size in enumerate(kernel.shape) if axis != kernel.out_axis]
    return jnp.moveaxis(rows.reshape(kernel.count, *others), 0, kernel.out_axis)
