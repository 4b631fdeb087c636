"""Part 2: what one merge of a network's deep layers costs on the device."""

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benchmarks.accelerator.session import Session, failures
from experiments.benchmarks.accelerator.timing import (
    Contender,
    copy_bandwidth,
    matmul_rate,
    seconds_per_call,
    summary,
)
from inmerge_jax import Kernel, MergeRule, merge_kernels
from inmerge_jax.models import create_model
from inmerge_jax.models.units import find_units

PART = "merge"
THRESHOLDS = (0.3, -1.0)
"""With random weights no pair exceeds the first, and every selected kernel exceeds the second."""
PARTNERS: tuple[Literal["random", "nearest"], ...] = ("random", "nearest")


class Network(NamedTuple):
    """Whose deep layers are merged: those after the first `skip` convolutions."""

    model: str
    stem: Literal["small", "imagenet"]
    size: int
    skip: int


NETWORKS = {
    "VGG19, six deep layers": Network("vgg19", "imagenet", 224, 10),
    "ResNet-18": Network("resnet18", "small", 28, 10),
    "ResNet-50": Network("resnet50", "imagenet", 224, 10),
    "DenseNet-121": Network("densenet121", "imagenet", 224, 10),
}
_COMPILE = {"VGG19, six deep layers": 15, "ResNet-18": 15, "ResNet-50": 45, "DenseNet-121": 90}
"""Seconds for both partners' programs, estimated: what two processor cores take."""
_MEASURE = 12
"""Seconds for everything that is timed of one network, estimated."""


def measure(session: Session) -> None:
    """Measures the ceilings of the device, and then every network."""
    session.attempt(PART, "ceilings", 10, lambda: ceilings(session.tiny))
    scale = 1.0  # of the estimates, as this machine has shown
    for name in ("ResNet-18",) if session.tiny else NETWORKS:
        network = NETWORKS[name]
        seconds = 0 if session.tiny else _COMPILE[name] * scale + _MEASURE
        case = functools.partial(merge_case, session, network)
        session.attempt(PART, name, seconds, case)
        if name in session.found[PART]["cases"]:
            scale = session.found[PART]["cases"][name]["compile_seconds"] / _COMPILE[name]


def ceilings(tiny: bool) -> dict[str, Any]:
    """The device's copy bandwidth in bytes/s and its rates of matrix products in FLOP/s."""
    return {
        "copy_bytes_per_second": copy_bandwidth(tiny),
        "float32_flops_per_second": matmul_rate(jnp.float32, tiny),
        "bfloat16_flops_per_second": matmul_rate(jnp.bfloat16, tiny),
    }


def deep_layers(network: Network, tiny: bool) -> tuple[Kernel, ...]:
    """The layers that merge, from an abstract trace; the first two of them if `tiny`."""
    width = 0.125 if tiny and network.stem == "small" else 1.0
    model = create_model(network.model, 14, stem=network.stem, width=width)
    kernels = find_units(model, (network.size, network.size, 3), ("kernels",))[network.skip :]
    return tuple(
        # Named by their paths, so that a flat dict holds them.
        Kernel((jax.tree_util.DictKey(kernel.name),), kernel.shape, kernel.out_axis)
        for kernel in kernels[: 2 if tiny else None]
    )


