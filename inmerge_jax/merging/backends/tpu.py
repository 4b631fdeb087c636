"""The merge on TPU with XLA's own operations: kernels are rows, whole tiles of a TPU's memory.

Counted by XLA's TPU compiler for one 1x1x2048x512 weight (v5e; a pass reads or writes the weight
once, in the chip's own memory too): gathering columns moves 23.5 passes, gathering rows 11.5, both
without a product. Products with a one-hot matrix move 6 to 9 and cost as many operations as
comparing all pairs, twice: 5 % of a ResNet-50's step at 224 px, where gathering costs none. A
gather also leaves a NaN in its own kernel.

Against the reference form it saves 6.4 % of the bytes that a ResNet-18's step at 28 px moves and
0.9 % of a VGG19's at 224 px (docs/tpu.md, counted by the compiler, not timed). Squared norms are of
the weights as they are, so kernels whose norms lie outside 1e-19 to 1e19 are not compared rightly.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from inmerge_jax.merging.rule import MergeRule, Quantile
from inmerge_jax.merging.units import Kernel

_LANES = 128


def merge(
    weights: Sequence[jax.Array],
    members: Sequence[Kernel],
    selected: jax.Array,
    partner: jax.Array | None,
    rule: MergeRule,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """As `merge.merge_layer`, for one weight."""
    (weight,), (kernel,) = weights, members
    rows = to_rows(weight, kernel.out_axis)
    # Which kernels merge is a decision: no gradient goes through it.
    compared = lax.stop_gradient(rows)
    if partner is None:
        partner, similarity = nearest_partner(compared, selected)
    else:
        similarity = pair_similarity(compared, partner, selected)
    merged = selected & (similarity > effective_threshold(rule.threshold, similarity))
    total = jnp.sum(jnp.where(merged, similarity, 0))
    rows = mix_pairs(rows, partner, merged, jnp.asarray(rule.alpha, jnp.float32))
    count = jnp.sum(merged, dtype=jnp.int32)
    return [from_rows(rows, weight.shape, kernel.out_axis)], count, total


def sequence_after(weight: jax.Array, before: jax.Array) -> jax.Array:
    """`weight`, which on TPU is not read before the array `before` has been computed.

    Args:
      weight: any dtype and shape.
      before: the previous layer's merged weight.
    """
    return lax.platform_dependent(
        weight,
        before,
        tpu=lambda weight, before: lax.optimization_barrier((weight, before))[0],
        default=lambda weight, _: weight,
    )


def to_rows(weight: jax.Array, axis: int) -> jax.Array:
    """The weight as (kernels, n, 128), or (kernels, n) where 128 doesn't divide a kernel's size.

    A kernel is then whole tiles of a TPU's memory, so that gathering kernels reads no others. The
    barrier keeps the compiler from transposing once for each use.
    """
    count = weight.shape[axis]
    matrix = jnp.moveaxis(weight, axis, 0).reshape(count, -1)
    if matrix.shape[1] % _LANES == 0:
        matrix = matrix.reshape(count, -1, _LANES)
    return lax.optimization_barrier(matrix)


def from_rows(matrix: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """The inverse of `to_rows`, for a weight of this shape."""
    others = tuple(size for d, size in enumerate(shape) if d != axis)
    return jnp.moveaxis(matrix.reshape(shape[axis], *others), 0, axis)


def pair_similarity(rows: jax.Array, partner: jax.Array, selected: jax.Array) -> jax.Array:
    """Cosine similarity of each selected row with its partner.

    Args:
      rows: (kernels, ...), any floating dtype.
      partner: int32 (kernels,), each kernel's partner.
      selected: bool (kernels,), the kernels whose similarity is needed.

    Returns:
      float32 (kernels,): at most 1; 0 where either kernel is zero; NaN where either holds a NaN or
      an infinity; -inf for kernels that aren't selected.
    """
    w, across = rows.astype(jnp.float32), tuple(range(1, rows.ndim))
    inverse = inverse_norm(jnp.sum(w * w, across))
    product = jnp.sum(w * _take(w, partner), across)
    similarity = jnp.minimum(product * inverse * inverse[partner], 1)
    return jnp.where(selected, similarity, -jnp.inf)


def nearest_partner(rows: jax.Array, selected: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each selected row's most similar other row, and their cosine similarity.

    Args:
      rows: (kernels, ...), any floating dtype.
      selected: bool (kernels,), the kernels whose partner is needed.

    Returns:
      int32 (kernels,) and float32 (kernels,). A kernel that holds a NaN or an infinity is nobody's
      partner and has similarity -inf itself, and so have kernels that aren't selected.
    """
    w, across = rows.astype(jnp.float32), tuple(range(1, rows.ndim))
    product = jnp.tensordot(w, w, (across, across), precision=lax.Precision.HIGHEST)
    inverse = inverse_norm(jnp.diagonal(product))
    itself = jnp.eye(len(product), dtype=bool)
    similarity = product * inverse[:, None] * inverse[None]
    similarity = jnp.where(itself | jnp.isnan(similarity), -jnp.inf, similarity)
    nearest = jnp.argmax(similarity, axis=1).astype(jnp.int32)
    highest = jnp.minimum(jnp.max(similarity, axis=1), 1)
    return nearest, jnp.where(selected, highest, -jnp.inf)


def mix_pairs(
    rows: jax.Array, partner: jax.Array, chosen: jax.Array, alpha: jax.Array
) -> jax.Array:
    r"""Replaces each chosen row by :math:`\alpha K_i + (1 - \alpha) K_j`, computed in float32."""
    old, other = rows.astype(jnp.float32), _take(rows, partner).astype(jnp.float32)
    mixed = (alpha * old + (1 - alpha) * other).astype(rows.dtype)
    return jnp.where(jnp.expand_dims(chosen, tuple(range(1, rows.ndim))), mixed, rows)


def effective_threshold(threshold: Any, similarity: jax.Array) -> Any:
    """The threshold, or of a `Quantile` the similarity that the layer's upper share exceeds.

    Kernels that aren't selected, or can't merge, have similarity -inf or NaN and don't count.
    """
    if not isinstance(threshold, Quantile):
        return threshold
    compared = jnp.isfinite(similarity)
    count = jnp.sum(compared, dtype=jnp.int32)
    ascending = jnp.sort(jnp.where(compared, similarity, -jnp.inf))
    # Less a tolerance: 0.6 * 25 > 15 in float32.
    exact = threshold.share * count.astype(jnp.float32)
    stay = jnp.ceil(exact - 1e-4 - 2e-7 * exact).astype(jnp.int32)
    last = ascending[len(ascending) - count + stay - 1]
    return jnp.where(stay > 0, last, -jnp.inf)


def inverse_norm(square: jax.Array) -> jax.Array:
    """1 / norm from squared norms, and 0 for zero kernels, so that their similarity is 0."""
    return jnp.where(square > 0, 1 / jnp.sqrt(square), 0)


def _take(rows: jax.Array, partner: jax.Array) -> jax.Array:
    """The rows with each kernel's place taken by its partner."""
    return rows.at[(partner,)].get(mode="promise_in_bounds")
