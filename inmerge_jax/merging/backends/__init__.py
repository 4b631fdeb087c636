"""Faster forms of `merge.merge_unit` for single weights on CPU and TPU, chosen here.

A form takes and returns what `merge_unit` does. Units that have several weights, batch axes, groups
or a view are merged by the reference on every platform.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from inmerge_jax.merging.backends import cpu, tpu
from inmerge_jax.merging.rule import MergeRule
from inmerge_jax.merging.units import Kernel

Form = Callable[..., tuple[list[jax.Array], jax.Array, jax.Array]]
_LARGE = 2**20


def choose(
    weights: Sequence[jax.Array], members: Sequence[Kernel], implementation: str, reference: Form
) -> Form:
    """The form for one layer: that of the platform which the program is compiled for.

    Weights whose shardings are explicit keep them. They take the reference form, which reduces
    similarities where the others would gather a weight, and inside, XLA propagates shardings as it
    does over automatic axes.

    Args:
      weights: of the layer.
      members: where its units are.
      implementation: of `merge_kernels`.
      reference: `merge_unit`.
    """
    shardings = [jax.typeof(weight).sharding for weight in weights]
    explicit = jax.sharding.AxisType.Explicit
    meshes = [s.mesh for s in shardings if not s.mesh.empty and explicit in s.mesh.axis_types]
    if not meshes:
        return _of_platform(weights, members, implementation, reference)
    sharded = any(names is not None for sharding in shardings for names in sharding.spec)
    form = reference if sharded else _of_platform(weights, members, implementation, reference)

    def merge(
        weights: Sequence[jax.Array],
        members: Sequence[Kernel],
        selected: jax.Array,
        partner: jax.Array | None,
        rule: MergeRule,
    ) -> Any:
        whole = jax.sharding.NamedSharding(meshes[0], jax.sharding.PartitionSpec())
        call = jax.sharding.auto_axes(
            lambda weights, *drawn: form(weights, members, *drawn),
            out_sharding=(shardings, whole, whole),
        )
        weights = [_by_entries(w, kernel) for w, kernel in zip(weights, members, strict=True)]
        return call(weights, selected, partner, rule)

    return merge


def _by_entries(weight: jax.Array, kernel: Kernel) -> jax.Array:
    """An explicitly sharded weight, divided along the entries of its units instead of its units.

    Devices then exchange parts of it, where comparing units of several devices would gather it.
    """
    sharding = jax.typeof(weight).sharding
    spec = list(sharding.spec)
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
    moved = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))
    return jax.sharding.reshard(weight, moved)


def _of_platform(
    weights: Sequence[jax.Array], members: Sequence[Kernel], implementation: str, reference: Form
) -> Form:
    kernel = members[0]
    plain = len(members) == 1 and kernel.problems == 1 and kernel.view is None
    if implementation == "reference" or not plain or _needs_reference(weights[0]):
        return reference
    cpu_form: Form = cpu.merge if cpu.fits(weights[0], kernel.out_axis) else reference
    if implementation == "cpu":
        return cpu_form
    tpu_form: Form = tpu.merge
    if implementation == "tpu":
        # Here, since Pallas takes a third of a second to import.
        from inmerge_jax.merging.backends import pallas

        if pallas.fits(weights[0], kernel.out_axis):
            tpu_form = pallas.merge

    def merge(
        weights: Sequence[jax.Array],
        members: Sequence[Kernel],
        selected: jax.Array,
        partner: jax.Array | None,
        rule: MergeRule,
    ) -> Any:
        def call(form: Form) -> Callable[..., Any]:
            return lambda weight, selected, partner, rule: form(
                [weight], members, selected, partner, rule
            )

        def elsewhere(*arguments: Any) -> Any:
            return lax.platform_dependent(*arguments, cpu=call(cpu_form), default=call(reference))

        arguments = (weights[0], selected, partner, rule)
        return lax.platform_dependent(*arguments, tpu=call(tpu_form), default=elsewhere)

    return merge


def supports_pallas(device: jax.Device) -> bool:
    """Whether a device can run the Pallas kernel: TPUs from v4 on.

    TPU v2 and v3 have no instruction that picks lanes by their number.
    """
    return device.platform == "tpu" and not device.device_kind.startswith(("TPU v2", "TPU v3"))


def _needs_reference(weight: jax.Array) -> bool:
    """Whether the loops of the other forms cannot be used.

    They index with traced numbers, which `jax_disable_jit` does not give, and their carries would
    have to vary over the same mesh axes as a weight that differs by device inside `shard_map`.
    """
    manual = getattr(jax.typeof(weight), "manual_axis_type", None)
    eager = jax.config.jax_disable_jit  # type: ignore[attr-defined]
    return bool(eager) or bool(getattr(manual, "varying", ()))


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
