"""Finds the weights of a network by reading which parameter reaches which operation."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

from inmerge_jax.merging.units import Kernel, PyTree, canonical_path, path_name

OPS = ("conv", "dense")


class PassedOver(NamedTuple):
    """An operation whose weight comes from a parameter but is no unit that can merge.

    Attributes:
      name: the parameter.
      op: "conv" or "dense".
      reason: why it is not listed.
    """

    name: str
    op: str
    reason: str


class Trace(NamedTuple):
    """What `trace_kernels` finds.

    Attributes:
      kernels: the weights, in the order of their first use.
      passed_over: convolutions and matrix products whose weights are not listed, with the reason.
    """

    kernels: tuple[Kernel, ...]
    passed_over: tuple[PassedOver, ...]


def find_kernels(
    forward: Callable[..., Any],
    params: PyTree,
    *args: Any,
    ops: Sequence[str] = ("conv",),
    **kwargs: Any,
) -> tuple[Kernel, ...]:
    """Finds the convolution weights in `params`, in the order in which `forward` first uses them.

    Reads the jaxpr of `forward(params, *args, **kwargs)`: every leaf of `params` that reaches a
    convolution as its weight is listed once, and its output axis comes from that operation's
    dimension numbers. Casts, transpositions, reshapes that keep the output axis, and elementwise
    changes (a mask, weight standardisation) on the way are followed, through nested `jit`, `remat`,
    `cond`, `platform_dependent`, custom derivatives, loops and `vmap`. So no naming convention is
    needed, and Flax Linen, Flax NNX, Equinox and Haiku parameters are alike to it.

    Kernels of different groups of a grouped or depthwise convolution read different inputs, so they
    are different problems (`Kernel.groups`); so are the layers of a stack that is scanned or
    indexed in a loop, and the members of a vmapped ensemble (`Kernel.batch_axes`).

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
      forward: a function of `(params, *args, **kwargs)`; it is traced, never run. One that needs a
        mapped axis name (batch normalisation with `axis_name`) is traced inside
        `jax.vmap(..., axis_name=...)` of the caller's.
      params: a tree of arrays or `jax.ShapeDtypeStruct`s.
      *args: the other arguments, concrete or abstract.
      ops: "conv" for convolutions, "dense" for matrix products whose one operand is a parameter.
      **kwargs: keyword arguments of `forward`; they are not traced, so `train=False` is a bool.

    Returns:
      The kernels in order of first use.

    Warns:
      UserWarning: a weight is computed from a parameter in a way that loses the output axis (a
        matrix product, the result of a loop, branches that differ), or a parameter is used in ways
        that disagree; it is not listed.

    Raises:
      ValueError: an unknown op; a leaf of `params` that is not an array; or no such operation takes
        a parameter.
    """
    found = trace_kernels(forward, params, *args, ops=ops, **kwargs)
    for one in found.passed_over:
        if one.op in ops:
            warnings.warn(
                f"{one.name!r} is the weight of a {one.op} operation but {one.reason}; it is not "
                "listed and will not be merged",
                stacklevel=2,
            )
    if not found.kernels:
        count = len(jax.tree.leaves(params))
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in found.passed_over[:3])
        advice = "" if "dense" in ops else 'ops=("conv", "dense") also takes matrix products. '
        raise ValueError(
            f"no {' or '.join(ops)} operation in forward takes its weight from params ({count} "
            f"leaves). {advice}"
            + (f"Passed over: {reasons}" if reasons else "Does forward use the params it is given?")
        )
    return found.kernels


def trace_kernels(
    forward: Callable[..., Any],
    params: PyTree,
    *args: Any,
    ops: Sequence[str] = OPS,
    **kwargs: Any,
) -> Trace:
    """As `find_kernels`, and what was passed over, with the reason; warns of nothing.

    An operation that `ops` leaves out is passed over for that reason.
    """
    unknown = [op for op in ops if op not in OPS]
    if unknown or not ops:
        raise ValueError(f"ops is {tuple(ops)!r}; choose from {', '.join(OPS)}")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"params leaf {path_name(path)!r} is a {type(leaf).__name__}, not an array; pass "
                "the arrays alone (Equinox: eqx.partition, Flax NNX: nnx.split) and put the rest "
                "back inside forward"
            )
    closed = jax.make_jaxpr(lambda params, *args: forward(params, *args, **kwargs))(params, *args)
    origins: list[_Origin | None] = [
        _Origin(number, tuple(((axis, size),) for axis, size in enumerate(leaf.shape)))
        for number, (_, leaf) in enumerate(leaves)
    ]
    origins += [None] * (len(closed.jaxpr.invars) - len(leaves))
    walk = _Walk()
    walk.jaxpr(closed.jaxpr, origins)
    kernels, passed_over = [], []
    for leaf, uses in walk.uses.items():
        path, weight = leaves[leaf]
        # A convolution's weight may be in products too, by which its norm is estimated, say.
        uses = [use for use in uses if use.op == "conv"] or uses
        use = next((use for use in uses if use.reason), uses[0])
        reason = use.reason
        if use.op not in ops:
            reason = f"ops is {tuple(ops)!r}"
        elif not reason and len(set(uses)) > 1:
            reason = "is used with different output axes or groups"
        if reason:
            name = path_name(canonical_path(path))
            passed_over.append(PassedOver(name, use.op, reason))
        else:
            place = (use.out_axis, use.batch_axes, use.groups)
            kernels.append(Kernel(path, tuple(weight.shape), *place, op=use.op))
    return Trace(tuple(kernels), tuple(passed_over))


_Atoms = tuple[tuple[int | None, int], ...]
"""What an axis of a value runs along: axes of the parameter with their sizes, the outermost first.
An axis None of the parameter is one that the value does not share with it."""


@dataclass(frozen=True)
class _Origin:
    """A traced value that is a parameter in another shape or type.

    Attributes:
      leaf: number of the parameter.
      axes: what each axis of the value runs along; None where the link is lost.
      sliced: axes of the parameter of which the value is one index.
      reason: how the link was lost.
      activation: whether the value came out of a convolution, a matrix product or a look-up, so
        that it may be an activation; of what is computed from it no parameter is the weight.
      spread: of an activation, whether it was broadcast, as a scale of a weight is.
      mixed: whether a value of the same shape that is no parameter was added, say: a mask of a
        weight, or an input to which the parameter is added.
    """

    leaf: int
    axes: tuple[_Atoms, ...] | None
    sliced: tuple[int, ...] = ()
    reason: str = ""
    activation: bool = False
    spread: bool = False
    mixed: bool = False

    def lost(self, name: str, activation: bool = False) -> "_Origin":
        """The same parameter, with the link lost by an operation."""
        reason = self.reason or f"is computed from it by {name!r}"
        return _Origin(self.leaf, None, (), reason, self.activation or activation)


class _Use(NamedTuple):
    """One use of a parameter as a weight.

    Attributes:
      op: the operation.
      out_axis: of the parameter, as in `Kernel`.
      batch_axes: of the parameter, as in `Kernel`.
      groups: as in `Kernel`.
      reason: why the use has no such axis.
    """

    op: str
    out_axis: int = 0
    batch_axes: tuple[int, ...] = ()
    groups: int = 1
    reason: str = ""


_SAME_AXES = frozenset(
    "convert_element_type copy copy_p rev optimization_barrier sharding_constraint reshard "
    "reduce_precision name neg abs sign tanh logistic round clamp square integer_pow sqrt rsqrt "
    "mul add sub div max min add_any select_n stop_gradient pvary pcast".split()
)


@dataclass
class _Walk:
    """Follows parameters through a jaxpr and its inner ones; collects their uses as weights."""

    uses: dict[int, list[_Use]] = field(default_factory=dict)

    def jaxpr(self, jaxpr: Any, origins: Sequence[_Origin | None]) -> list[_Origin | None]:
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
        carried = [o for o in origins if o is not None]
        if not carried:
            return nothing
        if name == "conv_general_dilated":
            self.convolution(eqn, origins[1])
            return [carried[-1].lost(name, activation=True)]
        if name == "dot_general":
            return self.product(eqn, origins)
        inner = _inner_jaxprs(eqn, origins)
        if inner:
            outs = [self.jaxpr(jaxpr, given) for jaxpr, given in inner]
            if name in ("scan", "while"):
                return [o and o.lost(name) for o in outs[-1]]
            return [_agreed(column, name) for column in zip(*outs, strict=True)]
        if name == "optimization_barrier":
            return origins
        if len(eqn.outvars) > 1:
            return [carried[0].lost(name)] * len(eqn.outvars)
        return [_follow(eqn, origins)]

    def convolution(self, eqn: Any, weight: _Origin | None) -> None:
        """Records the weight of a convolution."""
        if weight is None:
            return
        out = eqn.params["dimension_numbers"].rhs_spec[0]
        groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
        outputs = None if weight.axes is None else (weight.axes[out],)
        self.record("conv", weight, outputs, groups)

    def product(self, eqn: Any, origins: list[_Origin | None]) -> list[_Origin | None]:
        """Records the weight of a matrix product, one of whose operands is a parameter."""
        sides = [side for side, o in enumerate(origins) if o is not None and o.axes is not None]
        if len(sides) == 2:
            # An input with a parameter added to it, times a weight.
            unmixed = [side for side in sides if not getattr(origins[side], "mixed", False)]
            sides = unmixed or sides
        if len(sides) != 1:
            known = [o for o in origins if o is not None]
            for origin in known:
                if sides and origin.mixed:
                    reason = "is combined with another value before a product with a parameter"
                    self.record("dense", replace(origin, axes=None, reason=reason), None, 1)
                elif not sides and not origin.activation:
                    self.record("dense", origin, None, 1)
            # Of activations alone, or of two parameters: a product such as LoRA's.
            return [known[0].lost("dot_general", activation=not sides)]
        (side,) = sides
        weight = origins[side]
        assert weight is not None and weight.axes is not None
        contracted, batched = eqn.params["dimension_numbers"]
        taken = {*contracted[side], *batched[side]}
        kept = (atoms for d, atoms in enumerate(weight.axes) if d not in taken)
        together = [atom for d in batched[side] for atom in weight.axes[d]]
        indexed = tuple(axis for axis, size in together if axis is not None and size > 1)
        sliced = (*weight.sliced, *indexed)
        self.record("dense", _Origin(weight.leaf, weight.axes, sliced), tuple(kept), 1)
        return [weight.lost("dot_general", activation=True)]

    def record(
        self, op: str, weight: _Origin, outputs: Sequence[_Atoms] | None, groups: int
    ) -> None:
        """Records a use.

        Args:
          op: the operation.
          weight: its operand.
          outputs: what the operand's output axes run along; None where the link is lost. Only the
            innermost indexes units: the others are the members of a vmapped ensemble, or heads.
          groups: of a grouped convolution.
        """
        use = _Use(op, reason=weight.reason or "its output axis is lost by a reshape")
        atoms: list[tuple[int | None, int]] = []
        if outputs:
            *outer, last = outputs
            atoms = [atom for axis in outer for atom in axis if atom[1] > 1]
            # A convolution's weight has one output axis, which vmap merges with that of the batch.
            atoms += last if op == "conv" else [a for a in last if a[1] > 1] or last[:1]
        axes = [axis for axis, _ in atoms if axis is not None]
        if axes and len(axes) == len(atoms):
            *batch, (_, units) = atoms
            for _, size in batch:
                groups = groups // size if groups % size == 0 else groups
            if units % groups == 0:
                batch_axes = tuple(sorted({*weight.sliced, *axes[:-1]}))
                use = _Use(op, axes[-1], batch_axes, groups)
        self.uses.setdefault(weight.leaf, []).append(use)


def _inner_jaxprs(
    eqn: Any, origins: list[_Origin | None]
) -> list[tuple[Any, list[_Origin | None]]]:
    """The jaxprs that an equation calls, each with the origins of its arguments.

    Arguments are recognised by number and shape, since names of parameters change between releases
    of JAX (those of `scan` did in 0.11).
    """
    name = eqn.primitive.name
    if name.startswith(("reduce", "argm", "cum", "sort", "scatter", "select_and")):
        return []  # Their jaxprs are of two scalars.
    jaxprs = [jaxpr for value in eqn.params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return [(jaxpr, origins[1:]) for jaxpr in jaxprs]
    if name == "while":
        condition, body = (_opened(eqn.params[f"{which}_jaxpr"]) for which in ("cond", "body"))
        state = len(body.outvars)
        consts = len(condition.invars) - state
        return [
            (condition, origins[:consts] + origins[len(origins) - state :]),
            (body, origins[consts:]),
        ]
    called = [jaxpr for jaxpr in jaxprs if len(jaxpr.invars) == len(origins)]
    if not called:
        return []
    given = [
        origin and _entering(origin, outer.aval.shape, inner.aval.shape)
        for origin, outer, inner in zip(origins, eqn.invars, called[0].invars, strict=True)
    ]
    return [(called[0], given)]


def _entering(origin: _Origin, outer: Sequence[int], inner: Sequence[int]) -> _Origin:
    """The origin inside a called jaxpr, which may get one index of the first axis (`scan`)."""
    if tuple(outer) == tuple(inner) or origin.axes is None:
        return origin
    if tuple(outer[1:]) == tuple(inner):
        return _indexed(origin, origin.axes[1:], origin.axes[0], "scan")
    return origin.lost("a call")


def _indexed(origin: _Origin, axes: tuple[_Atoms, ...], removed: _Atoms, name: str) -> _Origin:
    """The origin of one index along an axis that is removed."""
    gone = [(axis, size) for axis, size in removed if size > 1]
    if any(axis is None for axis, _ in gone):
        return origin.lost(name)
    indexed = tuple(axis for axis, _ in gone if axis is not None)
    return replace(origin, axes=axes, sliced=(*origin.sliced, *indexed))


def _jaxprs(value: Any) -> Iterator[Any]:
    """The jaxprs in an equation's parameter, which may be closed or a tuple of them."""
    values = value if isinstance(value, tuple | list) else (value,)
    for one in values:
        opened = _opened(one)
        if hasattr(opened, "eqns") and hasattr(opened, "invars"):
            yield opened


