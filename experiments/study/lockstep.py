"""Trainings side by side, one to a device, whose steps are single calls of `jax.pmap`.

Each training runs the one loop in a thread of its own. Where all of them wait with a call of the
same step, their arrays become one array over the devices, without a copy, and the step that is
pmapped over the trainings is called once. A training that was resumed behind the others catches up
by calls of its own; where one has ended, the others go on alone.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from inmerge_jax.training.parallel import DATA_AXIS

Step = Callable[..., Any]


class _Call(NamedTuple):
    name: str
    arguments: tuple[Any, ...]
    answer: Future[Any]


class Lockstep:
    """Where the threads meet.

    Attributes:
      seats: one per device; each is for one thread.
      joint: how many calls were made for all at once.
    """

    def __init__(
        self,
        devices: Sequence[jax.Device],
        steps: Mapping[str, Step],
        should_stop: Callable[[], bool] = lambda: False,
    ):
        """Nothing is called before there is a call from every seat that has not been left.

        Args:
          devices: one for each training.
          steps: the steps by name, pmapped over `devices`; every argument has a leading axis of
            them. Where trainings wait with different ones, those with the first of these go on.
          should_stop: asked once for all between two calls, so that all stop after the same one.
        """
        self.seats = tuple(Seat(self, device) for device in devices)
        self.joint = 0
        self._steps = steps
        self._should_stop, self._stopping = should_stop, False
        self._spread = NamedSharding(
            Mesh(np.array(devices), (DATA_AXIS,)), PartitionSpec(DATA_AXIS)
        )
        self._present = set(self.seats)
        self._waiting: dict[Seat, _Call] = {}
        # What was joined, by its first part: results until the next ones, and keys.
        self._joined: dict[str, dict[int, tuple[tuple[jax.Array, ...], jax.Array]]] = {}
        self._lock = threading.Lock()

    def call(self, seat: "Seat", name: str, alone: Step, arguments: tuple[Any, ...]) -> Any:
        """The results of one training's step, once all who are present have called one."""
        call = _Call(name, arguments, Future())
        with self._lock:
            self._waiting[seat] = call
            self._go_on()
        results = call.answer.result()
        return alone(*arguments) if results is None else results

    def leave(self, seat: "Seat") -> None:
        """The others no longer wait for this seat."""
        with self._lock:
            self._present.discard(seat)
            self._joined.clear()
            self._go_on()

    def stopping(self) -> bool:
        """Whether to stop: the same for all who are between the same two calls."""
        with self._lock:
            whole = len(self._present) == len(self.seats)
            return self._stopping if whole else self._should_stop()

    def _go_on(self) -> None:
        whole = len(self._present) == len(self.seats)
        if whole and len(self._waiting) < len(self.seats):
            return
        behind = min(
            (call.name for call in self._waiting.values()), key=list(self._steps).index, default=""
        )
        calls = {s: call for s, call in self._waiting.items() if not whole or call.name == behind}
        self._waiting = {s: call for s, call in self._waiting.items() if s not in calls}
        self._stopping = self._should_stop()
        if len(calls) == len(self.seats):
            self._together(behind, [calls[seat] for seat in self.seats])
        else:
            for call in calls.values():
                call.answer.set_result(None)

    def _together(self, name: str, calls: list[_Call]) -> None:
        try:
            # The program must not depend on which thread comes last.
            with jax.default_device(None):
                joined = jax.tree.map(self._join, *(call.arguments for call in calls))
                results = self._steps[name](*joined)
            parts = self._parts(name, results)
        except BaseException as error:
            for call in calls:
                call.answer.set_exception(error)
            return
        self.joint += 1
        for call, part in zip(calls, parts, strict=True):
            call.answer.set_result(part)

    def _join(self, *arrays: jax.Array) -> jax.Array:
        """One array (devices, ...) of one (1, ...), or one scalar, from each device."""
        for known in self._joined.values():
            parts, joined = known.get(id(arrays[0]), ((), None))
            if joined is not None and all(map(lambda a, b: a is b, arrays, parts)):
                return joined
        parts = tuple(array if array.ndim else array[None] for array in arrays)
        shape = (len(parts), *parts[0].shape[1:])
        joined = jax.make_array_from_single_device_arrays(shape, self._spread, list(parts))
        if not arrays[0].ndim:
            self._joined.setdefault("scalars", {})[id(arrays[0])] = (arrays, joined)
        return joined

    def _parts(self, name: str, results: Any) -> list[Any]:
        """Each device's shards, (1, ...), of every array."""
        leaves, structure = jax.tree.flatten(results)
        columns = []
        for leaf in leaves:
            shards = {shard.device: shard.data for shard in leaf.addressable_shards}
            columns.append(tuple(shards[seat.device] for seat in self.seats))
        self._joined[name] = {id(c[0]): (c, leaf) for c, leaf in zip(columns, leaves, strict=True)}
        return [jax.tree.unflatten(structure, list(row)) for row in zip(*columns, strict=True)]


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

    def should_stop(self) -> bool:
        """See `Lockstep.stopping`."""
        return self._lockstep.stopping()
