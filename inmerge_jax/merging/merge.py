"""In-model merging: interpolates the similar units of one network (arXiv 2502.20516).

This is the reference form: plain operations, for every kind of unit. `backends` has faster forms
for convolution and Dense weights on CPU and TPU, held to this one by tests.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from inmerge_jax.merging import backends
from inmerge_jax.merging.rule import NOT_COMPARED, MergeRule, check_rule, effective_threshold
from inmerge_jax.merging.units import (
    Kernel,
    PyTree,
    as_rows,
    canonical_path,
    from_rows,
    group_units,
    path_name,
)

Implementation = Literal["auto", "reference", "cpu", "tpu"]


class MergeStats(NamedTuple):
    """What one merge did, by layer in the order of the kernels given; arrays of shape (layers,).

    Weights of one group are one layer.

    Attributes:
      kernels: int32, how many units the layer has.
      selected: int32, how many were selected.
      merged: int32, how many were mixed with their partner.
      similarity: float32, mean cosine similarity of the mixed pairs; 0 where none was mixed.
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
    implementation: Implementation = "auto",
) -> tuple[PyTree, MergeStats]:
    r"""Mixes each selected unit with a similar one of its layer.

    .. math:: K_i \leftarrow \alpha K_i + (1 - \alpha) K_j
              \quad\text{if}\quad \frac{k_i \cdot k_j}{\|k_i\| \|k_j\|} > \tau

    for selected :math:`i`, with :math:`k` the flattened unit (arXiv 2502.20516). All reads are from
    the weights as given. Arithmetic is float32 and the result has the weight's dtype; units that
    are not mixed, and all other leaves, come back bit for bit. A zero unit has similarity 0 with
    every other; a unit that holds a NaN or an infinity is never mixed, nor mixed in. A problem with
    one unit is left alone.

    Pure, so it may be used inside `jit`, `vmap`, `pmap`, `shard_map` and `scan`. Under data
    parallelism, give every replica the same key: they then merge alike, without communication.
    Differentiable: the mix is linear in the weights, and which units merge, and the counts, are
    constants to it.

    Example:
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
      params: a tree that holds the kernels' weights, of any floating dtype.
      key: a typed PRNG key, or a seed; a layer's draws are folded from it and the layer's own
        name, so that other layers, and their order, don't change them.
      kernels: which weights to merge, from `find_kernels`, `deep_kernels` or `attention_heads`.
      rule: when and how; its numbers may be traced scalars.
      implementation: "auto" takes the form that suits the platform which the program is compiled
        for; "reference" this module's on every platform; "cpu" the CPU form. "tpu" is "auto", but
        for a Pallas kernel on TPUs from v4 on, which moves a fifth of the bytes. XLA cannot divide
        that kernel among devices: use it in `pmap`, in `shard_map` with `check_vma=False`, or on
        one device; nor does `jax.export` take it for a TPU and other platforms at once.

    Returns:
      The merged tree, and the counts.

    Raises:
      ValueError: no kernels, or one whose path or shape is not that of a leaf of `params`, or whose
        weight is not of a floating dtype; a number of the rule out of range.
    """
    if implementation not in ("auto", "reference", "cpu", "tpu"):
        raise ValueError(
            f"implementation is {implementation!r}; choose auto, reference, cpu or tpu"
        )
    check_rule(rule)
    kernels = tuple(kernels)
    key = jax.random.key(key) if isinstance(key, int) else key
    found, places, (leaves, tree) = locate(kernels, params)
    counts: list[tuple[jax.Array, ...]] = []
    before: Sequence[jax.Array] | None = None
    units = group_units(kernels)
    for members in units:
        if members[0].units < 2:
            counts.append((jnp.int32(0), jnp.int32(0), jnp.float32(0)))
            continue
        selected, partner = draw_pairs(key, members[0], rule)
        weights = [jnp.asarray(found[kernel.name]) for kernel in members]
        weights = backends.sequence_after(weights, before, kernels)
        form = backends.choose(weights, members, implementation, reference=merge_unit)
        merge = _on_explicit_mesh(form, weights)
        before, merged, total = merge(weights, members, selected, partner, rule)
        for kernel, weight in zip(members, before, strict=True):
            leaves[places[kernel.name]] = weight
        count = jnp.sum(selected, dtype=jnp.int32)
        counts.append((count, merged, total / jnp.maximum(merged, 1).astype(jnp.float32)))
    selected, merged, similarity = (jnp.stack(column) for column in zip(*counts, strict=True))
    total = jnp.array([members[0].count for members in units], jnp.int32)
    return jax.tree.unflatten(tree, leaves), MergeStats(total, selected, merged, similarity)


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
    layer_key = jax.random.fold_in(key, zlib.crc32(kernel.unit.encode()))
    select_key, partner_key = jax.random.split(layer_key)
    selected = jax.random.uniform(select_key, (kernel.count,), jnp.float32) < rule.probability
    if rule.partner == "nearest":
        return selected, None
    other = jax.random.randint(partner_key, (kernel.count,), 0, kernel.units - 1, jnp.int32)
    itself = jnp.arange(kernel.count, dtype=jnp.int32)
    if kernel.problems > 1:
        itself %= kernel.units
    return selected, jnp.where(other >= itself, other + 1, other)


