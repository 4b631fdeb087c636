"""Training steps of a fixed size, in JAX and in PyTorch, for benchmarks."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from inmerge_jax import Kernel, MergeRule
from inmerge_jax.merging.units import group_weights
from inmerge_jax.modality import SIZE_UNITS, SPATIAL_AXES, Modality
from inmerge_jax.models import create_model, model_names
from inmerge_jax.models.units import default_units, find_units
from inmerge_jax.training.init import init_variables
from inmerge_jax.training.parallel import (
    DATA_AXIS,
    broadcast_to_devices,
    choose_devices,
    replicate,
    shard_batch,
)
from inmerge_jax.training.presets import NO_PRESET, select_units
from inmerge_jax.training.recipes import RECIPES, Recipe
from inmerge_jax.training.train_step import make_optimizer, make_train_step, new_state, zero_totals

if TYPE_CHECKING:
    import torch

CLASSES = 14
WITH_COUNTERPART = tuple(
    name
    for name in model_names("image")
    if name.startswith(("resnet", "vgg", "densenet", "vit_s", "vit_b"))
)
"""Networks that `torch_step` has."""


@dataclass(frozen=True)
class Case:
    """A training step on one device.

    Attributes:
      model: name of the network, see `create_model`.
      stem: first layers of the network.
      size: height and width of RGB images in pixels; depth, height and width of grey volumes;
        samples of a signal of one channel; or features of a table.
      batch: batch size.
      dtype: dtype of activations; weights are float32.
      steps: updates in one call.
      width: factor on the number of channels.
      modality: what the examples are.
    """

    model: str
    stem: Literal["small", "imagenet"]
    size: int
    batch: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    steps: int = 1
    width: float = 1.0
    modality: Modality = "image"

    def __str__(self) -> str:
        width = "" if self.width == 1 else f" width {self.width:g}"
        return f"{self.model}{width} {self.size} {SIZE_UNITS[self.modality]}, batch {self.batch}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        channels = {"image": 3, "table": self.size}.get(self.modality, 1)
        return (*(self.size,) * SPATIAL_AXES[self.modality], channels)

    @property
    def recipe(self) -> Recipe:
        """SGD of the released code for VGGs and DenseNets, else Adam of the MedMNIST benchmark.

        Without flips, which the PyTorch step lacks, and at a learning rate without divergence.
        """
        name = "released" if self.model.startswith(("vgg", "densenet")) else "medmnist"
        return dataclasses.replace(RECIPES[name], learning_rate=1e-3, flip=False)


@dataclass
class StepProgram:
    """A compiled training step.

    Attributes:
      run: dispatches one call on the state, which all programs of the case share.
      wait: waits for all dispatched calls.
      compile_seconds: XLA's compilation time, with several programs compiled at once.
      peak_bytes: device memory planned by the compiler: arguments, results and temporaries.
    """

    run: Callable[[], None]
    wait: Callable[[], Any]
    compile_seconds: float
    peak_bytes: int


def network_and_units(case: Case) -> tuple[Any, tuple[Kernel, ...]]:
    """The network of a case, and the units that merge.

    As in the released code, all kernels but those of the first 10 convolutions; of other units, and
    of networks with 10 convolutions or fewer, half of the layers, but no more than 10, are skipped.
    """
    model = create_model(
        case.model,
        CLASSES,
        modality=case.modality,
        stem=case.stem,
        width=case.width,
        dtype=jnp.dtype(case.dtype),
        axis_name=DATA_AXIS,
    )
    units = find_units(model, case.shape, default_units(case.model))
    layers = len(group_weights(units))
    released = default_units(case.model) == ("kernels",) and layers > 10
    skip = 10 if released else min(10, layers // 2)
    return model, select_units(NO_PRESET, case.model, units, skip)[0]


def jax_steps(case: Case, rules: Sequence[MergeRule | None]) -> list[StepProgram]:
    """JAX training steps on one device, one for each rule; all update one state.

    The programs are compiled concurrently, one per thread.
    """
    devices = choose_devices(1)
    model, merged = network_and_units(case)
    params, batch_stats = init_variables(model, case.shape, seed=0)
    optimizer = make_optimizer(case.recipe)
    state = new_state(params, batch_stats, optimizer, case.recipe.learning_rate)
    state = replicate(state, devices)
    images, labels = example_batch(case)
    index = np.arange(case.batch, dtype=np.int32)
    batch = shard_batch({"image": images, "label": labels, "index": index}, devices)
    if case.steps > 1:
        batch = {name: jnp.stack([x] * case.steps, axis=1) for name, x in batch.items()}
    root = broadcast_to_devices(jax.random.key(0), devices)

    def lower(rule: MergeRule | None) -> tuple[Any, Any]:
        deep, merging = (), 0
        if rule is not None:
            deep, merging = merged, len(group_weights(merged))
        totals = replicate(zero_totals(merging), devices)
        step: Any = make_train_step(
            model,
            optimizer,
            case.recipe,
            multi_label=False,
            devices=devices,
            kernels=deep,
            rule=rule,
            steps_per_execution=case.steps,
        )
        return step.lower(state, totals, batch, root), totals

    def compiled(lowered: Any) -> tuple[Any, float]:
        before = time.perf_counter()
        program = lowered.compile()
        return program, time.perf_counter() - before

    def make(program: Any, seconds: float, totals: Any) -> StepProgram:
        def run() -> None:
            nonlocal state, totals
            state, totals = program(state, totals, batch, root)

        plan = program.memory_analysis()
        peak = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
        peak -= plan.alias_size_in_bytes
        return StepProgram(run, lambda: jax.block_until_ready(state), seconds, peak)

    lowered = [lower(rule) for rule in rules]
    with ThreadPoolExecutor(len(rules)) as pool:
        programs = list(pool.map(compiled, [one for one, _ in lowered]))
    return [
        make(program, seconds, totals)
        for (program, seconds), (_, totals) in zip(programs, lowered, strict=True)
    ]


def torch_step(
    case: Case,
    layout: "torch.memory_format",
    *,
    device: "torch.device | str" = "cpu",
    autocast: contextlib.AbstractContextManager[Any] | None = None,
    compiled: bool = False,
) -> Callable[[], None]:
    """The same step in PyTorch.

    Args:
      case: network and sizes; its dtype is ignored in favour of `autocast`.
      layout: memory format of weights and images.
      device: training device.
      autocast: context of the forward pass and the loss; None for float32.
      compiled: whether to compile the network with `torch.compile`.

    Returns:
      A function that dispatches one step.
    """
    import torch

    from experiments.oracles.torch_networks import create_network

    recipe = case.recipe
    torch.manual_seed(0)
    network = create_network(case.model, CLASSES, stem=case.stem, size=case.size, width=case.width)
    network = network.to(device, memory_format=layout)
    if recipe.optimizer == "adam":
        optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate)
    else:
        optimizer = torch.optim.SGD(
            network.parameters(),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
    pixels, classes = example_batch(case)
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    images = images.to(device, memory_format=layout)
    labels = torch.from_numpy(classes).long().to(device)
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (recipe.mean, recipe.std))
    forward = torch.compile(network) if compiled else network

    def run() -> None:
        optimizer.zero_grad()
        with autocast or contextlib.nullcontext():
            logits = forward((images.float() / 255 - mean) / std)
            loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()

    return run


def example_batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Random examples (batch, *case.shape), uint8 or float32, and labels int32 (batch,)."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (case.batch, *case.shape), np.uint8)
    if case.modality in ("signal", "table"):
        images = images.astype(np.float32) / 255
    return images, rng.integers(0, CLASSES, case.batch, np.int32)