def merge_case(session: Session, network: Network) -> dict[str, Any]:
    """Seconds of a merge with both partners at both thresholds, of PyTorch's, and the lower bound.

    The lower bound reads and writes the weights once at the measured copy bandwidth. JAX's time is
    that of a loop on the device divided by its merges: the time that the host takes to start a
    program is no part of it.
    """
    from experiments.benchmarks.accelerator import pytorch

    kernels = deep_layers(network, session.tiny)
    weights = {
        kernel.name: np.random.default_rng(index).standard_normal(kernel.shape, np.float32)
        for index, kernel in enumerate(kernels)
    }
    moved = 2 * sum(weight.nbytes for weight in weights.values())
    ceiling = session.found[PART]["cases"].get("ceilings")
    bound = moved / ceiling["copy_bytes_per_second"] if ceiling else None
    count = 4 if session.tiny else 32
    loops = {partner: MergeLoop(kernels, partner, count) for partner in PARTNERS}
    before = time.perf_counter()
    compile_together([loop.compile for loop in loops.values()])
    compiled = time.perf_counter() - before
    rounds, seconds = (2, 0.01) if session.tiny else (5, 0.2)
    rows: dict[str, Any] = {}
    failed: dict[str, str] = {}
    missing = pytorch.why_missing()
    for partner, threshold in itertools.product(PARTNERS, THRESHOLDS):
        name = f"{partner}, threshold {threshold:g}"
        contenders = {"JAX": loops[partner].contender(weights, threshold)}
        if missing is None:
            with failures(failed, f"{name}: vectorised"):
                contenders |= pytorch.vectorised_merger(weights, kernels, partner, threshold)
                if pytorch.device().type == "cuda":
                    contenders |= pytorch.graph_merger(contenders[pytorch.VECTORISED].run)
        times = seconds_per_call(contenders, rounds=rounds, seconds=seconds)
        times["JAX"] = [one / count for one in times["JAX"]]
        if missing is None and partner == "random":
            with failures(failed, f"{name}: loop"):
                # Its loop over kernels takes up to seconds.
                slow = pytorch.looped_merger(weights, kernels, threshold)
                times |= seconds_per_call(slow, rounds=2, seconds=0)
        found = {who: summary(values) for who, values in times.items()}
        ours = found["JAX"]["median"]
        rows[name] = {
            "seconds": found,
            "over_bound": ours / bound if bound else None,
            "speedup": {who: one["median"] / ours for who, one in found.items() if who != "JAX"},
        }
    return {
        "layers": len(kernels),
        "kernels": sum(kernel.count for kernel in kernels),
        "bytes_moved": moved,
        "bound_seconds": bound,
        "compile_seconds": compiled,
        "merges": rows,
        "failed": failed,
        "skipped": {} if missing is None else {"PyTorch": missing},
    }


class MergeLoop:
    """Many merges, one after the other, as one program; its threshold is an argument."""

    def __init__(self, kernels: Sequence[Kernel], partner: str, count: int):
        """Traces the program.

        Args:
          kernels: the layers, each a leaf of one dict.
          partner: of `MergeRule`.
          count: merges in the program.
        """

        def merges(params: Any, root: jax.Array, threshold: jax.Array) -> Any:
            rule = MergeRule(0.3, threshold, 0.8, partner)

            def one(number: jax.Array, params: Any) -> Any:
                return merge_kernels(params, jax.random.fold_in(root, number), kernels, rule)[0]

            return lax.fori_loop(0, count, one, params)

        shapes = {
            kernel.name: jax.ShapeDtypeStruct(kernel.shape, jnp.float32) for kernel in kernels
        }
        self.root = jax.random.key(0)
        threshold = jax.ShapeDtypeStruct((), jnp.float32)
        self.lowered = jax.jit(merges, donate_argnums=0).lower(shapes, self.root, threshold)
        self.program: Any = None

    def compile(self) -> None:
        """Compiles the program; may be called in another thread."""
        self.program = self.lowered.compile()

    def contender(self, weights: Any, threshold: float) -> Contender:
        """One call of the program on weights that each call changes."""
        params, limit = jax.device_put(weights), jnp.float32(threshold)

        def run() -> None:
            nonlocal params
            params = self.program(params, self.root, limit)

        return Contender(run, lambda: jax.block_until_ready(params))


def compile_together(compilers: Sequence[Callable[[], Any]]) -> None:
    """Calls them in threads of their own: XLA compiles several programs at a time."""
    with ThreadPoolExecutor(len(compilers)) as pool:
        for future in [pool.submit(compiler) for compiler in compilers]:
            future.result()
