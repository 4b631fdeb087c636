"""A trial as stages of training: plan, stages with their steps, trained weights."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.study import datasets, variants
from experiments.study.archive import RESULTS
from experiments.study.treatments import (
    make_treatment,
    numbers,
    selection,
)
from experiments.study.trials import Trial
from inmerge_jax.data import Split, steps_per_epoch
from inmerge_jax.training.checkpointing import restore_checkpoint
from inmerge_jax.training.config import ModelConfig, RecipeConfig, RuleConfig, TrainConfig
from inmerge_jax.training.experiment import initial_variables, make_context, step_options
from inmerge_jax.training.parallel import replicate
from inmerge_jax.training.run_spec import RunSpec, make_run_spec
from inmerge_jax.training.stage_results import read_result
from inmerge_jax.training.train import StageConfig, TrainContext
from inmerge_jax.training.train_step import (
    TrainState,
    make_merging_eval_step,
    make_optimizer,
    make_train_step,
    new_state,
)

EDGES = Path("weights/vgg16_features_hed.safetensors")
"""Convolutions of a VGG16 for images in [0, 1]: ImageNet's, fine-tuned for edge detection."""
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam"},
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4},
}


@dataclass(frozen=True)
class Paths:
    """Where things are.

    Attributes:
      data: folder with medmnist/, nih/ and weights/.
      output: folder of the runs.
      results: folder of the archive.
      devices: that share every batch, or fewer where they cannot share it evenly.
    """

    data: Path
    output: Path
    results: Path = RESULTS
    devices: int = 1

    def trial(self, trial: Trial) -> Path:
        """The run folder of a trial."""
        return self.output / "trials" / trial.hash

    @property
    def built(self) -> Path:
        """The folder of data that are built from other files."""
        return self.output / "data"


def plan_of(trial: Trial, paths: Paths) -> RunSpec:
    """The validated plan of a trial's backbone, shared by its second stages."""
    start = trial.backbone
    all_images = dataclasses.replace(start, seed=0, images=None, wrong_labels=0.0)
    plan = _plan(all_images, paths)
    if start.images is None and not start.wrong_labels:
        return plan
    dataset = datasets.damaged(plan.dataset, start.images, start.wrong_labels, start.seed)
    return dataclasses.replace(plan, dataset=dataset)


@functools.lru_cache(maxsize=2)
def _plan(backbone: Any, paths: Paths) -> RunSpec:
    options = OPTIMIZERS[backbone.optimizer]
    config = TrainConfig(
        data=datasets.config_of(backbone.data, paths.data, paths.built),
        model=ModelConfig(
            name=backbone.model,
            stem=backbone.stem,
            width=backbone.width,
            init_from=paths.data / EDGES if backbone.weights == "edges" else None,
        ),
        recipe=RecipeConfig(
            name="medmnist",
            epochs=max(1, backbone.epochs),
            learning_rate=backbone.rate,
            batch_size=batch_size(backbone.data),
            class_weights=backbone.class_weights,
            **options,
        ),
        rule=RuleConfig(skip=0),
        output=paths.output,
        devices=math.gcd(batch_size(backbone.data), paths.devices),
        workers=0,
    )
    spec = make_run_spec(config)
    if backbone.weights == "edges":
        # The file expects images in [0, 1].
        recipe = dataclasses.replace(spec.recipe, mean=(0.0,) * 3, std=(1.0,) * 3)
        spec = dataclasses.replace(spec, recipe=recipe)
    return spec


