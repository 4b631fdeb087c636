"""Which weights of a network are convolution kernels, on which axis, in which order."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

PyTree = Any
_VALUE = jax.tree_util.GetAttrKey("value")


@dataclass(frozen=True)
class Kernel:
    """Where one convolution's kernels are: a weight in a parameter tree, and its output axis.

    A *kernel* is one output filter of a convolution, `w[..., i]` for a weight in HWIO layout.

    Attributes:
      path: the weight's key path, as `jax.tree_util.tree_flatten_with_path` gives it.
      shape: the weight's shape.
      out_axis: the axis that indexes output channels, that is, kernels.
    """

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    out_axis: int

    @property
    def name(self) -> str:
        """The path as text, `"layer1/conv1/kernel"`; the same for all forms of a Flax NNX state."""
        return path_name(pure_path(self.path))

    @property
    def count(self) -> int:
        """How many kernels the weight holds."""
        return self.shape[self.out_axis]


def path_name(path: Sequence[Any]) -> str:
    """A key path as text with slashes, the form in which paths are shown and matched."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def pure_path(path: Sequence[Any]) -> tuple[Any, ...]:
    """A key path without the last key, `value`, of a Flax NNX variable.

    `nnx.split` gives states whose paths have it, `nnx.as_pure`, by which `nnx.Optimizer` calls a
    transformation, takes it away.
    """
    path = tuple(path)
    return path[:-1] if path[-1:] == (_VALUE,) else path


