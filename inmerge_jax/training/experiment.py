"""A run over all seeds: a backbone, then finetune and inmerge from its best checkpoint.

In a single stage (`merge_from_epoch`), inmerge starts from the backbone's first weights instead.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from inmerge_jax.data import Dataset, eval_batches, steps_per_epoch
from inmerge_jax.files import remove, write_arrays, write_errors, write_json
from inmerge_jax.merging.rule import Quantile
from inmerge_jax.merging.similarity import THRESHOLDS
from inmerge_jax.modality import EXAMPLES
from inmerge_jax.progress import Progress
from inmerge_jax.training.checkpointing import DamagedCheckpointError, restore_checkpoint
from inmerge_jax.training.config import TrainConfig
from inmerge_jax.training.environment import environment, numerics_fingerprint
from inmerge_jax.training.init import (
    init_variables,
    pretrained_variables,
)
from inmerge_jax.training.metrics import selection_notice
from inmerge_jax.training.monitoring import StageMonitor
from inmerge_jax.training.multihost import (
    is_primary,
    require_same_config,
    run_on_primary,
    run_synced,
)
from inmerge_jax.training.preemption import TrainingInterrupted
from inmerge_jax.training.recipes import loss_weights
from inmerge_jax.training.resolve import (
    config_dict,
)
from inmerge_jax.training.run_spec import RunSpec
from inmerge_jax.training.second_stage import begin_second_stage, weights_sha256
from inmerge_jax.training.stage_results import read_result
from inmerge_jax.training.train import StageConfig, TrainContext, train_stage
from inmerge_jax.training.train_step import (
    make_batch_stats_step,
    make_eval_step,
    make_merging_eval_step,
    make_optimizer,
    make_train_step,
    new_state,
)
from inmerge_jax.training.workdir import environment_changes, open_workdir

_SAMPLES_PER_CLASS = 4
_MOVED = "the environment changed since the run started; results may not be bitwise reproducible"


def run_experiment(
    spec: RunSpec, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Runs all seeds and arms, and returns the content of results.json.

    The run folder is `spec.config.output`. Arms that are finished there are not trained again.

    Args:
      spec: the result of `make_run_spec`.
      should_stop: see `train.TrainContext`.

    Raises:
      UsageError: the folder holds another run, cannot be written, holds a damaged file, or is in
        use.
      NonFiniteLossError: training diverged.
      TrainingInterrupted: `should_stop` returned True; the run can be resumed.
    """
    config = spec.config
    own = {
        "steps_per_execution": config.steps_per_execution,
        "environment": numerics_fingerprint(environment()),
    }
    require_same_config({**_config_dict(spec), **own})
    with contextlib.ExitStack() as held:
        run = open_workdir(
            config.output, _config_dict(spec), resume=config.resume, overwrite=config.overwrite
        )
        # Only process 0 opens the folder, and closes it at the end.
        folder = run_on_primary(held.enter_context, run)
        moved = "; ".join(run_on_primary(environment_changes, folder))
        notices = (f"{_MOVED}: {moved}",) if moved else ()
        if notice := selection_notice(spec.recipe, spec.dataset):
            notices += (notice,)
        return _run_experiment(spec, folder, should_stop, notices)


