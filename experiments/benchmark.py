"""Measures what merging costs, beside the released code's loop, plain training and PyTorch."""

import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro
from rich.console import Console

from experiments.conversion import conversion_rows
from experiments.startup import cache_rows
from experiments.timing import Row, Target, ratio_row, take_turns, to_table
from experiments.trained_weights import train_vgg19
from inmerge_jax import MergeRule, deep_kernels, merge_kernels
from inmerge_jax.errors import InputError
from inmerge_jax.files import write_json
from inmerge_jax.kernels import Kernel
from inmerge_jax.models import create_model
from inmerge_jax.training.environment import environment
from inmerge_jax.training.initial import convolutions, random_weights
from inmerge_jax.training.memory import keep_freed_memory
from inmerge_jax.training.parallel import AXIS, broadcast, choose_devices, replicate, split
from inmerge_jax.training.recipes import RECIPES, Recipe
from inmerge_jax.training.state import make_optimizer, new_state
from inmerge_jax.training.steps import make_train_step, zero_totals
from tests.oracles.released_torch import merge_pass
from tests.oracles.torch_networks import create_network

Section = Literal["merge", "overhead", "pytorch", "conversion", "cache"]

CLASSES = 14
UPDATES = 60
LOOP, OURS, NEAREST, KEPT = "PyTorch loop", "random", "nearest", "random, params kept"
PLAIN, MERGING, TORCH, TORCH_LAST = "plain", "merging", "PyTorch", "PyTorch channels_last"

TINY_RUN = (
    "--data phantom --phantom.train 64 --phantom.val 32 --phantom.test 32 --model resnet18 "
    "--width 0.125 --epochs 1 --merging-epochs 1 --batch-size 32 --overwrite"
).split()


@dataclass(frozen=True)
class BenchmarkConfig:
    """Measures in-model merging's speed on this machine, which should do nothing else meanwhile.

    merge: one merge of VGG19's six deep layers against a PyTorch reading of the released code's
    loop. overhead: the training step with merging against the same step without. pytorch: the
    training step without merging against PyTorch's. conversion: VGG19's weights from PyTorch's
    form and back. cache: what a second start of a training command compiles anew. Contenders take
    turns in one process; a ratio is the median of the ratios of times from the same round.

    Attributes:
      only: The sections to measure. Of the others, the output file keeps what it holds.
      output: JSON file for all times, their ratios, and the environment they were taken in.
      rounds: Factor on every number of rounds, such as 0.1 for a quick look.
    """

    only: tuple[Section, ...] = ("merge", "overhead", "pytorch", "conversion", "cache")
    output: Path = Path("experiments/results/benchmark.json")
    rounds: float = 1.0


@dataclass(frozen=True)
class Case:
    """A training step: network, image size in pixels, batch size, and rounds to time it for."""

    model: str
    stem: Literal["small", "imagenet"]
    size: int
    batch: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.model} {self.size} px, batch {self.batch}"

    @property
    def recipe(self) -> Recipe:
        """The MedMNIST benchmark's Adam for ResNets, the released code's SGD for VGGs.

        Without flips, which the PyTorch step lacks, and at a rate that keeps weights finite.
        """
        name = "medmnist" if self.model.startswith("resnet") else "released"
        return dataclasses.replace(RECIPES[name], learning_rate=1e-3, flip=False)


