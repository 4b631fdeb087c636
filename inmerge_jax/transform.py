"""In-model merging as an optax transformation, for any training loop."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from inmerge_jax.kernels import Kernel
from inmerge_jax.merging import MergeRule, merge_kernels


class InModelMergingState(NamedTuple):
    """How many updates were made, int32 (), and the key that every merge's key is folded from."""

    count: jax.Array  # type: ignore[assignment]  # optax's states name it so; tuple has a count
    key: jax.Array


def in_model_merging(
    kernels: Sequence[Kernel],
    rule: MergeRule | Callable[[jax.Array], MergeRule],
    key: jax.Array,
) -> optax.GradientTransformation:
    r"""Merges similar kernels after every update; the last in its chain.

    Lets the updates :math:`u` that come in be applied, merges, and hands on the difference:

    .. math:: u' = \mathrm{merge}(\theta + u) - \theta

    so that `optax.apply_updates` yields merged parameters. This equals merging before every
    forward pass, apart from the first and the last merge. Updates of kernels that aren't merged
    are handed on bit for bit; merged ones are exact to the rounding of that difference.

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

    Args:
      kernels: which weights to merge, from `find_kernels` or `deep_kernels`.
      rule: the rule, or a function from the count of updates so far, int32 (), to the rule.
      key: a typed PRNG key, the same on all replicas; the merge after update number `n`, counted
        from 0, uses `fold_in(key, n)`.

    Returns:
      A gradient transformation whose state is a count and the key. Inside `optax.MultiSteps` it
      merges once per accumulated update.

    Raises:
      ValueError: at the update, when `params` isn't passed or doesn't hold the kernels.

    References:
      arXiv 2502.20516, section on the merging stage.
    """

    def init(params: optax.Params) -> InModelMergingState:
        del params
        return InModelMergingState(jnp.zeros([], jnp.int32), key)

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
        merged, _ = merge_kernels(moved, jax.random.fold_in(state.key, state.count), kernels, now)

        def rewritten(
            u: jax.Array, p: jax.Array, unmerged: jax.Array, merged: jax.Array
        ) -> jax.Array:
            if merged is unmerged:
                return u
            return jnp.where(merged == unmerged, u, (merged - p).astype(u.dtype))

        updates = jax.tree.map(rewritten, updates, params, moved, merged)
        return updates, InModelMergingState(optax.safe_increment(state.count), state.key)

    return optax.GradientTransformation(init, update)
