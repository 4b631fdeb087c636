"""Faster implementations of `merge.merge_layer` on CPU and TPU, chosen here.

Each takes and returns what `merge_layer` does. The TPU form is for single weights, the CPU form
also for a weight with its biases. All other layers of several weights, and those with batch axes
or groups, take the reference.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes, reshard

from inmerge_jax.merging.backends import cpu, tpu
from inmerge_jax.merging.rule import MergeRule
from inmerge_jax.merging.units import Kernel

Form = Callable[..., tuple[list[jax.Array], jax.Array, jax.Array]]
Implementation = Literal["auto", "reference", "cpu", "tpu"]
_LARGE = 2**20


def check_implementation(name: str) -> None:
    """Raises a ValueError where there is no such implementation."""
    if name not in (choices := get_args(Implementation)):
        raise ValueError(f"implementation is {name!r}; choose one of {', '.join(choices)}")


def choose(
    weights: Sequence[jax.Array],
    members: Sequence[Kernel],
    implementation: Implementation,
    reference: Form,
) -> Form:
    """The form for one layer: that of the platform which the program is compiled for.

    Weights that are sharded over explicit axes take the reference form, which reduces similarities
    where the others would gather a weight, and keep their shardings.

    Args:
      weights: of the layer.
      members: where its units are.
      implementation: of `merge_kernels`.
      reference: `merge_layer`.
    """
    mesh = _explicit_mesh(weights)
    if mesh is None:
        return _of_platform(weights, members, implementation, reference)
    shardings = [_sharding(weight, mesh) for weight in weights]
    sharded = any(names is not None for sharding in shardings for names in sharding.spec)
    form = reference if sharded else _of_platform(weights, members, implementation, reference)

    def merge(
        weights: Sequence[jax.Array],
        members: Sequence[Kernel],
        selected: jax.Array,
        partner: jax.Array | None,
        rule: MergeRule,
    ) -> Any:
        def call(weights: Sequence[jax.Array], *drawn: Any) -> Any:
            return form(weights, members, *drawn)

        whole = NamedSharding(mesh, PartitionSpec())
        given = [_by_entries(w, kernel, mesh) for w, kernel in zip(weights, members, strict=True)]
        automatic = auto_axes(call, out_sharding=(shardings, whole, whole))
        return automatic(given, selected, partner, rule)

    return merge


def over_automatic_axes(function: Callable[..., Any], arrays: Sequence[jax.Array]) -> Any:
    """`function` for arrays that may be sharded over explicit axes; its result is replicated.

    Over automatic axes XLA propagates shardings, where every operation on explicitly sharded arrays
    would have to say how its result is sharded.
    """
    mesh = _explicit_mesh(arrays)
    if mesh is None:
        return function
    return auto_axes(function, out_sharding=NamedSharding(mesh, PartitionSpec()))


def _explicit_mesh(arrays: Sequence[jax.Array]) -> Any:
    """The mesh of the arrays, or else the current one, if it has explicit axes."""
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    meshes.append(jax.sharding.get_abstract_mesh())
    explicit = AxisType.Explicit
    return next((m for m in meshes if not m.empty and explicit in m.axis_types), None)


def _sharding(array: jax.Array, mesh: Any) -> NamedSharding:
    sharding = jax.typeof(array).sharding
    return sharding if not sharding.mesh.empty else NamedSharding(mesh, PartitionSpec())


def _by_entries(weight: jax.Array, kernel: Kernel, mesh: Any) -> jax.Array:
    """An explicitly sharded weight, divided along the entries of its units instead of its units.

    Devices then exchange parts of it, where comparing units of several devices would gather it.
    """
    sharding = _sharding(weight, mesh)
    spec = [*sharding.spec, *[None] * (weight.ndim - len(sharding.spec))]
    names, size = spec[kernel.out_axis], kernel.shape[kernel.out_axis]
    if kernel.view is not None or names is None:
        return weight
    devices = size // sharding.shard_shape(kernel.shape)[kernel.out_axis]
    free = [
        (kernel.shape[axis], axis)
        for axis in range(weight.ndim)
        if axis not in (kernel.out_axis, *kernel.batch_axes)
        and spec[axis] is None
        and kernel.shape[axis] % devices == 0
    ]
    if not free:
        return weight
    _, axis = max(free)
    spec[axis], spec[kernel.out_axis] = names, None
    return reshard(weight, NamedSharding(mesh, PartitionSpec(*spec)))


def _of_platform(
    weights: Sequence[jax.Array], members: Sequence[Kernel], implementation: str, reference: Form
) -> Form:
    several = any(kernel.problems > 1 for kernel in members)
    if implementation == "reference" or several or any(map(_needs_reference, weights)):
        return reference
    cpu_form: Form = cpu.merge if cpu.fits(members) else reference
    if implementation == "cpu":
        return cpu_form
    single = len(members) == 1 and members[0].view is None
    tpu_form: Form = tpu.merge if single else reference
    if implementation == "tpu" and single:
        # Here, since Pallas takes a third of a second to import.
        from inmerge_jax.merging.backends import pallas

        if pallas.fits(weights[0], members[0].out_axis):
            tpu_form = pallas.merge
    if cpu_form is tpu_form:
        return reference

    # Without their paths, so that layers of the same shapes are traced once.
    shapes = tuple(
        Kernel((), kernel.shape, kernel.out_axis, compared=kernel.compared, view=kernel.view)
        for kernel in members
    )

    def merge(
        weights: Sequence[jax.Array],
        members: Sequence[Kernel],
        selected: jax.Array,
        partner: jax.Array | None,
        rule: MergeRule,
    ) -> Any:
        def call(form: Form) -> Callable[..., Any]:
            return functools.partial(_merge_layer, form, shapes)

        def elsewhere(*arguments: Any) -> Any:
            return lax.platform_dependent(*arguments, cpu=call(cpu_form), default=call(reference))

        arguments = (list(weights), selected, partner, rule)
        return lax.platform_dependent(*arguments, tpu=call(tpu_form), default=elsewhere)

    return merge


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _merge_layer(
    form: Form,
    members: tuple[Kernel, ...],
    weights: list[jax.Array],
    selected: jax.Array,
    partner: jax.Array | None,
    rule: MergeRule,
) -> Any:
    return form(weights, members, selected, partner, rule)


def supports_pallas(device: jax.Device) -> bool:
    """Whether a device can run the Pallas kernel: TPUs from v4 on.

    TPU v2 and v3 have no instruction that picks lanes by their number.
    """
    return device.platform == "tpu" and not device.device_kind.startswith(("TPU v2", "TPU v3"))


def _needs_reference(weight: jax.Array) -> bool:
    """Whether the loops of the other forms cannot be used, which compute in float32.

    They index with traced numbers, which `jax_disable_jit` does not give, and their carries would
    have to vary over the same mesh axes as a weight that differs by device inside `shard_map`.
    """
    manual = getattr(jax.typeof(weight), "manual_axis_type", None)
    eager = jax.config.jax_disable_jit  # type: ignore[attr-defined]
    return weight.dtype == jnp.float64 or bool(eager) or bool(getattr(manual, "varying", ()))


def sequence_after(
    weights: Sequence[jax.Array], before: Sequence[jax.Array] | None, kernels: Sequence[Kernel]
) -> list[jax.Array]:
    """The weights, which on TPU are not read before the layer `before` has been merged.

    Left free, the TPU compiler plans 1 to 6 layers' weights more of temporary memory for a step of
    ResNet-18, VGG19 or ResNet-50. Only where some layer is large: DenseNet-121's many small ones
    took more memory in sequence.

    Args:
      weights: of the next layer.
      before: the merged weights of the last one; None for the first.
      kernels: of the whole merge.
    """
    if before is None or max(math.prod(kernel.shape) for kernel in kernels) < _LARGE:
        return list(weights)
    return [tpu.sequence_after(weight, before[0]) for weight in weights]
