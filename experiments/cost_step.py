"""Arms of one network, timed in a process of their own: used by `experiments.cost`."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.study.cells import Treatment
from experiments.study.treatments import selection
from inmerge_jax import MergeRule
from inmerge_jax.data import make_phantom, steps_per_epoch, train_batches
from inmerge_jax.models import create_model
from inmerge_jax.training.initial import convolutions, random_weights
from inmerge_jax.training.memory import keep_freed_memory
from inmerge_jax.training.parallel import AXIS, ahead, broadcast, replicate
from inmerge_jax.training.recipes import RECIPES
from inmerge_jax.training.state import make_optimizer, new_state
from inmerge_jax.training.steps import make_train_step, zero_totals

ALWAYS = MergeRule(threshold=-1.0, partner="nearest")
"""Every selected kernel merges with its most similar one: the dearest case."""


def peak_bytes() -> int:
    """The most memory that this process has had resident.

    Linux's `ru_maxrss` begins with what the process that started this one had, so it isn't asked.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (one for one in status.read_text().splitlines() if one.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Training:
    """One arm of one network on the phantom, as the library's own loop trains it.

    Attributes:
      steps: updates of an epoch.
    """

    def __init__(self, model_name: str, arm: str, width: float, batch_size: int) -> None:
        self._data = make_phantom(size=28, train=4 * batch_size, val=8, test=8)
        self._batch_size = batch_size
        self.steps = steps_per_epoch(len(self._data.train), batch_size)
        recipe = RECIPES["medmnist"]
        self._devices = (jax.local_devices()[0],)
        model = create_model(
            model_name,
            self._data.num_classes,
            stem="small",
            width=width,
            dtype=jnp.float32,
            axis_name=AXIS,
        )
        shape = (28, 28, 1)
        params, batch_stats = random_weights(model, shape, 0)
        kernels = convolutions(model, shape)
        deep = selection(Treatment("merge"), kernels) if arm == "inmerge" else ()
        optimizer = make_optimizer(recipe)
        merging = {"kernels": deep, "rule": ALWAYS} if deep else {}
        self._step = make_train_step(
            model, optimizer, recipe, multi_label=False, devices=self._devices, **merging
        )
        state = new_state(params, batch_stats, optimizer, recipe.learning_rate)
        self._state = replicate(state, self._devices)
        self._totals = replicate(zero_totals(len(deep)), self._devices)
        self._root = broadcast(jax.random.key(0), self._devices)

    def epoch(self) -> list[float]:
        """Trains for one; the seconds of each update, with the wait for its batch."""
        batches = train_batches(
            self._data.train, seed=0, batch_size=self._batch_size, start=0, stop=self.steps
        )
        seconds, started = [], time.perf_counter()
        for batch in ahead(batches, self._devices):
            self._state, self._totals = jax.block_until_ready(
                self._step(self._state, self._totals, batch, self._root)
            )
            now = time.perf_counter()
            seconds.append(now - started)
            started = now
        return seconds

    @property
    def merged(self) -> int:
        """Kernels that were merged so far."""
        return int(np.asarray(self._totals.merged).sum())


def alone(name: str, arm: str, width: float, batch_size: int, epochs: int) -> dict[str, Any]:
    """Seconds of the first update and of each later one, kernels merged, and the peak memory."""
    training = Training(name, arm, width, batch_size)
    first, *seconds = (one for _ in range(epochs + 1) for one in training.epoch())
    return {
        "first": first,
        "updates": seconds,
        "merged": training.merged,
        "peak_bytes": peak_bytes(),
    }


def together(name: str, arms: list[str], width: float, batch_size: int, turns: int) -> dict:
    """Seconds of each arm's epochs in one process, in turns, forwards and backwards.

    Whatever slows the machine down slows all arms; the first turn is not counted.
    """
    trainings = {arm: Training(name, arm, width, batch_size) for arm in arms}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(turns + 1):
        for arm in arms if turn % 2 else arms[::-1]:
            seconds[arm].append(sum(trainings[arm].epoch()))
    return {"steps": trainings[arms[0]].steps, "epochs": {a: s[1:] for a, s in seconds.items()}}


def main(name: str, arms: str, width: str, batch_size: str, count: str) -> int:
    """Prints `alone` of one arm, or `together` of several with commas between, as JSON."""
    keep_freed_memory()
    of, options = arms.split(","), (float(width), int(batch_size), int(count))
    print(json.dumps(together(name, of, *options) if of[1:] else alone(name, arms, *options)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
