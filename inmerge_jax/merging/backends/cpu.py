"""The merge on CPU: kernels are columns, compared and mixed in blocks of rows that fit the cache.

A weight (..., inputs, kernels) is read as rows by kernels. Only the selected columns are gathered,
in loops whose length follows how many there are.

Measured on two cores (`backends` in experiments/results/benchmark.json; few merge, all selected
merge, nearest partner), a merge in the reference form takes 9.2, 4.6 and 3.2 times as long for a
ResNet-18 at 28 px, batch 128, and 12.6, 5.6 and 3.7 times for a VGG19 at 224 px, batch 8. This form
saves 2.7, 2.4 and 3.8 % of the first one's training step, and 2.2, 2.0 and 3.4 % of the second's.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from inmerge_jax.merging.rule import NOT_COMPARED, MergeRule, effective_threshold
from inmerge_jax.merging.units import Kernel

_ROWS = 64
_UNROLL = 4
_FEW = 8


def fits(members: Sequence[Kernel]) -> bool:
    """Whether this form takes a layer: its units are the last axis of each weight.

    One weight is compared, which has two axes or more. The others are mixed with it, such as the
    biases of neurons.
    """
    compared = [kernel for kernel in members if kernel.compared]
    last = all(kernel.out_axis == len(kernel.dims) - 1 for kernel in members)
    single = all(kernel.problems == 1 for kernel in members)
    return last and single and len(compared) == 1 and len(compared[0].dims) >= 2


def merge(
    weights: Sequence[jax.Array],
    members: Sequence[Kernel],
    selected: jax.Array,
    partner: jax.Array | None,
    rule: MergeRule,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """As `merge.merge_layer`, for a layer that `fits`; differentiable in the weights and alpha."""
    # Two axes for a bias too; the last one indexes units.
    matrices = [
        weight.reshape(kernel.dims if len(kernel.dims) > 1 else (1, -1))
        for weight, kernel in zip(weights, members, strict=True)
    ]
    # Which units merge is a decision: no gradient goes through it.
    number = next(n for n, kernel in enumerate(members) if kernel.compared)
    compared = lax.stop_gradient(matrices[number])
    others = matrices[:number] + matrices[number + 1 :]
    finite = [jnp.all(jnp.isfinite(m), tuple(range(m.ndim - 1))) for m in others]
    # A column with a NaN or an infinity in another weight has no similarity.
    usable = functools.reduce(jnp.logical_and, finite) if finite else None
    if partner is None:
        partner, similarity = nearest_partner(compared, selected, usable)
    else:
        similarity = pair_similarity(compared, partner, selected, usable)
    threshold = effective_threshold(rule.threshold, similarity)
    merged = (similarity > threshold) & (similarity > NOT_COMPARED)
    total = jnp.sum(jnp.where(merged, similarity, 0))
    alpha = jnp.asarray(rule.alpha, jnp.float32)
    mixed = [
        mix_pairs(matrix, partner, merged, alpha).reshape(weight.shape)
        for matrix, weight in zip(matrices, weights, strict=True)
    ]
    return mixed, jnp.sum(merged, dtype=jnp.int32), total


def scales(weight: jax.Array) -> jax.Array:
    """A power of two for each kernel, float32 (kernels,), by which its entries come near 1.

    So that squares neither under- nor overflow. Some rows alone are read: a pass over the weight
    would take as long as comparing few kernels does. They are spread, since rows next to each other
    may all be tiny, as the weights of blank pixels at an image's edge are. Of an odd distance, so
    that they are not of the same few channels at each tap.
    """
    matrix = weight.reshape(-1, weight.shape[-1])
    some = matrix[:: -(-len(matrix) // _ROWS) | 1].astype(jnp.float32)
    largest = jnp.max(jnp.abs(some), 0)
    _, exponent = jnp.frexp(jnp.where(largest > 0, largest, jnp.max(largest)))
    return jnp.ldexp(jnp.float32(1), -jnp.clip(exponent, -120, 120))


def inverse_norm(square: jax.Array, usable: jax.Array | None = None) -> jax.Array:
    """1 / norm from squared norms, and 0 for zero kernels, so that their similarity is 0.

    NaN for kernels that are not `usable`, bool (kernels,).
    """
    inverse = jnp.where(square > 0, 1 / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return inverse if usable is None else jnp.where(usable, inverse, jnp.nan)


def mix(kernel: jax.Array, other: jax.Array, alpha: jax.Array) -> jax.Array:
    """`alpha * kernel + (1 - alpha) * other`, computed in float32, in the kernel's dtype."""
    mixed = alpha * kernel.astype(jnp.float32) + (1 - alpha) * other.astype(jnp.float32)
    return mixed.astype(kernel.dtype)


