"""Part 3: the training step with and without merging, next to PyTorch's on the same device."""

import collections
import dataclasses
import functools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from experiments.accelerator import pytorch
from experiments.accelerator.session import Session
from experiments.accelerator.timing import Contender, paired_ratio, seconds_per_call, summary
from experiments.step_cases import Case, StepProgram, jax_steps
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
)
_GFLOPS = {"resnet18": 0.86, "resnet50": 8.2, "vgg19": 39.3, "densenet121": 5.7}
"""Forward pass of one image in 1e9 operations at these sizes, for estimates of time."""
_COMPILE = {"resnet18": 25, "resnet50": 70, "vgg19": 35, "densenet121": 150}
"""Seconds for both programs, estimated: what two processor cores take."""
_TORCH_COMPILE = {"resnet18": 40, "resnet50": 70, "vgg19": 40, "densenet121": 150}
_UTILISATION = 0.3
"""Share of the rate of a large matrix product that a step reaches, for estimates."""


def cases(tiny: bool) -> list[Case]:
    """In the order of what they tell: bfloat16 first, and several steps per call last."""
    if tiny:
        start = Case("vgg11", "small", 8, 8, width=0.125)
        return [start, dataclasses.replace(start, dtype="bfloat16", steps=2)]
    low = [dataclasses.replace(case, dtype="bfloat16") for case in _NETWORKS]
    found = [low[0], _SMALL, *low[1:], *_NETWORKS[1:]]
    eight = [dataclasses.replace(case, steps=8) for case in found]
    # On CPU, XLA's convolutions are about 45 times slower inside a loop.
    return found if jax.local_devices()[0].platform == "cpu" else found + eight


def name_of(case: Case) -> str:
    """For tables and files."""
    steps = f", {case.steps} steps a call" if case.steps > 1 else ""
    return f"{case}, {case.dtype}{steps}"


def measure(session: Session) -> None:
    """Measures all cases, as far as the time suffices."""
    for case in cases(session.tiny):
        seconds = 0 if session.tiny else estimate(case, session)
        session.attempt(PART, name_of(case), seconds, functools.partial(step_case, session, case))


def estimate(case: Case, session: Session) -> float:
    """Seconds for JAX's two programs: their compilation, and three rounds of each."""
    ceilings = (session.found.get("merge") or {"cases": {}})["cases"].get("ceilings", {})
    rate = ceilings.get(f"{case.dtype}_flops_per_second", 1e11)
    # The backward pass takes twice the operations of the forward pass.
    one = 3e9 * _GFLOPS[case.model] * case.batch * case.steps / (_UTILISATION * rate)
    return _COMPILE[case.model] + 2 * (2 + 3) * one


def step_case(session: Session, case: Case) -> dict[str, Any]:
    """Times, memory and compilation of JAX's step with and without merging, and of PyTorch's."""
    rounds, seconds = (2, 0.01) if session.tiny else (7, 0.5)
    programs = dict(zip((PLAIN, MERGING), jax_steps(case, (None, MergeRule())), strict=True))
    ours = {name: Contender(one.run, one.wait) for name, one in programs.items()}
    times = seconds_per_call(ours, rounds=rounds, seconds=seconds, calls=50)
    found: dict[str, Any] = {
        "images": case.batch * case.steps,
        "peak_bytes": {name: one.peak_bytes for name, one in programs.items()},
        "compile_seconds": {name: one.compile_seconds for name, one in programs.items()},
        "merging_over_plain": paired_ratio(times[MERGING], times[PLAIN]),
        "failed": {},
        "skipped": {},
    }
    if case.steps == 1:
        missing = pytorch.why_missing()
        if missing:
            found["skipped"]["PyTorch"] = missing
        else:
            beside_pytorch(session, case, programs[PLAIN], times, found)
    found["seconds_per_call"] = {name: summary(values) for name, values in times.items()}
    missed = [name for name, met in targets(found).items() if met is False]
    if missed and not session.tiny and session.left(PART) > 10:
        found["profile"] = {name: profile(one) for name, one in programs.items()}
    return found


def beside_pytorch(
    session: Session,
    case: Case,
    plain: StepProgram,
    times: dict[str, list[float]],
    found: dict[str, Any],
) -> None:
    """Adds PyTorch's eager and compiled step to `times` and `found`, each in turns with JAX's."""
    kept = session.found["correctness"]["cases"].get("precision", {})
    pytorch.allow_tf32(kept.get("reduced_precision_by_default", True))
    rounds, seconds = (2, 0.01) if session.tiny else (5, 0.5)
    once = statistics.median(times[PLAIN])
    for name, compiled in ((EAGER, False), (COMPILED, True)):
        needs = 3 * (2 + rounds) * max(once, seconds)
        needs += 0 if session.tiny or not compiled else _TORCH_COMPILE[case.model]
        left = session.left(PART)
        if needs > left:
            found["skipped"][name] = f"needs about {needs:.0f} s; {max(left, 0):.0f} s were left"
            continue
        with pytorch.failures(found["failed"], name):
            before = time.perf_counter()
            theirs, peak = pytorch.train_step(case, compiled=compiled)
            theirs.run()
            theirs.wait()
            start = time.perf_counter() - before
            turns = seconds_per_call(
                {name: theirs, PLAIN: Contender(plain.run, plain.wait)},
                rounds=rounds,
                seconds=seconds,
                calls=50,
            )
            times[name] = turns[name]
            found["compile_seconds"][name] = start - statistics.median(turns[name])
            found["peak_bytes"][name] = peak()
            found.setdefault("pytorch_over_jax", {})[name] = paired_ratio(turns[name], turns[PLAIN])


def targets(found: dict[str, Any]) -> dict[str, bool | None]:
    """Whether the targets are met, None where nothing was measured.

    Merging adds at most 1 % to a step; JAX's step is at least as fast as PyTorch's faster one.
    """
    theirs = [row["median"] for row in found.get("pytorch_over_jax", {}).values()]
    return {
        "merging": found["merging_over_plain"]["median"] <= MERGING_LIMIT,
        "pytorch": min(theirs) >= 1 if theirs else None,
    }


def profile(program: StepProgram, calls: int = 3, top: int = 12) -> dict[str, Any]:
    """The operations of a step that take the device most time.

    Returns:
      "milliseconds": of one call, summed over all operations; "operations": rows of name,
      milliseconds of one call and number of runs in it, the longest first.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                program.run()
            program.wait()
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        spent: dict[str, float] = collections.defaultdict(float)
        runs: dict[str, int] = collections.defaultdict(int)
        for plane in data.planes:
            if not plane.name.startswith("/device:"):
                continue
            # A GPU has a line for each stream; a TPU has one for its operations.
            for line in plane.lines:
                if line.name.startswith("Stream") or line.name == "XLA Ops":
                    for event in line.events:
                        spent[event.name] += event.duration_ns
                        runs[event.name] += 1
    order = sorted(spent, key=spent.__getitem__, reverse=True)[:top]
    return {
        "milliseconds": sum(spent.values()) / calls / 1e6,
        "operations": [[name, spent[name] / calls / 1e6, runs[name] / calls] for name in order],
    }
