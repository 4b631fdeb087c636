"""What merges: units, their weights, and which of them may merge with each other."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
_VALUE = jax.tree_util.GetAttrKey("value")


@dataclass(frozen=True)
class Kernel:
    """A weight in a parameter tree, and how it divides into units.

    A *unit* is an index along `out_axis`: a kernel of a convolution (one output filter, `w[..., i]`
    in HWIO), a neuron of a Dense layer, an attention head, an expert. A *problem* is a set of units
    that may merge with each other. The axes below are those of the weight, or of `view` if given.

    Attributes:
      path: the weight's key path, as `jax.tree_util.tree_flatten_with_path` gives it.
      shape: the weight's shape.
      out_axis: the axis that indexes units.
      batch_axes: axes that index independent problems: the layers of a scanned stack, say.
      groups: consecutive blocks of units that are independent problems, since they read different
        inputs: the groups of a grouped or depthwise convolution.
      group: weights with the same label form one unit together; see `tie`.
      compared: whether the weight counts in the similarity of its group; a weight that does not is
        mixed along with the others (a bias, an output projection).
      view: a shape that the weight is reshaped to first, such as (d, 3, H, h) of a fused QKV weight
        (d, 3 * H * h).
      op: what reads the weight: "conv", "conv_transpose" or "dense". For predicates and reports.

    Raises:
      ValueError: an axis out of range or named twice, groups that do not divide the units, or a
        view of another size.
    """

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    out_axis: int
    batch_axes: tuple[int, ...] = ()
    groups: int = 1
    group: str | None = None
    compared: bool = True
    view: tuple[int, ...] | None = None
    op: str = "conv"

    def __post_init__(self) -> None:
        name = path_name(canonical_path(self.path))
        if self.view is not None and math.prod(self.view) != math.prod(self.shape):
            raise ValueError(
                f"kernel {name!r}: view {self.view} has {math.prod(self.view)} entries, but shape "
                f"{self.shape} has {math.prod(self.shape)}"
            )
        dims = self.dims
        axes = (self.out_axis, *self.batch_axes)
        for axis in axes:
            if not -len(dims) <= axis < len(dims):
                raise ValueError(
                    f"kernel {name!r}: axis {axis} is out of range for shape {dims}; choose one of "
                    f"{-len(dims)} to {len(dims) - 1}"
                )
        out_axis, *batch_axes = (axis % len(dims) for axis in axes)
        if len({out_axis, *batch_axes}) != len(axes):
            raise ValueError(
                f"kernel {name!r}: out_axis {self.out_axis} and batch_axes {self.batch_axes} name "
                f"an axis of shape {dims} twice"
            )
        if self.groups < 1 or dims[out_axis] % self.groups:
            raise ValueError(
                f"kernel {name!r}: groups is {self.groups}, which does not divide the "
                f"{dims[out_axis]} units along axis {out_axis}"
            )
        object.__setattr__(self, "out_axis", out_axis)
        object.__setattr__(self, "batch_axes", tuple(batch_axes))

    @property
    def name(self) -> str:
        """The path as text, `"layer1/conv1/kernel"`; the same for all forms of a Flax NNX state."""
        return path_name(canonical_path(self.path))

    @property
    def unit(self) -> str:
        """The label of the group, or the name of a weight that is in none; draws depend on it."""
        return self.name if self.group is None else self.group

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape that the axes refer to."""
        return self.shape if self.view is None else self.view

    @property
    def problems(self) -> int:
        """How many independent problems the weight holds."""
        return math.prod(self.dims[axis] for axis in self.batch_axes) * self.groups

    @property
    def units(self) -> int:
        """Units of one problem."""
        return self.dims[self.out_axis] // self.groups

    @property
    def count(self) -> int:
        """Units of all problems together."""
        return self.problems * self.units


