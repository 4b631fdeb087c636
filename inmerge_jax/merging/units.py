"""What merges: units, their weights, and which of them may merge with each other."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


@dataclass(frozen=True)
class Kernel:
    """A weight in a parameter tree, and how it divides into units.

    A *unit* is an index along `out_axis`: a kernel of a convolution (one output filter, `w[..., i]`
    in HWIO), a neuron of a Dense layer, an attention head, an expert. A *problem* is a set of units
    that may merge with each other. The axes below are those of the weight, or of `view` if given.

    Attributes:
      path: Key path of the weight, from `jax.tree_util.tree_flatten_with_path`.
      shape: Shape of the weight.
      out_axis: Axis that indexes units.
      batch_axes: Axes that index independent problems, such as the layers of a scanned stack.
      groups: Number of consecutive blocks of units that are independent problems, because they read
        different inputs: the groups of a grouped or depthwise convolution.
      group: Label of the weights that form one unit together; see `tie`.
      compared: Whether the weight is part of the similarity of its group. If not, it is only mixed
        with the others (a bias, an output projection).
      view: Shape that the weight is reshaped to first, such as (d, 3, H, h) for a fused QKV weight
        (d, 3 * H * h).
      op: Operation that reads the weight, `"conv"`, `"conv_transpose"` or `"dense"`, for predicates
        and reports.

    Raises:
      ValueError: An axis out of range or named twice, groups that do not divide the units, or a
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
        def refuse(reason: str) -> None:
            raise ValueError(f"kernel {self.name!r}: {reason}")

        for name in ("path", "shape", "batch_axes", "view"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
            elif not (isinstance(value, tuple) or (name == "view" and value is None)):
                remedy = "; for a name give Kernel.named(params, name, ...)" * (name == "path")
                raise ValueError(f"{name} of a kernel is {value!r}; give a tuple{remedy}")
        if self.view is not None and math.prod(self.view) != math.prod(self.shape):
            refuse(
                f"view {self.view} has {math.prod(self.view)} entries, but shape {self.shape} has "
                f"{math.prod(self.shape)}"
            )
        dims, axes = self.dims, (self.out_axis, *self.batch_axes)
        for axis in axes:
            if not -len(dims) <= axis < len(dims):
                refuse(
                    f"axis {axis} is out of range for shape {dims}; choose one of {-len(dims)} to "
                    f"{len(dims) - 1}"
                )
        out_axis, *batch_axes = (axis % len(dims) for axis in axes)
        if len({out_axis, *batch_axes}) != len(axes):
            refuse(
                f"out_axis {self.out_axis} and batch_axes {self.batch_axes} name an axis of shape "
                f"{dims} twice"
            )
        if self.groups < 1 or dims[out_axis] % self.groups:
            refuse(
                f"groups is {self.groups}, which does not divide the {dims[out_axis]} units along "
                f"axis {out_axis}"
            )
        object.__setattr__(self, "out_axis", out_axis)
        object.__setattr__(self, "batch_axes", tuple(batch_axes))

    @classmethod
    def named(cls, params: PyTree, name: str, out_axis: int, **fields: Any) -> "Kernel":
        """A kernel for the leaf of `params` with this name, such as a bias for `tie`.

        Args:
          params: A parameter tree.
          name: Path of the leaf as text, such as `"fc/bias"`.
          out_axis: Axis that indexes units.
          **fields: Other fields of the kernel.

        Raises:
          ValueError: No leaf has this name, or a field does not fit its shape.
        """
        return cls(*_leaf(params, name), out_axis, **fields)

    @property
    def name(self) -> str:
        """Path as text, such as `"layer1/conv1/kernel"`; the same for all forms of an NNX state.

        A last attribute `value` is taken for that of an NNX variable, and left out.
        """
        return path_name(self.path)

    @property
    def label(self) -> str:
        """Label of the group, or the name of a weight without a group. Draws depend on it."""
        return self.name if self.group is None else self.group

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape that the axes refer to: `view` if given, otherwise `shape`."""
        return self.shape if self.view is None else self.view

    @property
    def problems(self) -> int:
        """Number of independent problems in the weight."""
        return math.prod(self.dims[axis] for axis in self.batch_axes) * self.groups

    @property
    def units(self) -> int:
        """Number of units of one problem."""
        return self.dims[self.out_axis] // self.groups

    @property
    def count(self) -> int:
        """Number of units of all problems together."""
        return self.problems * self.units


def path_name(path: Sequence[Any]) -> str:
    """A key path as text with slashes, by which weights are shown and matched.

    Without the last key, `value`, of a Flax NNX variable: `nnx.split` gives it, `nnx.as_pure`, by
    which `nnx.Optimizer` calls a transformation, takes it away. A path of that key alone keeps it.
    """
    path = tuple(path)
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def as_rows(weight: jax.Array, kernel: Kernel) -> jax.Array:
    """The weight as (problems, units, ...), the other axes in their order.

    They are not flattened: that would gather a weight which is sharded along one of them.
    """
    front = (*kernel.batch_axes, kernel.out_axis)
    moved = jnp.moveaxis(weight.reshape(kernel.dims), front, range(len(front)))
    return moved.reshape(kernel.problems, kernel.units, *moved.shape[len(front) :])


def from_rows(rows: jax.Array, kernel: Kernel) -> jax.Array:
    """The inverse of `as_rows`."""
    front = (*kernel.batch_axes, kernel.out_axis)
    moved = rows.reshape(*(kernel.dims[axis] for axis in front), *rows.shape[2:])
    return jnp.moveaxis(moved, range(len(front)), front).reshape(kernel.shape)


def weights_of(
    kernels: Sequence[Kernel], tree: PyTree, what: str = "params"
) -> tuple[dict[str, jax.Array], Callable[[dict[str, jax.Array]], PyTree]]:
    """The leaves of the kernels by name, and a function that puts new ones in their places.

    Args:
      kernels: of the tree, or of one with the same names, such as a Flax NNX module and its state.
      tree: params or updates; leaves of other kernels may be anything, None too.
      what: the tree's name in error messages.

    Raises:
      ValueError: a kernel that is not there, or whose leaf has another shape or no floating dtype.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    names = [path_name(path) for path, _ in flat]
    place = {name: number for number, name in enumerate(names)}
    found = {}
    for kernel in kernels:
        name = kernel.name
        if name not in place:
            raise ValueError(
                f"kernel {name!r} is not in {what}, whose {len(flat)} leaves begin with "
                f"{', '.join(names[:3])}; give the same tree as to find_kernels, and no kernels "
                "that optax.masked or optax.partition hides"
            )
        if names.count(name) > 1:
            raise ValueError(
                f"kernel {name!r} is the name of two leaves of {what}; rename one of them"
            )
        leaf = flat[place[name]][1]
        if leaf is None:
            raise ValueError(
                f"kernel {name!r} is None in {what}; differentiate by it or leave it out of kernels"
            )
        if tuple(leaf.shape) != kernel.shape:
            raise ValueError(
                f"kernel {name!r} was found with shape {kernel.shape} but has {tuple(leaf.shape)} "
                f"in {what}; find the kernels of this network again. Merge outside of shard_map, "
                "in which a device sees its part of a weight, and stacked networks under jax.vmap"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"kernel {name!r} has dtype {leaf.dtype}; only floating-point weights can be "
                "mixed, so merge before quantising, or leave it out of kernels"
            )
        found[name] = leaf.__jax_array__() if holds_array(leaf) else leaf

    def put(new: dict[str, jax.Array]) -> PyTree:
        leaves = [leaf for _, leaf in flat]
        for name, leaf in new.items():
            leaves[place[name]] = leaf
        return jax.tree.unflatten(structure, leaves)

    return found, put


def holds_array(leaf: Any) -> bool:
    """Whether a leaf is an object around an array, such as a variable of Keras."""
    return not isinstance(leaf, jax.Array) and hasattr(leaf, "__jax_array__")


def as_kernels(kernels: Iterable[Kernel]) -> tuple[Kernel, ...]:
    """The kernels as a tuple, of any iterable.

    Raises:
      ValueError: something else than kernels.
    """
    found = tuple(kernels) if isinstance(kernels, Iterable) else (kernels,)
    if not isinstance(kernels, Iterable) or not all(isinstance(one, Kernel) for one in found):
        raise ValueError(
            f"kernels must be a sequence of Kernel, such as find_kernels(...) or "
            f"trace_kernels(...).kernels; it is {kernels!r:.80}"
        )
    return found


def group_weights(kernels: Sequence[Kernel]) -> tuple[tuple[Kernel, ...], ...]:
    """The kernels by unit: weights of one group together, at the place of the first of them.

    Raises:
      ValueError: no kernels, or something else than kernels; weights of one group that have
        different numbers of units or none that is compared; a weight that is empty or given twice.
    """
    kernels = as_kernels(kernels)
    if not kernels:
        raise ValueError("kernels is empty; select some with find_kernels and deep_kernels")
    names = [kernel.name for kernel in kernels]
    found: dict[tuple[bool, str], list[Kernel]] = {}
    for kernel in kernels:
        if names.count(kernel.name) > 1:
            raise ValueError(
                f"kernel {kernel.name!r} is given twice, or is the name of two leaves; give each "
                "weight once, and rename one of two leaves of one name"
            )
        if not math.prod(kernel.shape):
            raise ValueError(f"kernel {kernel.name!r} has shape {kernel.shape}, which is empty")
        found.setdefault((kernel.group is None, kernel.label), []).append(kernel)
    for (_, name), members in found.items():
        if len({(kernel.problems, kernel.units) for kernel in members}) > 1:
            listed = ", ".join(f"{k.name}: {k.problems} x {k.units}" for k in members)
            raise ValueError(
                f"the weights of group {name!r} have different numbers of problems x units, "
                f"{listed}"
            )
        if not any(kernel.compared for kernel in members):
            raise ValueError(f"no weight of group {name!r} is compared; leave compared=True on one")
    return tuple(map(tuple, found.values()))


def tie(
    kernels: Iterable[Kernel], name: str, compared: Callable[[Kernel], bool] | None = None
) -> tuple[Kernel, ...]:
    """Ties weights, so that unit i of one merges together with unit i of the others.

    Examples: A neuron with its bias
      >>> import jax.numpy as jnp
      >>> params = {"fc": {"kernel": jnp.ones((16, 32)), "bias": jnp.zeros(32)}}
      >>> weight = Kernel.named(params, "fc/kernel", out_axis=1, op="dense")
      >>> bias = Kernel.named(params, "fc/bias", out_axis=0, op="dense")
      >>> tied = tie([weight, bias], "fc", compared=lambda kernel: kernel is weight)
      >>> [(kernel.name, kernel.group, kernel.compared) for kernel in tied]
      [('fc/kernel', 'fc', True), ('fc/bias', 'fc', False)]

    Args:
      kernels: Kernels with the same number of problems and units.
      name: Label of the group.
      compared: Predicate that selects the weights that are part of the similarity; all by default.

    Returns:
      The kernels with the label.

    Raises:
      ValueError: No kernels, kernels with different numbers of units, or none that is compared.
    """
    tied = tuple(
        replace(kernel, group=name, compared=compared is None or compared(kernel))
        for kernel in kernels
    )
    group_weights(tied)
    return tied


def experts(params: PyTree, name: str, weights: Sequence[str], axis: int = 0) -> tuple[Kernel, ...]:
    """The experts of a mixture-of-experts layer as units.

    All named weights of an expert are compared and mixed.

    Args:
      params: A parameter tree.
      name: Label of the group.
      weights: Names of the weights, such as `"moe/wi"`.
      axis: Axis that indexes experts.

    Returns:
      A kernel for each weight, tied.

    Raises:
      ValueError: A name that is not in `params`, or different numbers of experts.
    """
    weights = _names("weights", weights)
    return tie([Kernel.named(params, weight, axis, op="dense") for weight in weights], name)


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
    """The heads of one attention layer as units.

    Two heads are compared by their query, key and value weights. The output weight and the biases
    are mixed with them. A fused QKV weight (d, 3 * H * h) is named three times, as query, key and
    value. Below, d is the model width, H the number of heads and h the head width.

    Args:
      params: A parameter tree.
      name: Label of the group.
      query: Name of the query weight: (d, H, h) as in Flax, or (d, H * h) with `heads`.
      key: Name of the key weight, of the same form.
      value: Name of the value weight, of the same form.
      out: Name of the output weight: (H, h, d) as in Flax, or (H * h, d) with `heads`.
      heads: Number of heads; required if the weights have two axes.
      biases: Names of query, key and value biases: (H, h), (H * h,) or (3 * H * h,).
      out_first: Whether two-axis weights have their output axis first, as in PyTorch and Equinox.

    Returns:
      A kernel for each weight, tied.

    Raises:
      ValueError: A name that is not in `params`, or shapes that do not divide into heads.
    """
    biases = _names("biases", biases)
    if heads is not None and (not isinstance(heads, int) or heads < 1):
        raise ValueError(f"heads is {heads!r}; give the number of heads, 1 or more")
    _, shape = _leaf(params, out)
    if len(shape) not in (2, 3):
        raise ValueError(
            f"{out!r} has shape {shape}: give the weights of one layer, which have two or three "
            "axes. For a stack of layers, make each Kernel yourself, with the stack's axis in "
            "batch_axes"
        )
    split = len(shape) == 3
    count = shape[0] if split else heads
    if count is None:
        raise ValueError(f"{out!r} has shape {shape}: give heads, the number of heads")
    if heads not in (None, count):
        raise ValueError(f"{out!r} has shape {shape}, which is {count} heads, not {heads}")
    total = shape[-1 if out_first else 0]
    if not split and total % count:
        raise ValueError(f"{out!r} has shape {shape}: {total} does not divide into {count} heads")
    width = shape[1] if split else total // count

    def kernel(weight: str, axis: int, parts: Sequence[int], compared: bool) -> Kernel:
        """The heads of a weight along an axis, which holds one of `parts` times all heads."""
        path, shape = _leaf(params, weight)
        view, out_axis = None, axis
        if shape[axis : axis + 2] != (count, width) or 1 not in parts:
            part = next((p for p in parts if shape[axis] == p * count * width), None)
            if part is None:
                raise ValueError(
                    f"{weight!r} has shape {shape}: axis {axis} is not "
                    f"{' or '.join(map(str, parts))} x {count} heads x {width}. Query heads that "
                    "share keys and values (grouped-query attention) are no units of their own: "
                    "tie those of one key head, of kernels whose view has an axis for key heads"
                )
            view, out_axis = (*shape[:axis], part, count, width, *shape[axis + 1 :]), axis + 1
        return Kernel(path, shape, out_axis, group=name, compared=compared, view=view, op="dense")

    inputs = (query, key, value)
    found = []
    for weight in dict.fromkeys(inputs):
        first = out_first and len(_leaf(params, weight)[1]) == 2
        found.append(kernel(weight, 0 if first else 1, [inputs.count(weight)], True))
    found.append(kernel(out, 1 if out_first and not split else 0, [1], False))
    found += [kernel(bias, 0, [1, 2, 3], False) for bias in biases]
    group_weights(found)
    return tuple(found)


def _names(what: str, given: Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        raise ValueError(f"{what} is the name {given!r}; give a sequence of names, such as a list")
    return tuple(given)


def _leaf(params: PyTree, name: str) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """The path and the shape of the leaf of this name."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        # A field `value` of the user's own has the key of an NNX variable.
        if name in (path_name(path), jax.tree_util.keystr(path, simple=True, separator="/")):
            return path, tuple(leaf.shape)
    names = ", ".join(path_name(path) for path, _ in leaves[:3])
    raise ValueError(f"{name!r} is not in params; its leaves begin with {names}")


def deep_kernels(
    kernels: Sequence[Kernel], skip: int = 10, where: Callable[[Kernel], bool] | None = None
) -> tuple[Kernel, ...]:
    """Selects the deep layers: all but the first `skip` in the order of the forward pass.

    `skip` is the paper's L_s (arXiv 2502.20516). The default is that of its released code.

    Args:
      kernels: Kernels from `find_kernels`.
      skip: Number of layers to leave out, counted from the input. Weights of one group are one
        layer, so that no unit is divided.
      where: Predicate on a `Kernel` that further selects the remaining ones, such as
        `lambda kernel: "conv2" in kernel.name`.

    Returns:
      The selected kernels, in the same order.

    Raises:
      ValueError: `skip` is no number of layers, `where` no function, or nothing is selected.
    """
    kernels = as_kernels(kernels)
    if isinstance(skip, bool) or not isinstance(skip, int | np.integer) or skip < 0:
        raise ValueError(f"skip is {skip!r}; it counts layers to leave alone, so 0, 1, 2 ...")
    if where is not None and not callable(where):
        raise ValueError(
            f"where is {where!r:.80}; give a function of a Kernel, such as "
            'lambda kernel: "conv2" in kernel.name'
        )
    layers = dict.fromkeys((kernel.group is None, kernel.label) for kernel in kernels)
    shallow = set(list(layers)[:skip])
    deep = tuple(
        kernel
        for kernel in kernels
        if (kernel.group is None, kernel.label) not in shallow and (where is None or where(kernel))
    )
    if not deep:
        names = ", ".join(kernel.name for kernel in kernels[-3:])
        few = (
            ". A network that consists of other layers has its units in find_kernels(..., "
            'ops=("conv", "dense")) or attention_heads'
        )
        raise ValueError(
            f"skip={skip}{'' if where is None else ' and the predicate'} selects none of the "
            f"{len(kernels)} weights{f' (the last: {names})' if names else ''}; choose a smaller "
            f"skip or another predicate{few if len(kernels) <= 3 else ''}"
        )
    return deep