def _opened(value: Any) -> Any:
    """A jaxpr without the constants that may be closed over."""
    return getattr(value, "jaxpr", value)


def _agreed(origins: Sequence[_Origin | None], name: str) -> _Origin | None:
    """What the branches of a conditional say alike; lost where they differ."""
    known = [o for o in origins if o is not None]
    if all(o == origins[0] for o in origins):
        return origins[0]
    return known[0].lost(name)


def _follow(eqn: Any, origins: list[_Origin | None]) -> _Origin:
    """The origin of an equation's one result, from those of its operands."""
    name, params = eqn.primitive.name, eqn.params
    out_shape = eqn.outvars[0].aval.shape
    if name in _SAME_AXES:
        found = _elementwise(name, origins, [v.aval.shape for v in eqn.invars], out_shape)
        others = (v for v, o in zip(eqn.invars, origins, strict=True) if o is None)
        same = (not isinstance(v, Literal) and v.aval.shape == out_shape != () for v in others)
        return replace(found, mixed=True) if any(same) else found
    first = next(i for i, o in enumerate(origins) if o is not None)
    source, in_shape = origins[first], eqn.invars[first].aval.shape
    assert source is not None
    axes = source.axes
    activation = next((o for o in origins if o is not None and o.activation), None)
    if activation is not None:
        wider = math.prod(out_shape) > math.prod(in_shape)
        scale = name == "broadcast_in_dim" and (wider or activation.spread)
        return replace(activation, spread=scale)
    if axes is None:
        return source
    if first and name in ("dynamic_slice", "gather", "dynamic_update_slice"):
        return source.lost(name)  # The parameter is an index, or what is written.
    if name == "transpose":
        return _with(source, tuple(axes[d] for d in params["permutation"]))
    if name == "broadcast_in_dim":
        spread: list[_Atoms] = [((None, size),) for size in out_shape]
        for d, to in enumerate(params["broadcast_dimensions"]):
            if in_shape[d] == out_shape[to]:
                spread[to] = axes[d]
        return _with(source, tuple(spread))
    if name == "squeeze":
        return _with(source, tuple(a for d, a in enumerate(axes) if d not in params["dimensions"]))
    if name == "reshape":
        order = params["dimensions"]
        ordered = axes if order is None else tuple(axes[d] for d in order)
        return _with(source, _reshaped(ordered, out_shape))
    if name in ("slice", "dynamic_slice"):
        return _sliced(source, in_shape, out_shape, name)
    if name == "gather":
        return _gathered(eqn, source, in_shape)
    return source.lost(name)


