"""Finds the weights of a network by reading which parameter reaches which operation.

`_Walk` reads a jaxpr operation by operation. It records the uses of parameters as weights, and
gives every value that comes from a parameter an `_Origin`: which axes of the parameter its own axes
run along. The functions below `_Walk` say how other operations change an origin.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from inmerge_jax.merging.units import Kernel, PyTree, holds_array, path_name

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
    /,
    *args: Any,
    ops: Sequence[str] = ("conv",),
    **kwargs: Any,
) -> tuple[Kernel, ...]:
    """Lists the convolution weights in `params` in the order of the forward pass.

    Traces `forward(params, *args, **kwargs)` and reads its jaxpr. Every leaf of `params` that is
    the weight of a convolution is listed once. The output axis comes from the dimension numbers of
    that convolution, so no naming convention is needed: Flax, Equinox, Haiku and Keras parameters
    all work. Casts, transpositions, reshapes that keep the output axis, and arithmetic (a mask,
    weight standardisation, `tanh`) are followed, through nested `jit`, `remat`, `cond`,
    `platform_dependent`, custom derivatives, loops and `vmap`. Exponentials and logarithms are not:
    of `w * exp(s)` the weight is `w`.

    Units of different groups of a grouped or depthwise convolution never merge with each other
    (`Kernel.groups`), because they read different inputs. The same holds for the layers of a
    scanned or indexed stack and the members of a vmapped ensemble (`Kernel.batch_axes`).

    Examples:
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
      forward: The forward pass, a function of `(params, *args, **kwargs)`. It is traced, never
        run. If it needs a mapped axis name (batch normalisation with `axis_name`), call
        `find_kernels` inside `jax.vmap(..., axis_name=...)`. It must not divide weights among
        devices with `jax.shard_map`.
      params: A tree of arrays or `jax.ShapeDtypeStruct`.
      *args: Further arguments of `forward`, concrete or abstract. Bools and strings are not traced;
        give other static arguments as keyword arguments.
      ops: `"conv"` for convolutions, `"dense"` for matrix products with a parameter as one operand.
      **kwargs: Keyword arguments of `forward`. They are not traced, so `train=False` stays a bool.

    Returns:
      The kernels in the order of their first use.

    Warns:
      UserWarning: A weight is computed from a parameter in a way that loses the output axis (a
        matrix product, the result of a loop, branches that differ), or the uses of a parameter
        disagree. It is not listed.

    Raises:
      ValueError: An unknown op, a leaf of `params` that is not an array, or no operation that takes
        its weight from `params`.
    """
    found = trace_kernels(forward, params, *args, ops=ops, **kwargs)
    for one in found.passed_over:
        if one.op.removesuffix("_transpose") in ops:
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
    /,
    *args: Any,
    ops: Sequence[str] = OPS,
    **kwargs: Any,
) -> Trace:
    """Lists weights like `find_kernels`, and the operations that were passed over.

    Args:
      forward: See `find_kernels`.
      params: See `find_kernels`.
      *args: See `find_kernels`.
      ops: See `find_kernels`. Operations that `ops` leaves out are among those passed over.
      **kwargs: See `find_kernels`.

    Returns:
      A `Trace` with `kernels` and `passed_over`, which has a name, an op and a reason for each
      convolution and matrix product whose weight is not listed. There are no warnings.

    Raises:
      ValueError: An unknown op, or a leaf of `params` that is not an array.
    """
    if isinstance(ops, str) or not (ops := tuple(ops)) or set(ops) - set(OPS):
        raise ValueError(f"ops is {ops!r}; give a tuple, and choose from {', '.join(OPS)}")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        is_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        if not is_array or holds_array(leaf):
            raise ValueError(
                f"params leaf {path_name(path)!r} is a {type(leaf).__name__}, not an array; pass "
                "the arrays alone (Equinox: eqx.partition, Flax NNX: nnx.split, Keras: "
                "variable.value, numbers: jnp.asarray) and put the rest back inside forward"
            )

    def call(params: PyTree, *arrays: Any) -> Any:
        given = iter(arrays)
        found = forward(params, *(a if _is_static(a) else next(given) for a in args), **kwargs)
        return [leaf for leaf in jax.tree.leaves(found) if hasattr(leaf, "dtype")]

    closed = jax.make_jaxpr(call)(params, *(a for a in args if not _is_static(a)))
    origins: list[_Origin | None] = [
        _Origin((number,), tuple(((axis, size),) for axis, size in enumerate(leaf.shape)))
        for number, (_, leaf) in enumerate(leaves)
    ]
    walk = _Walk()
    walk.jaxpr(closed.jaxpr, origins + [None] * (len(closed.jaxpr.invars) - len(leaves)))
    kernels, passed_over = [], []
    for number, uses in walk.uses.items():
        path, weight = leaves[number]
        # A convolution's weight may be in products too, by which its norm is estimated, say; and
        # its result may be another convolution's weight, as in a network of two inputs.
        convolutions = [use for use in uses if use.op != "dense"]
        uses = [use for use in convolutions if not use.computed] or convolutions or uses
        use = next((use for use in uses if use.reason), uses[0])
        reason = use.reason
        if use.op.removesuffix("_transpose") not in ops:
            reason = f"ops is {ops!r}"
        elif not reason and not jnp.issubdtype(weight.dtype, jnp.floating):
            reason = f"has dtype {weight.dtype}, which cannot be interpolated"
        elif not reason and len(set(uses)) > 1:
            reason = "is used with different output axes or groups"
        if reason:
            passed_over.append(PassedOver(path_name(path), use.op, reason))
        else:
            kernels.append(Kernel(path, tuple(weight.shape), *use.place, op=use.op))
    for number in walk.multiplied.difference(walk.uses):
        name = path_name(leaves[number][0])
        passed_over.append(PassedOver(name, "dense", "is multiplied by another parameter"))
    return Trace(tuple(kernels), tuple(passed_over))


def _is_static(argument: Any) -> bool:
    return isinstance(argument, bool | np.bool_ | str)


_Atom = tuple[int | None, int]
"""An axis and its size; the axis is None if it is not one of the parameter."""


@dataclass(frozen=True)
class _Origin:
    """How a value derives from parameters.

    Attributes:
      leaves: numbers of the parameters; one, unless the link is lost.
      axes: what each axis of the value runs along, the outermost first; None where the link is
        lost.
      indexed: axes of the parameter of which the value is one index.
      reason: how the link was lost.
      activation: whether the value came out of a convolution, a matrix product or a look-up; of
        what is computed from it no parameter is the weight.
      spread: of an activation, whether it was broadcast, as a scale of a weight is.
      mixed: whether a value of the same shape that is no parameter was added, say: a mask of a
        weight, or an input to which the parameter is added.
    """

    leaves: tuple[int, ...] = ()
    axes: tuple[tuple[_Atom, ...], ...] | None = None
    indexed: tuple[int, ...] = ()
    reason: str = ""
    activation: bool = False
    spread: bool = False
    mixed: bool = False


_Origins = Sequence[_Origin | None]


class _Use(NamedTuple):
    """One use of a parameter as a weight: `out_axis`, `batch_axes` and `groups`, or why not.

    `computed` is whether the weight is what a layer of that parameter computes.
    """

    op: str
    place: tuple[int, tuple[int, ...], int] = (0, (), 1)
    reason: str = ""
    computed: bool = False


_SAME_AXES = frozenset(
    "convert_element_type copy copy_p rev sharding_constraint reshard "
    "reduce_precision name neg abs sign tanh logistic round floor ceil clamp square integer_pow "
    "sqrt rsqrt mul add sub div max min add_any select_n stop_gradient pvary pcast".split()
)


@dataclass
class _Walk:
    """Follows parameters through a jaxpr and its inner ones.

    Attributes:
      uses: of each parameter as a weight.
      multiplied: parameters that are multiplied by another one, as LoRA's factors are.
    """

    uses: dict[int, list[_Use]] = field(default_factory=dict)
    multiplied: set[int] = field(default_factory=set)

    def jaxpr(self, jaxpr: Any, origins: _Origins) -> list[_Origin | None]:
        known = dict(zip(jaxpr.invars, origins, strict=True))

        def origin(atom: Any) -> _Origin | None:
            return None if isinstance(atom, Literal) else known.get(atom)

        for eqn in jaxpr.eqns:
            results = self.equation(eqn, [origin(atom) for atom in eqn.invars])
            known |= dict(zip(eqn.outvars, results, strict=True))
        return [origin(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, origins: list[_Origin | None]) -> _Origins:
        name = eqn.primitive.name
        # A callback, such as that of `jax.debug.print`, has no results.
        if not any(origins) or not eqn.outvars:
            return [None] * len(eqn.outvars)
        if name == "conv_general_dilated":
            self.convolution(eqn, origins[1])
            return [_activation(origins[::-1], name)]
        if name == "dot_general":
            return [self.product(origins, *eqn.params["dimension_numbers"])]
        if name.startswith("ragged_dot"):
            numbers = eqn.params["ragged_dot_dimension_numbers"]
            contracted, batched = numbers.dot_dimension_numbers
            experts = (*batched[1], *numbers.rhs_group_dimensions)
            return [self.product(origins[:2], contracted, (batched[0], experts))]
        if name in ("scan", "while"):
            return self.loop(eqn, origins)
        if name == "optimization_barrier":
            return origins
        # Names of parameters change between releases of JAX, so jaxprs are known by their kind.
        inner = [jaxpr for value in eqn.params.values() for jaxpr in _jaxprs(value)]
        if name == "cond":
            branches = [self.jaxpr(jaxpr, origins[1:]) for jaxpr in inner]
            return [_agreed(column, name) for column in zip(*branches, strict=True)]
        called = [jaxpr for jaxpr in inner if len(jaxpr.invars) == len(origins)]
        if called:
            return self.jaxpr(called[0], _entering(eqn.invars, called[0].invars, origins, name))
        for op in ("conv", "dense"):
            if any(_holds(jaxpr, op) for jaxpr in inner) and not _lost(origins, name).activation:
                self.record(op, _lost(origins, name), [], 1)
        if len(eqn.outvars) > 1 and name not in ("split", "unstack"):
            return [_lost(origins, name)] * len(eqn.outvars)
        return [_follow(eqn, variable, origins) for variable in eqn.outvars]

    def loop(self, eqn: Any, origins: list[_Origin | None]) -> _Origins:
        """Follows a scan or while loop until what it carries stays what it is."""
        body = [jaxpr for value in eqn.params.values() for jaxpr in _jaxprs(value)][-1]
        # A condition's constants come first. Then constants, what is carried, and what is scanned.
        outer = eqn.invars[-len(body.invars) :]
        given = _entering(outer, body.invars, origins[-len(outer) :], eqn.primitive.name)
        carried = sum(
            _shape(a) == _shape(b) for a, b in zip(eqn.outvars, body.outvars, strict=True)
        )
        end = sum(len(_shape(a)) == len(_shape(b)) for a, b in zip(outer, body.invars, strict=True))
        while True:
            results = self.jaxpr(body, given)
            pairs = zip(given[end - carried : end], results[:carried], strict=True)
            agreed = [_agreed(pair, eqn.primitive.name) for pair in pairs]
            if agreed == given[end - carried : end]:
                return [o and _lost([o], eqn.primitive.name) for o in results]
            given[end - carried : end] = agreed

    def convolution(self, eqn: Any, weight: _Origin | None) -> None:
        """Records the weight of a convolution."""
        out = eqn.params["dimension_numbers"].rhs_spec[0]
        op = "conv_transpose" if max(eqn.params["lhs_dilation"], default=1) > 1 else "conv"
        groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
        if weight is not None:
            self.record(op, weight, [weight.axes[out]] if weight.axes else [], groups)

    def product(self, origins: _Origins, contracted: Any, batched: Any) -> _Origin:
        """Records the weight of a matrix product, one of whose operands is a parameter."""
        sides = [side for side, o in enumerate(origins) if o and o.axes is not None]
        if len(sides) == 2:
            # An input with a parameter added to it, times a weight.
            sides = [side for side in sides if not origins[side].mixed] or sides  # type: ignore[union-attr]
        if len(sides) == 1:
            (side,) = sides
            weight, gone = origins[side], {*contracted[side], *batched[side]}
            assert weight and weight.axes is not None
            kept = [atoms for d, atoms in enumerate(weight.axes) if d not in gone]
            together = [atom for d in batched[side] for atom in weight.axes[d]]
            indexed = (axis for axis, size in together if axis is not None and size > 1)
            self.record("dense", replace(weight, indexed=(*weight.indexed, *indexed)), kept, 1)
            return _activation([weight], "dot_general")
        for origin in origins:
            if not sides and origin and not origin.activation:
                self.record("dense", origin, [], 1)
            elif sides and origin and origin.mixed:
                reason = "is combined with another value before a product with a parameter"
                self.record("dense", replace(origin, reason=reason), [], 1)
        if sides and not any(origin and origin.mixed for origin in origins):
            # A product such as LoRA's, which may be a weight itself.
            leaves = {origin.leaves for origin in origins if origin}
            self.multiplied |= {leaf for (leaf,) in leaves} if len(leaves) == 2 else set()
        return (_lost if sides else _activation)(origins, "dot_general")

    def record(
        self, op: str, weight: _Origin, outputs: Sequence[tuple[_Atom, ...]], groups: int
    ) -> None:
        """Records a use.

        Args:
          op: the operation.
          weight: its operand.
          outputs: what the operand's output axes run along; none where the link is lost. Only the
            innermost indexes units: the others are the members of a vmapped ensemble, or heads.
          groups: of a grouped convolution.
        """
        reason = weight.reason or "its output axis is lost by a reshape"
        use = _Use(op, reason=reason, computed=weight.activation)
        atoms: list[_Atom] = []
        if outputs:
            *outer, last = outputs
            atoms = [atom for axis in outer for atom in axis if atom[1] > 1]
            # A convolution's weight has one output axis, which vmap merges with that of the batch.
            atoms += last if op != "dense" else [a for a in last if a[1] > 1] or last[:1]
        axes = [axis for axis, _ in atoms if axis is not None]
        if axes and len(axes) == len(atoms):
            *batch, (_, units) = atoms
            # If the members of an ensemble share their input, groups come first, then members.
            unclear = groups == math.prod(size for _, size in batch) > 1 and axes[-1] < axes[0]
            for _, size in batch:
                groups = groups // size if groups % size == 0 else groups
            if unclear:
                use = use._replace(reason="its groups and another axis cannot be told apart")
            elif units % groups == 0:
                batch_axes = tuple(sorted({*weight.indexed, *axes[:-1]}))
                use = _Use(op, (axes[-1], batch_axes, groups))
        for leaf in weight.leaves:
            self.uses.setdefault(leaf, []).append(use)


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def _jaxprs(value: Any) -> list[Any]:
    """The jaxprs in an equation's parameter, which may be closed or a tuple of them."""
    values = value if isinstance(value, tuple | list) else (value,)
    opened = [getattr(one, "jaxpr", one) for one in values]
    return [one for one in opened if hasattr(one, "eqns") and hasattr(one, "invars")]


