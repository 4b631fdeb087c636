"""Times the arms of one network in a separate process, for `experiments.study.questions.cost`."""

import functools
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.study.treatments import selection
from experiments.study.trials import Treatment
from inmerge_jax import MergeRule
from inmerge_jax.data import make_phantom, train_batches
from inmerge_jax.data.anatomy import FINDINGS
from inmerge_jax.models import create_model
from inmerge_jax.models.units import find_units
from inmerge_jax.training.environment import configure_malloc
from inmerge_jax.training.init import init_variables
from inmerge_jax.training.parallel import (
    DATA_AXIS,
    broadcast_to_devices,
    prefetch_to_device,
    replicate,
)
from inmerge_jax.training.recipes import RECIPES
from inmerge_jax.training.train_step import make_optimizer, make_train_step, new_state, zero_totals

SHAPE = (28, 28, 1)
FEWEST = 16
"""Minimum number of turns."""
ALWAYS = MergeRule(threshold=-1.0, partner="nearest")
"""Every selected kernel merges with its most similar one: the most expensive case."""


def peak_bytes() -> int:
    """Peak resident memory of this process.

    Not Linux's `ru_maxrss`, which includes the peak of the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (one for one in status.read_text().splitlines() if one.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Program(NamedTuple):
    """A compiled step, and what its state is made from."""

    step: Callable[..., Any]
    weights: tuple[Any, Any]
    optimizer: optax.GradientTransformation
    layers: int


@functools.cache
def program(name: str, merging: bool, width: float) -> Program:
    """The training step of a network, shared by all arms without merging."""
    model = create_model(
        name, len(FINDINGS) + 1, stem="small", width=width, dtype=jnp.float32, axis_name=DATA_AXIS
    )
    weights, recipe = init_variables(model, SHAPE, 0), RECIPES["medmnist"]
    deep = selection(Treatment("merge"), find_units(model, SHAPE, ("kernels",))) if merging else ()
    optimizer = make_optimizer(recipe)
    options = {"kernels": deep, "rule": ALWAYS} if deep else {}
    devices = (jax.local_devices()[0],)
    step = make_train_step(model, optimizer, recipe, multi_label=False, devices=devices, **options)
    return Program(step, weights, optimizer, len(deep))


class Training:
    """One arm of one network on the phantom, as the library's own loop trains it."""

    def __init__(self, name: str, arm: str, width: float, batch_size: int) -> None:
        data = make_phantom(size=SHAPE[0], train=4 * batch_size, val=8, test=8)
        devices = (jax.local_devices()[0],)
        self._step, weights, optimizer, layers = program(name, arm == "inmerge", width)
        self._state = replicate(new_state(*weights, optimizer, 1e-3), devices)
        self._totals = replicate(zero_totals(layers), devices)
        self._root = broadcast_to_devices(jax.random.key(0), devices)
        batches = train_batches(data.train, seed=0, batch_size=batch_size)
        self._batches = prefetch_to_device(batches, devices)

    def update(self) -> float:
        """Trains on one batch; returns the seconds, including the wait for the batch."""
        started = time.perf_counter()
        self._state, self._totals = jax.block_until_ready(
            self._step(self._state, self._totals, next(self._batches), self._root)
        )
        return time.perf_counter() - started

    @property
    def merged(self) -> int:
        """Number of kernels merged so far."""
        return int(np.asarray(self._totals.merged).sum())


def alone(name: str, arm: str, width: float, batch_size: int, updates: int) -> dict[str, Any]:
    """Seconds of the first update and of the others, kernels merged, and the peak memory."""
    training = Training(name, arm, width, batch_size)
    first, *seconds = (training.update() for _ in range(updates))
    return {
        "first": first,
        "updates": seconds,
        "merged": training.merged,
        "peak_bytes": peak_bytes(),
    }


def together(name: str, arms: list[str], width: float, batch_size: int, limit: int) -> dict:
    """Seconds of each arm's updates in one process, in which the arms take turns.

    A slower machine then slows all arms. Runs for `limit` seconds and at least `FEWEST` turns; each
    arm's first four updates are not counted.
    """
    trainings = {arm: Training(name, arm, width, batch_size) for arm in arms}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for training in trainings.values():
        for _ in range(4):
            training.update()
    turn, started = 0, time.perf_counter()
    while turn < FEWEST or time.perf_counter() - started < limit:
        for arm in arms if turn % 2 else arms[::-1]:
            seconds[arm].append(trainings[arm].update())
        turn += 1
    return {"updates": seconds}


def main(name: str, arms: str, width: str, batch_size: str, count: str) -> int:
    """Prints `alone` of one arm, or `together` of several with commas between, as JSON."""
    configure_malloc()
    of, options = arms.split(","), (float(width), int(batch_size), int(count))
    print(json.dumps(together(name, of, *options) if of[1:] else alone(name, arms, *options)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
