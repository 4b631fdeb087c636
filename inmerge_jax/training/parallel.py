"""Data parallelism: choice of devices, and placement of trees and batches on them."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from inmerge_jax.errors import UsageError

DATA_AXIS = "devices"
"""Name of the mapped axis over which the steps average."""


def choose_devices(count: int | None) -> tuple[jax.Device, ...]:
    """The first `count` local devices, or all of them for None.

    In a run of several processes these are the devices of all processes, those of process 0 first.

    Raises:
      UsageError: `count` is below 1 or above the number of local devices. With several processes:
        `count` is not the number of all devices, or processes have different numbers of devices.
    """
    available = jax.local_devices()
    if jax.process_count() > 1:
        return _of_all_processes(count)
    if count is None:
        return tuple(available)
    if not 1 <= count <= len(available):
        hint = ""
        if available[0].platform == "cpu":
            hint = f"; XLA_FLAGS=--xla_force_host_platform_device_count={count} simulates more"
        raise UsageError(
            f"`devices` {count}: choose 1 to {len(available)}, the number of local "
            f"{available[0].platform} devices{hint}"
        )
    return tuple(available[:count])


def _of_all_processes(count: int | None) -> tuple[jax.Device, ...]:
    groups = [jax.local_devices(number) for number in range(jax.process_count())]
    numbers = [len(group) for group in groups]
    if len(set(numbers)) > 1:
        raise UsageError(
            f"the processes have {', '.join(map(str, numbers))} devices: give all the same number"
        )
    if count not in (None, sum(numbers)):
        raise UsageError(
            f"`devices` {count}: {len(groups)} processes train on all of their {sum(numbers)} "
            "devices; leave it out"
        )
    return tuple(device for group in groups for device in group)


def replicate(tree: Any, devices: tuple[jax.Device, ...]) -> Any:
    """One copy of every array per device, for `jax.pmap`: shape (...) becomes (devices, ...).

    As in `jax.pmap`, a process holds the part of its own devices. Here and in the other functions,
    the device axis is as long as the number of devices of this process.
    """
    spread = _sharding(devices, PartitionSpec(DATA_AXIS))
    count = spread.mesh.size

    def copy(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.device_put(np.broadcast_to(x, (count, *x.shape)), spread)

    return jax.tree.map(copy, tree)


def unreplicate(tree: Any) -> Any:
    """The first device's copy as NumPy arrays: the inverse of `replicate`."""
    first = jax.tree.map(lambda x: x.addressable_shards[0].data, tree)
    return jax.tree.map(lambda x: x[0], jax.device_get(first))


def broadcast_to_devices(tree: Any, devices: tuple[jax.Device, ...]) -> Any:
    """A full copy on every device, for arguments that `jax.pmap` maps with axis None."""
    return jax.device_put(tree, _sharding(devices, PartitionSpec()))


def shard_batch(
    batch: dict[str, np.ndarray], devices: tuple[jax.Device, ...]
) -> dict[str, jax.Array]:
    """Splits this process's rows (n, ...) over its devices: (devices, n / devices, ...)."""
    spread = _sharding(devices, PartitionSpec(DATA_AXIS))
    count = spread.mesh.size

    def divide(x: np.ndarray) -> jax.Array:
        return jax.device_put(x.reshape(count, -1, *x.shape[1:]), spread)

    return {name: divide(x) for name, x in batch.items()}


def prefetch_to_device(
    batches: Iterator[dict[str, np.ndarray]], devices: tuple[jax.Device, ...], count: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """Yields batches on the devices, see `shard_batch`, each copied `count` batches in advance.

    The copy to the devices, and the reading before it, overlap with the running step.
    """
    waiting: deque[dict[str, jax.Array]] = deque()
    for batch in batches:
        waiting.append(shard_batch(batch, devices))
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def _sharding(devices: tuple[jax.Device, ...], spec: PartitionSpec) -> NamedSharding:
    """A sharding over those of `devices` that belong to this process."""
    local = [device for device in devices if device.process_index == jax.process_index()]
    return NamedSharding(Mesh(np.array(local), (DATA_AXIS,)), spec)