def _run_experiment(
    spec: RunSpec, folder: Path, should_stop: Callable[[], bool], notices: tuple[str, ...]
) -> dict[str, Any]:
    """Trains what is missing in `folder`; stores `notices` in the results of these stages."""
    config = spec.config
    context = make_context(spec, should_stop)
    plain, merging, merging_eval = _steps(spec, context)
    several, several_merging, _ = _steps(spec, context, config.steps_per_execution)
    if config.steps_per_execution == 1:
        several = several_merging = None
    labels = {"val": spec.dataset.val.labels, "test": spec.dataset.test.labels}
    if spec.dataset.test.patients is not None:
        labels["test_patients"] = spec.dataset.test.patients
    run_on_primary(_write_arrays, folder / "labels.npz", labels)
    if spec.dataset.modality != "table":
        run_on_primary(lambda: _write_arrays(folder / "samples.npz", _samples(spec.dataset)))

    arms: dict[str, list[dict[str, Any]]] = {"backbone": []}
    arms |= {arm: [] for arm in ("finetune", "inmerge") if arm in (config.arms or ())}
    batch_size = spec.recipe.batch_size
    images = batch_size * steps_per_epoch(len(spec.dataset.train), batch_size)
    epochs = spec.recipe.epochs + spec.second_epochs * (len(arms) - 1)
    console = None if is_primary() else Console(quiet=True)
    modality = spec.dataset.modality
    unit = "img" if modality == "image" else EXAMPLES[modality]
    with Progress(images * epochs * len(config.seeds), console, unit=unit) as progress:
        progress.say(_headline(spec))
        inmerge_notices = (*notices, spec.notice) if spec.notice else notices
        for notice in inmerge_notices if "inmerge" in arms else notices:
            progress.say(f"WARNING: {notice}", style="bold yellow")
        if not spec.dataset.test.in_memory and not run_on_primary(_has_checkpoint, folder):
            progress.describe("reads the test images")
            run_synced(_read_test_images, spec, should_stop)
        for seed in config.seeds:
            place = folder / f"seed{seed}"
            progress.describe(f"seed {seed} backbone", "compiling")
            params, batch_stats = run_on_primary(initial_variables, spec, seed)
            backbone = StageConfig(
                arm="backbone",
                seed=seed,
                number=0,
                folder=place / "backbone",
                epochs=spec.recipe.epochs,
                learning_rate=spec.recipe.learning_rate,
                train_step=plain,
                multi_step_fn=several,
                steps_per_execution=config.steps_per_execution,
                notices=notices,
                checksums=config.checksums,
                monitor=_monitor(config, seed, place / "backbone"),
                recompute_batch_stats=spec.recipe.recompute_batch_stats == "all",
            )
            result = run_on_primary(read_result, backbone.folder)
            best = None
            if result is not None:
                try:
                    best = run_on_primary(
                        restore_best, context, backbone, result, params, batch_stats
                    )
                except DamagedCheckpointError as error:
                    lost = f"{error}; the backbone was trained again"
                    progress.say(f"WARNING: {lost}", style="bold yellow")
                    backbone = dataclasses.replace(backbone, notices=(*notices, lost))
                    # Else a start after a kill would take it for finished.
                    run_on_primary(remove, backbone.folder / "result.json")
            trained = best is None
            if best is None:
                with backbone.monitor:
                    result = train_stage(context, backbone, params, batch_stats, progress)
                best = run_on_primary(restore_best, context, backbone, result, params, batch_stats)
            else:
                progress.skip(images * backbone.epochs)
            arms["backbone"].append(result)
            if not spec.single_stage:
                params, batch_stats, rate = best
                rate = spec.recipe.merging_learning_rate or rate
            else:
                rate = spec.recipe.learning_rate
            start = weights_sha256(params, batch_stats)

            for arm in list(arms)[1:]:
                stage = StageConfig(
                    arm=arm,
                    seed=seed,
                    number=0 if spec.single_stage else 1,
                    folder=place / arm,
                    epochs=spec.second_epochs,
                    learning_rate=rate,
                    train_step=merging if arm == "inmerge" else plain,
                    deep=spec.deep if arm == "inmerge" else (),
                    merging_eval_step=merging_eval if arm == "inmerge" else None,
                    notices=inmerge_notices if arm == "inmerge" else notices,
                    checksums=config.checksums,
                    multi_step_fn=several_merging if arm == "inmerge" else several,
                    steps_per_execution=config.steps_per_execution,
                    monitor=_monitor(config, seed, place / arm),
                    merge_from_epoch=config.rule.merge_from_epoch or 1,
                    recompute_batch_stats=spec.recipe.recompute_batch_stats in ("all", arm),
                )
                # Initial weights of a single stage follow from the seed.
                other = None
                if not spec.single_stage:
                    other = run_on_primary(begin_second_stage, stage.folder, start, trained)
                if other is not None:
                    progress.say(f"WARNING: {stage.name}: {other}", style="bold yellow")
                    stage = dataclasses.replace(stage, notices=(*stage.notices, other))
                result = run_on_primary(read_result, stage.folder)
                if result is None:
                    with stage.monitor:
                        result = train_stage(context, stage, params, batch_stats, progress)
                else:
                    progress.skip(images * stage.epochs)
                arms[arm].append(result)

    results = _results(spec, arms)
    run_on_primary(write_json, folder / "results.json", results)
    return results


