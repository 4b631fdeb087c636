"""PyTorch on the same device as JAX: the merge in two forms, and the training step."""

import contextlib
import gc
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.accelerator.timing import Contender
from inmerge_jax import Kernel

LOOP, VECTORISED, GRAPH = "PyTorch, loop", "PyTorch, vectorised", "PyTorch, vectorised, CUDA graph"
P, ALPHA = 0.3, 0.8


def device() -> Any:
    """The PyTorch device that corresponds to the one of JAX: "cuda" for a GPU, else "cpu".

    Raises:
      RuntimeError: JAX has an accelerator that this PyTorch cannot use.
    """
    import torch

    platform = jax.local_devices()[0].platform
    if platform == "cpu":
        return torch.device("cpu")
    if platform == "gpu" and torch.cuda.is_available():
        return torch.device("cuda")
    raise RuntimeError(f"PyTorch {torch.__version__} cannot use the {platform} that JAX uses")


def why_missing(*packages: str) -> str | None:
    """Why PyTorch is not measured; None where it can be.

    Args:
      packages: that are needed in addition to PyTorch.
    """
    for name in ("torch", *packages):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    try:
        for name in ("torch", *packages):
            importlib.import_module(name)
        device()
    except Exception as error:  # Libraries of another CUDA end an import in many ways.
        return f"{type(error).__name__}: {error}"
    return None


def wait() -> None:
    """Returns when the device has done what was queued."""
    import torch

    if device().type == "cuda":
        torch.cuda.synchronize()


def as_rows(weights: Mapping[str, np.ndarray], kernels: Sequence[Kernel]) -> list[Any]:
    """The weights on the device in PyTorch's layout, kernels first."""
    import torch

    return [
        torch.from_numpy(np.moveaxis(weights[k.name], k.out_axis, 0).copy()).to(device())
        for k in kernels
    ]


def looped_merger(
    weights: Mapping[str, np.ndarray], kernels: Sequence[Kernel], threshold: float
) -> dict[str, Contender]:
    """The released code's pass, a loop over kernels, on weights that each call changes."""
    import torch

    from experiments.oracles.released_torch import merge_pass

    state, generator = as_rows(weights, kernels), torch.Generator().manual_seed(0)

    def run() -> None:
        nonlocal state
        state, _ = merge_pass(state, generator, P, threshold, ALPHA)

    return {LOOP: Contender(run, wait)}


def vectorised_merger(
    weights: Mapping[str, np.ndarray], kernels: Sequence[Kernel], partner: str, threshold: float
) -> dict[str, Contender]:
    """A vectorised merge, layer by layer, in PyTorch."""
    state = as_rows(weights, kernels)

    def run() -> None:
        for weight in state:
            merge_in_place(weight, partner, threshold)

    return {VECTORISED: Contender(run, wait)}


def graph_merger(run: Callable[[], Any]) -> dict[str, Contender]:
    """The same as a CUDA graph, which leaves out the host's time to start its operations."""
    import torch

    # Libraries set up their workspaces in the first call, which a graph cannot hold.
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return {GRAPH: Contender(graph.replay, wait)}


def merge_in_place(weight: Any, partner: str, threshold: float, draws: Any = None) -> None:
    """Merges one layer, all of whose kernels are read before any is written.

    Args:
      weight: float32, kernels first.
      partner: "random" or "nearest".
      threshold: that a similarity must exceed.
      draws: which kernels are selected, bool (kernels,), and their random partners, int64
        (kernels,); drawn where it is None.
    """
    import torch

    with torch.no_grad():
        rows, count = weight.flatten(1), len(weight)
        unit = torch.nn.functional.normalize(rows, dim=1)
        if draws is None:
            selected = torch.rand(count, device=weight.device) < P
            other = torch.randint(count - 1, (count,), device=weight.device)
            other += other >= torch.arange(count, device=weight.device)
        else:
            selected, other = draws
        if partner == "nearest":
            similarity, other = (unit @ unit.T).fill_diagonal_(-2).max(1)
        else:
            similarity = (unit * unit[other]).sum(1)
        merged = selected & (similarity > threshold)
        mixed = ALPHA * rows + (1 - ALPHA) * rows[other]
        weight.copy_(torch.where(merged[:, None], mixed, rows).view_as(weight))


def train_step(case: Any, *, compiled: bool) -> tuple[Contender, Callable[[], int | None]]:
    """The training step of `step_cases.Case` in channels_last, and a function for peak memory.

    bfloat16 is PyTorch's autocast: weights stay float32, as ours do. float32 products use TF32
    where JAX's do, which is decided by `allow_tf32`.

    Args:
      case: network, sizes and dtype.
      compiled: with `torch.compile`, or eager.

    Returns:
      What to time; and the bytes that PyTorch's allocator had at most, None on CPU.
    """
    import torch

    from experiments.benchmarks.step_cases import torch_step

    on = device()
    if on.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    low = case.dtype == "bfloat16"
    autocast = torch.autocast(on.type, torch.bfloat16) if low else contextlib.nullcontext()
    run = torch_step(case, torch.channels_last, device=on, autocast=autocast, compiled=compiled)

    def peak() -> int | None:
        return torch.cuda.max_memory_allocated() if on.type == "cuda" else None

    return Contender(run, wait), peak


def release() -> None:
    """Frees the memory of networks that are no longer referred to, compiled ones too."""
    import torch

    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def allow_tf32(allowed: bool) -> None:
    """Whether PyTorch's float32 products and convolutions on a GPU use TF32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
