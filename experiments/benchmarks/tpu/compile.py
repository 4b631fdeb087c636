"""Compiles one training step with the TPU compiler and reports its counts. Needs no TPU.

`experiments.benchmarks.tpu.check` starts one such process for each case.
"""

import dataclasses
import hashlib
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments.benchmarks.tpu.collectives import collectives
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_json

WITHOUT_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "",
    # Several compilers may run at once, because none opens a chip; a stale lock does no harm.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
CLASSES = 14


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step, and the chips that it is compiled for.

    Attributes:
      model: name of the network.
      stem: first layers of the network.
      size: height and width of the images, in pixels.
      topology: chip generation and layout, such as v5e:2x2.
      step: "plain" without merging, or the partner of the merge rule.
      images: batch size per chip.
      steps_per_call: training steps in one dispatch.
    """

    model: str
    stem: Literal["small", "imagenet"]
    size: int
    topology: str
    step: Literal["plain", "random", "nearest"]
    images: int = 64
    steps_per_call: int = 1

    @property
    def network(self) -> str:
        """Name of the network and image size."""
        return f"{self.model} {self.size} px"

    @property
    def name(self) -> str:
        """Unique name of the case."""
        calls = "" if self.steps_per_call == 1 else f", {self.steps_per_call} steps a call"
        return f"{self.network}, {self.topology}{calls}, {self.step}"


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """Compiles one training step and writes the compiler's counts.

    Attributes:
      output: JSON file for the result.
      known: fingerprint of a program with a stored result. The same program is not compiled again,
        and nothing is written.
    """

    case: tyro.conf.OmitArgPrefixes[Case]
    output: Path
    known: str = ""


def compile_case(case: Case, known: str = "") -> dict[str, Any] | None:
    """Lowers the step and, unless its fingerprint is `known`, compiles it.

    Returns:
      The compiler's counts for one chip; "compiles": False and the compiler's message for a program
      that does not compile; None for the `known` program.
    """
    import jax

    lowered, chips, largest = _lower(case)
    program, versions = _fingerprint(case, lowered)
    if program == known:
        return None
    row = dataclasses.asdict(case) | {
        "fingerprint": program,
        "versions": versions,
        "chips": chips,
        "largest_merged_layer_bytes": largest,
    }
    started = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return row | {"compiles": False, "reason": str(error).splitlines()[0][:300]}
    seconds = time.monotonic() - started
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    sizes = {
        name: getattr(memory, f"{name}_size_in_bytes")
        for name in ("argument", "output", "alias", "temp", "generated_code")
    }
    held = sizes["argument"] + sizes["output"] - sizes["alias"]
    return row | {
        "compiles": True,
        "compile_seconds": round(seconds, 1),
        "flops": cost["flops"],
        "bytes_moved": cost["bytes accessed"],
        "memory": sizes
        | {
            "total": held + sizes["temp"] + sizes["generated_code"],
            "peak": memory.peak_memory_in_bytes,
        },
        "collectives": collectives(compiled.as_text()),
    }


def fingerprint(case: Case) -> str:
    """SHA-256 of the case, its simplified program and the compiler's versions.

    In the simplified program, functions are inlined and unused values are removed, so that a change
    of code that runs on other platforms alone keeps the fingerprint.
    """
    return _fingerprint(case, _lower(case)[0])[0]


def fingerprints(cases: Sequence[Case]) -> list[str]:
    """The `fingerprint` of each case, computed by several processes.

    Requires the caller to have set the variables of `environment`.
    """
    processes = min(os.cpu_count() or 1, len(cases))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(fingerprint, cases))


def _fingerprint(case: Case, lowered: Any) -> tuple[str, dict[str, str]]:
    import jax
    import jaxlib.version
    import libtpu

    versions = {
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "libtpu": libtpu.__version__,
    }
    program = hashlib.sha256(json.dumps([dataclasses.asdict(case), versions]).encode())
    program.update(_simplified(lowered).encode())
    return program.hexdigest(), versions


def _simplified(lowered: Any) -> str:
    """The text of the program, with functions inlined and without unused values."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.passmanager import PassManager

    module = lowered.compiler_ir()
    with module.context:
        copied = ir.Module.parse(module.operation.get_asm(binary=False, enable_debug_info=False))
        passes = "builtin.module(inline,canonicalize,cse,symbol-dce)"
        PassManager.parse(passes).run(copied.operation)
        return str(copied)