def _monitor(config: TrainConfig, seed: int, folder: Path) -> StageMonitor:
    if not is_primary():
        return StageMonitor()
    profile = config.logging.profile if seed == config.seeds[0] else None
    return StageMonitor(
        folder,
        tensorboard=config.logging.tensorboard,
        profile=profile or 0,
        steps_per_execution=config.steps_per_execution,
    )


def make_context(spec: RunSpec, should_stop: Callable[[], bool] = lambda: False) -> TrainContext:
    """Builds what all stages of a run share."""
    own = () if isinstance(spec.rule.threshold, Quantile) else (float(spec.rule.threshold),)
    if spec.config.rule.threshold_end is not None:
        own = (*own, spec.config.rule.threshold_end)
    return TrainContext(
        dataset=spec.dataset,
        recipe=spec.recipe,
        devices=spec.devices,
        optimizer=make_optimizer(spec.recipe),
        eval_step=make_eval_step(spec.model, spec.recipe, **step_options(spec)),
        kernels=spec.kernels,
        batch_stats_step=make_batch_stats_step(spec.model, spec.recipe, spec.devices),
        workers=spec.workers,
        thresholds=tuple(sorted({*THRESHOLDS, *own})),
        should_stop=should_stop,
    )


def _steps(
    spec: RunSpec, context: TrainContext, steps_per_execution: int = 1
) -> tuple[Any, Any, Any]:
    """Training steps without and with merging, and the merging evaluation step or None."""
    per_call = {
        "steps_per_execution": steps_per_execution,
        "grad_accum_steps": spec.config.grad_accum_steps,
    }
    common = step_options(spec)
    plain = make_train_step(spec.model, context.optimizer, spec.recipe, **common, **per_call)
    if not spec.deep:
        return plain, plain, None
    common |= {"kernels": spec.deep, "rule": spec.schedule, "pallas": spec.config.pallas}
    merging = make_train_step(spec.model, context.optimizer, spec.recipe, **common, **per_call)
    if not spec.preset.merge_in_validation:
        return plain, merging, None
    return plain, merging, make_merging_eval_step(spec.model, spec.recipe, **common)


def step_options(spec: RunSpec) -> dict[str, Any]:
    """Arguments that all steps of the run share, besides network, optimizer and recipe."""
    return {
        "multi_label": spec.dataset.multi_label,
        "devices": spec.devices,
        "pos_weight": loss_weights(
            spec.recipe, spec.dataset.train.labels, spec.dataset.num_classes
        ),
    }


def _config_dict(spec: RunSpec) -> dict[str, Any]:
    return config_dict(
        spec.config,
        spec.recipe,
        len(spec.devices),
        spec.init_sha256,
        spec.dataset.fingerprint or None,
    )


def initial_variables(spec: RunSpec, seed: int) -> tuple[Any, Any]:
    """Initial parameters and batch statistics: random, or from the file `init_from`."""
    if spec.init_sha256 is None:
        return init_variables(spec.model, spec.shape, seed)
    params, batch_stats, _ = pretrained_variables(
        spec.config.model, spec.init_sha256, spec.dataset.num_classes, spec.shape, seed
    )
    return params, batch_stats


def restore_best(
    context: TrainContext,
    stage: StageConfig,
    result: dict[str, Any],
    params: Any,
    batch_stats: Any,
) -> tuple[Any, Any, float]:
    """Parameters, batch statistics and learning rate of a finished stage's best checkpoint.

    Raises:
      DamagedCheckpointError: it is missing or damaged.
    """
    template = new_state(params, batch_stats, context.optimizer, stage.learning_rate)
    state, meta = restore_checkpoint(stage.checkpoints / str(result["best_epoch"]), template)
    return state.params, state.batch_stats, meta["learning_rate"]


