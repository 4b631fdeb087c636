"""In-model merging: interpolates the similar units of one network (arXiv 2502.20516).

`merge_layer` is the reference form: plain operations, for every kind of unit, on every platform.
`backends` has faster forms of this one function, held to it by tests.
"""

import functools
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from inmerge_jax.merging import backends
from inmerge_jax.merging.rule import NOT_COMPARED, MergeRule, check_rule, effective_threshold
from inmerge_jax.merging.units import (
    Kernel,
    PyTree,
    as_kernels,
    as_rows,
    from_rows,
    group_weights,
    weights_of,
)


class MergeStats(NamedTuple):
    """Counts of a merge: arrays of shape (layers,), in the order given. A group is one layer.

    Attributes:
      kernels: Number of units, int32.
      selected: Number of selected units, int32.
      merged: Number of units that were mixed with their partner, int32.
      similarity: Mean cosine similarity of the mixed pairs, float32; 0 if there are none.
    """

    kernels: jax.Array
    selected: jax.Array
    merged: jax.Array
    similarity: jax.Array


def merge_kernels(
    params: PyTree,
    key: jax.Array | int,
    kernels: Sequence[Kernel],
    rule: MergeRule,
    *,
    implementation: backends.Implementation = "auto",
) -> tuple[PyTree, MergeStats]:
    """Mixes each selected unit with a similar one of its layer.

        K_i <- alpha K_i + (1 - alpha) K_j    if k_i . k_j / (|k_i| |k_j|) > threshold

    for selected `i`, where `k` is the flattened unit (arXiv 2502.20516).

    - All units of a layer are mixed simultaneously: reads are from the weights as given.
    - Similarities are float32. Units are mixed in float32, of float64 weights in float64, and the
      result has the dtype of the weight.
    - Units that are not mixed, and all other leaves, are returned bit for bit.
    - A zero unit has similarity 0 with every other. A unit with a NaN or an infinity in any of its
      weights is never mixed, nor is it a partner. A problem with one unit is left alone.
    - The function is pure and works inside `jit`, `vmap`, `pmap`, `shard_map` and `scan`. In data
      parallelism, give every replica the same key: they merge alike without communication.
    - It is differentiable in the weights and alpha. Which units merge, and the counts, are
      constants.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from inmerge_jax import Kernel
      >>> w = jnp.array([[1.0, 1.0], [0.0, 1.0]])       # two kernels, w[:, 0] and w[:, 1]
      >>> kernel = Kernel((jax.tree_util.DictKey("w"),), shape=(2, 2), out_axis=1)
      >>> rule = MergeRule(probability=1.0, threshold=0.5, alpha=0.75)
      >>> params, stats = merge_kernels({"w": w}, jax.random.key(0), [kernel], rule)
      >>> print(params["w"])
      [[1.   1.  ]
       [0.25 0.75]]
      >>> print(stats.merged)
      [2]

    Args:
      params: A parameter tree with the weights of the kernels, of any floating dtype.
      key: A PRNG key, or a seed. The draws of a layer are folded from it and from the name of the
        layer, so other layers and their order do not change them. With `vmap` over networks, give
        each its own key: with one key all select the same units.
      kernels: Weights to merge, from `find_kernels`, `deep_kernels` or `attention_heads`.
      rule: The rule. Its numbers may be traced scalars.
      implementation: `"auto"` chooses the form for the platform that the program is compiled for.
        `"reference"` is the plain form, `"cpu"` the CPU form. `"tpu"` is `"auto"` with a Pallas
        kernel on TPUs from v4 on. XLA cannot divide that kernel among devices: use it in `pmap`, in
        `shard_map` with `check_vma=False`, or on one device; `jax.export` accepts it for TPU only.

    Returns:
      The merged tree, and the counts.

    Raises:
      ValueError: No kernels; a kernel whose path or shape is not that of a leaf of `params`, or
        whose weight is not of a floating dtype; a number of the rule out of range, unless it is
        traced; no key.
    """
    backends.check_implementation(implementation)
    check_rule(rule)
    kernels = as_kernels(kernels)
    key, layers = as_key(key), group_weights(kernels)
    weights, put = weights_of(kernels, params)
    counts: list[tuple[Any, ...]] = []
    previous = None
    for members in layers:
        if members[0].units < 2:
            counts.append((members[0].count, jnp.int32(0), jnp.int32(0), jnp.float32(0)))
            continue
        selected, partner = draw_pairs(key, members[0], rule)
        given = [jnp.asarray(weights[kernel.name]) for kernel in members]
        given = backends.sequence_after(given, previous, kernels)
        form = backends.choose(given, members, implementation, reference=merge_layer)
        previous, merged, total = form(given, members, selected, partner, rule)
        weights |= {kernel.name: w for kernel, w in zip(members, previous, strict=True)}
        drawn = jnp.sum(selected, dtype=jnp.int32)
        mean = total / jnp.maximum(merged, 1).astype(jnp.float32)
        counts.append((members[0].count, drawn, merged, mean))
    units, *columns = zip(*counts, strict=True)
    return put(weights), MergeStats(jnp.array(units, jnp.int32), *map(jnp.stack, columns))