def _holds(jaxpr: Any, op: str) -> bool:
    """Whether a jaxpr, or one inside it, has such an operation."""
    primitive = "conv_general_dilated" if op == "conv" else "dot_general"
    return any(
        eqn.primitive.name == primitive
        or any(_holds(inner, op) for value in eqn.params.values() for inner in _jaxprs(value))
        for eqn in jaxpr.eqns
    )


def _lost(origins: Iterable[_Origin | None], name: str) -> _Origin:
    """The origin after an operation that cannot be followed."""
    given = [o for o in origins if o is not None]
    known = [o for o in given if not o.activation]
    if not known:
        return replace(given[0], spread=False)
    reason = next((o.reason for o in known if o.reason), f"is computed from it by {name!r}")
    return _Origin(tuple(sorted({leaf for o in known for leaf in o.leaves})), reason=reason)


def _activation(origins: Iterable[_Origin | None], name: str) -> _Origin:
    return replace(_lost(origins, name), activation=True)


def _agreed(origins: _Origins, name: str) -> _Origin | None:
    """What all branches of a conditional, or iterations of a loop, agree on; else it is lost."""
    return origins[0] if all(o == origins[0] for o in origins) else _lost(origins, name)


def _entering(
    outer: Sequence[Any], inner: Sequence[Any], origins: _Origins, name: str
) -> list[_Origin | None]:
    """The origins inside a called jaxpr, which may get one index of the first axis (`scan`)."""
    given: list[_Origin | None] = []
    for variable, argument, origin in zip(outer, inner, origins, strict=True):
        if origin and origin.axes is not None and _shape(variable) != _shape(argument):
            if _shape(variable)[1:] == _shape(argument):
                origin = _indexed(origin, origin.axes[1:], origin.axes[0], name)
            else:
                origin = _lost([origin], name)
        given.append(origin)
    return given