def _has_checkpoint(folder: Path) -> bool:
    """Whether an epoch is finished."""
    return any(folder.glob("seed*/backbone/checkpoints/*"))


def _read_test_images(spec: RunSpec, should_stop: Callable[[], bool]) -> None:
    """Reads this process's test images once, since the run needs them at its end alone.

    Raises:
      UsageError: one cannot be read.
      TrainingInterrupted: a process that runs alone is to stop.
    """
    # Of several, one that fails would leave the others waiting for its answer.
    alone = jax.process_count() == 1
    for _ in eval_batches(
        spec.dataset.test,
        spec.recipe.batch_size,
        host=jax.process_index(),
        hosts=jax.process_count(),
        workers=spec.workers,
    ):
        if alone and should_stop():
            raise TrainingInterrupted("stopped before the first update")


def _samples(dataset: Dataset) -> dict[str, np.ndarray]:
    """The first few training examples of every class or label, with the names of the classes.

    Of volumes, the middle slice. Where the labels are masks: the first few training images, and as
    "test_images" those of the test split.
    """
    images, labels = dataset.train.images, dataset.train.labels
    if dataset.segmentation:
        first = images[:_SAMPLES_PER_CLASS]
        return {
            "images": _slices(dataset, first),
            "labels": labels[: len(first)],
            "names": np.array([f"image {row}" for row in range(len(first))]),
            "test_images": _slices(dataset, dataset.test.images[:_SAMPLES_PER_CLASS]),
        }
    rows, names = [], []
    for index, name in enumerate(dataset.classes):
        members = labels[:, index] == 1 if dataset.multi_label else labels == index
        chosen = np.flatnonzero(members)[:_SAMPLES_PER_CLASS].tolist()
        rows += chosen
        names += [name] * len(chosen)
    return {
        "images": _slices(dataset, images[rows]),
        "labels": labels[rows],
        "names": np.array(names),
    }


def _slices(dataset: Dataset, examples: np.ndarray) -> np.ndarray:
    """Middle slices of volumes; other examples unchanged."""
    return examples[:, examples.shape[1] // 2] if dataset.modality == "volume" else examples


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with write_errors(path):
        write_arrays(path, arrays)


def _headline(spec: RunSpec) -> str:
    data, recipe = spec.dataset, spec.recipe
    kinds = ", ".join(sorted({device.device_kind for device in spec.devices}))
    return (
        f"{data.title} {data.size_text}, {len(data.train)}/{len(data.val)}/{len(data.test)} "
        f"{EXAMPLES[data.modality]}; "
        f"{spec.config.model.name}, recipe {spec.config.recipe.name}, "
        f"{recipe.epochs}{'' if spec.single_stage else f'+{recipe.merging_epochs}'} epochs, "
        f"batch {recipe.batch_size}; "
        f"{len(spec.devices)} x {kinds}"
    )


def _results(spec: RunSpec, arms: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    data = spec.dataset
    values = _config_dict(spec)
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
            **({"modality": data.modality} if data.modality != "image" else {}),
            **({"features": list(data.features)} if data.features else {}),
            **({"split": data.split_name} if data.split_name else {}),
            **({"bits": data.bits} if data.bits else {}),
            **({"full_counts": dict(data.full_counts)} if data.full_counts else {}),
            **({"test_names_sha256": data.test_names_sha256} if data.test_names_sha256 else {}),
        },
        "model": values["model"],
        **({"init": dataclasses.asdict(spec.init_report)} if spec.init_report else {}),
        "recipe": values["recipe"],
        "rule": values["rule"],
        "seeds": list(spec.config.seeds),
        "arms": arms,
        "environment": environment(),
        "seconds": sum(result["seconds"] for stages in arms.values() for result in stages),
    }