def as_key(key: jax.Array | int) -> jax.Array:
    """The key, or that of a seed, an integer of any kind.

    Raises:
      ValueError: `key` is neither, or several keys.
    """
    if isinstance(key, int) and -(2**63) <= key < 2**63:
        return jax.random.key(key)
    if isinstance(key, jax.Array | np.ndarray | np.generic):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and not key.shape:
            return key
        data = jax.eval_shape(jax.random.PRNGKey, 0)
        if (key.shape, key.dtype) == (data.shape, data.dtype):
            return jnp.asarray(key)  # The data of a key, which `jax.random.PRNGKey` gives.
        if jnp.issubdtype(key.dtype, jnp.integer) and not key.shape:
            return jax.random.key(key)
        given = f"of shape {key.shape} and dtype {key.dtype}"
    else:
        given = f"{key!r:.80}"
    raise ValueError(f"key is {given}; give one PRNG key, such as jax.random.key(0), or a seed")


def draw_pairs(
    key: jax.Array, kernel: Kernel, rule: MergeRule
) -> tuple[jax.Array, jax.Array | None]:
    """What `merge_kernels` draws for one layer, so that another implementation can use the same.

    Args:
      key: the key given to `merge_kernels`; the layer's own is folded from it.
      kernel: the layer, of two units or more in each problem; any weight of a group.
      rule: its probability and its partner.

    Returns:
      Which units are selected, bool (count,), problem after problem; and their random partners,
      int32 (count,), numbers within the problem. None for the partners where the rule takes the
      nearest, which is no draw.
    """
    # crc32, since Python's hash of a string differs from one process to the next.
    layer_key = jax.random.fold_in(key, zlib.crc32(kernel.label.encode()))
    select_key, partner_key = jax.random.split(layer_key)
    selected = jax.random.uniform(select_key, (kernel.count,), jnp.float32) < rule.probability
    if rule.partner == "nearest":
        return selected, None
    other = jax.random.randint(partner_key, (kernel.count,), 0, kernel.units - 1, jnp.int32)
    itself = jnp.arange(kernel.count, dtype=jnp.int32)
    if kernel.problems > 1:
        itself %= kernel.units
    return selected, jnp.where(other >= itself, other + 1, other)