def _indexed(
    origin: _Origin, axes: tuple[tuple[_Atom, ...], ...], removed: Iterable[_Atom], name: str
) -> _Origin:
    """The origin of one index along axes that are removed: of one layer of a stack."""
    gone = [axis for axis, size in removed if size > 1]
    if None in gone:
        return _lost([origin], name)
    indexed = (axis for axis in gone if axis is not None)
    return replace(origin, axes=axes, indexed=(*origin.indexed, *indexed))


def _follow(eqn: Any, result: Any, origins: list[_Origin | None]) -> _Origin:
    """The origin of a result of an equation, from those of its operands."""
    name, params, out = eqn.primitive.name, eqn.params, _shape(result)
    if name in _SAME_AXES:
        return _elementwise(eqn, origins, out)
    source, shape = origins[0], _shape(eqn.invars[0])
    activation = next((o for o in origins if o and o.activation), None)
    if activation:
        wider = math.prod(out) > math.prod(shape)
        scale = name == "broadcast_in_dim" and (wider or activation.spread)
        return replace(activation, spread=scale)
    if source is None or source.axes is None:
        return _lost(origins, name)  # The parameter may be an index, or what is written.
    axes = source.axes
    if name == "transpose":
        return replace(source, axes=tuple(axes[d] for d in params["permutation"]))
    if name == "squeeze":
        kept = (atoms for d, atoms in enumerate(axes) if d not in params["dimensions"])
        return replace(source, axes=tuple(kept))
    if name == "reshape":
        order = params["dimensions"] or range(len(axes))
        return replace(source, axes=_reshaped([axes[d] for d in order], out))
    if name == "broadcast_in_dim":
        spread: list[tuple[_Atom, ...]] = [((None, size),) for size in out]
        for d, to in enumerate(params["broadcast_dimensions"]):
            if shape[d] == out[to]:
                spread[to] = axes[d]
        return replace(source, axes=tuple(spread))
    if name in ("slice", "dynamic_slice", "split"):
        # One index of an axis is a layer of a stack; a part of an axis is no unit.
        cut = [d for d in range(len(out)) if out[d] != shape[d]]
        if all(out[d] == 1 for d in cut):
            rest = tuple(((None, 1),) if d in cut else axes[d] for d in range(len(out)))
            return _indexed(source, rest, (atom for d in cut for atom in axes[d]), name)
    if name == "unstack":
        d = params["axis"]
        return _indexed(source, axes[:d] + axes[d + 1 :], axes[d], name)
    if name == "gather":
        # `w[i]` with a traced index, a weight for each example, or a look-up in a table.
        sizes = tuple(params["slice_sizes"])
        first = tuple(params["dimension_numbers"].start_index_map) == (0,)
        if first and sizes == (1, *shape[1:]) and out == shape[1:]:
            return _indexed(source, axes[1:], axes[0], name)
        matrices = sum(size > 1 for size in sizes) > 1
        return (_lost if matrices else _activation)([source], name)
    return _lost(origins, name)


