"""The merge of a layer as one Pallas kernel for TPU, which reads and writes the weight once.

The weight goes to the chip's fast memory as it lies in main memory, as rows (taps * inputs) by
kernels, is compared and mixed there in tiles of 128 rows by 128 kernels, and goes back. XLA's own
operations (`tpu.py`) make eleven passes or more. Against these it saves 12 % of the bytes that a
ResNet-18's step at 28 px moves and 1.5 % of a VGG19's at 224 px (docs/tpu.md, counted by the
compiler, not timed).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from inmerge_jax.merging.backends import tpu
from inmerge_jax.merging.rule import MergeRule, Quantile
from inmerge_jax.merging.units import Kernel

_LANES = 128
_SUBLANES = 8
_ROWS = 128
_PRODUCT_ROWS = 256
# A TPU's compiler gives an operation 16 MiB of fast memory unless told otherwise; told for one, XLA
# keeps fewer activations there in the rest of the step.
_FAST_MEMORY = 12 * 2**20


def fits(weight: jax.Array, axis: int) -> bool:
    """Whether `merge` takes it: kernels last, in whole tiles, and in fast memory.

    That is, at most 12 MiB with 128 of its rows twice and 13 numbers for each kernel. Fewer than
    128 kernels would be filled up to 128, at main memory's expense. With jax_enable_x64 no weight
    fits: TPU's kernels have no 64-bit numbers.
    """
    count = weight.shape[axis]
    rows = weight.size // count
    held = (rows + math.gcd(rows, _ROWS)) * count * weight.dtype.itemsize
    held += (_SUBLANES + 5) * 4 * count  # The inverse norms, and what is known of each kernel.
    return (
        weight.ndim > 1
        and axis == weight.ndim - 1
        and weight.dtype in (jnp.float32, jnp.bfloat16)
        and count % _LANES == 0
        and rows % (2 * _SUBLANES) == 0
        and held <= _FAST_MEMORY
        and jax.dtypes.canonicalize_dtype(np.int64) == np.int32
    )


def merge(
    weights: Sequence[jax.Array],
    members: Sequence[Kernel],
    selected: jax.Array,
    partner: jax.Array | None,
    rule: MergeRule,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """As `merge.merge_layer`, for one weight that `fits`, to the rounding of similarities."""
    del members
    (weight,) = weights
    threshold = rule.threshold
    is_quantile = isinstance(threshold, Quantile)
    number = jnp.asarray(
        threshold.share if isinstance(threshold, Quantile) else threshold, jnp.float32
    )
    alpha = jnp.asarray(rule.alpha, jnp.float32)
    weight, similarity, chosen, _ = _merge(is_quantile, weight, alpha, selected, partner, number)
    total = jnp.sum(jnp.where(chosen, lax.stop_gradient(similarity), 0))
    return [weight], jnp.sum(chosen, dtype=jnp.int32), total


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _merge(
    quantile: bool,
    weight: jax.Array,
    alpha: jax.Array,
    selected: jax.Array,
    partner: jax.Array | None,
    threshold: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The merged weight; each kernel's similarity, whether it was mixed, and with which other."""
    # A batch of weights goes through one after the other.
    call = jax.custom_batching.sequential_vmap(functools.partial(_call, quantile))
    return call(weight, alpha, selected, partner, threshold)


@_merge.defjvp
def _(quantile: bool, primals: Any, tangents: Any) -> Any:
    merged, similarity, chosen, partner = _merge(quantile, *primals)

    def mix(weight: jax.Array, alpha: jax.Array) -> jax.Array:
        rows = tpu.mix_pairs(jnp.moveaxis(weight, -1, 0), partner, chosen, alpha)
        return jnp.moveaxis(rows, 0, -1)

    moved = jax.jvp(mix, primals[:2], tangents[:2])[1]
    none = [np.zeros(counts.shape, jax.dtypes.float0) for counts in (chosen, partner)]
    outputs = merged, similarity, chosen, partner
    return outputs, (moved, jnp.zeros_like(similarity), *none)


