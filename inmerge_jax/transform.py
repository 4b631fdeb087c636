"""In-model merging as an optax transformation, for any training loop."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from inmerge_jax.kernels import Kernel
from inmerge_jax.merging import MergeRule, MergeStats, merge_kernels


class InModelMergingState(NamedTuple):
    """Plain arrays alone, which any library for checkpoints keeps.

    Attributes:
      count: int32 (), how many updates were made.
      key: uint32, the data of the key that every merge's key is folded from.
      stats: of all merges so far: selected and merged are sums, similarity is the mean of all pairs
        that were mixed.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's states name it so; tuple has a count
    key: jax.Array
    stats: MergeStats


def in_model_merging(
    kernels: Sequence[Kernel],
    rule: MergeRule | Callable[[jax.Array], MergeRule],
    key: jax.Array,
    *,
    fused: bool = False,
) -> optax.GradientTransformation:
    r"""Merges similar kernels after every update; the last in its chain.

    Lets the updates :math:`u` that come in be applied, merges, and hands on the difference:

    .. math:: u' = \mathrm{merge}(\theta + u) - \theta

    so that `optax.apply_updates` yields merged parameters. This equals merging before every
    forward pass, apart from the first and the last merge. Updates of kernels that aren't merged
    are handed on bit for bit; merged ones are exact to the rounding of that difference.

    That last merge comes after the last forward pass, so running averages of batch normalisation
    have not seen its weights. Where many kernels merge at every update, average them anew before an
    evaluation, or call `merge_kernels` at the start of a step instead.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from inmerge_jax import MergeRule, find_kernels, in_model_merging
      >>> forward = lambda params, x: jax.lax.conv(x, params["w"], (1, 1), "SAME")
      >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 3, 3, 3))}
      >>> kernels = find_kernels(forward, params, jnp.zeros((1, 3, 8, 8)))
      >>> merging = in_model_merging(kernels, MergeRule(threshold=-1.0), jax.random.key(1))
      >>> tx = optax.chain(optax.sgd(0.1, momentum=0.9), merging)
      >>> state = tx.init(params)
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(state[-1].stats.merged <= state[-1].stats.selected)
      [ True]

    Args:
      kernels: which weights to merge, from `find_kernels` or `deep_kernels`.
      rule: the rule, or a function from the count of updates so far, int32 (), to the rule.
      key: a typed PRNG key, the same on all replicas; the merge after update number `n`, counted
        from 0, uses `fold_in(key, n)`.
      fused: on TPU, merge each layer in one Pallas kernel; see `merge_kernels`.

    Returns:
      A gradient transformation with an `InModelMergingState`, whose `stats` say what was merged.
      Inside `optax.MultiSteps` it merges once per accumulated update.

    Raises:
      ValueError: at the update, when `params` isn't passed or doesn't hold the kernels.

    References:
      arXiv 2502.20516, section on the merging stage.
    """
    implementation = jax.random.key_impl(key)

    def init(params: optax.Params) -> InModelMergingState:
        del params
        # A copy: states are donated, and the caller's key may be of use again.
        data = jnp.array(jax.random.key_data(key), copy=True)
        counts = jnp.array([kernel.count for kernel in kernels], jnp.int32)
        none = jnp.zeros(len(kernels), jnp.int32)
        stats = MergeStats(counts, none, jnp.zeros_like(none), jnp.zeros(len(kernels), jnp.float32))
        return InModelMergingState(jnp.zeros([], jnp.int32), data, stats)

    def update(
        updates: optax.Updates, state: InModelMergingState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, InModelMergingState]:
        if params is None:
            raise ValueError(
                "in_model_merging rewrites parameters, so it needs them: call "
                "tx.update(grads, state, params)"
            )
        now = rule if isinstance(rule, MergeRule) else rule(state.count)
        moved = optax.apply_updates(params, updates)
        root = jax.random.wrap_key_data(state.key, impl=implementation)
        now_key = jax.random.fold_in(root, state.count)
        merged, stats = merge_kernels(moved, now_key, kernels, now, fused=fused)

        def rewritten(
            u: jax.Array, p: jax.Array, unmerged: jax.Array, merged: jax.Array
        ) -> jax.Array:
            if merged is unmerged:
                return u
            return jnp.where(merged == unmerged, u, (merged - p).astype(u.dtype))

        updates = jax.tree.map(rewritten, updates, params, moved, merged)
        count = optax.safe_increment(state.count)
        return updates, InModelMergingState(count, state.key, _add(state.stats, stats))

    return optax.GradientTransformation(init, update)


def _add(total: MergeStats, new: MergeStats) -> MergeStats:
    def similarities(stats: MergeStats) -> jax.Array:
        return stats.similarity * stats.merged.astype(jnp.float32)

    merged = total.merged + new.merged
    mean = (similarities(total) + similarities(new)) / jnp.maximum(merged, 1).astype(jnp.float32)
    return MergeStats(total.kernels, total.selected + new.selected, merged, mean)