def _with(origin: _Origin, axes: tuple[_Atoms, ...]) -> _Origin:
    return replace(origin, axes=axes)


def _sliced(origin: _Origin, old: Sequence[int], new: Sequence[int], name: str) -> _Origin:
    """After a slice: one index of an axis is a layer of a stack; a part of an axis is no unit."""
    assert origin.axes is not None
    for d, (before, after) in enumerate(zip(old, new, strict=True)):
        if before == after:
            continue
        if after != 1:
            return origin.lost(name)
        axes = (*origin.axes[:d], ((None, 1),), *origin.axes[d + 1 :])
        origin = _indexed(origin, axes, origin.axes[d], name)
        if origin.axes is None:
            return origin
    return origin


def _gathered(eqn: Any, origin: _Origin, shape: Sequence[int]) -> _Origin:
    """After `w[i]` with a traced index: a gather of one index of the first axis."""
    numbers, sizes = eqn.params["dimension_numbers"], tuple(eqn.params["slice_sizes"])
    out_shape = eqn.outvars[0].aval.shape
    one = (1, *shape[1:])
    if sizes == one and tuple(numbers.start_index_map) == (0,) and out_shape == tuple(shape[1:]):
        assert origin.axes is not None
        return _indexed(origin, origin.axes[1:], origin.axes[0], "gather")
    return origin.lost("gather", activation=True)