@functools.partial(jax.jit, static_argnums=0)
def _call(
    quantile: bool,
    weight: jax.Array,
    alpha: jax.Array,
    selected: jax.Array,
    partner: jax.Array | None,
    threshold: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    count = weight.shape[-1]
    matrix = weight.reshape(-1, count)
    main, fast = pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=pltpu.VMEM)
    given = [] if partner is None else [partner[None]]
    products = matrix.size * (count if partner is None else 1)
    merged, similarity, chosen, partner = pl.pallas_call(
        functools.partial(_kernel, quantile=quantile),
        out_shape=(
            pltpu.HBM(matrix.shape, matrix.dtype),
            jax.ShapeDtypeStruct((1, count), jnp.float32),
            jax.ShapeDtypeStruct((1, count), jnp.int32),
            jax.ShapeDtypeStruct((1, count), jnp.int32),
        ),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            main,
            fast,
            *[fast] * len(given),
        ],
        out_specs=(main, fast, fast, fast),
        scratch_shapes=[
            pltpu.VMEM(matrix.shape, matrix.dtype),
            pltpu.VMEM((math.gcd(len(matrix), _ROWS), count), matrix.dtype),
            pltpu.VMEM((_SUBLANES, count), jnp.float32),
        ],
        input_output_aliases={1: 0},
        # Counted by hand, since XLA doesn't look into a kernel: squares, products, two for a mix.
        cost_estimate=pl.CostEstimate(
            flops=2 * (matrix.size + products) + 3 * matrix.size,
            transcendentals=count,
            bytes_accessed=2 * matrix.size * matrix.dtype.itemsize + 4 * (4 + len(given)) * count,
        ),
        name="merge_layer",
    )(jnp.stack([threshold, alpha]), matrix, selected.astype(jnp.int32)[None], *given)
    return merged.reshape(weight.shape), similarity[0], chosen[0] > 0, partner[0]


def _kernel(numbers: Any, source: Any, selected: Any, *refs: Any, quantile: bool) -> None:
    """Merges one layer; `numbers` are the threshold, or the quantile's share, and alpha."""
    *given, target, similarity, chosen, partner, weight, mixed, inverse = refs
    pltpu.sync_copy(source, weight)
    _norms(weight, inverse)
    if given:
        partner[...] = given[0][...]
        _compare_with_given(weight, inverse, partner, similarity)
    else:
        _compare_with_all(weight, inverse, partner, similarity)
    similarity[...] = jnp.where(selected[...] > 0, similarity[...], -jnp.inf)
    _decide(similarity, numbers[0], quantile, chosen)
    _mix(weight, partner, chosen, numbers[1], mixed)
    pltpu.sync_copy(weight, target)


def _norms(weight: Any, inverse: Any) -> None:
    """Writes 1 / norm of each kernel, 0 for a zero kernel, into every row of `inverse`."""

    def group(g: Any, lanes: pl.Slice) -> None:
        def add(rows: pl.Slice, total: jax.Array) -> jax.Array:
            tile = weight[rows, lanes].astype(jnp.float32)
            return total + jnp.sum(tile * tile, 0, keepdims=True)

        square = _over_rows(weight, _ROWS, add, jnp.zeros((1, _LANES), jnp.float32))
        norm = jnp.where(square > 0, 1 / jnp.sqrt(square), 0)
        inverse[:, lanes] = jnp.broadcast_to(norm, (_SUBLANES, _LANES))

    _over_kernels(weight, group)


def _compare_with_given(weight: Any, inverse: Any, partner: Any, similarity: Any) -> None:
    """Writes each kernel's cosine similarity with its partner."""

    def group(g: Any, lanes: pl.Slice) -> None:
        def add(rows: pl.Slice, total: jax.Array) -> jax.Array:
            tile = weight[rows, lanes].astype(jnp.float32)
            other = _partners(weight, rows, partner, lanes)
            return total + jnp.sum(tile * other, 0, keepdims=True)

        product = _over_rows(weight, _ROWS, add, jnp.zeros((1, _LANES), jnp.float32))
        norms = inverse[:, lanes] * _partners(inverse, pl.Slice(0, _SUBLANES), partner, lanes)
        similarity[:, lanes] = jnp.minimum(product * norms[0:1], 1)

    _over_kernels(weight, group)


def _compare_with_all(weight: Any, inverse: Any, partner: Any, similarity: Any) -> None:
    """Writes each kernel's most similar other kernel, and their cosine similarity."""

    def group(g: Any, lanes: pl.Slice) -> None:
        row = lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), 0)
        column = lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), 1)

        def compare(h: Any, others: pl.Slice, best: tuple[jax.Array, jax.Array]) -> Any:
            def add(rows: pl.Slice, total: jax.Array) -> jax.Array:
                return total + lax.dot_general(
                    weight[rows, others].astype(jnp.float32),
                    weight[rows, lanes].astype(jnp.float32),
                    (((0,), (0,)), ((), ())),
                    precision=lax.Precision.HIGHEST,
                )

            zeros = jnp.zeros((_LANES, _LANES), jnp.float32)
            cosine = _over_rows(weight, _PRODUCT_ROWS, add, zeros)
            cosine *= _upright(inverse, others) * inverse[0:1, lanes]
            itself = (row == column) & (g == h)
            cosine = jnp.where(itself | (cosine != cosine), -jnp.inf, cosine)
            highest = jnp.max(cosine, 0, keepdims=True)
            first = jnp.min(jnp.where(cosine == highest, row, _LANES), 0, keepdims=True)
            better = highest > best[1]
            return jnp.where(better, h * _LANES + first, best[0]), jnp.maximum(highest, best[1])

        nobody = jnp.zeros((1, _LANES), jnp.int32), jnp.full((1, _LANES), -jnp.inf, jnp.float32)
        partner[:, lanes], highest = _over_kernels(weight, compare, nobody)
        similarity[:, lanes] = jnp.minimum(highest, 1)

    _over_kernels(weight, group)