def batch_size(data: str) -> int:
    """Images per update; fewer for the phantom of the tests."""
    return min(datasets.SOURCES[data].batch, datasets.SOURCES[data].images[0] // 4)


def images_of(trial: Trial) -> int:
    """Number of training images that a trial processes, over all epochs."""
    epochs = trial.epochs or trial.backbone.epochs
    size, images = batch_size(trial.backbone.data), datasets.SOURCES[trial.backbone.data].images[0]
    return steps_per_epoch(min(images, trial.backbone.images or images), size) * size * epochs


def first_stage(trial: Trial, plan: RunSpec, setup: TrainContext, paths: Paths) -> StageConfig:
    """The backbone of a trial."""
    options = step_options(plan)
    return StageConfig(
        arm="backbone",
        seed=trial.backbone.seed,
        number=0,
        folder=paths.trial(trial.first()),
        epochs=trial.backbone.epochs,
        learning_rate=trial.backbone.rate,
        train_step=make_train_step(plan.model, setup.optimizer, plan.recipe, **options),
    )


def second_stage(
    trial: Trial, plan: RunSpec, setup: TrainContext, paths: Paths
) -> tuple[TrainContext, StageConfig]:
    """The second stage of a trial; its optimizer and recipe may differ from the backbone's."""
    treatment, recipe = trial.treatment, plan.recipe
    steps = steps_per_epoch(len(plan.dataset.train), recipe.batch_size)
    if treatment.kind == "decay":
        recipe = dataclasses.replace(recipe, weight_decay=treatment.decay)
    average = treatment.decay if treatment.kind == "ema" else treatment.average
    recipe = dataclasses.replace(recipe, average_weights=average)
    setup = dataclasses.replace(setup, recipe=recipe, optimizer=make_optimizer(recipe))
    deep, merging_eval = (), None
    given: dict[str, Any] = step_options(plan)
    if treatment.kind == "variant":
        deep = variants.selection(treatment, plan.kernels)
        given["param_transform"] = variants.make_variant(treatment, deep)
        given["hyperparams"] = variants.numbers(treatment, steps, trial.epochs)
        given["kernels"] = deep
    elif treatment.kind not in ("none", "ema", "decay"):
        deep = selection(treatment, plan.kernels)
        if treatment.kind == "released":
            rule = numbers(treatment, steps).rule
            merging_eval = make_merging_eval_step(
                plan.model, recipe, kernels=deep, rule=rule, **given
            )
        kind = "merge" if treatment.kind == "released" else treatment.kind
        given["param_transform"] = make_treatment(kind, deep)
        given["hyperparams"] = numbers(treatment, steps)
        given["kernels"] = deep
    step = make_train_step(plan.model, setup.optimizer, recipe, **given)
    stage = StageConfig(
        arm=re.sub("[@./]", "_", trial.arm),  # It goes into the name of the score files.
        seed=trial.backbone.seed,
        number=1,
        folder=paths.trial(trial),
        epochs=trial.epochs,
        learning_rate=trial.learning_rate,
        train_step=step,
        deep=deep,
        merging_eval_step=merging_eval,
        recompute_batch_stats=treatment.statistics == "renewed",
    )
    return setup, stage


def best_state(trial: Trial, paths: Paths) -> tuple[TrainContext, StageConfig, TrainState]:
    """A finished trial's setup, stage, and the state in its best checkpoint (NumPy arrays).

    Raises:
      UsageError: the checkpoint is missing or damaged.
    """
    plan = plan_of(trial, paths)
    setup = make_context(plan)
    params, batch_stats = initial_variables(plan, trial.backbone.seed)
    stage = first_stage(trial, plan, setup, paths)
    if not trial.is_backbone:
        setup, stage = second_stage(trial, plan, setup, paths)
    result = read_result(stage.folder)
    assert result is not None, trial
    state = new_state(params, batch_stats, setup.optimizer, stage.learning_rate)
    state, _ = restore_checkpoint(stage.checkpoints / str(result["best_epoch"]), state)
    return setup, stage, state


def weights_of(trial: Trial, paths: Paths) -> Callable[[np.ndarray], np.ndarray]:
    """The network of a finished trial's best checkpoint: from uint8 images to scores.

    Raises:
      UsageError: see `best_state`.
    """
    setup, stage, state = best_state(trial, paths)
    return predictor(setup, setup.evaluation_state(stage, replicate(state, setup.devices)))


def predictor(setup: TrainContext, state: TrainState) -> Callable[[np.ndarray], np.ndarray]:
    """A function from uint8 images, of which the test split has as many or more, to scores."""
    labels = setup.dataset.test.labels

    def predict(images: np.ndarray) -> np.ndarray:
        # Evaluation needs labels; the scores do not depend on them.
        return setup.evaluate(state, Split(images, labels[: len(images)]))[0]

    return predict