def _elementwise(
    name: str, origins: list[_Origin | None], shapes: list[tuple[int, ...]], out: tuple[int, ...]
) -> _Origin:
    """The origin of an elementwise result of shape `out`.

    Of a weight with its scale, in any order, it is the weight's: the one that runs along every
    axis. A scale is a parameter of its own spread over the weight's shape, or the weight's own
    statistics, to which the link is lost.
    """
    pairs = [(o, shape) for o, shape in zip(origins, shapes, strict=True) if o is not None]
    for o, shape in pairs:
        # A scale is spread over the weight; what has the shape of the result is an activation.
        if o.activation and not o.spread and tuple(shape) == tuple(out) and math.prod(out) > 1:
            return o
    carried = [_spread(o, shape, out) for o, shape in pairs]
    kept = [o for o in carried if o.axes is not None]
    full = {o for o in kept if all(_shared(atoms) for atoms in o.axes or ())}
    if len(full) == 1:
        return full.pop()
    if len({o.leaf for o in carried}) == 1 == len(set(kept)):
        return kept[0]
    return kept[0].lost(name) if kept else carried[0]


def _shared(atoms: _Atoms) -> bool:
    """Whether an axis runs along the parameter; one of size 1 runs along anything."""
    return all(axis is not None or size == 1 for axis, size in atoms)


