"""A whole run: for every seed the backbone, then finetune and inmerge from its best checkpoint."""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from inmerge_jax.data import Dataset, load_dataset, steps_per_epoch
from inmerge_jax.errors import InputError
from inmerge_jax.files import write_arrays, write_json
from inmerge_jax.merging import Kernel, MergeRule
from inmerge_jax.models import create_model
from inmerge_jax.training.checkpointing import DamagedError, restore_checkpoint
from inmerge_jax.training.config import (
    TrainConfig,
    apply_preset,
    check_run,
    check_steps_per_call,
    config_dict,
    resolve_recipe,
    resolve_rule,
)
from inmerge_jax.training.environment import deciding, environment, keep_freed_memory
from inmerge_jax.training.init import (
    convolutions,
    file_sha256,
    random_weights,
    weights_from_file,
)
from inmerge_jax.training.multihost import by_first, is_first, require_same
from inmerge_jax.training.parallel import AXIS, choose_devices
from inmerge_jax.training.preemption import never
from inmerge_jax.training.presets import Preset, find_preset, select_kernels
from inmerge_jax.training.progress import ProgressLine
from inmerge_jax.training.recipes import Recipe, positive_weights
from inmerge_jax.training.train import Setup, Stage, read_result, train_stage
from inmerge_jax.training.train_step import (
    make_eval_step,
    make_merging_eval_step,
    make_optimizer,
    make_train_step,
    new_state,
)
from inmerge_jax.training.workdir import cannot_write, changes_since_start, hold_run