OVERHEAD_CASES = (
    Case("resnet18", "small", 28, 128, rounds=20),
    Case("vgg19", "imagenet", 224, 8, rounds=10),
)
PYTORCH_CASES = (
    Case("resnet18", "small", 28, 64, rounds=10),
    Case("vgg16", "small", 28, 64, rounds=12),
    Case("vgg19", "small", 32, 64, rounds=12),
    Case("vgg19", "imagenet", 224, 8, rounds=6),
    Case("resnet50", "imagenet", 64, 16, rounds=10),
    Case("densenet121", "imagenet", 64, 16, rounds=10),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 2 on bad input. A missed target is no error."""
    config = tyro.cli(BenchmarkConfig, prog="python -m experiments.benchmark", args=arguments)
    try:
        run(config, standard_sections(config.rounds))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def standard_sections(factor: float) -> dict[str, Callable[[], list[Row]]]:
    """What each section measures, with every number of rounds times `factor`.

    Raises:
      InputError: `factor` is not a positive number.
    """
    if not 0 < factor < float("inf"):
        raise InputError(f"--rounds {factor}: choose a positive factor, such as 1 or 0.1")

    def scaled(cases: Sequence[Case]) -> list[Case]:
        return [
            dataclasses.replace(case, rounds=max(1, round(case.rounds * factor))) for case in cases
        ]

    return {
        "merge": lambda: merge_rows(rounds=max(1, round(40 * factor))),
        "overhead": lambda: [overhead_row(case) for case in scaled(OVERHEAD_CASES)],
        "pytorch": lambda: [row for case in scaled(PYTORCH_CASES) for row in pytorch_rows(case)],
        "conversion": lambda: conversion_rows(rounds=max(1, round(5 * factor))),
        "cache": lambda: cache_rows("experiments.train", TINY_RUN),
    }


def run(
    config: BenchmarkConfig, sections: dict[str, Callable[[], list[Row]]]
) -> dict[str, dict[str, Any]]:
    """Measures the chosen sections, prints each as a table, and returns what the file then holds.

    The file is written after each section, so that an interrupted run keeps those it finished.

    Raises:
      InputError: the output file can't be read or written.
    """
    stored = _read(config.output)
    _write(config.output, stored)
    kept = keep_freed_memory()  # as training on CPU does; PyTorch, in the same process, gains too
    for name in config.only:
        started = time.perf_counter()
        around = environment() | {
            "torch_threads": torch.get_num_threads(),
            "keeps_freed_memory": kept,
        }
        rows = [row.to_dict() for row in sections[name]()]
        seconds = time.perf_counter() - started
        stored[name] = {"environment": around, "seconds": seconds, "rows": rows}
        _write(config.output, stored)
        Console().print(to_table(name, stored[name]))
        gc.collect()
    print(f"written to {config.output}")
    return stored


def merge_rows(*, rounds: int, width: float = 1.0, repeats: int = 5) -> list[Row]:
    """One merge of a trained VGG19's six deep weights, p 0.3, alpha 0.8, against the loop.

    Ours is jitted and, as in the training step, given its parameters to overwrite (donated).
    """
    print(f"merge: training VGG19 for {UPDATES} updates", flush=True)
    weights, losses = train_vgg19(updates=UPDATES, width=width)
    rows = []
    for threshold, target, what in ((0.3, 5, "few qualify"), (-1.0, 3, "all selected merge")):
        print(f"merge: threshold {threshold:g}, {rounds} rounds", flush=True)
        random = MergeRule(threshold=threshold)
        contenders = {
            LOOP: loop_merger(weights, threshold),
            OURS: merger(weights, random, donate=True),
            NEAREST: merger(weights, dataclasses.replace(random, partner="nearest"), donate=True),
            KEPT: merger(weights, random, donate=False),
        }
        merged = ", ".join(f"{name} {int(run())}" for name, run in contenders.items())
        note = (
            f"kernels merged by one pass over {sum(w.shape[3] for w in weights)}: {merged}. "
            f"Jitted; params donated, as in the training step, except in {KEPT!r}. Weights: VGG19 "
            f"with batch normalisation, {UPDATES} updates of SGD on the phantom at 28 px, mean "
            f"loss {losses[0]:.2f} to {losses[1]:.2f}."
        )
        seconds = take_turns(contenders, rounds=rounds, repeats=repeats)
        name = f"merge, threshold {threshold:g} ({what})"
        within = Target("at most", 2.5) if threshold > 0 else None
        rows += [
            ratio_row(name, seconds, LOOP, OURS, Target("at least", target), note),
            ratio_row(name, seconds, NEAREST, LOOP, within, note),
            ratio_row(name, seconds, LOOP, KEPT, None, note),
        ]
    return rows


def loop_merger(weights: Sequence[np.ndarray], threshold: float) -> Callable[[], int]:
    """Runs the released code's pass on weights that it goes on changing."""
    state = [torch.from_numpy(w.transpose(3, 2, 0, 1).copy()) for w in weights]
    generator = torch.Generator().manual_seed(0)

    def run() -> int:
        nonlocal state
        state, merged = merge_pass(state, generator, 0.3, threshold, 0.8)
        return merged

    return run


def merger(weights: Sequence[np.ndarray], rule: MergeRule, *, donate: bool) -> Callable[[], Any]:
    """Runs `merge_kernels`, jitted, on weights that it goes on changing."""
    params = {f"conv{i}": jnp.array(w) for i, w in enumerate(weights)}
    kernels = [
        Kernel(path, leaf.shape, out_axis=3)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]

    def step(params: Any, root: jax.Array, count: jax.Array) -> Any:
        return merge_kernels(params, jax.random.fold_in(root, count), kernels, rule)

    step = jax.jit(step, donate_argnums=0 if donate else ())
    root, count = jax.random.key(0), 0

    def run() -> jax.Array:
        nonlocal params, count
        params, stats = jax.block_until_ready(step(params, root, np.int32(count)))
        count += 1
        return stats.merged.sum()

    return run


def overhead_row(case: Case) -> Row:
    """The training step with merging (the default rule, all but the first ten convolutions)."""
    print(f"overhead: {case}, {case.rounds} rounds", flush=True)
    plain, merging = jax_steps(case, (None, MergeRule()))
    seconds = take_turns({MERGING: merging, PLAIN: plain}, rounds=case.rounds)
    note = "random partner, threshold 0.3; state donated; both steps take turns on one state"
    return ratio_row(f"step, {case}", seconds, MERGING, PLAIN, Target("at most", 1.02), note)


def pytorch_rows(case: Case) -> list[Row]:
    """The training step without merging against PyTorch's, in its default layout and the other."""
    print(f"pytorch: {case}, {case.rounds} rounds", flush=True)
    contenders = {
        PLAIN: jax_steps(case, (None,))[0],
        TORCH: torch_step(case, torch.contiguous_format),
        TORCH_LAST: torch_step(case, torch.channels_last),
    }
    seconds = take_turns(contenders, rounds=case.rounds)
    note = f"float32, {case.recipe.optimizer}, {CLASSES} classes, RGB images given as uint8"
    name = f"step, {case}"
    return [
        ratio_row(name, seconds, TORCH, PLAIN, Target("at least", 1), note),
        ratio_row(name, seconds, TORCH_LAST, PLAIN, None, note),
    ]


def jax_steps(case: Case, rules: Sequence[MergeRule | None]) -> list[Callable[[], None]]:
    """The library's own training steps on one device, one for each rule, all on one state."""
    devices = choose_devices(1)
    model = create_model(case.model, CLASSES, stem=case.stem, axis_name=AXIS)
    shape = (case.size, case.size, 3)
    params, batch_stats = random_weights(model, shape, seed=0)
    kernels = convolutions(model, shape)
    optimizer = make_optimizer(case.recipe)
    state = new_state(params, batch_stats, optimizer, case.recipe.learning_rate)
    state = replicate(state, devices)
    images, labels = _batch(case)
    index = np.arange(case.batch, dtype=np.int32)
    batch = split({"image": images, "label": labels, "index": index}, devices)
    root = broadcast(jax.random.key(0), devices)

    def make(rule: MergeRule | None) -> Callable[[], None]:
        deep = () if rule is None else deep_kernels(kernels, skip=10)
        totals = replicate(zero_totals(len(deep)), devices)
        step = make_train_step(
            model,
            optimizer,
            case.recipe,
            multi_label=False,
            devices=devices,
            kernels=deep,
            rule=rule,
        )

        def run() -> None:
            nonlocal state, totals
            state, totals = jax.block_until_ready(step(state, totals, batch, root))

        return run

    return [make(rule) for rule in rules]


def torch_step(case: Case, layout: torch.memory_format) -> Callable[[], None]:
    """The same step as PyTorch users write it, with the memory format `layout`."""
    recipe = case.recipe
    torch.manual_seed(0)
    network = create_network(case.model, CLASSES, stem=case.stem, size=case.size)
    network = network.to(memory_format=layout)
    if recipe.optimizer == "adam":
        optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate)
    else:
        optimizer = torch.optim.SGD(
            network.parameters(),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
    images, labels = _batch(case)
    images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(memory_format=layout)
    labels = torch.from_numpy(labels).long()
    mean, std = (torch.tensor(x)[:, None, None] for x in (recipe.mean, recipe.std))

    def run() -> None:
        optimizer.zero_grad()
        logits = network((images.float() / 255 - mean) / std)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()

    return run


def _batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Random images uint8 (batch, size, size, 3) and labels int32 (batch,)."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (case.batch, case.size, case.size, 3), np.uint8)
    return images, rng.integers(0, CLASSES, case.batch, np.int32)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"--output {path}: {error}; remove it or choose another file") from error


def _write(path: Path, stored: dict[str, dict[str, Any]]) -> None:
    try:
        write_json(path, stored)
    except OSError as error:
        raise InputError(f"--output {path}: {error}; choose another file") from error


if __name__ == "__main__":
    sys.exit(main())