def most_similar(
    product: jax.Array, inverse: jax.Array, inverse_others: jax.Array, itself: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The most similar column to each row, and that similarity, from inner products.

    Args:
      product: float32 (rows, columns), inner products.
      inverse: float32 (rows,), the rows' inverse norms.
      inverse_others: float32 (columns,), the columns'.
      itself: bool (rows, columns), the pairs that don't count.

    Returns:
      int32 (rows,) and float32 (rows,), `NOT_COMPARED` where every similarity is NaN or doesn't
      count.
    """
    similarity = product * inverse[:, None] * inverse_others[None]
    similarity = jnp.where(itself | jnp.isnan(similarity), NOT_COMPARED, similarity)
    nearest = jnp.argmax(similarity, axis=1).astype(jnp.int32)
    return nearest, jnp.minimum(jnp.max(similarity, axis=1), 1)


def pair_similarity(
    weight: jax.Array,
    partner: jax.Array,
    selected: jax.Array,
    usable: jax.Array | None = None,
) -> jax.Array:
    """Cosine similarity of each selected kernel with its partner.

    Args:
      weight: any floating dtype; its last axis indexes kernels.
      partner: int32 (kernels,), each kernel's partner.
      selected: bool (kernels,), the kernels whose similarity is needed.
      usable: bool (kernels,), the kernels that can merge; None for all.

    Returns:
      float32 (kernels,): at most 1; 0 where either kernel is zero; `NOT_COMPARED` where either
      holds a NaN or an infinity or is not usable, and for kernels that aren't selected.
    """
    flat, matrix = weight.reshape(-1), weight.reshape(-1, weight.shape[-1])
    rows, count = matrix.shape
    scale = scales(weight)

    def group(place: Any, kernels: jax.Array, found: jax.Array) -> Any:
        size = len(kernels)
        others = partner[kernels]
        pairs = jnp.concatenate([kernels, others])

        def add(start: Any, height: int, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            # Summed over the rows only at the end: a gather that is fused into a reduction runs
            # many times slower. Squares of all columns cost less than of those gathered.
            squares, products = sums
            w = lax.dynamic_slice_in_dim(matrix, start, height).astype(jnp.float32) * scale[None]
            x = _take_columns(flat, start, height, count, pairs).astype(jnp.float32)
            return squares + w * w, products + x[:, :size] * scale[kernels][None] * x[:, size:]

        def add_unrolled(b: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            for u in range(_UNROLL):
                sums = add((b * _UNROLL + u) * _ROWS, _ROWS, sums)
            return sums

        def zeros(height: int) -> tuple[jax.Array, ...]:
            return jnp.zeros((height, count), jnp.float32), jnp.zeros((height, size), jnp.float32)

        blocks, rest = divmod(rows, _ROWS * _UNROLL)
        sums = lax.fori_loop(0, blocks, add_unrolled, zeros(_ROWS)) if blocks else zeros(1)
        square, product = (jnp.sum(s, 0) for s in sums)
        if rest:
            tail = add(jnp.int32(rows - rest), rest, zeros(rest))
            square, product = square + jnp.sum(tail[0], 0), product + jnp.sum(tail[1], 0)
        inverse = inverse_norm(square, usable)
        similarity = jnp.minimum(product * inverse[kernels] * (inverse * scale)[others], 1)
        similarity = jnp.where(jnp.isnan(similarity), NOT_COMPARED, similarity)
        return found.at[place].set(similarity, mode="drop")

    return _for_selected(selected, group, jnp.full(count, NOT_COMPARED, jnp.float32))


def nearest_partner(
    weight: jax.Array, selected: jax.Array, usable: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Each selected kernel's most similar other kernel, and their cosine similarity.

    Args:
      weight: any floating dtype; its last axis indexes kernels.
      selected: bool (kernels,), the kernels whose partner is needed.
      usable: bool (kernels,), the kernels that can merge; None for all.

    Returns:
      int32 (kernels,) and float32 (kernels,). A kernel that holds a NaN or an infinity or is not
      usable is nobody's partner and has similarity `NOT_COMPARED` itself, and so have kernels that
      aren't selected.
    """
    blocks = _blocks(weight)
    taps, height, count = blocks.shape
    flat, everyone = weight.reshape(-1), jnp.arange(count, dtype=jnp.int32)
    scale = scales(weight)
    inverse = inverse_norm(
        jnp.sum(jnp.square(blocks.astype(jnp.float32) * scale[None, None]), (0, 1)), usable
    )

    def group(place: Any, kernels: jax.Array, found: tuple[jax.Array, ...]) -> Any:
        def add(tap: Any, product: jax.Array) -> jax.Array:
            mine = _take_columns(flat, tap * height, height, count, kernels).astype(jnp.float32)
            return product + lax.dot_general(
                lax.optimization_barrier(mine * scale[kernels][None]),
                blocks[tap].astype(jnp.float32),
                (((0,), (0,)), ((), ())),
                precision=lax.Precision.HIGHEST,
            )

        product = lax.fori_loop(0, taps, add, jnp.zeros((len(kernels), count), jnp.float32))
        itself = kernels[:, None] == everyone[None]
        nearest, similarity = most_similar(product, inverse[kernels], inverse * scale, itself)
        return (
            found[0].at[place].set(nearest, mode="drop"),
            found[1].at[place].set(similarity, mode="drop"),
        )

    nothing = jnp.zeros(count, jnp.int32), jnp.full(count, NOT_COMPARED, jnp.float32)
    return _for_selected(selected, group, nothing)


@jax.custom_jvp
def mix_pairs(
    weight: jax.Array, partner: jax.Array, chosen: jax.Array, alpha: jax.Array
) -> jax.Array:
    r"""Replaces each chosen kernel by :math:`\alpha K_i + (1 - \alpha) K_j`.

    Args:
      weight: any floating dtype; its last axis indexes kernels.
      partner: int32 (kernels,), the j of each kernel i.
      chosen: bool (kernels,); the other kernels come back bit for bit.
      alpha: float32 (), the fraction that is kept.

    Up to a few kernels are written one by one, which leaves the other columns unread; more of them
    in one pass over the weight. Each is a loop that runs no iteration where it is not needed: a
    conditional would copy the weight.
    """
    count = weight.shape[-1]
    few = min(_FEW, count)
    total = jnp.sum(chosen, dtype=jnp.int32)
    order = _chosen_first(chosen)
    matrix = weight.reshape(-1, count)

    def read(m: Any, mixed: jax.Array) -> jax.Array:
        i = order[m]
        kernel, other = (
            lax.dynamic_slice_in_dim(matrix, k, 1, axis=1)[:, 0] for k in (i, partner[i])
        )
        return lax.dynamic_update_slice_in_dim(mixed, mix(kernel, other, alpha)[None], m, axis=0)

    def write(m: Any, matrix: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(matrix, mixed[m][:, None], order[m], axis=1)

    singly = jnp.where(total <= few, total, 0)
    mixed = lax.fori_loop(0, singly, read, jnp.zeros((few, len(matrix)), weight.dtype))
    blocks = lax.fori_loop(0, singly, write, matrix).reshape(_blocks(weight).shape)
    taps, height, _ = blocks.shape

    def pass_over(tap: Any, blocks: jax.Array) -> jax.Array:
        block = blocks[tap]
        other = _take_columns(block.reshape(-1), jnp.int32(0), height, count, partner)
        return blocks.at[tap].set(jnp.where(chosen[None], mix(block, other, alpha), block))

    blocks = lax.fori_loop(0, jnp.where(total > few, taps, 0), pass_over, blocks)
    return blocks.reshape(weight.shape)


@mix_pairs.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Loops of unknown length have no reverse mode, so the derivative is that of one expression."""

    def whole(
        weight: jax.Array, partner: jax.Array, chosen: jax.Array, alpha: jax.Array
    ) -> jax.Array:
        other = weight.at[..., partner].get(mode="promise_in_bounds")
        return jnp.where(
            jnp.expand_dims(chosen, tuple(range(weight.ndim - 1))),
            mix(weight, other, alpha),
            weight,
        )

    return mix_pairs(*primals), jax.jvp(whole, primals, tangents)[1]


def _for_selected(selected: jax.Array, group: Any, found: Any) -> Any:
    """Folds `group(place, kernels, found)` over the selected kernels, some at a time.

    A group holds 11/32 of a wide layer's kernels, so that at the method's usual probability of 0.3
    one is nearly always enough. `kernels` int32 (size,) are its kernels, with any others to fill
    it; `place` int32 (size,) is where their results belong, out of range for those that fill.
    """
    count = len(selected)
    size = min(count, -(-count * 11 // 512) * 16)
    total = jnp.sum(selected, dtype=jnp.int32)
    order = jnp.pad(_chosen_first(selected), (0, -count % size))

    def step(g: Any, found: Any) -> Any:
        kernels = lax.dynamic_slice_in_dim(order, g * size, size)
        real = g * size + jnp.arange(size, dtype=jnp.int32) < total
        return group(jnp.where(real, kernels, count), kernels, found)

    return lax.fori_loop(0, (total + size - 1) // size, step, found)


def _chosen_first(chosen: jax.Array) -> jax.Array:
    """All indices, int32, those of the chosen first; each part in ascending order."""
    count = len(chosen)
    index = jnp.arange(count, dtype=jnp.int32)
    # Numbers sort many times faster than pairs of a key and an index.
    return lax.sort(jnp.where(chosen, index, index + count), is_stable=False) % count


def _blocks(weight: jax.Array) -> jax.Array:
    """A weight as (taps, input channels, kernels)."""
    return weight.reshape(-1, *weight.shape[-2:])


def _take_columns(
    flat: jax.Array, start: jax.Array, height: int, count: int, columns: jax.Array
) -> jax.Array:
    """`weight[start : start + height, columns]` of a flattened (rows, count) weight.

    One gather from the flat weight with unsigned indices is what XLA's CPU backend fuses best.
    """
    rows = start.astype(jnp.uint32) + jnp.arange(height, dtype=jnp.uint32)
    index = rows[:, None] * jnp.uint32(count) + columns.astype(jnp.uint32)[None]
    one_number = lax.GatherDimensionNumbers(
        offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    return lax.gather(
        flat,
        index[..., None],
        one_number,
        slice_sizes=(1,),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