def _elementwise(eqn: Any, origins: list[_Origin | None], out: tuple[int, ...]) -> _Origin:
    """The origin of an elementwise result of shape `out`.

    Of a weight with its scale, in any order, it is the weight's: the one that runs along every
    axis. A scale is a parameter of its own spread over the weight's shape, or the weight's own
    statistics, to which the link is lost.
    """
    carried, mixed, activations = [], False, []
    for variable, origin in zip(eqn.invars, origins, strict=True):
        same = _shape(variable) == out
        if origin is None:
            mixed |= same and out != () and not isinstance(variable, Literal)
        elif origin.activation and not origin.spread and same and math.prod(out) > 1:
            activations.append(origin)  # A scale is spread over the weight; this is not.
        else:
            carried.append(origin if same else _lost([origin], eqn.primitive.name))
    if activations:
        # With those of a weight that is added. A bias is broadcast first, to axes of None.
        own = [o for o in carried if o.axes and all(a is not None for x in o.axes for a, _ in x)]
        leaves = {leaf for o in (*activations, *own) for leaf in o.leaves}
        return replace(activations[0], leaves=tuple(sorted(leaves)))
    # An axis of size 1 runs along anything.
    kept = {o for o in carried if o.axes is not None}
    full = {o for o in kept if _is_full(o)}
    alone = len(kept) == 1 == len({o.leaves for o in carried if not o.activation})
    if len(full) != 1 and not alone:
        return _lost(carried, eqn.primitive.name)
    (found,) = full if len(full) == 1 else kept
    return replace(found, mixed=mixed or found.mixed)


