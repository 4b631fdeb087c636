"""What a stage of training needs: its own part, and what all stages of a run share."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from inmerge_jax.data import Dataset
from inmerge_jax.merging import Kernel
from inmerge_jax.training.recipes import Recipe
from inmerge_jax.training.state import TrainState
from inmerge_jax.training.steps import Totals
from inmerge_jax.training.stopping import never


def batch_seed(seed: int, number: int) -> int:
    """The seed of a stage's batches: the same for all arms of a second stage.

    Args:
      seed: of the run.
      number: of the stage, see `Stage`.
    """
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def root_key(seed: int, number: int) -> jax.Array:
    """The key that every random draw of a stage is folded from; arguments as in `batch_seed`."""
    return jax.random.fold_in(jax.random.key(seed), number)


def same(state: TrainState) -> TrainState:
    """The state itself."""
    return state


@dataclass(frozen=True)
class Stage:
    """One stage of one arm: what `loop.train_stage` needs beside the state to start from.

    Attributes:
      arm: "backbone", "finetune" or "inmerge".
      seed: of the run; decides the order of the batches and every random draw of the stage.
      number: 0 for the backbone, 1 for the second stage. Arms of the same seed and number see the
        same batches, flips and dropout masks.
      folder: the stage's own part of the run folder.
      epochs: how many to train.
      learning_rate: of the first epoch.
      train_step: of `steps.make_train_step`, with merging or without.
      deep: the kernels that it merges; () without merging.
      merging_eval_step: of `steps.make_merging_eval_step`, where validation merges too.
      notices: warnings that go into the stage's result, each once.
      several_steps: `steps_per_call` updates in one dispatch; None where that is 1.
      steps_per_call: updates in one dispatch.
      evaluated: the state whose weights are evaluated, from that of training: the same one, or one
        with the averages of the weights that an optimizer keeps.
    """

    arm: str
    seed: int
    number: int
    folder: Path
    epochs: int
    learning_rate: float
    train_step: Callable[..., tuple[TrainState, Totals]]
    deep: tuple[Kernel, ...] = ()
    merging_eval_step: Callable[..., Any] | None = None
    notices: tuple[str, ...] = ()
    several_steps: Callable[..., tuple[TrainState, Totals]] | None = None
    steps_per_call: int = 1
    evaluated: Callable[[TrainState], TrainState] = same

    @property
    def name(self) -> str:
        """For people."""
        return f"seed {self.seed} {self.arm}"

    @property
    def checkpoints(self) -> Path:
        """Folder of the stage's checkpoints."""
        return self.folder / "checkpoints"


@dataclass(frozen=True)
class Setup:
    """What all stages of a run share.

    Attributes:
      dataset: all three splits.
      recipe: how to train.
      devices: what the steps run on.
      optimizer: of `state.make_optimizer`.
      eval_step: of `steps.make_eval_step`.
      kernels: every convolution of the network, in the order of the forward pass.
      workers: processes that read images; 0 for none.
      should_stop: whether to keep what is done and stop: asked before each call of a step and each
        batch of an evaluation. Of several processes, all have to get the same answers.
    """

    dataset: Dataset
    recipe: Recipe
    devices: tuple[jax.Device, ...]
    optimizer: Any
    eval_step: Callable[..., tuple[jax.Array, jax.Array]]
    kernels: tuple[Kernel, ...]
    workers: int = 0
    should_stop: Callable[[], bool] = never