def merge_layer(
    weights: Sequence[jax.Array],
    members: Sequence[Kernel],
    selected: jax.Array,
    partner: jax.Array | None,
    rule: MergeRule,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Merges one layer: a weight, or the weights of one group.

    Args:
      weights: of any floating dtype.
      members: where the units are in them.
      selected: bool (count,), of `draw_pairs`.
      partner: int32 (count,), or None for the nearest.
      rule: its threshold and alpha.

    Returns:
      The merged weights; how many units were mixed, int32; and the sum of their similarities.
    """

    def merge(rows: list[jax.Array], selected: jax.Array, partner: jax.Array | None) -> Any:
        """Merges one problem; rows are (units, ...)."""
        # Which units merge is a decision: no gradient goes through it.
        compared = [row for row, k in zip(rows, members, strict=True) if k.compared]
        vectors = unit_vectors(jax.lax.stop_gradient(compared))
        for row, kernel in zip(rows, members, strict=True):
            if not kernel.compared:
                # A unit with a NaN or an infinity has no similarity.
                finite = jnp.all(jnp.isfinite(row), tuple(range(1, row.ndim)))
                vectors = [jnp.where(_beside(finite, v), v, jnp.nan) for v in vectors]
        if partner is None:
            partner, similarity = nearest(cosines(vectors))
        else:
            similarity = _total([_sums(v * _take(v, partner)) for v in vectors])
        similarity = jnp.minimum(similarity, 1)
        counts = selected & ~jnp.isnan(similarity)
        similarity = jnp.where(counts, similarity, NOT_COMPARED)
        merged = counts & (similarity > effective_threshold(rule.threshold, similarity))

        def mix(row: jax.Array) -> jax.Array:
            wide = jnp.float64 if row.dtype == jnp.float64 else jnp.float32
            kept, other = row.astype(wide), _take(row, partner).astype(wide)
            alpha = jnp.asarray(rule.alpha, wide)
            mixed = (alpha * kept + (1 - alpha) * other).astype(row.dtype)
            return jnp.where(_beside(merged, row), mixed, row)

        return [mix(row) for row in rows], merged, jnp.where(merged, similarity, 0)

    rows = [as_rows(weight, kernel) for weight, kernel in zip(weights, members, strict=True)]
    shape = members[0].problems, members[0].units
    partner = None if partner is None else partner.reshape(shape)
    rows, merged, similarity = jax.vmap(merge)(rows, selected.reshape(shape), partner)
    new = [from_rows(row, kernel) for row, kernel in zip(rows, members, strict=True)]
    return new, jnp.sum(merged, dtype=jnp.int32), jnp.sum(similarity)


def unit_vectors(rows: Sequence[jax.Array]) -> list[jax.Array]:
    """The units of one problem at length 1, float32, from what each weight holds, (units, ...).

    They are scaled by a power of two first, which is exact, so that no square under- or overflows.
    A zero unit stays zero.
    """
    floats = [row.astype(jnp.float32) for row in rows]
    largest = [jnp.max(jnp.abs(row), tuple(range(1, row.ndim))) for row in floats]
    _, exponent = jnp.frexp(functools.reduce(jnp.maximum, largest))
    # A product per entry takes half as long as ldexp. 2 ** 127 is the largest power of two.
    scale = jnp.ldexp(jnp.float32(1), -jnp.clip(exponent, -120, 120))
    scaled = [row * _beside(scale, row) for row in floats]
    square = _total([_sums(row * row) for row in scaled])
    inverse = jnp.where(square > 0, 1 / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return [row * _beside(inverse, row) for row in scaled]


def cosines(vectors: Sequence[jax.Array]) -> jax.Array:
    """The cosines of all pairs, float32 (units, units), of `unit_vectors`."""

    def products(vector: jax.Array) -> jax.Array:
        entries = tuple(range(1, vector.ndim))
        return jnp.tensordot(vector, vector, (entries, entries), precision="highest")

    return _total(map(products, vectors))


def nearest(cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each unit's most similar other unit, int32 (units,), and their similarity, float32."""
    itself = jnp.eye(len(cosine), dtype=bool)
    cosine = jnp.where(itself | jnp.isnan(cosine), NOT_COMPARED, cosine)
    return jnp.argmax(cosine, -1).astype(jnp.int32), jnp.max(cosine, -1)


def _total(arrays: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, arrays)


def _sums(rows: jax.Array) -> jax.Array:
    """The sum over each unit's entries, (units,)."""
    return jnp.sum(rows, tuple(range(1, rows.ndim)))


def _beside(values: jax.Array, rows: jax.Array) -> jax.Array:
    """Values (units,) in a shape that broadcasts with the rows."""
    return jnp.expand_dims(values, tuple(range(1, rows.ndim)))


def _take(rows: jax.Array, partner: jax.Array) -> jax.Array:
    """The rows with each unit's place taken by its partner."""
    return rows.at[partner].get(mode="promise_in_bounds")