def _is_full(origin: _Origin) -> bool:
    """Whether each axis of a value, but those of size 1, runs along the parameter."""
    return not any(axis is None and size > 1 for atoms in origin.axes or () for axis, size in atoms)


def _reshaped(
    axes: Sequence[tuple[_Atom, ...]], new: Sequence[int]
) -> tuple[tuple[_Atom, ...], ...]:
    """Axes after a reshape: the sequence of all sizes, divided again; lost if an axis is split."""
    # An axis of the parameter counts even at size 1: a vmapped layer may have one output.
    atoms = [atom for axis in axes for atom in axis if atom != (None, 1)]
    found: list[tuple[_Atom, ...]] = []
    for number, size in enumerate(new):
        taken: list[_Atom] = []
        following = new[number + 1] if number + 1 < len(new) else 0
        while atoms and (
            math.prod(s for _, s in taken) < size or (atoms[0][1] == 1 and following != 1)
        ):
            taken.append(atoms.pop(0))
        product = math.prod(s for _, s in taken)
        if product == size:
            found.append(tuple(taken) or ((None, 1),))
            continue
        # The rest of the last axis continues in the next one; neither runs along the parameter.
        if not size or product % size:
            return tuple(((None, s),) for s in new)
        found.append(((None, size),))
        atoms.insert(0, (None, product // size))
    return tuple(found)
