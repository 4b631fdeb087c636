"""Comparing and mixing kernels with their partners, in the form that suits each platform."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from inmerge_jax import columns

_LANES = 128


def as_rows_on_tpu(
    merge: Callable[..., tuple[jax.Array, jax.Array, jax.Array]],
    weight: jax.Array,
    axis: int,
    selected: jax.Array,
    rest: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`merge(weight, axis, selected, rest)`, on TPU with the kernels as the first axis.

    Counted by XLA's TPU compiler for one 1x1x2048x512 weight (v5e; a pass reads or writes the
    weight once, in the chip's own memory too): gathering columns moves 23.5 passes, gathering rows
    11.5, both without a product. Products with a one-hot matrix move 6 to 9 and cost as many
    operations as comparing all pairs, twice: 5 % of a ResNet-50's step at 224 px, where gathering
    costs none. A gather also leaves a NaN in its own kernel. docs/tpu.md has whole steps.

    Args:
      merge: gives the merged weight and two counts; differentiable in the weight.
      weight: any floating dtype and rank; `axis` indexes its kernels.
      axis: the kernels' axis, not negative.
      selected: bool (kernels,).
      rest: arrays and numbers that `merge` takes as they are.
    """

    def rows(weight: jax.Array, selected: jax.Array, rest: Any) -> Any:
        matrix = to_rows(weight, axis)
        merged, *counts = merge(matrix, 0, selected, rest)
        return from_rows(merged, weight.shape, axis), *counts

    def as_is(weight: jax.Array, selected: jax.Array, rest: Any) -> Any:
        return merge(weight, axis, selected, rest)

    return lax.platform_dependent(weight, selected, rest, tpu=rows, default=as_is)


def in_turn_on_tpu(weight: jax.Array, before: jax.Array) -> jax.Array:
    """`weight`, which on TPU is not read before the array `before` has been computed.

    With it layers merge one after the other. Left free, the TPU compiler plans 1 to 6 layers'
    weights more of temporary memory for a step of ResNet-18, VGG-19 or ResNet-50.

    Args:
      weight: any dtype and shape.
      before: what the layer merged before it became.
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


def pair_similarity(
    weight: jax.Array, axis: int, partner: jax.Array, selected: jax.Array
) -> jax.Array:
    """Cosine similarity of each selected kernel with its partner.

    Args:
      weight: any floating dtype and rank; `axis` indexes its kernels.
      axis: the kernels' axis, not negative.
      partner: int32 (kernels,), each kernel's partner.
      selected: bool (kernels,), the kernels whose similarity is wanted.

    Returns:
      float32 (kernels,): at most 1; 0 where either kernel is zero; NaN where either holds a NaN
      or an infinity; -inf for kernels that aren't selected.
    """

    def whole(weight: jax.Array, partner: jax.Array, selected: jax.Array) -> jax.Array:
        w, across = weight.astype(jnp.float32), _across(weight, axis)
        inverse = columns.inverse_norm(jnp.sum(w * w, across))
        product = jnp.sum(w * _take(w, axis, partner), across)
        similarity = jnp.minimum(product * inverse * inverse[partner], 1)
        return jnp.where(selected, similarity, -jnp.inf)

    form = _by_platform(weight, axis, columns.pair_similarity, whole)
    return form(weight, partner, selected)


def nearest_partner(
    weight: jax.Array, axis: int, selected: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each selected kernel's most similar other kernel, and their cosine similarity.

    Args:
      weight: any floating dtype and rank; `axis` indexes its kernels.
      axis: the kernels' axis, not negative.
      selected: bool (kernels,), the kernels whose partner is wanted.

    Returns:
      int32 (kernels,) and float32 (kernels,). A kernel that holds a NaN or an infinity is nobody's
      partner and has similarity -inf itself, and so have kernels that aren't selected.
    """

    def whole(weight: jax.Array, selected: jax.Array) -> tuple[jax.Array, jax.Array]:
        w, across = weight.astype(jnp.float32), _across(weight, axis)
        product = jnp.tensordot(w, w, (across, across), precision=lax.Precision.HIGHEST)
        inverse = columns.inverse_norm(jnp.diagonal(product))
        itself = jnp.eye(len(product), dtype=bool)
        nearest, similarity = columns.most_similar(product, inverse, inverse, itself)
        return nearest, jnp.where(selected, similarity, -jnp.inf)

    return _by_platform(weight, axis, columns.nearest_partner, whole)(weight, selected)


def mix_pairs(
    weight: jax.Array, axis: int, partner: jax.Array, chosen: jax.Array, alpha: Any
) -> jax.Array:
    r"""Replaces each chosen kernel by :math:`\alpha K_i + (1 - \alpha) K_j`.

    Differentiable in the weight and in alpha.

    Args:
      weight: any floating dtype and rank; `axis` indexes its kernels.
      axis: the kernels' axis, not negative.
      partner: int32 (kernels,), the j of each kernel i.
      chosen: bool (kernels,); the other kernels come back bit for bit.
      alpha: the share that stays, a number or a traced scalar.

    Returns:
      The weight with its own dtype; the mix itself is computed in float32.
    """

    def whole(
        weight: jax.Array, partner: jax.Array, chosen: jax.Array, alpha: jax.Array
    ) -> jax.Array:
        mixed = columns.mix(weight, _take(weight, axis, partner), alpha)
        return jnp.where(jnp.expand_dims(chosen, _across(weight, axis)), mixed, weight)

    blocked = _with_derivative_of(whole, columns.mix_pairs)
    form = _by_platform(weight, axis, blocked, whole)
    return form(weight, partner, chosen, jnp.asarray(alpha, jnp.float32))


def _by_platform(weight: jax.Array, axis: int, blocked: Any, whole: Any) -> Any:
    """The blocked form on CPU where kernels are columns (HWIO), else the whole-array form.

    On CPU, a column gather over a whole layer is bound by fresh memory and scattered reads; in
    blocks of rows, of the selected columns only, it stays in cache and needs no large temporary.
    Other backends fuse the plain expression themselves.
    """
    if weight.ndim < 2 or axis != weight.ndim - 1:
        return whole
    return lambda *args: lax.platform_dependent(*args, cpu=blocked, default=whole)


def _with_derivative_of(
    whole: Callable[..., jax.Array], blocked: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """`blocked`, whose loops of unknown length have no reverse mode, with the rule of `whole`."""
    form = jax.custom_jvp(blocked)

    @form.defjvp
    def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        return form(*primals), jax.jvp(whole, primals, tangents)[1]

    return form


def _across(weight: jax.Array, axis: int) -> tuple[int, ...]:
    """All axes but the kernels' own."""
    return tuple(d for d in range(weight.ndim) if d != axis)


def _take(w: jax.Array, axis: int, partner: jax.Array) -> jax.Array:
    """The weight with each kernel's place taken by its partner."""
    return w.at[(slice(None),) * axis + (partner,)].get(mode="promise_in_bounds")