def find_kernels(forward: Callable[..., Any], params: PyTree, *args: Any) -> tuple[Kernel, ...]:
    """Finds the convolution weights in `params`, in the order in which `forward` first uses them.

    Reads the jaxpr of `forward(params, *args)`: every leaf of `params` that reaches the right-hand
    side of a `conv_general_dilated` is listed once, and its output axis comes from that
    operation's dimension numbers. Casts, transpositions, reshapes that keep the output axis, and
    elementwise changes (a mask, weight standardisation) on the way are followed, through nested
    `jit`, `remat`, `cond`, `platform_dependent`, custom derivatives and loops. So no naming
    convention is needed, and Flax Linen, Flax NNX, Equinox and Haiku parameters are alike to it.

    Kernels of a grouped or depthwise convolution count as kernels of one layer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def forward(params, x):
      ...     dimensions = ("NHWC", "HWIO", "NHWC")
      ...     for w in (params["conv_2"], params["conv_10"]):
      ...         x = jax.lax.conv_general_dilated(
      ...             x, w, (1, 1), "SAME", dimension_numbers=dimensions)
      ...     return x
      >>> params = {"conv_2": jnp.zeros((3, 3, 1, 8)), "conv_10": jnp.zeros((3, 3, 8, 16))}
      >>> [(k.name, k.count) for k in find_kernels(forward, params, jnp.zeros((1, 28, 28, 1)))]
      [('conv_2', 8), ('conv_10', 16)]

    Args:
      forward: a function of `(params, *args)`; it is traced, never run.
      params: a tree of arrays or `jax.ShapeDtypeStruct`s.
      *args: the other arguments, concrete or abstract.

    Returns:
      The kernels in order of first use.

    Warns:
      UserWarning: a convolution's weight is computed from a parameter in a way that loses the
        output axis (a matrix product, weights stacked over a `scan`, the result of a loop, branches
        that differ); it is not listed.

    Raises:
      ValueError: a leaf of `params` is not an array, or no convolution takes a parameter.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"params leaf {path_name(path)!r} is a {type(leaf).__name__}, not an array; pass "
                "the arrays alone (Equinox: eqx.partition, Flax NNX: nnx.split) and put the rest "
                "back inside forward"
            )
    closed = jax.make_jaxpr(forward)(params, *args)
    origins: list[_Origin | None] = [
        _Origin(i, tuple(range(len(leaf.shape)))) for i, (_, leaf) in enumerate(leaves)
    ]
    origins += [None] * (len(closed.jaxpr.invars) - len(leaves))
    walk = _Walk([path_name(path) for path, _ in leaves])
    walk.jaxpr(closed.jaxpr, origins)
    if not walk.out_axes:
        raise ValueError(
            f"no convolution in forward takes its weight from params ({len(leaves)} leaves); "
            "in-model merging mixes convolution kernels, so check that forward really uses the "
            "params that it is given"
        )
    return tuple(
        Kernel(leaves[leaf][0], tuple(leaves[leaf][1].shape), axis)
        for leaf, axis in walk.out_axes.items()
    )


def deep_kernels(
    kernels: Sequence[Kernel],
    skip: int = 10,
    where: Callable[[str], bool] | None = None,
) -> tuple[Kernel, ...]:
    """Selects the deep convolutions: all but the first `skip` in forward order.

    The paper's L_s is `skip` (arXiv 2502.20516; its released code's default is 10).

    Args:
      kernels: what `find_kernels` returns.
      skip: how many convolutions to leave alone, counted from the input.
      where: keeps, of the others, those for whose name it returns true:
        `deep_kernels(kernels, skip=0, where=lambda name: "conv2" in name)`.

    Returns:
      The selected kernels, in the same order.

    Raises:
      ValueError: `skip` is negative, or nothing is selected.
    """
    if skip < 0:
        raise ValueError(f"skip is {skip}; it counts convolutions to leave alone, so 0 or more")
    deep = tuple(k for k in kernels[skip:] if where is None or where(k.name))
    if not deep:
        names = ", ".join(k.name for k in kernels[-3:])
        rest = "" if where is None else " and the predicate"
        raise ValueError(
            f"skip={skip}{rest} selects none of the {len(kernels)} convolutions"
            + (f" (the last: {names})" if names else "")
            + "; choose a smaller skip or another predicate"
        )
    return deep


@dataclass(frozen=True)
class _Origin:
    """A traced value that is a parameter in another shape or type.

    `axes[d]` is the parameter's axis that the value's axis `d` runs along, or None. `axes` is None
    where the link is lost, and `lost_by` then names the operation.
    """

    leaf: int
    axes: tuple[int | None, ...] | None
    lost_by: str = ""


_SAME_AXES = frozenset(
    "convert_element_type copy copy_p rev optimization_barrier sharding_constraint "
    "reduce_precision name neg abs sign tanh logistic round clamp square integer_pow sqrt rsqrt "
    "mul add sub div max min add_any select_n stop_gradient pvary".split()
)


class _Walk:
    """Follows parameters through a jaxpr and its inner ones; collects `{leaf: output axis}`."""

    def __init__(self, names: list[str]):
        self.names = names
        self.out_axes: dict[int, int] = {}

    def jaxpr(self, jaxpr: Jaxpr, origins: Sequence[_Origin | None]) -> list[_Origin | None]:
        known = {v: o for v, o in zip(jaxpr.invars, origins, strict=True) if o is not None}

        def origin(atom: Any) -> _Origin | None:
            return None if isinstance(atom, Literal) else known.get(atom)

        for eqn in jaxpr.eqns:
            results = self.equation(eqn, [origin(atom) for atom in eqn.invars])
            known.update((v, o) for v, o in zip(eqn.outvars, results, strict=True) if o is not None)
        return [origin(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, origins: list[_Origin | None]) -> list[_Origin | None]:
        name = eqn.primitive.name
        nothing: list[_Origin | None] = [None] * len(eqn.outvars)
        inner = _inner_jaxprs(eqn, origins)
        if inner is not None:
            outs = [self.jaxpr(jaxpr, given) for jaxpr, given in inner]
            if name in ("scan", "while"):
                return [o and _Origin(o.leaf, None, name) for o in outs[-1]]
            return [_agreed(column, name) for column in zip(*outs, strict=True)]
        if name == "conv_general_dilated":
            self.convolution(eqn, origins[1])
            return nothing
        carried = [o for o in origins if o is not None]
        if not carried:
            return nothing
        if name == "optimization_barrier":
            return origins
        if len(eqn.outvars) > 1:
            return [_Origin(carried[0].leaf, None, name)] * len(eqn.outvars)
        return [_follow(eqn, origins)]

    def convolution(self, eqn: Any, weight: _Origin | None) -> None:
        if weight is None or weight.leaf in self.out_axes:
            return
        out = eqn.params["dimension_numbers"].rhs_spec[0]
        axis = None if weight.axes is None else weight.axes[out]
        if axis is None:
            warnings.warn(
                f"a convolution takes a weight computed from params {self.names[weight.leaf]!r} "
                f"by {weight.lost_by or 'a reshape'!r}, which loses the output axis; it is not "
                "listed and will not be merged",
                stacklevel=4,
            )
            return
        self.out_axes[weight.leaf] = axis


def _inner_jaxprs(
    eqn: Any, origins: list[_Origin | None]
) -> list[tuple[Jaxpr, list[_Origin | None]]] | None:
    """The jaxprs that an equation calls, each with the origins of its arguments; or None."""
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        return [(branch.jaxpr, origins[1:]) for branch in params["branches"]]
    if name == "while":
        n, m = params["cond_nconsts"], params["body_nconsts"]
        return [
            (params["cond_jaxpr"].jaxpr, origins[:n] + origins[n + m :]),
            (params["body_jaxpr"].jaxpr, origins[n:]),
        ]
    if name == "scan":
        whole = params["num_consts"] + params["num_carry"]
        sliced = [o and _Origin(o.leaf, None, "scan") for o in origins[whole:]]
        return [(params["jaxpr"].jaxpr, origins[:whole] + sliced)]
    called = list(_called(params.values(), len(origins)))
    return [(called[0], origins)] if called else None


def _called(values: Iterator[Any], arguments: int) -> Iterator[Jaxpr]:
    """The jaxprs among an equation's parameters that take just its arguments (jit, remat, ...)."""
    for value in values:
        jaxpr = value.jaxpr if isinstance(value, ClosedJaxpr) else value
        if isinstance(jaxpr, Jaxpr) and len(jaxpr.invars) == arguments:
            yield jaxpr


