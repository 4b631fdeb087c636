"""Comparing and mixing kernels with their partners, in the form that suits each platform."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def pair_similarity(weight: jax.Array, axis: int, partner: jax.Array) -> jax.Array:
    """Cosine similarity of each kernel with its partner.

    Args:
      weight: any floating dtype and rank; `axis` indexes its kernels.
      axis: the kernels' axis, not negative.
      partner: int32 (kernels,), each kernel's partner.

    Returns:
      float32 (kernels,): at most 1; 0 where either kernel is zero; NaN where either holds a NaN
      or an infinity.
    """

    def whole(weight: jax.Array, partner: jax.Array) -> tuple[jax.Array, jax.Array]:
        w, across = weight.astype(jnp.float32), _across(weight, axis)
        return jnp.sum(w * w, across), jnp.sum(w * _take(w, axis, partner), across)

    def blocked(weight: jax.Array, partner: jax.Array) -> tuple[jax.Array, jax.Array]:
        blocks = _blocks(weight)

        def add(b: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            w = blocks[b].astype(jnp.float32)
            return (
                sums[0] + jnp.sum(w * w, 0),
                sums[1] + jnp.sum(w * _take_columns(w, partner), 0),
            )

        zeros = jnp.zeros(weight.shape[axis], jnp.float32)
        return lax.fori_loop(0, len(blocks), add, (zeros, zeros))

    square, product = _by_platform(weight, axis, blocked, whole)(weight, partner)
    inverse = _inverse_norm(square)
    return jnp.minimum(product * inverse * inverse[partner], 1)


def nearest_partner(weight: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Each kernel's most similar other kernel, and their cosine similarity.

    Args:
      weight: any floating dtype and rank; `axis` indexes its kernels.
      axis: the kernels' axis, not negative.

    Returns:
      int32 (kernels,) and float32 (kernels,). A kernel that holds a NaN or an infinity is nobody's
      partner and has similarity -inf itself.
    """
    w, across = weight.astype(jnp.float32), _across(weight, axis)
    product = jnp.tensordot(w, w, (across, across), precision=lax.Precision.HIGHEST)
    inverse = _inverse_norm(jnp.diagonal(product))
    similarity = product * jnp.expand_dims(inverse, 0) * jnp.expand_dims(inverse, 1)
    itself = jnp.eye(len(similarity), dtype=bool)
    similarity = jnp.where(itself | jnp.isnan(similarity), -jnp.inf, similarity)
    nearest = jnp.argmax(similarity, axis=1).astype(jnp.int32)
    return nearest, jnp.minimum(jnp.max(similarity, axis=1), 1)


def mix_pairs(
    weight: jax.Array, axis: int, partner: jax.Array, chosen: jax.Array, alpha: Any
) -> jax.Array:
    r"""Replaces each chosen kernel by :math:`\alpha K_i + (1 - \alpha) K_j`.

    Args:
      weight: any floating dtype and rank; `axis` indexes its kernels.
      axis: the kernels' axis, not negative.
      partner: int32 (kernels,), the j of each kernel i.
      chosen: bool (kernels,); the other kernels come back bit for bit.
      alpha: the share that stays, a number or a traced scalar.

    Returns:
      The weight with its own dtype; the mix itself is computed in float32.
    """
    alpha = jnp.asarray(alpha, jnp.float32)

    def mixed(weight: jax.Array, other: jax.Array, chosen: jax.Array) -> jax.Array:
        mix = alpha * weight.astype(jnp.float32) + (1 - alpha) * other.astype(jnp.float32)
        return jnp.where(chosen, mix.astype(weight.dtype), weight)

    def whole(weight: jax.Array, partner: jax.Array, chosen: jax.Array) -> jax.Array:
        columns = jnp.expand_dims(chosen, _across(weight, axis))
        return mixed(weight, _take(weight, axis, partner), columns)

    def blocked(weight: jax.Array, partner: jax.Array, chosen: jax.Array) -> jax.Array:
        columns = jnp.expand_dims(chosen, 0)

        def write(b: Any, blocks: jax.Array) -> jax.Array:
            w = blocks[b]
            return blocks.at[b].set(mixed(w, _take_columns(w, partner), columns))

        def every(blocks: jax.Array) -> jax.Array:
            return lax.fori_loop(0, len(blocks), write, blocks)

        # Deep layers often have nothing to mix, and reading them again would cost as much as
        # comparing them did.
        blocks = lax.cond(jnp.any(chosen), every, lambda blocks: blocks, _blocks(weight))
        return blocks.reshape(weight.shape)

    return _by_platform(weight, axis, blocked, whole)(weight, partner, chosen)


def _by_platform(weight: jax.Array, axis: int, blocked: Any, whole: Any) -> Any:
    """The blocked form on CPU where kernels are columns (HWIO), else the whole-array form.

    On CPU, a column gather over a whole layer is bound by fresh memory and scattered reads; in
    blocks of one tap's input channels by kernels it stays in cache and needs no large temporary.
    Other backends fuse the plain expression themselves.
    """
    if weight.ndim < 2 or axis != weight.ndim - 1:
        return whole
    return lambda *args: lax.platform_dependent(*args, cpu=blocked, default=whole)


def _across(weight: jax.Array, axis: int) -> tuple[int, ...]:
    """All axes but the kernels' own."""
    return tuple(d for d in range(weight.ndim) if d != axis)


def _inverse_norm(square: jax.Array) -> jax.Array:
    """1 / norm from squared norms, and 0 for zero kernels, so that their similarity is 0."""
    return jnp.where(square > 0, 1 / jnp.sqrt(square), 0)


def _take(w: jax.Array, axis: int, partner: jax.Array) -> jax.Array:
    """The weight with each kernel's place taken by its partner."""
    return w.at[(slice(None),) * axis + (partner,)].get(mode="promise_in_bounds")


def _blocks(weight: jax.Array) -> jax.Array:
    """A weight whose last axis is the kernels' as (taps, input channels, kernels)."""
    return weight.reshape(-1, *weight.shape[-2:])


def _take_columns(block: jax.Array, partner: jax.Array) -> jax.Array:
    """`block[:, partner]`, as a flat gather, which XLA's CPU backend fuses best."""
    rows, columns = block.shape
    start = jnp.arange(rows, dtype=jnp.uint32)[:, None] * jnp.uint32(columns)
    flat = start + jnp.expand_dims(partner.astype(jnp.uint32), 0)
    one_number = lax.GatherDimensionNumbers(
        offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    return lax.gather(
        block.reshape(-1),
        flat[..., None],
        one_number,
        slice_sizes=(1,),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