def _lower(case: Case) -> tuple[Any, int, int]:
    """The lowered step, the number of chips, and the size in bytes of the largest merged layer."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    from inmerge_jax import MergeRule, deep_kernels
    from inmerge_jax.models import create_model
    from inmerge_jax.models.units import find_units
    from inmerge_jax.training.parallel import DATA_AXIS
    from inmerge_jax.training.recipes import RECIPES
    from inmerge_jax.training.train_step import (
        TrainState,
        make_optimizer,
        make_train_step,
        zero_totals,
    )

    topology = topologies.get_topology_desc(case.topology, platform="tpu")
    devices = tuple(topology.devices)
    model = create_model(case.model, CLASSES, stem=case.stem, axis_name=DATA_AXIS)
    image = jax.ShapeDtypeStruct((1, case.size, case.size, 3), jnp.float32)
    variables = jax.eval_shape(
        lambda key, x: model.init(key, x, train=False), jax.random.key(0), image
    )
    params, rest = variables["params"], variables.get("batch_stats", {})

    deep = deep_kernels(find_units(model, image.shape[1:], ("kernels",)), skip=10)
    merging = case.step != "plain"
    recipe = RECIPES["released" if case.model.startswith("vgg") else "medmnist"]
    optimizer = make_optimizer(recipe)
    state = jax.eval_shape(
        lambda p, b: TrainState(jnp.int32(0), p, b, optimizer.init(p)), params, rest
    )
    totals = jax.eval_shape(lambda: zero_totals(len(deep) if merging else 0))
    steps = () if case.steps_per_call == 1 else (case.steps_per_call,)

    def on_devices(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(devices), *x.shape), x.dtype), tree)

    number = jax.ShapeDtypeStruct((*steps, case.images), jnp.int32)
    images = jax.ShapeDtypeStruct((*number.shape, case.size, case.size, 3), jnp.uint8)
    batch = {"image": images, "label": number, "index": number}
    step: Any = make_train_step(
        model,
        optimizer,
        recipe,
        multi_label=False,
        devices=devices,
        kernels=deep if merging else (),
        rule=MergeRule(partner=case.step) if merging else None,
        steps_per_execution=case.steps_per_call,
    )
    root = jax.eval_shape(lambda: jax.random.key(0))
    # The bytes of a Pallas kernel contain source files and lines. Without these, the fingerprint is
    # the same in every checkout.
    frames = jax.config.jax_traceback_in_locations_limit  # type: ignore[attr-defined]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        lowered = step.lower(on_devices(state), on_devices(totals), on_devices(batch), root)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", frames)
    sizes = [4 * int(np.prod(kernel.shape)) for kernel in deep] if merging else []
    return lowered, len(devices), max(sizes, default=0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles the case of the command line; returns 0."""
    config = tyro.cli(
        CompileConfig, prog="python -m experiments.benchmarks.tpu.compile", args=arguments
    )
    row = compile_case(config.case, config.known)
    if row is not None:
        write_json(config.output, row)
    return 0


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """`inherited` with the variables that keep libtpu from looking for a TPU."""
    return {**inherited, **WITHOUT_TPU}


def need_libtpu() -> None:
    """Raises UsageError where libtpu is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            "libtpu is not installed: run make tpu-check, which installs it into build/tpu-check, "
            "or put such a folder on PYTHONPATH"
        )


if __name__ == "__main__":
    os.environ.update(WITHOUT_TPU)
    sys.exit(main())