def merge_unit(
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
    shape = members[0].problems, members[0].units
    rows = [as_rows(weight, kernel) for weight, kernel in zip(weights, members, strict=True)]
    # Which units merge is a decision: no gradient goes through it.
    compared = [
        jax.lax.stop_gradient(row)
        for row, kernel in zip(rows, members, strict=True)
        if kernel.compared
    ]
    units = unit_vectors(compared)
    if partner is None:
        partner, similarity = nearest(units)
    else:
        partner = partner.reshape(shape)
        products = [_over_entries(jnp.sum, unit * _take(unit, partner)) for unit in units]
        similarity = functools.reduce(jnp.add, products)
    similarity = jnp.minimum(similarity, 1)
    counts = selected.reshape(shape) & ~jnp.isnan(similarity)
    similarity = jnp.where(counts, similarity, NOT_COMPARED)
    merged = counts & (similarity > effective_threshold(rule.threshold, similarity))
    alpha = jnp.asarray(rule.alpha, jnp.float32)

    def mix(row: jax.Array) -> jax.Array:
        old, other = row.astype(jnp.float32), _take(row, partner).astype(jnp.float32)
        mixed = alpha * old + (1 - alpha) * other
        return jnp.where(_beside(merged, row), mixed.astype(row.dtype), row)

    new = [from_rows(mix(row), kernel) for row, kernel in zip(rows, members, strict=True)]
    total = jnp.sum(jnp.where(merged, similarity, 0))
    return new, jnp.sum(merged, dtype=jnp.int32), total


def unit_vectors(rows: Sequence[jax.Array]) -> list[jax.Array]:
    """The units at length 1, float32, where a unit is what all weights hold of it.

    They are scaled by a power of two first, which is exact, so that no square under- or overflows.
    A zero unit stays zero.

    Args:
      rows: of `as_rows`, each (problems, units, ...).
    """
    floats = [row.astype(jnp.float32) for row in rows]
    largest = [_over_entries(jnp.max, jnp.abs(row)) for row in floats]
    _, exponent = jnp.frexp(functools.reduce(jnp.maximum, largest))
    scaled = [jnp.ldexp(row, -_beside(exponent, row)) for row in floats]
    square = functools.reduce(jnp.add, [_over_entries(jnp.sum, row * row) for row in scaled])
    inverse = jnp.where(square > 0, 1 / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return [row * _beside(inverse, row) for row in scaled]


def cosines(units: Sequence[jax.Array]) -> jax.Array:
    """The cosines of all pairs of each problem, float32 (problems, units, units).

    Args:
      units: of `unit_vectors`.
    """

    def products(unit: jax.Array) -> jax.Array:
        entries = tuple(range(2, unit.ndim))
        dimensions = ((entries, entries), ((0,), (0,)))
        return jax.lax.dot_general(unit, unit, dimensions, precision=jax.lax.Precision.HIGHEST)

    return functools.reduce(jnp.add, map(products, units))


def nearest(units: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Each unit's most similar other unit in its problem, int32, and their similarity, float32."""
    cosine = cosines(units)
    itself = jnp.eye(cosine.shape[-1], dtype=bool)[None]
    cosine = jnp.where(itself | jnp.isnan(cosine), NOT_COMPARED, cosine)
    return jnp.argmax(cosine, -1).astype(jnp.int32), jnp.max(cosine, -1)


def _over_entries(reduce: Any, rows: jax.Array) -> jax.Array:
    """Reduces (problems, units, ...) to (problems, units)."""
    return reduce(rows, tuple(range(2, rows.ndim)))


def _beside(values: jax.Array, rows: jax.Array) -> jax.Array:
    """Values (problems, units) in a shape that broadcasts with the rows."""
    return jnp.expand_dims(values, tuple(range(2, rows.ndim)))


def _take(rows: jax.Array, partner: jax.Array) -> jax.Array:
    """The rows with each unit's place taken by its partner."""
    index = _beside(partner, rows)
    return jnp.take_along_axis(rows, index, 1, mode="promise_in_bounds")


def _on_explicit_mesh(form: Any, weights: Sequence[jax.Array]) -> Any:
    """`form`, whose weights keep their shardings where these are explicit.

    Inside, XLA propagates shardings as it does over automatic axes: a transposition or a gather
    of explicitly sharded arrays would have to say how its result is sharded.
    """
    shardings = [jax.typeof(weight).sharding for weight in weights]
    explicit = jax.sharding.AxisType.Explicit
    meshes = [s.mesh for s in shardings if not s.mesh.empty and explicit in s.mesh.axis_types]
    if not meshes:
        return form

    def merge(weights: Any, members: Any, selected: Any, partner: Any, rule: MergeRule) -> Any:
        whole = jax.sharding.NamedSharding(meshes[0], jax.sharding.PartitionSpec())
        call = jax.sharding.auto_axes(
            lambda weights, selected, partner, rule: form(
                weights, members, selected, partner, rule
            ),
            out_sharding=(list(shardings), whole, whole),
        )
        return call(list(weights), selected, partner, rule)

    return merge


def locate(
    kernels: Sequence[Kernel], tree: PyTree, what: str = "params"
) -> tuple[dict[str, Any], dict[str, int], tuple[list[Any], Any]]:
    """The leaves of the kernels, matched by their canonical names.

    Args:
      kernels: of the tree, or of one with the same names, such as a Flax NNX module and its state.
      tree: params or updates; leaves of other kernels may be anything, None too.
      what: it is called in errors.

    Returns:
      The kernels' leaves by name; their places among all leaves; and all leaves with the structure.

    Raises:
      ValueError: a kernel that is not there, or whose leaf has another shape or no floating dtype.
    """
    group_units(kernels)
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    position: dict[str, int] = {}
    twice: set[str] = set()
    for place, (path, _) in enumerate(flat):
        name = path_name(canonical_path(path))
        if position.setdefault(name, place) != place:
            twice.add(name)
    leaves = [leaf for _, leaf in flat]
    found = {}
    for kernel in kernels:
        if kernel.name in twice:
            raise ValueError(
                f"kernel {kernel.name!r} is the name of two leaves of {what}; rename one of them"
            )
        leaf = leaves[position[kernel.name]] if kernel.name in position else None
        if leaf is None:
            names = ", ".join(list(position)[:3])
            raise ValueError(
                f"kernel {kernel.name!r} is not in {what}, whose {len(leaves)} leaves begin with "
                f"{names}; give the same tree as to find_kernels, and no kernels that optax.masked "
                "or optax.partition hides"
            )
        if tuple(leaf.shape) != kernel.shape:
            raise ValueError(
                f"kernel {kernel.name!r} was found with shape {kernel.shape} but has "
                f"{tuple(leaf.shape)} in {what}; find the kernels of this network again"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"kernel {kernel.name!r} has dtype {leaf.dtype}; only floating-point weights can "
                "be mixed, so merge before quantising, or leave it out of kernels"
            )
        found[kernel.name] = leaf
    return found, {kernel.name: position[kernel.name] for kernel in kernels}, (leaves, structure)
