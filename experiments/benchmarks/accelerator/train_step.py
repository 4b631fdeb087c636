"""Part 3: the training step with and without merging, next to PyTorch's on the same device."""

import collections
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.accelerator import pytorch
from experiments.benchmarks.accelerator.session import Session, failures
from experiments.benchmarks.accelerator.timing import (
    Contender,
    paired_ratio,
    seconds_per_call,
    summary,
)
from experiments.benchmarks.step_cases import WITH_COUNTERPART, Case, StepProgram, jax_steps
from inmerge_jax import MergeRule

PART = "step"
MERGING_LIMIT = 1.01
"""A step with merging takes at most this many times as long as one without."""
PLAIN, MERGING, EAGER, COMPILED = "JAX", "JAX, merging", "PyTorch, eager", "PyTorch, torch.compile"

_SMALL = Case("resnet18", "small", 28, 128)
_NETWORKS = (
    _SMALL,
    Case("resnet50", "imagenet", 224, 256),
    Case("vgg19", "imagenet", 224, 128),
    Case("densenet121", "imagenet", 224, 64),
    Case("vit_s_16", "small", 224, 128),
    Case("mamba_tiny", "small", 28, 128),
)
_GFLOPS = {
    **{"resnet18": 0.86, "resnet50": 8.2, "vgg19": 39.3, "densenet121": 5.7},
    **{"vit_s_16": 9.2, "mamba_tiny": 0.06},
}
"""Forward pass of one image in 1e9 operations at these sizes, for estimates of time."""
_COMPILE = {
    **{"resnet18": 25, "resnet50": 70, "vgg19": 35, "densenet121": 150},
    **{"vit_s_16": 45, "mamba_tiny": 40},
}
"""Seconds for both programs, estimated: what two processor cores take."""
_TORCH_COMPILE = {
    **{"resnet18": 40, "resnet50": 70, "vgg19": 40, "densenet121": 150},
    **{"vit_s_16": 60, "mamba_tiny": 0},
}
_ROUNDS, _SECONDS = 7, 0.3
"""Of timing: numbers for each contender, and the seconds that each takes at least."""
_UTILISATION = {"cpu": 0.7, "gpu": 0.3, "tpu": 0.3}
"""Share of the rate of a large matrix product that a step reaches, for estimates."""


def groups(tiny: bool) -> list[list[Case]]:
    """In the order of what they tell: bfloat16, float32, then several steps per call."""
    if tiny:
        start = Case("vgg11", "small", 8, 8, width=0.125)
        return [[start, dataclasses.replace(start, dtype="bfloat16", steps=2)]]
    low = [dataclasses.replace(case, dtype="bfloat16") for case in _NETWORKS]
    found = [[low[0]], [_SMALL], low[1:], list(_NETWORKS[1:])]
    if jax.local_devices()[0].platform == "cpu":
        # Its own type first, and no loops, in which XLA's convolutions are 45 times slower there.
        return [[_SMALL], list(_NETWORKS[1:]), low]
    eight = [dataclasses.replace(case, steps=8) for case in (low[0], _SMALL, *low[1:])]
    return [*found, eight, [dataclasses.replace(case, steps=8) for case in _NETWORKS[1:]]]


def name_of(case: Case) -> str:
    """For tables and files."""
    steps = f", {case.steps} steps a call" if case.steps > 1 else ""
    return f"{case}, {case.dtype}{steps}"


def measure(session: Session) -> None:
    """Measures all cases, as far as the time suffices; PyTorch's compiled step after each group."""
    for group in groups(session.tiny):
        for case in group:
            seconds = 0 if session.tiny else estimate(case, session)
            run = functools.partial(step_case, session, case)
            session.attempt(PART, name_of(case), seconds, run)
        for case in group:
            if case.steps == 1 and case.model in WITH_COUNTERPART:
                seconds = 0 if session.tiny else estimate(case, session, compiled=True)
                run = functools.partial(compiled_case, session, case)
                session.attempt(PART, f"{name_of(case)}: {COMPILED}", seconds, run)


def estimate(case: Case, session: Session, *, compiled: bool = False) -> float:
    """Seconds for a case: compilation, and the least number of calls."""
    ceilings = session.found["merge"]["cases"].get("ceilings", {})
    rate = ceilings.get(f"{case.dtype}_flops_per_second", 1e11)
    # The backward pass takes twice the operations of the forward pass.
    used = _UTILISATION.get(jax.local_devices()[0].platform, 0.3)
    one = 3e9 * _GFLOPS[case.model] * case.batch * case.steps / (used * rate)
    scale = 1.0  # of the estimates, as this machine has shown
    for found in session.found[PART]["cases"].values():
        if COMPILED in found and COMPILED not in found["compile_seconds"]:
            continue  # PyTorch is missing, and JAX's program came from the cache.
        scale = max(found["compile_seconds"].values()) / _assumed(found["model"], COMPILED in found)
    # Two contenders, or twice two, each with two calls untimed and two or more rounds.
    calls = (8 if compiled else 16) * one
    return _assumed(case.model, compiled) * scale + max(calls, 4 * _ROUNDS * _SECONDS)


def _assumed(model: str, compiled: bool) -> float:
    return (_TORCH_COMPILE if compiled else _COMPILE)[model]