_SAMPLES_PER_CLASS = 4
_MOVED = "resumed under other conditions, which may give other bits than the first would have"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked configuration, ready to run.

    Attributes:
      config: as given, with the preset's recipe and partner where none was named.
      preset: what it names, or what holds without one.
      recipe: the recipe with its overrides.
      rule: the merging rule.
      devices: what the steps run on.
      dataset: loaded.
      model: the network, whose batch statistics span the devices.
      shape: of one image as the network sees it, (h, w, c).
      kernels: every convolution, in the order of the forward pass.
      deep: those that merging works on.
      init_sha256: of the file that the backbone's weights come from; None for random weights.
      notice: why there are none of these, where the released code has none; else "".
      workers: processes that read images.
    """

    config: TrainConfig
    preset: Preset
    recipe: Recipe
    rule: MergeRule
    devices: tuple[jax.Device, ...]
    dataset: Dataset
    model: nn.Module
    shape: tuple[int, int, int]
    kernels: tuple[Kernel, ...]
    deep: tuple[Kernel, ...]
    notice: str
    workers: int
    init_sha256: str | None = None


def plan_run(config: TrainConfig) -> Plan:
    """Checks the whole configuration and loads the data; writes nothing.

    Raises:
      InputError: for anything that would stop the run later.
    """
    check_run(config)
    config = apply_preset(config)
    recipe, rule = resolve_recipe(config.recipe), resolve_rule(config.rule)
    devices = choose_devices(config.devices)
    check_steps_per_call(config.steps_per_call, devices[0].platform)
    _check_shares(recipe.batch_size, len(devices), config.accumulate)
    dataset = load_dataset(config.data)
    _check_updates(config.steps_per_call, steps_per_epoch(len(dataset.train), recipe.batch_size))
    workers = _workers(config, dataset)
    if recipe.positive_weights is not None and not dataset.multi_label:
        raise InputError(
            f"--positive-weights is for data of several labels per image; {dataset.name} is "
            f"{dataset.task}: leave it out"
        )
    model = create_model(
        config.model.name,
        dataset.num_classes,
        stem=config.model.stem,
        width=config.model.width,
        dtype=jnp.dtype(config.model.dtype),
        axis_name=AXIS,
        remat=config.model.remat,
    )
    channels = len(recipe.mean) if dataset.channels == 1 else dataset.channels
    shape = (dataset.size, dataset.size, channels)
    kernels = convolutions(model, shape)
    preset = find_preset(config.preset)
    deep, notice = select_kernels(preset, config.model.name, kernels, config.rule.skip)
    plan = Plan(
        config, preset, recipe, rule, devices, dataset, model, shape, kernels, deep, notice, workers
    )
    if config.model.init_from is None:
        return plan
    plan = dataclasses.replace(plan, init_sha256=file_sha256(config.model.init_from))
    initial_weights(plan, config.seeds[0])
    return plan


def _check_updates(steps_per_call: int, updates: int) -> None:
    if steps_per_call > updates:
        raise InputError(
            f"--steps-per-call {steps_per_call}: an epoch has {updates} updates, so that no call "
            f"would hold as many; choose {updates} or fewer"
        )


def _check_shares(batch_size: int, devices: int, parts: int) -> None:
    if batch_size % devices:
        raise InputError(
            f"--batch-size {batch_size} cannot be shared by {devices} devices: choose a multiple "
            f"of {devices}, or fewer --devices"
        )
    if batch_size % (devices * parts):
        raise InputError(
            f"--accumulate {parts}: {batch_size // devices} images a device cannot be cut into "
            f"{parts} parts; choose a --batch-size that is a multiple of {devices * parts}"
        )


def train_arms(plan: Plan, should_stop: Callable[[], bool] = never) -> dict[str, Any]:
    """Runs what `plan_run` has checked and returns what results.json holds.

    The run's folder is `plan.config.output`. Arms that it already holds are not trained again.

    Raises:
      InputError: the folder does not fit the options, cannot be written to, holds a damaged file,
        or is in use.
      NonFiniteLossError: training diverged.
      Stopped: `should_stop` said so, see `train.Setup`; the run can be resumed.
    """
    config = plan.config
    if plan.devices[0].platform == "cpu":
        keep_freed_memory()
    own = {"steps_per_call": config.steps_per_call, "environment": deciding(environment())}
    require_same({**_config_dict(plan), **own})
    with contextlib.ExitStack() as held:
        run = hold_run(
            config.output, _config_dict(plan), resume=config.resume, overwrite=config.overwrite
        )
        # Process 0 enters it, and it alone leaves it at the end.
        folder = by_first(held.enter_context, run)
        moved = "; ".join(by_first(changes_since_start, folder))
        notices = (f"{_MOVED}: {moved}",) if moved else ()
        return _train_arms(plan, folder, should_stop, notices)


def _train_arms(
    plan: Plan, folder: Path, should_stop: Callable[[], bool], notices: tuple[str, ...]
) -> dict[str, Any]:
    """Goes on with the run in `folder`; `notices` go into what is trained from here on."""
    config = plan.config
    setup = make_setup(plan, should_stop)
    plain, merging, merging_eval = _steps(plan, setup)
    several, several_merging, _ = _steps(plan, setup, config.steps_per_call)
    if config.steps_per_call == 1:
        several = several_merging = None
    labels = {"val": plan.dataset.val.labels, "test": plan.dataset.test.labels}
    if plan.dataset.test.patients is not None:
        labels["test_patients"] = plan.dataset.test.patients
    by_first(_write_arrays, folder / "labels.npz", labels)
    by_first(_write_arrays, folder / "samples.npz", _samples(plan.dataset))

    arms: dict[str, list[dict[str, Any]]] = {"backbone": []}
    arms |= {arm: [] for arm in ("finetune", "inmerge") if arm in config.arms}
    batch_size = plan.recipe.batch_size
    images = batch_size * steps_per_epoch(len(plan.dataset.train), batch_size)
    epochs = plan.recipe.epochs + plan.recipe.merging_epochs * (len(arms) - 1)
    console = None if is_first() else Console(quiet=True)
    with ProgressLine(images * epochs * len(config.seeds), console) as progress:
        progress.say(_headline(plan))
        inmerge_notices = (*notices, plan.notice) if plan.notice else notices
        for notice in inmerge_notices if "inmerge" in arms else notices:
            progress.say(f"WARNING: {notice}", style="bold yellow")
        for seed in config.seeds:
            place = folder / f"seed{seed}"
            params, batch_stats = by_first(initial_weights, plan, seed)
            backbone = Stage(
                arm="backbone",
                seed=seed,
                number=0,
                folder=place / "backbone",
                epochs=plan.recipe.epochs,
                learning_rate=plan.recipe.learning_rate,
                train_step=plain,
                several_steps=several,
                steps_per_call=config.steps_per_call,
                notices=notices,
            )
            result = by_first(read_result, backbone.folder)
            best = by_first(best_weights, setup, backbone, result, params, batch_stats)
            if best is None:
                result = train_stage(setup, backbone, params, batch_stats, progress)
                best = by_first(best_weights, setup, backbone, result, params, batch_stats)
            else:
                progress.skip(images * backbone.epochs)
            arms["backbone"].append(result)
            params, batch_stats, rate = best

            for arm in list(arms)[1:]:
                stage = Stage(
                    arm=arm,
                    seed=seed,
                    number=1,
                    folder=place / arm,
                    epochs=plan.recipe.merging_epochs,
                    learning_rate=plan.recipe.merging_learning_rate or rate,
                    train_step=merging if arm == "inmerge" else plain,
                    deep=plan.deep if arm == "inmerge" else (),
                    merging_eval_step=merging_eval if arm == "inmerge" else None,
                    notices=inmerge_notices if arm == "inmerge" else notices,
                    several_steps=several_merging if arm == "inmerge" else several,
                    steps_per_call=config.steps_per_call,
                )
                result = by_first(read_result, stage.folder)
                if result is None:
                    result = train_stage(setup, stage, params, batch_stats, progress)
                else:
                    progress.skip(images * stage.epochs)
                arms[arm].append(result)

    results = _results(plan, arms)
    by_first(write_json, folder / "results.json", results)
    return results


def make_setup(plan: Plan, should_stop: Callable[[], bool] = never) -> Setup:
    """What all stages of a run share."""
    return Setup(
        dataset=plan.dataset,
        recipe=plan.recipe,
        devices=plan.devices,
        optimizer=make_optimizer(plan.recipe),
        eval_step=make_eval_step(plan.model, plan.recipe, **step_options(plan)),
        kernels=plan.kernels,
        workers=plan.workers,
        should_stop=should_stop,
    )


def _steps(plan: Plan, setup: Setup, steps_per_call: int = 1) -> tuple[Any, Any, Any]:
    """The steps without and with merging, and that of merging in validation, None without it."""
    per_call = {"steps_per_call": steps_per_call, "accumulate": plan.config.accumulate}
    common = step_options(plan)
    plain = make_train_step(plan.model, setup.optimizer, plan.recipe, **common, **per_call)
    if not plan.deep:
        return plain, plain, None
    common |= {"kernels": plan.deep, "rule": plan.rule, "fused": plan.config.fused}
    merging = make_train_step(plan.model, setup.optimizer, plan.recipe, **common, **per_call)
    if not plan.preset.merge_in_validation:
        return plain, merging, None
    return plain, merging, make_merging_eval_step(plan.model, plan.recipe, **common)


def step_options(plan: Plan) -> dict[str, Any]:
    """What every step of the run is made with, beside its network, optimizer and recipe."""
    return {
        "multi_label": plan.dataset.multi_label,
        "devices": plan.devices,
        "positive_weights": positive_weights(plan.recipe, plan.dataset.train.labels),
    }


def _workers(config: TrainConfig, dataset: Dataset) -> int:
    """How many processes read images: as asked, or by the number of cores."""
    if dataset.train.in_memory:
        if config.workers:
            raise InputError(
                f"--workers {config.workers}: {dataset.name} is all in memory, so there is nothing "
                "to read; leave it out"
            )
        return 0
    return min((os.cpu_count() or 1) // 3, 16) if config.workers is None else config.workers


def _config_dict(plan: Plan) -> dict[str, Any]:
    return config_dict(
        plan.config,
        plan.recipe,
        len(plan.devices),
        plan.init_sha256,
        plan.dataset.fingerprint or None,
    )


def initial_weights(plan: Plan, seed: int) -> tuple[Any, Any]:
    """Parameters and batch statistics, random or those of --init-from."""
    if plan.init_sha256 is None:
        return random_weights(plan.model, plan.shape, seed)
    return weights_from_file(
        plan.config.model, plan.init_sha256, plan.dataset.num_classes, plan.shape[-1], seed
    )


def best_weights(
    setup: Setup, stage: Stage, result: dict[str, Any] | None, params: Any, batch_stats: Any
) -> tuple[Any, Any, float] | None:
    """Parameters, batch statistics and learning rate of a finished stage's best checkpoint.

    None where the stage is not finished, or its checkpoint was damaged since.
    """
    if result is None:
        return None
    template = new_state(params, batch_stats, setup.optimizer, stage.learning_rate)
    path = stage.checkpoints / str(result["best_epoch"])
    try:
        state, meta = restore_checkpoint(path, template)
    except DamagedError:
        return None
    return state.params, state.batch_stats, meta["learning_rate"]


def _samples(dataset: Dataset) -> dict[str, np.ndarray]:
    """The first few training images of every class, or of every label, with their names."""
    images, labels = dataset.train.images, dataset.train.labels
    rows, names = [], []
    for index, name in enumerate(dataset.classes):
        members = labels[:, index] == 1 if dataset.multi_label else labels == index
        chosen = np.flatnonzero(members)[:_SAMPLES_PER_CLASS].tolist()
        rows += chosen
        names += [name] * len(chosen)
    return {"images": images[rows], "labels": labels[rows], "names": np.array(names)}


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    try:
        write_arrays(path, arrays)
    except OSError as error:
        raise cannot_write(path, error) from error


def _headline(plan: Plan) -> str:
    data, recipe = plan.dataset, plan.recipe
    kinds = ", ".join(sorted({device.device_kind for device in plan.devices}))
    return (
        f"{data.title} {data.size} px, {len(data.train)}/{len(data.val)}/{len(data.test)} images; "
        f"{plan.config.model.name}, recipe {plan.config.recipe.name}, "
        f"{recipe.epochs}+{recipe.merging_epochs} epochs, batch {recipe.batch_size}; "
        f"{len(plan.devices)} x {kinds}"
    )


def _results(plan: Plan, arms: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    data = plan.dataset
    values = _config_dict(plan)
    counts = {"train": len(data.train), "val": len(data.val), "test": len(data.test)}
    return {
        "dataset": {
            "name": data.name,
            "size": data.size,
            "task": data.task,
            "classes": list(data.classes),
            "title": data.title,
            "source": data.source,
            "counts": counts,
            **({"split": data.split_name} if data.split_name else {}),
            **({"full_counts": dict(data.full_counts)} if data.full_counts else {}),
            **({"test_names_sha256": data.test_names_sha256} if data.test_names_sha256 else {}),
        },
        "model": values["model"],
        "recipe": values["recipe"],
        "rule": values["rule"],
        "seeds": list(plan.config.seeds),
        "arms": arms,
        "environment": environment(),
        "seconds": sum(result["seconds"] for stages in arms.values() for result in stages),
    }
