"""Merging steps on the devices of this process, or of several; started by `scaling`."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments.benchmarks.timing import machine
from experiments.benchmarks.tpu.collectives import collectives
from inmerge_jax.files import write_arrays, write_json

MODEL, WIDTH, SIZE, BATCH, SKIP = "vgg11_bn", 0.125, 28, 64, 3
LEARNING_RATE = 0.01


@dataclass(frozen=True)
class StepConfig:
    """Trains some steps with merging and writes what came of it; process 0 does the writing.

    Attributes:
      output: JSON file for the row; the parameters go beside it, as .npz.
      steps: updates.
      dtype: what is computed in, and of the parameters.
      coordinator: as of experiments.train.
      num_processes: likewise.
      process_id: likewise.
    """

    output: Path
    steps: int
    dtype: Literal["float32", "float64"] = "float32"
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    num_processes: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    process_id: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None


def run(steps: int, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of this process's devices, and its parameters after the first and the last step.

    Of the parameters' names, the first part is "first" or "last", the other their path.
    """
    import jax
    import numpy as np

    from inmerge_jax import MergeRule, deep_kernels
    from inmerge_jax.data import make_phantom, train_batches
    from inmerge_jax.models import create_model
    from inmerge_jax.training.init import conv_kernels, init_variables
    from inmerge_jax.training.parallel import (
        DATA_AXIS,
        broadcast_to_devices,
        choose_devices,
        replicate,
        shard_batch,
        unreplicate,
    )
    from inmerge_jax.training.recipes import RECIPES
    from inmerge_jax.training.train_step import (
        make_optimizer,
        make_train_step,
        new_state,
        zero_totals,
    )

    # SGD, since Adam divides by a gradient's size and so blows rounding up where that is tiny; and
    # every selected kernel merges, since one at the threshold would merge or not by rounding.
    devices = choose_devices(None)
    recipe = replace(RECIPES["released"], learning_rate=LEARNING_RATE)
    dataset = make_phantom(size=SIZE, train=2 * BATCH, val=8, test=8)
    model = create_model(MODEL, dataset.num_classes, width=WIDTH, dtype=dtype, axis_name=DATA_AXIS)
    shape = (SIZE, SIZE, 3)
    params, batch_stats = init_variables(model, shape, seed=0)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    deep = deep_kernels(conv_kernels(model, shape), skip=SKIP)
    optimizer = make_optimizer(recipe)
    common = {"multi_label": False, "devices": devices}
    rule = MergeRule(threshold=-1.0)
    plain = make_train_step(model, optimizer, recipe, **common)
    step = make_train_step(model, optimizer, recipe, **common, kernels=deep, rule=rule)
    state = replicate(new_state(params, batch_stats, optimizer, recipe.learning_rate), devices)
    totals, nothing = (replicate(zero_totals(n), devices) for n in (len(deep), 0))
    root = broadcast_to_devices(jax.random.key(1), devices)
    batches = [
        shard_batch(batch, devices)
        for batch in train_batches(
            dataset.train,
            seed=0,
            batch_size=BATCH,
            stop=steps,
            host=jax.process_index(),
            hosts=jax.process_count(),
        )
    ]
    compiled = {
        "merging": step.lower(state, totals, batches[0], root).compile(),
        "plain": plain.lower(state, nothing, batches[0], root).compile(),
    }
    losses, seconds, merged, params = [], [], 0, {}
    for batch in batches:
        started = time.monotonic()
        state, found = jax.block_until_ready(step(state, totals, batch, root))
        seconds.append(time.monotonic() - started)
        losses.append(float(unreplicate(found).loss))
        merged += int(unreplicate(found).merged.sum())
        leaves = jax.tree_util.tree_leaves_with_path(unreplicate(state.params))
        when = "last" if params else "first"
        params |= {f"{when} {jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}
    equal = all(
        np.array_equal(leaf[0], other)
        for leaf in map(np.asarray, jax.tree.leaves(state))
        for other in leaf[1:]
    )
    row = {
        "devices": len(devices),
        "processes": jax.process_count(),
        "process": jax.process_index(),
        "steps": steps,
        "dtype": dtype,
        "losses": losses,
        "merged": merged,
        "replicas_equal": equal,
        "collectives": {name: collectives(each.as_text()) for name, each in compiled.items()},
        # The first call looks the compiled program up.
        "step_seconds": sorted(seconds[1:]),
        "machine": machine(),
    }
    return row, params


def params_file(output: Path, process: int) -> Path:
    """Where a process leaves its parameters."""
    return output.with_suffix(f".{process}.npz")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0."""
    config = tyro.cli(
        StepConfig, prog="python -m experiments.reliability.scaling_step", args=arguments
    )
    import jax

    from inmerge_jax.training.multihost import connect, is_primary

    jax.config.update("jax_enable_x64", config.dtype == "float64")
    connect(config.coordinator, config.num_processes, config.process_id)
    row, params = run(config.steps, config.dtype)
    write_arrays(params_file(config.output, row["process"]), params)
    if is_primary():
        write_json(config.output, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
