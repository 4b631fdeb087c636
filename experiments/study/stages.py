"""A cell as stages of training: its plan, its stages and their steps, its trained weights."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.study import datasets
from experiments.study.cells import Cell
from experiments.study.treatments import (
    average_weights,
    averaged,
    make_treatment,
    numbers,
    selection,
)
from inmerge_jax.data import Split, steps_per_epoch
from inmerge_jax.training.checkpointing import restore_checkpoint
from inmerge_jax.training.config import ModelConfig, RecipeConfig, RuleConfig, TrainConfig
from inmerge_jax.training.experiment import (
    RunSpec,
    initial_variables,
    make_context,
    make_run_spec,
    step_options,
)
from inmerge_jax.training.parallel import replicate
from inmerge_jax.training.train import StageConfig, TrainContext, identity, read_result
from inmerge_jax.training.train_step import TrainState, make_optimizer, make_train_step, new_state

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam"},
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4},
}


@dataclass(frozen=True)
class Places:
    """Where things are.

    Attributes:
      data: folder that holds medmnist/ and nih/.
      output: folder of the cells.
      results: folder of what is kept of them, and of the answers.
      devices: that share every batch, or fewer where they cannot share it evenly.
    """

    data: Path
    output: Path
    results: Path = Path("experiments/results")
    devices: int = 1

    def cell(self, cell: Cell) -> Path:
        """The folder of one cell."""
        return self.output / "cells" / cell.hash

    @property
    def kept(self) -> Path:
        """The folder of kept cells."""
        return self.results / "cells"

    @property
    def built(self) -> Path:
        """The folder of data that are made from others."""
        return self.output / "data"


def plan_of(cell: Cell, places: Places) -> RunSpec:
    """The checked plan of a cell's backbone; the same object for all cells that share it."""
    return _plan(dataclasses.replace(cell.backbone, seed=0), places)


@functools.lru_cache(maxsize=2)
def _plan(backbone: Any, places: Places) -> RunSpec:
    options = OPTIMIZERS[backbone.optimizer]
    config = TrainConfig(
        data=datasets.config_of(backbone.data, places.data, places.built),
        model=ModelConfig(name=backbone.model, stem=backbone.stem, width=backbone.width),
        recipe=RecipeConfig(
            name="medmnist",
            epochs=backbone.epochs,
            learning_rate=backbone.rate,
            batch_size=batch_size(backbone.data),
            **options,
        ),
        rule=RuleConfig(skip=0),
        output=places.output,
        devices=math.gcd(batch_size(backbone.data), places.devices),
        workers=0,
    )
    return make_run_spec(config)


def batch_size(data: str) -> int:
    """The benchmark's 128; less for the little data set of tests."""
    return min(128, datasets.SOURCES[data].images[0] // 4)


def images_of(cell: Cell) -> int:
    """Images that the network is shown in a cell's training."""
    epochs = cell.epochs or cell.backbone.epochs
    size = batch_size(cell.backbone.data)
    return steps_per_epoch(datasets.SOURCES[cell.backbone.data].images[0], size) * size * epochs


def first_stage(
    cell: Cell, plan: RunSpec, setup: TrainContext, places: Places, apart: bool = False
) -> StageConfig:
    """The backbone of a cell; its step trains a cell per device where they are `apart`."""
    options = step_options(plan) | {"independent_replicas": apart}
    return StageConfig(
        arm="backbone",
        seed=cell.backbone.seed,
        number=0,
        folder=places.cell(cell.first()),
        epochs=cell.backbone.epochs,
        learning_rate=cell.backbone.rate,
        train_step=make_train_step(plan.model, setup.optimizer, plan.recipe, **options),
    )


def second_stage(
    cell: Cell, plan: RunSpec, setup: TrainContext, places: Places, apart: bool = False
) -> tuple[TrainContext, StageConfig]:
    """The second stage of a cell; its optimizer and recipe may differ from the backbone's.

    Its step trains a cell per device where they are `apart`.
    """
    treatment, recipe = cell.treatment, plan.recipe
    steps = steps_per_epoch(len(plan.dataset.train), recipe.batch_size)
    if treatment.kind == "decay":
        recipe = dataclasses.replace(recipe, weight_decay=treatment.decay)
    last = [average_weights(treatment.decay)] if treatment.kind == "ema" else []
    setup = dataclasses.replace(setup, recipe=recipe, optimizer=make_optimizer(recipe, *last))
    deep = ()
    given: dict[str, Any] = step_options(plan) | {"independent_replicas": apart}
    if treatment.kind not in ("none", "ema", "decay"):
        deep = selection(treatment, plan.kernels)
        given["param_transform"] = make_treatment(treatment.kind, deep)
        given["hyperparams"] = numbers(treatment, steps)
        given["kernels"] = deep
    step = make_train_step(plan.model, setup.optimizer, recipe, **given)
    stage = StageConfig(
        arm=re.sub("[@./]", "_", cell.arm),  # It goes into the name of the score files.
        seed=cell.backbone.seed,
        number=1,
        folder=places.cell(cell),
        epochs=cell.epochs,
        learning_rate=cell.learning_rate,
        train_step=step,
        deep=deep,
        eval_state_fn=averaged if treatment.kind == "ema" else identity,
    )
    return setup, stage


def joint_steps(cells: Sequence[Cell], places: Places) -> dict[str, Callable[..., Any]]:
    """The steps of cells that differ in their seeds alone, each over one cell per device."""
    plan = plan_of(cells[0], places)
    devices = tuple(jax.local_devices()[: len(cells)])
    plan = dataclasses.replace(plan, devices=devices)
    setup = make_context(plan)
    if cells[0].is_backbone:
        stage = first_stage(cells[0], plan, setup, places, apart=True)
    else:
        setup, stage = second_stage(cells[0], plan, setup, places, apart=True)
    return {"train": stage.train_step, "eval": setup.eval_step}


def best_state(cell: Cell, places: Places) -> tuple[TrainContext, StageConfig, TrainState]:
    """The state in a finished cell's best checkpoint, in NumPy arrays, and what it belongs to.

    Raises:
      UsageError: the checkpoint is gone or damaged.
    """
    plan = plan_of(cell, places)
    setup = make_context(plan)
    params, batch_stats = initial_variables(plan, cell.backbone.seed)
    stage = first_stage(cell, plan, setup, places)
    if not cell.is_backbone:
        setup, stage = second_stage(cell, plan, setup, places)
    result = read_result(stage.folder)
    assert result is not None, cell
    state = new_state(params, batch_stats, setup.optimizer, stage.learning_rate)
    state, _ = restore_checkpoint(stage.checkpoints / str(result["best_epoch"]), state)
    return setup, stage, state


def weights_of(cell: Cell, places: Places) -> Callable[[np.ndarray], np.ndarray]:
    """The network of a finished cell's best checkpoint: from uint8 images to scores.

    Raises:
      UsageError: see `best_state`.
    """
    setup, stage, state = best_state(cell, places)
    state = replicate(stage.eval_state_fn(state), setup.devices)
    labels = setup.dataset.test.labels

    def predict(images: np.ndarray) -> np.ndarray:
        return setup.evaluate(state, Split(images, labels))[0]

    return predict