def step_case(session: Session, case: Case) -> dict[str, Any]:
    """Times, memory and compilation of JAX's step with and without merging, and of eager PyTorch.

    Where a target is missed, the operations that take most time are added.
    """
    rounds, seconds = _turns(session)
    programs = dict(zip((PLAIN, MERGING), jax_steps(case, (None, MergeRule())), strict=True))
    ours = {name: Contender(one.run, one.wait) for name, one in programs.items()}
    limit = session.left(PART) / 4
    times = seconds_per_call(ours, rounds=rounds, seconds=seconds, calls=50, limit=limit)
    found = {
        "model": case.model,
        "images": case.batch * case.steps,
        "peak_bytes": {name: one.peak_bytes for name, one in programs.items()},
        "compile_seconds": {name: one.compile_seconds for name, one in programs.items()},
        "merging_over_plain": paired_ratio(times[MERGING], times[PLAIN]),
        "seconds_per_call": {name: summary(values) for name, values in times.items()},
        "failed": {},
        "skipped": {},
    }
    if case.steps == 1:
        beside_pytorch(session, case, programs[PLAIN], found, EAGER)
    missed = [name for name, met in targets(found).items() if met is False]
    if missed and session.left(PART) > 10:
        with failures(found["failed"], "profile"):
            found["profile"] = {name: profile(one) for name, one in programs.items()}
    return found


def compiled_case(session: Session, case: Case) -> dict[str, Any]:
    """PyTorch's step by `torch.compile`, in turns with JAX's, whose program is in the cache."""
    (plain,) = jax_steps(case, (None,))
    found: dict[str, Any] = {"model": case.model, COMPILED: True, "failed": {}, "skipped": {}}
    found |= {"peak_bytes": {}, "compile_seconds": {}, "seconds_per_call": {}}
    found["compile_seconds"][PLAIN] = plain.compile_seconds
    beside_pytorch(session, case, plain, found, COMPILED)
    return found


def _turns(session: Session) -> tuple[int, float]:
    return (2, 0.01) if session.tiny else (_ROUNDS, _SECONDS)


def beside_pytorch(
    session: Session, case: Case, plain: StepProgram, found: dict[str, Any], name: str
) -> None:
    """Adds PyTorch's eager or compiled step to `found`, in turns with JAX's."""
    if case.model not in WITH_COUNTERPART:
        found["skipped"][name] = f"{case.model} has no counterpart in PyTorch here"
        return
    needed = () if case.model.startswith("resnet") and case.stem == "small" else ("torchvision",)
    missing = pytorch.why_missing(*needed)
    if missing:
        found["skipped"][name] = missing
        return
    kept = session.found["correctness"]["cases"].get("precision", {})
    pytorch.allow_tf32(kept.get("reduced_precision_by_default", True))
    rounds, seconds = _turns(session)
    with failures(found["failed"], name):
        theirs, peak = pytorch.train_step(case, compiled=name == COMPILED)
        before = time.perf_counter()
        theirs.run()
        theirs.wait()
        start = time.perf_counter() - before
        turns = seconds_per_call(
            {name: theirs, PLAIN: Contender(plain.run, plain.wait)},
            rounds=rounds,
            seconds=seconds,
            calls=50,
            limit=session.left(PART) / 2,
        )
        found["seconds_per_call"][name] = summary(turns[name])
        found["compile_seconds"][name] = start - statistics.median(turns[name])
        found["peak_bytes"][name] = peak()
        found["pytorch_over_jax"] = {name: paired_ratio(turns[name], turns[PLAIN])}
        del theirs, peak
    pytorch.release()


def targets(found: dict[str, Any]) -> dict[str, bool | None]:
    """Whether the targets are met, None where nothing was measured.

    Merging adds at most 1 % to a step; JAX's step is at least as fast as PyTorch's.
    """
    theirs = [row["median"] for row in found.get("pytorch_over_jax", {}).values()]
    return {
        "merging": found["merging_over_plain"]["median"] <= MERGING_LIMIT,
        "pytorch": min(theirs) >= 1 if theirs else None,
    }


def combined(cases: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The stored cases by `name_of`, each with its compiled case's figures among its own."""
    found = {}
    for name, case in cases.items():
        base = name.removesuffix(f": {COMPILED}")
        if base == name:
            found[base] = {**case, "pytorch_over_jax": dict(case.get("pytorch_over_jax", {}))}
            continue
        if base in found:
            for key in ("pytorch_over_jax", "peak_bytes"):
                found[base][key] = found[base][key] | case.get(key, {})
            # Of this case JAX's program came from the cache.
            found[base]["compile_seconds"] = (
                case["compile_seconds"] | found[base]["compile_seconds"]
            )
    return found


def profile(program: StepProgram, calls: int = 3, top: int = 12) -> dict[str, Any]:
    """The operations of a step that take the device most time; see `time_by_operation`."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                program.run()
            program.wait()
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
        return time_by_operation(planes, calls, top)


def time_by_operation(planes: Iterable[Any], calls: int, top: int) -> dict[str, Any]:
    """Sums the events on the devices of a profile by their names.

    Args:
      planes: of `jax.profiler.ProfileData`; those of devices are named "/device:...".
      calls: of the program, in the profile.
      top: how many operations are named.

    Returns:
      "milliseconds": of one call, over all operations; "operations": rows of name, milliseconds of
      one call and number of runs in it, the longest first. CPU has no such plane, so no rows.
    """
    spent: dict[str, float] = collections.defaultdict(float)
    runs: dict[str, int] = collections.defaultdict(int)
    for plane in planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            # A GPU has a line for each stream; a TPU has one for its operations.
            if line.name.startswith("Stream") or line.name == "XLA Ops":
                for event in line.events:
                    spent[event.name] += event.duration_ns
                    runs[event.name] += 1
    order = sorted(spent, key=spent.__getitem__, reverse=True)[:top]
    return {
        "milliseconds": sum(spent.values()) / calls / 1e6,
        "operations": [[name, spent[name] / calls / 1e6, runs[name] / calls] for name in order],
    }