def _spread(origin: _Origin, shape: Sequence[int], out: Sequence[int]) -> _Origin:
    """The origin of an operand at the result's shape: axes of size 1 may be spread over it."""
    if origin.axes is None or len(shape) != len(out):
        return origin if origin.axes is None else origin.lost("broadcasting")
    sizes = zip(origin.axes, shape, out, strict=True)
    return _with(
        origin, tuple(atoms if old == new else ((None, new),) for atoms, old, new in sizes)
    )


def _reshaped(axes: tuple[_Atoms, ...], new: Sequence[int]) -> tuple[_Atoms, ...]:
    """Axes after a reshape: the sequence of all sizes, divided anew; lost where one is split."""
    # An axis of the parameter counts even at size 1: a vmapped layer may have one output.
    atoms = [atom for axis in axes for atom in axis if atom != (None, 1)]
    found: list[_Atoms] = []
    for number, size in enumerate(new):
        taken: list[tuple[int | None, int]] = []
        following = new[number + 1] if number + 1 < len(new) else 0
        while atoms and (
            math.prod(s for _, s in taken) < size or (atoms[0][1] == 1 and following != 1)
        ):
            taken.append(atoms.pop(0))
        product = math.prod(s for _, s in taken)
        if product == size:
            found.append(tuple(taken) or ((None, 1),))
            continue
        # The rest of the last axis goes on in the next one; neither runs along the parameter.
        if not size or product % size:
            return tuple(((None, s),) for s in new)
        found.append(((None, size),))
        atoms.insert(0, (None, product // size))
    return tuple(found)
