"""In-model merging: mixing the similar kernels of one network (arXiv 2502.20516)."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from inmerge_jax.kernels import Kernel, path_name, pure_path
from inmerge_jax.pairs import (
    as_rows_on_tpu,
    in_turn_on_tpu,
    mix_pairs,
    nearest_partner,
    pair_similarity,
)

PARTNERS = ("random", "nearest")
_IN_TURN = 2**20
_T = TypeVar("_T")


def _as_pytree(cls: type[_T]) -> type[_T]:
    """Registers a dataclass whose rebuilt instances are not checked.

    `jax.tree_util.register_dataclass` rebuilds by the constructor, which refuses what a rule can't
    be; but a gradient, a difference or an axis may be any number.
    """
    leaves = [f.name for f in fields(cls) if not f.metadata.get("static")]  # type: ignore[arg-type]
    static = [f.name for f in fields(cls) if f.metadata.get("static")]  # type: ignore[arg-type]

    def flatten(tree: _T) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        keyed = [(jax.tree_util.GetAttrKey(name), getattr(tree, name)) for name in leaves]
        return keyed, tuple(getattr(tree, name) for name in static)

    def unflatten(fixed: tuple[Any, ...], values: Any) -> _T:
        tree = object.__new__(cls)
        for name, value in zip((*leaves, *static), (*values, *fixed), strict=True):
            object.__setattr__(tree, name, value)
        return tree

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


@_as_pytree
@dataclass(frozen=True)
class Quantile:
    """A threshold that every layer sets by its own kernels, see `quantile`."""

    share: float | jax.Array

    def __post_init__(self) -> None:
        _check_range("quantile", self.share, 0, 1)


def quantile(share: float | jax.Array) -> Quantile:
    """A threshold for `MergeRule`: of the pairs that a merge compares in a layer, the share below.

    How alike kernels are depends on the layer, the network and the optimizer, so a fixed threshold
    merges everything here and nothing there. With this one a layer whose merge compares m selected
    kernels with their partners merges the floor((1 - share) m) most similar (fewer where equal
    similarities stand on both sides), so it merges at about the rate probability * (1 - share);
    below that in layers of few kernels, and not at all where (1 - share) m is below 1. A product
    less than 1e-4 below a whole number is rounding, and counts as that number.

    Example:
      >>> rule = MergeRule(probability=0.3, threshold=quantile(0.9), partner="nearest")

    Args:
      share: in [0, 1], or a traced scalar. 0 merges every selected kernel, 1 none.

    Raises:
      ValueError: a number out of range.
    """
    return Quantile(share)


@_as_pytree
@dataclass(frozen=True)
class MergeRule:
    r"""When and how kernels are mixed; a pytree whose three numbers can be traced.

    In each merge every kernel :math:`K_i` is selected with `probability`. A selected kernel gets a
    partner :math:`K_j`, :math:`j \neq i`, and where their cosine similarity exceeds `threshold`,

    .. math:: K_i \leftarrow \alpha K_i + (1 - \alpha) K_j.

    Example, a grid of rules as one pytree, and a schedule:
      >>> import jax.numpy as jnp
      >>> grid = MergeRule(*jnp.meshgrid(jnp.array([0.1, 0.3]), jnp.array([0.3]), jnp.array([0.8])))
      >>> grid.probability.shape
      (1, 2, 1)
      >>> warm_up = lambda step: MergeRule(probability=0.3 * jnp.minimum(step / 1000, 1.0))

    Attributes:
      probability: the chance that a kernel is selected, in [0, 1]; the paper's p.
      threshold: the similarity to exceed, in [-1, 1]; the paper's tau. Or `quantile(share)`, with
        which each layer sets its own.
      alpha: the share of the kernel that stays, in [0, 1].
      partner: `"random"`, drawn uniformly from the layer's other kernels, as the released code
        does; or `"nearest"`, the most similar other kernel, as the paper's text reads.

    Raises:
      ValueError: an unknown partner, or a number out of range. A traced number isn't checked, nor
        is a rule that a transformation makes of another, such as the gradient by one.

    References:
      In-Model Merging for Enhancing the Robustness of Medical Imaging Classification Models,
      arXiv 2502.20516. The defaults are its released code's.
    """

    probability: float | jax.Array = 0.3
    threshold: float | jax.Array | Quantile = 0.3
    alpha: float | jax.Array = 0.8
    partner: Literal["random", "nearest"] = field(default="random", metadata={"static": True})

    def __post_init__(self) -> None:
        _check_range("probability", self.probability, 0, 1)
        if not isinstance(self.threshold, Quantile):
            _check_range("threshold", self.threshold, -1, 1)
        _check_range("alpha", self.alpha, 0, 1)
        if self.partner not in PARTNERS:
            raise ValueError(f"partner is {self.partner!r}; choose one of {', '.join(PARTNERS)}")


class MergeStats(NamedTuple):
    """What one merge did, per layer in the order of the kernels given; arrays of shape (layers,).

    Attributes:
      kernels: int32, how many kernels the layer has.
      selected: int32, how many were selected.
      merged: int32, how many were mixed with their partner.
      similarity: float32, mean cosine similarity of the mixed pairs; 0 where none was mixed.
    """

    kernels: jax.Array
    selected: jax.Array
    merged: jax.Array
    similarity: jax.Array


def merge_kernels(
    params: Any,
    key: jax.Array,
    kernels: Sequence[Kernel],
    rule: MergeRule,
    *,
    fused: bool = False,
) -> tuple[Any, MergeStats]:
    r"""Mixes each selected kernel with a similar one of its layer.

    .. math:: K_i \leftarrow \alpha K_i + (1 - \alpha) K_j
              \quad\text{if}\quad \frac{k_i \cdot k_j}{\|k_i\| \|k_j\|} > \tau

    for selected :math:`i`, with :math:`k` the flattened kernel (arXiv 2502.20516). All reads are
    from the weights as given. Arithmetic is float32 and the result has the weight's dtype; kernels
    that aren't mixed, and all other leaves, come back bit for bit. A zero kernel has similarity 0
    with every other; a kernel holding a NaN or an infinity is never mixed, nor mixed in. A layer
    with one kernel is left alone.

    Pure, so it may be used inside `jit`, `vmap`, `pmap` and `scan`. Under data parallelism, give
    every replica the same key: they then merge alike, without communication. Differentiable: the
    mix is linear in the weights, and which kernels merge, and the counts, are constants to it.

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
      key: a typed PRNG key; a layer's draws are folded from it and the layer's own path, so that
        other layers, and their order, don't change them.
      kernels: which weights to merge, from `find_kernels` or `deep_kernels`.
      rule: when and how; its numbers may be traced scalars.
      fused: on TPU, v4 or later, merge each layer in one Pallas kernel, which moves a fifth of the
        bytes; elsewhere, in JAX's 64-bit mode and for layers that it can't take
        (`inmerge_jax.fused.fits`), nothing changes. XLA can't split such a kernel among devices:
        use it in `pmap`, in `shard_map` with `check_vma=False`, or on one device; nor does
        `jax.export` take it for a TPU and other platforms at once.

    Returns:
      The merged tree, and the counts.

    Raises:
      ValueError: no kernels, or one whose path or shape isn't that of a leaf of `params`, or whose
        weight isn't of a floating dtype.
    """
    if not kernels:
        raise ValueError("kernels is empty; select some with find_kernels and deep_kernels")
    paths_leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    position = {pure_path(path): i for i, (path, _) in enumerate(paths_leaves)}
    leaves = [leaf for _, leaf in paths_leaves]
    counts: list[tuple[jax.Array, ...]] = []
    # Only where some layer is large: DenseNet-121's many small ones took more memory in turn.
    in_turn = max(math.prod(kernel.shape) for kernel in kernels) >= _IN_TURN
    before = None
    for kernel in kernels:
        i = _locate(kernel, position, leaves)
        if kernel.count < 2:
            none = jnp.int32(0)
            counts.append((none, none, jnp.float32(0)))
            continue
        selected, partner = draw_pairs(key, kernel, rule)
        weight = jnp.asarray(leaves[i])
        if in_turn and before is not None:
            weight = in_turn_on_tpu(weight, before)
        before, *count = _merge_layer(weight, kernel.out_axis, selected, partner, rule, fused)
        leaves[i] = before
        counts.append(tuple(count))
    selected, merged, similarity = (jnp.stack(column) for column in zip(*counts, strict=True))
    total = jnp.array([kernel.count for kernel in kernels], jnp.int32)
    return jax.tree.unflatten(tree, leaves), MergeStats(total, selected, merged, similarity)


def draw_pairs(
    key: jax.Array, kernel: Kernel, rule: MergeRule
) -> tuple[jax.Array, jax.Array | None]:
    """What `merge_kernels` draws for one layer, so that another implementation can use the same.

    Args:
      key: the key given to `merge_kernels`; the layer's own is folded from it.
      kernel: the layer, of two kernels or more.
      rule: its probability and its partner.

    Returns:
      Which kernels are selected, bool (kernels,), and their random partners, int32 (kernels,); None
      for the partners where the rule takes the nearest, which is no draw.
    """
    # crc32, since Python's hash of a string differs from one process to the next.
    layer_key = jax.random.fold_in(key, zlib.crc32(kernel.name.encode()))
    select_key, partner_key = jax.random.split(layer_key)
    selected = jax.random.uniform(select_key, (kernel.count,), jnp.float32) < rule.probability
    if rule.partner == "nearest":
        return selected, None
    other = jax.random.randint(partner_key, (kernel.count,), 0, kernel.count - 1, jnp.int32)
    itself = jnp.arange(kernel.count, dtype=jnp.int32)
    return selected, jnp.where(other >= itself, other + 1, other)


def _merge_layer(
    weight: jax.Array,
    axis: int,
    selected: jax.Array,
    partner: jax.Array | None,
    rule: MergeRule,
    fused: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Merges one layer; returns its weight, the counts selected and merged, the mean similarity.

    `partner` gives each kernel's partner, or is None for the nearest.
    """

    def merge(
        weight: jax.Array, axis: int, selected: jax.Array, rest: tuple[Any, ...]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        partner, threshold, alpha = rest
        # Which kernels merge is a decision: no gradient goes through it.
        compared = jax.lax.stop_gradient(weight)
        if partner is None:
            partner, similarity = nearest_partner(compared, axis, selected)
        else:
            similarity = pair_similarity(compared, axis, partner, selected)
        merged = selected & (similarity > _to_exceed(threshold, similarity))
        total = jnp.sum(jnp.where(merged, similarity, 0))
        weight = mix_pairs(weight, axis, partner, merged, alpha)
        return weight, jnp.sum(merged, dtype=jnp.int32), total

    on_tpu = as_rows_on_tpu
    if fused:
        # Here, since Pallas takes a third of a second to import.
        from inmerge_jax import fused as one_kernel

        if one_kernel.fits(weight, axis):
            on_tpu = one_kernel.fused_on_tpu
    weight, count, total = on_tpu(
        merge, weight, axis, selected, (partner, rule.threshold, rule.alpha)
    )
    return (
        weight,
        jnp.sum(selected, dtype=jnp.int32),
        count,
        total / jnp.maximum(count, 1).astype(jnp.float32),
    )


def _to_exceed(threshold: Any, similarity: jax.Array) -> Any:
    """The threshold, or of a `Quantile` the similarity that the layer's upper share exceeds.

    Kernels that aren't selected, or can't merge, have similarity -inf or NaN and don't count.
    """
    if not isinstance(threshold, Quantile):
        return threshold
    compared = jnp.isfinite(similarity)
    count = jnp.sum(compared, dtype=jnp.int32)
    ascending = jnp.sort(jnp.where(compared, similarity, -jnp.inf))
    # Less a little: 0.6 times 25 is above 15 in float32.
    stay = jnp.ceil(threshold.share * count.astype(jnp.float32) - 1e-4).astype(jnp.int32)
    last = ascending[len(ascending) - count + stay - 1]
    return jnp.where(stay > 0, last, -jnp.inf)


def _locate(kernel: Kernel, position: dict[Any, int], leaves: list[Any]) -> int:
    """The place of a kernel's weight among the leaves."""
    path = pure_path(kernel.path)
    if path not in position:
        names = ", ".join(path_name(path) for path in list(position)[:3])
        raise ValueError(
            f"kernel {kernel.name!r} is not in params, whose {len(position)} leaves begin with "
            f"{names}; give merge_kernels the same tree as find_kernels"
        )
    i = position[path]
    if tuple(leaves[i].shape) != kernel.shape:
        raise ValueError(
            f"kernel {kernel.name!r} was found with shape {kernel.shape} but has "
            f"{tuple(leaves[i].shape)} in params; find the kernels of this network anew"
        )
    if not jnp.issubdtype(leaves[i].dtype, jnp.floating):
        raise ValueError(
            f"kernel {kernel.name!r} has dtype {leaves[i].dtype}; only floating-point weights can "
            "be mixed, so merge before quantising, or leave it out of kernels"
        )
    return i


def _check_range(name: str, value: Any, low: float, high: float) -> None:
    # Axes and shardings, for transformations that take a rule, may be any other thing.
    if isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, a string; give a number between {low} and {high}")
    if isinstance(value, jax.core.Tracer) or not isinstance(
        value, int | float | np.ndarray | np.generic | jax.Array
    ):
        return
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return
    numbers = np.asarray(value)
    if not np.all((numbers >= low) & (numbers <= high)):
        raise ValueError(f"{name} is {value}; it must lie between {low} and {high}")