def path_name(path: Sequence[Any]) -> str:
    """A key path as text with slashes, the form in which paths are shown and matched."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def canonical_path(path: Sequence[Any]) -> tuple[Any, ...]:
    """A key path without the last key, `value`, of a Flax NNX variable.

    `nnx.split` gives states whose paths have it; `nnx.as_pure`, by which `nnx.Optimizer` calls a
    transformation, takes it away.
    """
    path = tuple(path)
    return path[:-1] if path[-1:] == (_VALUE,) else path


def as_rows(weight: jax.Array, kernel: Kernel) -> jax.Array:
    """The weight as (problems, units, ...), the other axes in their order.

    They are not flattened: that would gather a weight which is sharded along one of them.
    """
    front, rest = _divided(kernel)
    moved = jnp.moveaxis(weight.reshape(kernel.dims), front, range(len(front)))
    return moved.reshape(kernel.problems, kernel.units, *(kernel.dims[axis] for axis in rest))


def from_rows(rows: jax.Array, kernel: Kernel) -> jax.Array:
    """The inverse of `as_rows`."""
    front, rest = _divided(kernel)
    moved = rows.reshape(*(kernel.dims[axis] for axis in (*front, *rest)))
    return jnp.moveaxis(moved, range(len(front)), front).reshape(kernel.shape)


def _divided(kernel: Kernel) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of problems and units, and all others."""
    front = (*kernel.batch_axes, kernel.out_axis)
    return front, tuple(axis for axis in range(len(kernel.dims)) if axis not in front)


def tie(
    kernels: Iterable[Kernel], name: str, compared: Callable[[Kernel], bool] | None = None
) -> tuple[Kernel, ...]:
    """Weights whose units belong together: unit i of one merges with unit i of the others.

    Example, a neuron with its bias:
      >>> import jax
      >>> path = lambda *keys: tuple(map(jax.tree_util.DictKey, keys))
      >>> weight = Kernel(path("fc", "kernel"), (16, 32), out_axis=1, op="dense")
      >>> bias = Kernel(path("fc", "bias"), (32,), out_axis=0, op="dense")
      >>> tied = tie([weight, bias], "fc", compared=lambda kernel: kernel is weight)
      >>> [(kernel.name, kernel.group, kernel.compared) for kernel in tied]
      [('fc/kernel', 'fc', True), ('fc/bias', 'fc', False)]

    Args:
      kernels: of equally many problems and units.
      name: the label of the group.
      compared: says of each weight whether it counts in the similarity; by default all do.

    Raises:
      ValueError: no kernels, kernels of different numbers of units, or none that is compared.
    """
    tied = tuple(
        replace(kernel, group=name, compared=compared is None or compared(kernel))
        for kernel in kernels
    )
    group_units(tied)
    return tied


def group_units(kernels: Sequence[Kernel]) -> tuple[tuple[Kernel, ...], ...]:
    """The kernels by unit: weights of one group together, at the place of the first of them.

    Raises:
      ValueError: no kernels; weights of one group that have different numbers of units or none
        that is compared; a weight that is given twice.
    """
    if not kernels:
        raise ValueError("kernels is empty; select some with find_kernels and deep_kernels")
    found: dict[tuple[bool, str], list[Kernel]] = {}
    names: set[str] = set()
    for kernel in kernels:
        if kernel.name in names:
            raise ValueError(f"kernel {kernel.name!r} is given twice; give each weight once")
        names.add(kernel.name)
        found.setdefault((kernel.group is None, kernel.unit), []).append(kernel)
    for (_, name), members in found.items():
        sizes = {(kernel.problems, kernel.units) for kernel in members}
        if len(sizes) > 1:
            listed = ", ".join(f"{k.name}: {k.problems} x {k.units}" for k in members)
            raise ValueError(
                f"the weights of group {name!r} have different numbers of problems x units, "
                f"{listed}"
            )
        if not any(kernel.compared for kernel in members):
            raise ValueError(f"no weight of group {name!r} is compared; leave compared=True on one")
    return tuple(map(tuple, found.values()))