def _decide(similarity: Any, threshold: Any, quantile: bool, chosen: Any) -> None:
    """Writes which kernels merge.

    The upper share of a layer, without a sort: those with at least `stay` finite similarities below
    their own. `rule.py` says why a tolerance is subtracted.
    """

    def group(g: Any, lanes: pl.Slice) -> None:
        mine = similarity[:, lanes]
        if not quantile:
            chosen[:, lanes] = (mine > threshold).astype(jnp.int32)
            return

        def count(h: Any, others: pl.Slice, totals: tuple[jax.Array, jax.Array]) -> Any:
            other = _upright(similarity, others)
            finite = jnp.abs(other) < jnp.inf
            new = (jnp.where(which, 1.0, 0.0) for which in (finite & (other < mine), finite))
            return tuple(t + jnp.sum(n, 0, keepdims=True) for t, n in zip(totals, new, strict=True))

        none = jnp.zeros((1, _LANES), jnp.float32)
        below, compared = _over_kernels(similarity, count, (none, none))
        exact = threshold * compared
        stay = jnp.ceil(exact - 1e-4 - 2e-7 * exact)
        chosen[:, lanes] = ((below >= stay) & (jnp.abs(mine) < jnp.inf)).astype(jnp.int32)

    _over_kernels(similarity, group)


def _mix(weight: Any, partner: Any, chosen: Any, alpha: Any, mixed: Any) -> None:
    """Mixes the chosen kernels with their partners, in place; `mixed` holds some rows meanwhile."""

    def some_rows(rows: pl.Slice, _: Any) -> None:
        def group(g: Any, lanes: pl.Slice) -> None:
            tile = weight[rows, lanes]
            mixed[:, lanes] = tile

            @pl.when(jnp.max(chosen[:, lanes].astype(jnp.float32)) > 0)
            def _() -> None:
                other = _partners(weight, rows, partner, lanes)
                new = alpha * tile.astype(jnp.float32) + (1 - alpha) * other
                mixed[:, lanes] = jnp.where(chosen[:, lanes] > 0, new.astype(tile.dtype), tile)

        _over_kernels(weight, group)
        weight[rows, :] = mixed[...]

    _over_rows(weight, _ROWS, some_rows, None)


def _partners(ref: Any, rows: pl.Slice, partner: Any, lanes: pl.Slice) -> jax.Array:
    """`ref[rows, partner[lanes]]` in float32: a TPU picks among 128 lanes, so group by group."""
    index = jnp.broadcast_to(partner[:, lanes], (rows.size, _LANES))

    def pick(h: Any, others: pl.Slice, found: jax.Array) -> jax.Array:
        tile = ref[rows, others].astype(jnp.float32)
        there = jnp.take_along_axis(tile, index & (_LANES - 1), axis=1, mode="promise_in_bounds")
        return jnp.where(index >> (_LANES.bit_length() - 1) == h, there, found)

    # Several at a time hide that a permutation of lanes takes long to come back.
    return _over_kernels(ref, pick, jnp.zeros((rows.size, _LANES), jnp.float32), unroll=4)


def _upright(ref: Any, lanes: pl.Slice) -> jax.Array:
    """(128, 128): row i holds the value of kernel i, from the first row of `ref`."""
    return jnp.transpose(jnp.broadcast_to(ref[0:1, lanes], (_LANES, _LANES)))


def _over_kernels(ref: Any, body: Callable[..., Any], carry: Any = None, unroll: int = 1) -> Any:
    """Folds `body(g, lanes, carry)` over groups of kernels; with no carry, `body(g, lanes)`.

    `unroll` is how many groups at most are in one turn of the loop.
    """
    groups = ref.shape[1] // _LANES
    together = math.gcd(groups, unroll)

    def step(s: Any, carry: Any) -> Any:
        for u in range(together):
            g = s * together + u
            lanes = pl.ds(pl.multiple_of(g * _LANES, _LANES), _LANES)
            carry = body(g, lanes) if carry is None else body(g, lanes, carry)
        return carry

    return lax.fori_loop(0, groups // together, step, carry)


def _over_rows(ref: Any, most: int, body: Callable[..., Any], carry: Any) -> Any:
    """Folds `body(rows, carry)` over groups of rows, of a size that divides `most` and all."""
    size = math.gcd(ref.shape[0], most)

    def step(g: Any, carry: Any) -> Any:
        return body(pl.ds(pl.multiple_of(g * size, size), size), carry)

    return lax.fori_loop(0, ref.shape[0] // size, step, carry)
