"""Benchmarks merging on CPU against the released code's loop, plain training and PyTorch."""

import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro
from rich.console import Console

from experiments.benchmarks.step_cases import (
    CLASSES,
    Case,
    StepProgram,
    jax_steps,
    network_and_units,
    torch_step,
)
from experiments.benchmarks.timing import Row, Target, ratio_row, take_turns, to_table
from experiments.benchmarks.trained_weights import train_vgg19
from experiments.oracles.released_torch import merge_pass
from inmerge_jax import MergeRule, deep_kernels, merge_kernels, quantile
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_json
from inmerge_jax.merging import Kernel
from inmerge_jax.merging.backends import Implementation
from inmerge_jax.models import create_model
from inmerge_jax.models.units import default_units, find_units
from inmerge_jax.training.environment import configure_malloc, environment
from inmerge_jax.training.init import init_variables

Section = Literal["merge", "backends", "overhead", "arms", "families", "pytorch"]

UPDATES = 60
LOOP, OURS, NEAREST, KEPT = "PyTorch loop", "random", "nearest", "random, params kept"
REFERENCE: Implementation = "reference"
CPU: Implementation = "cpu"
PLAIN, MERGING, TORCH, TORCH_LAST = "plain", "merging", "PyTorch", "PyTorch channels_last"
MERGE = "merge alone"


@dataclass(frozen=True)
class BenchmarkConfig:
    """Benchmarks in-model merging on this machine, which should be idle otherwise.

    merge: merge of VGG19's six deep layers, compared with a PyTorch version of the released code's
    loop. backends: merge of a network's deep layers, reference and CPU implementation, and the
    share of a training step saved. overhead: training step with and without merging. arms: training
    steps of the study's arms, compared with fine-tuning, with their compilation and memory.
    families: the same for networks other than image CNNs. pytorch: training step without merging,
    compared with PyTorch. Contenders run interleaved in one process; a ratio is the median of the
    ratios by round.

    Attributes:
      only: Sections to measure. The output file keeps the rows of the other sections.
      output: JSON file for times, ratios and the environment.
      rounds: Factor on every number of rounds, such as 0.1 for a quick run.
    """

    only: tuple[Section, ...] = get_args(Section)
    output: Path = Path("experiments/results/benchmark.json")
    rounds: float = 1.0


class Rounds(NamedTuple):
    """A training step and its number of timed rounds."""

    case: Case
    rounds: int