def attention_heads(
    params: PyTree,
    name: str,
    *,
    query: str,
    key: str,
    value: str,
    out: str,
    heads: int | None = None,
    biases: Sequence[str] = (),
    out_first: bool = False,
) -> tuple[Kernel, ...]:
    """The heads of one attention layer: the query, key, value and output weights of each.

    Two heads are compared by their query, key and value weights. The output weight, and biases, are
    mixed along with them. For a fused QKV weight (d, 3 * H * h), name it as query, key and value.

    Args:
      params: the tree that holds the weights.
      name: the label of the group.
      query: name of the query's weight, as `Kernel.name` gives it: (d, H, h) as in Flax, or
        (d, H * h) with `heads`.
      key: likewise.
      value: likewise.
      out: name of the output weight: (H, h, d) as in Flax, or (H * h, d) with `heads`.
      heads: H; needed where the weights have two axes.
      biases: names of biases of the query, key and value, (H, h), (H * h,) or (3 * H * h,).
      out_first: whether weights of two axes have their outputs first, as in PyTorch and Equinox.

    Raises:
      ValueError: a name that is not in `params`, or shapes that do not divide into heads.
    """
    leaves = {
        path_name(canonical_path(path)): (path, tuple(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def shape_of(weight: str) -> tuple[int, ...]:
        if weight not in leaves:
            raise ValueError(
                f"{weight!r} is not in params; its leaves begin with {', '.join(list(leaves)[:3])}"
            )
        return leaves[weight][1]

    whole = len(shape_of(out)) == 3
    count = shape_of(out)[0] if whole else heads
    if count is None:
        raise ValueError(f"{out!r} has shape {shape_of(out)}: give heads, the number of heads")
    if heads not in (None, count):
        raise ValueError(f"{out!r} has shape {shape_of(out)}, which is {count} heads, not {heads}")
    width = shape_of(out)[1] if whole else shape_of(out)[-1 if out_first else 0] // count

    def make(weight: str, along: int, compared: bool, parts: Sequence[int]) -> Kernel:
        """The heads of a weight along one axis, which holds one of `parts` times all heads."""
        shape = shape_of(weight)
        if shape[along : along + 2] == (count, width) and 1 in parts:
            return Kernel(
                leaves[weight][0], shape, along, group=name, compared=compared, op="dense"
            )
        found = [part for part in parts if shape[along] == part * count * width]
        if not found:
            raise ValueError(
                f"{weight!r} has shape {shape}: axis {along} is not "
                f"{' or '.join(map(str, parts))} x {count} heads x {width}"
            )
        before, after = shape[:along], shape[along + 1 :]
        view = (*before, found[0], count, width, *after)
        axis = len(before) + 1
        return Kernel(
            leaves[weight][0], shape, axis, group=name, compared=compared, view=view, op="dense"
        )

    inputs = [query, key, value]
    found = []
    for weight in dict.fromkeys(inputs):
        flat = len(shape_of(weight)) == 2
        along = 0 if flat and out_first else 1
        found.append(make(weight, along, True, [inputs.count(weight)]))
    found.append(make(out, 1 if out_first and not whole else 0, False, [1]))
    found += [make(bias, 0, False, [1, 2, 3]) for bias in biases]
    group_units(found)
    return tuple(found)


def experts(params: PyTree, name: str, weights: Sequence[str], axis: int = 0) -> tuple[Kernel, ...]:
    """The experts of a mixture layer: all named weights of each are compared and mixed.

    Args:
      params: the tree that holds the weights.
      name: the label of the group.
      weights: names of the weights, as `Kernel.name` gives them.
      axis: the axis that indexes experts.

    Raises:
      ValueError: a name that is not in `params`, or different numbers of experts.
    """
    leaves = {
        path_name(canonical_path(path)): (path, tuple(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    missing = [weight for weight in weights if weight not in leaves]
    if missing:
        raise ValueError(
            f"{missing[0]!r} is not in params; its leaves begin with {', '.join(list(leaves)[:3])}"
        )
    return tie([Kernel(*leaves[weight], out_axis=axis, op="dense") for weight in weights], name)


def deep_kernels(
    kernels: Sequence[Kernel],
    skip: int = 10,
    where: Callable[[Kernel], bool] | None = None,
) -> tuple[Kernel, ...]:
    """Selects the deep layers: all but the first `skip` in forward order.

    The paper's L_s is `skip` (arXiv 2502.20516; its released code's default is 10).

    Args:
      kernels: what `find_kernels` returns.
      skip: how many weights to leave alone, counted from the input.
      where: keeps, of the others, those for which it returns true:
        `deep_kernels(kernels, skip=0, where=lambda kernel: "conv2" in kernel.name)`.

    Returns:
      The selected kernels, in the same order.

    Raises:
      ValueError: `skip` is negative, or nothing is selected.
    """
    if skip < 0:
        raise ValueError(f"skip is {skip}; it counts weights to leave alone, so 0 or more")
    deep = tuple(kernel for kernel in kernels[skip:] if where is None or where(kernel))
    if not deep:
        names = ", ".join(kernel.name for kernel in kernels[-3:])
        rest = "" if where is None else " and the predicate"
        few = (
            ""
            if len(kernels) > 3
            else (
                ". A network that consists of other layers has its units in "
                'find_kernels(..., ops=("conv", "dense")) or attention_heads'
            )
        )
        raise ValueError(
            f"skip={skip}{rest} selects none of the {len(kernels)} weights"
            + (f" (the last: {names})" if names else "")
            + "; choose a smaller skip or another predicate"
            + few
        )
    return deep