def _agreed(origins: Sequence[_Origin | None], name: str) -> _Origin | None:
    """What the branches of a conditional say alike; lost where they differ."""
    known = [o for o in origins if o is not None]
    if all(o == origins[0] for o in origins):
        return origins[0]
    return _Origin(known[0].leaf, None, name)


def _follow(eqn: Any, origins: list[_Origin | None]) -> _Origin:
    """The origin of an equation's one result, from those of its operands."""
    name, params = eqn.primitive.name, eqn.params
    out_shape = eqn.outvars[0].aval.shape
    if name in _SAME_AXES:
        return _elementwise(name, origins, [v.aval.shape for v in eqn.invars], out_shape)
    first = next(i for i, o in enumerate(origins) if o is not None)
    source, in_shape = origins[first], eqn.invars[first].aval.shape
    assert source is not None
    axes = source.axes
    if axes is None:
        return source
    if name == "transpose":
        return _Origin(source.leaf, tuple(axes[d] for d in params["permutation"]))
    if name == "broadcast_in_dim":
        spread: list[int | None] = [None] * len(out_shape)
        for d, to in enumerate(params["broadcast_dimensions"]):
            spread[to] = axes[d] if in_shape[d] == out_shape[to] else None
        return _Origin(source.leaf, tuple(spread))
    if name == "squeeze":
        kept = (a for d, a in enumerate(axes) if d not in params["dimensions"])
        return _Origin(source.leaf, tuple(kept))
    if name == "reshape":
        return _Origin(source.leaf, _reshaped(axes, in_shape, out_shape))
    return _Origin(source.leaf, None, name)


def _elementwise(
    name: str, origins: list[_Origin | None], shapes: list[tuple[int, ...]], out: tuple[int, ...]
) -> _Origin:
    """The origin of an elementwise result of shape `out`.

    Of a weight with its scale, in any order, it is the weight's: the one that runs along every
    axis. A scale is a parameter of its own spread over the weight's shape, or the weight's own
    statistics, to which the link is lost.
    """
    carried = [_spread(o, shape, out) for o, shape in zip(origins, shapes, strict=True) if o]
    kept = [o for o in carried if o.axes is not None]
    full = {o for o in kept if o.axes is not None and None not in o.axes}
    if len(full) == 1:
        return full.pop()
    if len({o.leaf for o in carried}) == 1 == len(set(kept)):
        return kept[0]
    return _Origin(kept[0].leaf, None, name) if kept else carried[0]


def _spread(origin: _Origin, shape: Sequence[int], out: Sequence[int]) -> _Origin:
    """The origin of an operand at the result's shape: axes of size 1 may be spread over it."""
    if origin.axes is None or len(shape) != len(out):
        return _Origin(origin.leaf, None, origin.lost_by)
    sizes = zip(origin.axes, shape, out, strict=True)
    return _Origin(origin.leaf, tuple(axis if old == new else None for axis, old, new in sizes))


def _reshaped(
    axes: tuple[int | None, ...], old: Sequence[int], new: Sequence[int]
) -> tuple[int | None, ...]:
    """Axes after a reshape: one survives where its size and all before it are unchanged."""
    before = {(math.prod(old[:d]), size): axes[d] for d, size in enumerate(old) if size > 1}
    return tuple(before.get((math.prod(new[:d]), size)) for d, size in enumerate(new))