OVERHEAD_CASES = (
    Rounds(Case("resnet18", "small", 28, 128), 20),
    Rounds(Case("vgg19", "imagenet", 224, 8), 10),
)
ARM_CASES = (
    Rounds(Case("vgg16", "small", 64, 64), 16),
    Rounds(Case("vgg16", "small", 28, 64), 16),
    Rounds(Case("resnet18", "small", 28, 128), 16),
    Rounds(Case("resnet18", "small", 28, 32, width=0.25), 100),
)
"""Networks, image sizes and batch sizes of docs/protocol.md, sections 1 to 4."""
ARMS = {
    "paper": MergeRule(threshold=-1.0, partner="nearest"),
    "released": MergeRule(threshold=-1.0),
    "quantile": MergeRule(threshold=quantile(0.5), partner="nearest"),
}
"""Arms of the study. With a threshold of -1 all selected kernels merge: the most expensive case."""
FAMILY_CASES = (
    Rounds(Case("vit_tiny", "small", 28, 128), 6),
    Rounds(Case("mixer_tiny", "small", 28, 128), 10),
    Rounds(Case("mamba_tiny", "small", 140, 128, modality="signal"), 6),
    Rounds(Case("resnet18", "small", 140, 128, modality="signal"), 10),
    Rounds(Case("resnet18", "small", 28, 2, modality="volume"), 4),
    Rounds(Case("mlp", "small", 30, 128, modality="table"), 40),
)
PYTORCH_CASES = (
    Rounds(Case("resnet18", "small", 28, 64), 10),
    Rounds(Case("vgg16", "small", 28, 64), 12),
    Rounds(Case("vgg19", "small", 32, 64), 12),
    Rounds(Case("vgg19", "imagenet", 224, 8), 6),
    Rounds(Case("resnet50", "imagenet", 64, 16), 10),
    Rounds(Case("densenet121", "imagenet", 64, 16), 10),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 2 on bad input. A missed target is no error."""
    config = tyro.cli(BenchmarkConfig, prog="python -m experiments.benchmarks.cpu", args=arguments)
    try:
        run(config, standard_sections(config.rounds))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def standard_sections(factor: float) -> dict[str, Callable[[], list[Row]]]:
    """Section -> function that measures it, with all numbers of rounds multiplied by `factor`.

    Raises:
      UsageError: `factor` is not a positive number.
    """
    if not 0 < factor < float("inf"):
        raise UsageError(f"--rounds {factor}: choose a positive factor, such as 1 or 0.1")

    def scaled(cases: Sequence[Rounds]) -> list[Rounds]:
        return [Rounds(case, max(1, round(rounds * factor))) for case, rounds in cases]

    return {
        "merge": lambda: merge_rows(rounds=max(1, round(40 * factor))),
        "backends": lambda: [row for one in scaled(OVERHEAD_CASES) for row in backend_rows(*one)],
        "overhead": lambda: [overhead_row(*one) for one in scaled(OVERHEAD_CASES)],
        "arms": lambda: [row for one in scaled(ARM_CASES) for row in arm_rows(*one)],
        "families": lambda: [row for one in scaled(FAMILY_CASES) for row in family_rows(*one)],
        "pytorch": lambda: [row for one in scaled(PYTORCH_CASES) for row in pytorch_rows(*one)],
    }


def run(
    config: BenchmarkConfig, sections: dict[str, Callable[[], list[Row]]]
) -> dict[str, dict[str, Any]]:
    """Measures the chosen sections, prints their tables and returns the file's contents.

    The file is written after each section, so that an interrupted run keeps the finished ones.

    Raises:
      UsageError: the output file can't be read or written.
    """
    stored = _read(config.output)
    _write(config.output, stored)
    kept = configure_malloc()  # as in training on CPU; it also applies to PyTorch
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
    """Merge of a trained VGG19's six deep weights, compared with the released code's loop.

    Probability 0.3, alpha 0.8. The merge is jitted and its parameters are donated, as in training.
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
    """Function that applies the released code's merge pass to its own copy of the weights."""
    state = [torch.from_numpy(w.transpose(3, 2, 0, 1).copy()) for w in weights]
    generator = torch.Generator().manual_seed(0)

    def run() -> int:
        nonlocal state
        state, merged = merge_pass(state, generator, 0.3, threshold, 0.8)
        return merged

    return run


def merger(
    weights: Sequence[np.ndarray],
    rule: MergeRule,
    *,
    donate: bool,
    implementation: Implementation = "auto",
) -> Callable[[], Any]:
    """Function that applies the jitted `merge_kernels` to its own copy of the weights."""
    params = {f"conv{i}": jnp.array(w) for i, w in enumerate(weights)}
    kernels = [
        Kernel(path, leaf.shape, out_axis=3)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    return _merger(params, kernels, rule, donate, implementation)


def unit_merger(case: Case, rule: MergeRule) -> Callable[[], Any]:
    """Function that merges the units of a network as its training step does, and nothing else."""
    model, units = network_and_units(case)
    return _merger(init_variables(model, case.shape, 0)[0], units, rule, True, "auto")


def _merger(
    params: Any,
    kernels: Sequence[Kernel],
    rule: MergeRule,
    donate: bool,
    implementation: Implementation,
) -> Callable[[], Any]:
    def step(params: Any, root: jax.Array, count: jax.Array) -> Any:
        key = jax.random.fold_in(root, count)
        return merge_kernels(params, key, kernels, rule, implementation=implementation)

    step = jax.jit(step, donate_argnums=0 if donate else ())
    root, count = jax.random.key(0), 0

    def run() -> jax.Array:
        nonlocal params, count
        params, stats = jax.block_until_ready(step(params, root, np.int32(count)))
        count += 1
        return stats.merged.sum()

    return run


def backend_rows(case: Case, rounds: int) -> list[Row]:
    """Merge of a network's deep layers by the reference and the CPU implementation."""
    print(f"backends: {case}, {rounds} rounds", flush=True)
    model = create_model(case.model, CLASSES, stem=case.stem, width=case.width)
    shape = (case.size, case.size, 3)
    kernels = deep_kernels(find_units(model, shape, ("kernels",)), skip=10)
    leaves = dict(jax.tree_util.tree_leaves_with_path(init_variables(model, shape, 0)[0]))
    weights = [np.asarray(leaves[kernel.path]) for kernel in kernels]
    rules = {
        "few merge": MergeRule(),
        "all selected merge": MergeRule(threshold=-1.0),
        "nearest": MergeRule(threshold=-1.0, partner="nearest"),
    }
    contenders = {PLAIN: blocking(jax_steps(case, (None,))[0])}
    for name, rule in rules.items():
        for form in (REFERENCE, CPU):
            contenders[f"{name}, {form}"] = merger(weights, rule, donate=True, implementation=form)
    seconds = take_turns(contenders, rounds=rounds)
    rows = []
    for name in rules:
        slow, fast = f"{name}, {REFERENCE}", f"{name}, {CPU}"
        ratio = ratio_row(f"{case}, {name}", seconds, slow, fast)
        times = zip(seconds[slow], seconds[fast], seconds[PLAIN], strict=True)
        shares = [(a - b) / step for a, b, step in times]
        saved = dataclasses.replace(
            ratio,
            quantity="share of a step saved",
            value=statistics.median(shares),
            low=min(shares),
            high=max(shares),
            target=Target("at least", 0.01),
            seconds=ratio.seconds | {PLAIN: seconds[PLAIN]},
        )
        rows += [ratio, saved]
    return rows


def overhead_row(case: Case, rounds: int) -> Row:
    """Training step with merging by the default rule, compared with the step without."""
    print(f"overhead: {case}, {rounds} rounds", flush=True)
    plain, merging = map(blocking, jax_steps(case, (None, MergeRule())))
    seconds = take_turns({MERGING: merging, PLAIN: plain}, rounds=rounds)
    note = "random partner, threshold 0.3; state donated; both steps take turns on one state"
    return ratio_row(f"step, {case}", seconds, MERGING, PLAIN, Target("at most", 1.02), note)


def family_rows(case: Case, rounds: int) -> list[Row]:
    """Step of a network with merging, and a merge alone, compared with the step without.

    Also compilation and memory. The target of 0.01 is for steps of 100 ms or more.
    """
    print(f"families: {case}, {rounds} rounds", flush=True)
    programs = jax_steps(case, (None, MergeRule()))
    plain, merging = map(blocking, programs)
    contenders = {MERGING: merging, PLAIN: plain, MERGE: unit_merger(case, MergeRule())}
    seconds = take_turns(contenders, rounds=rounds)
    step = statistics.median(seconds[PLAIN])
    target = Target("at most", 0.01) if step >= 0.1 else None
    name = f"step, {case}"
    note = f"units: {', '.join(default_units(case.model))}; random partner, threshold 0.3"
    rate = [case.batch / one for one in seconds[PLAIN]]
    return [
        ratio_row(name, seconds, MERGING, PLAIN, None, note),
        ratio_row(name, seconds, MERGE, PLAIN, target, note),
        Row(name, "examples per second, plain", statistics.median(rate), min(rate), max(rate)),
        *_program_rows(name, PLAIN, programs[0], MERGING, programs[1]),
    ]


def arm_rows(case: Case, rounds: int) -> list[Row]:
    """Step of each merging arm of the study, compared with the step of fine-tuning.

    Also compilation and memory, of fine-tuning and the paper's rule.
    """
    print(f"arms: {case}, {rounds} rounds", flush=True)
    programs = dict(zip((PLAIN, *ARMS), jax_steps(case, (None, *ARMS.values())), strict=True))
    seconds = take_turns({arm: blocking(one) for arm, one in programs.items()}, rounds=rounds)
    name, first = f"step, {case}", next(iter(ARMS))
    return [
        *(ratio_row(name, seconds, arm, PLAIN, None, str(rule)) for arm, rule in ARMS.items()),
        *_program_rows(name, PLAIN, programs[PLAIN], first, programs[first]),
    ]


def _program_rows(
    name: str, plain: str, without: StepProgram, merging: str, program: StepProgram
) -> list[Row]:
    """Compilation and memory of two programs."""
    figures = {
        f"seconds of compilation, {plain}": without.compile_seconds,
        f"seconds of compilation, {merging}": program.compile_seconds,
        f"planned memory in MB, {plain}": without.peak_bytes / 1e6,
        f"planned memory, {merging} / {plain}": program.peak_bytes / without.peak_bytes,
    }
    return [Row(name, quantity, *(value,) * 3) for quantity, value in figures.items()]


def pytorch_rows(case: Case, rounds: int) -> list[Row]:
    """Training step without merging compared with PyTorch's, in both memory formats."""
    print(f"pytorch: {case}, {rounds} rounds", flush=True)
    contenders = {
        PLAIN: blocking(jax_steps(case, (None,))[0]),
        TORCH: torch_step(case, torch.contiguous_format),
        TORCH_LAST: torch_step(case, torch.channels_last),
    }
    seconds = take_turns(contenders, rounds=rounds)
    note = f"float32, {case.recipe.optimizer}, {CLASSES} classes, RGB images given as uint8"
    name = f"step, {case}"
    return [
        ratio_row(name, seconds, TORCH, PLAIN, Target("at least", 1), note),
        ratio_row(name, seconds, TORCH_LAST, PLAIN, None, note),
    ]


def blocking(program: StepProgram) -> Callable[[], None]:
    """Function that calls a step once and waits for its result."""

    def run() -> None:
        program.run()
        program.wait()

    return run


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {path}: {error}; remove it or choose another file") from error


def _write(path: Path, stored: dict[str, dict[str, Any]]) -> None:
    try:
        write_json(path, stored)
    except OSError as error:
        raise UsageError(f"--output {path}: {error}; choose another file") from error


if __name__ == "__main__":
    sys.exit(main())
