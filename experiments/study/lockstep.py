"""Trainings side by side, one to a device, whose steps are single calls of `jax.pmap`.

Each training runs the one loop in a thread of its own. Where all of them wait with a call of the
same step, their arrays become one array over the devices, without a copy, and the step that is
pmapped over the trainings is called once. Where one of them has ended, or is in another step since
it was resumed, each makes its own call.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from inmerge_jax.training.parallel import AXIS

Step = Callable[..., Any]


class Lockstep:
    """Where the threads meet.

    Attributes:
      seats: one per device; each is for one thread.
      joint: how many calls were made for all at once.
    """

    def __init__(self, devices: Sequence[jax.Device], steps: Mapping[str, Step]):
        """Nothing is called before there is a call from every seat that has not been left.

        Args:
          devices: one for each training.
          steps: the steps by name, pmapped over `devices`; every argument has a leading axis of
            them.
        """
        self.seats = tuple(Seat(self, device) for device in devices)
        self.joint = 0
        self._steps = steps
        self._spread = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))
        self._present = set(self.seats)
        self._waiting: dict[Seat, tuple[str, tuple[Any, ...], Future[Any]]] = {}
        self._lock = threading.Lock()

    def call(self, seat: "Seat", name: str, alone: Step, arguments: tuple[Any, ...]) -> Any:
        """The results of one training's step, once all who are present have called one."""
        answer: Future[Any] = Future()
        with self._lock:
            self._waiting[seat] = (name, arguments, answer)
            self._go_on()
        results = answer.result()
        return alone(*arguments) if results is None else results

    def leave(self, seat: "Seat") -> None:
        """The others no longer wait for this seat."""
        with self._lock:
            self._present.discard(seat)
            self._go_on()

    def _go_on(self) -> None:
        if len(self._waiting) < len(self._present):
            return
        waiting, self._waiting = self._waiting, {}
        names = {name for name, _, _ in waiting.values()}
        if len(waiting) < len(self.seats) or len(names) > 1:
            for _, _, answer in waiting.values():
                answer.set_result(None)
            return
        calls = [waiting[seat] for seat in self.seats]
        try:
            # The program must not depend on which thread comes last.
            with jax.default_device(None):
                joined = jax.tree.map(self._join, *(arguments for _, arguments, _ in calls))
                results = self._steps[names.pop()](*joined)
        except Exception as error:
            for _, _, answer in calls:
                answer.set_exception(error)
            return
        self.joint += 1
        for seat, (_, _, answer) in zip(self.seats, calls, strict=True):
            answer.set_result(_part(results, seat.device))

    def _join(self, *arrays: jax.Array) -> jax.Array:
        """One array (devices, ...) of one (1, ...), or one scalar, from each device."""
        parts = [array if array.ndim else array[None] for array in arrays]
        shape = (len(parts), *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self._spread, parts)


class Seat:
    """One training's place; leaving the `with` block, for whatever reason, gives it up.

    Attributes:
      device: the training's own.
    """

    def __init__(self, lockstep: Lockstep, device: jax.Device):
        self.device = device
        self._lockstep = lockstep

    def __enter__(self) -> "Seat":
        return self

    def __exit__(self, *_: Any) -> None:
        self._lockstep.leave(self)

    def step(self, name: str, alone: Step) -> Step:
        """The step of that name for all trainings at once where possible, else `alone`."""
        return lambda *arguments: self._lockstep.call(self, name, alone, arguments)


def _part(tree: Any, device: jax.Device) -> Any:
    """One device's shard, (1, ...), of every array."""

    def own(array: jax.Array) -> jax.Array:
        (data,) = (shard.data for shard in array.addressable_shards if shard.device == device)
        return data

    return jax.tree.map(own, tree)
