"""One arm of one network, timed in a process of its own: used by `experiments.cost`."""

import json
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.study.cells import Treatment
from experiments.study.treatments import selection
from inmerge_jax import MergeRule
from inmerge_jax.data import Dataset, make_phantom, steps_per_epoch, train_batches
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


def main(model_name: str, arm: str, width: float, batch_size: int, epochs: int) -> int:
    """Prints, as JSON, the seconds of the first update and of each epoch, and the peak memory."""
    keep_freed_memory()
    data: Dataset = make_phantom(size=28, train=4 * batch_size, val=8, test=8)
    recipe = RECIPES["medmnist"]
    devices = (jax.local_devices()[0],)
    model = create_model(
        model_name, data.num_classes, stem="small", width=width, dtype=jnp.float32, axis_name=AXIS
    )
    shape = (28, 28, 1)
    params, batch_stats = random_weights(model, shape, 0)
    kernels = convolutions(model, shape)
    deep = selection(Treatment("merge"), kernels) if arm == "inmerge" else ()
    optimizer = make_optimizer(recipe)
    merging = {"kernels": deep, "rule": ALWAYS} if deep else {}
    step = make_train_step(model, optimizer, recipe, multi_label=False, devices=devices, **merging)
    state = replicate(new_state(params, batch_stats, optimizer, recipe.learning_rate), devices)
    totals = replicate(zero_totals(len(deep)), devices)
    root = broadcast(jax.random.key(0), devices)
    steps = steps_per_epoch(len(data.train), batch_size)
    batches = train_batches(
        data.train, seed=0, batch_size=batch_size, start=0, stop=(epochs + 1) * steps
    )
    seconds = []
    started = time.perf_counter()
    first = None
    for number, batch in enumerate(ahead(batches, devices)):
        state, totals = jax.block_until_ready(step(state, totals, batch, root))
        now = time.perf_counter()
        if first is None:
            first = now - started
        if (number + 1) % steps == 0:
            seconds.append(now - started)
            started = now
    measured = {
        "first": first,
        "epochs": seconds[1:],
        "steps": steps,
        "merged": int(np.asarray(totals.merged).sum()),
        "peak_bytes": peak_bytes(),
    }
    print(json.dumps(measured))
    return 0


if __name__ == "__main__":
    name, which, factor, size, count = sys.argv[1:]
    sys.exit(main(name, which, float(factor), int(size), int(count)))
