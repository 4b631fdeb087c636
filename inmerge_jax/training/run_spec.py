"""What a run trains: its options after validation, with the data, network and kernels they name."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from inmerge_jax.data import Dataset, load_dataset, steps_per_epoch
from inmerge_jax.errors import UsageError
from inmerge_jax.merging import Kernel, MergeRule
from inmerge_jax.merging.units import group_weights
from inmerge_jax.models import check_options, create_model, model_names, segments
from inmerge_jax.models.torchvision import LoadReport
from inmerge_jax.models.unet import UNet
from inmerge_jax.models.units import find_units
from inmerge_jax.training.config import TrainConfig
from inmerge_jax.training.environment import available_cores
from inmerge_jax.training.init import (
    file_sha256,
    has_batch_stats,
    pretrained_variables,
)
from inmerge_jax.training.monitoring import check_monitoring
from inmerge_jax.training.parallel import DATA_AXIS, choose_devices
from inmerge_jax.training.presets import Preset, find_preset, select_units
from inmerge_jax.training.recipes import Recipe, fit_recipe
from inmerge_jax.training.resolve import (
    apply_preset,
    check_run,
    check_steps_per_execution,
    resolve_recipe,
    resolve_rule,
    schedule_rule,
)
from inmerge_jax.training.rule_schedule import RuleSchedule


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """A validated configuration, with everything that a run needs.

    Attributes:
      config: the configuration, with the defaults of its preset.
      preset: the preset, or the defaults without one.
      recipe: the recipe with its overrides.
      rule: the merging rule.
      devices: the devices that the steps run on.
      dataset: the loaded data set.
      model: the network, whose batch statistics span the devices.
      shape: shape of one example that the network reads, such as (h, w, c).
      kernels: all units of the kinds that merge, in execution order.
      deep: the units to merge.
      notice: the reason why `deep` is empty, if the released code merges nothing; else "".
      workers: number of processes that read images.
      init_sha256: hash of the file of initial weights; None for random weights.
      schedule: the rule at each update, if it changes; else `rule`.
      init_report: what was loaded from this file; None for random weights.
    """

    config: TrainConfig
    preset: Preset
    recipe: Recipe
    rule: MergeRule
    devices: tuple[jax.Device, ...]
    dataset: Dataset
    model: nn.Module
    shape: tuple[int, ...]
    kernels: tuple[Kernel, ...]
    deep: tuple[Kernel, ...]
    notice: str
    workers: int
    init_sha256: str | None = None
    schedule: MergeRule | RuleSchedule | None = None
    init_report: LoadReport | None = None

    @property
    def single_stage(self) -> bool:
        """Whether inmerge starts from the backbone's first weights, in place of its best ones."""
        return self.config.rule.merge_from_epoch is not None

    @property
    def second_epochs(self) -> int:
        """Epochs of each arm but the backbone."""
        return self.recipe.epochs if self.single_stage else self.recipe.merging_epochs


def make_run_spec(config: TrainConfig) -> RunSpec:
    """Validates the configuration and loads the data; writes nothing.

    Raises:
      UsageError: the configuration is invalid.
    """
    check_run(config)
    config = apply_preset(config)
    recipe, rule = resolve_recipe(config.recipe), resolve_rule(config.rule)
    devices = choose_devices(config.devices)
    check_steps_per_execution(config.steps_per_execution, devices[0].platform)
    _check_shares(recipe.batch_size, len(devices), config.grad_accum_steps)
    preset = find_preset(config.preset)
    _check_rule(config, recipe, rule, preset)
    network = config.model
    check_options(network.name, stem=network.stem, width=network.width, remat=network.remat)
    sha256 = None if network.init_from is None else file_sha256(network.init_from)
    # Loading may take minutes: what needs no data is checked before.
    dataset = load_dataset(config.data)
    updates = steps_per_epoch(len(dataset.train), recipe.batch_size)
    _check_updates(config.steps_per_execution, updates)
    check_monitoring(
        config.output,
        tensorboard=config.logging.tensorboard,
        profile=config.logging.profile,
        updates=updates,
        steps_per_execution=config.steps_per_execution,
    )
    workers = _workers(config, dataset)
    _check_model(config, dataset)
    recipe = fit_recipe(recipe, dataset, config.data.channels)
    model = create_model(
        config.model.name,
        dataset.num_classes,
        modality=dataset.modality,
        stem=config.model.stem,
        width=config.model.width,
        dtype=jnp.dtype(config.model.dtype),
        axis_name=DATA_AXIS,
        remat=config.model.remat,
    )
    _check_halving(config, dataset, model)
    channels = len(recipe.mean) if dataset.channels == 1 else dataset.channels
    shape = (*dataset.train.images.shape[1:-1], channels)
    kernels = find_units(model, shape, config.rule.units)
    deep, notice = select_units(
        preset, config.model.name, kernels, config.rule.skip, config.rule.layers
    )
    if config.rule.skip is None:
        half = len(group_weights(kernels)) // 2
        config = dataclasses.replace(config, rule=dataclasses.replace(config.rule, skip=half))
    if recipe.recompute_batch_stats != "off":
        _check_batch_stats(config, model, shape, recipe, preset)
    spec = RunSpec(
        config, preset, recipe, rule, devices, dataset, model, shape, kernels, deep, notice, workers
    )
    schedule = schedule_rule(config.rule, rule, spec.second_epochs, updates)
    spec = dataclasses.replace(spec, schedule=schedule)
    if sha256 is None:
        return spec
    *_, report = pretrained_variables(
        config.model, sha256, dataset.num_classes, shape, config.seeds[0]
    )
    return dataclasses.replace(spec, init_sha256=sha256, init_report=report)


def _check_rule(config: TrainConfig, recipe: Recipe, rule: MergeRule, preset: Preset) -> None:
    """Refuses values of the schedule that are out of range, and what a preset excludes."""
    single = config.rule.merge_from_epoch is not None
    epochs = recipe.epochs if single else recipe.merging_epochs
    schedule = schedule_rule(config.rule, rule, epochs, steps=1)
    if not preset.merge_in_validation:
        return
    if recipe.average_weights is not None:
        raise UsageError(
            f"`average_weights` {recipe.average_weights}: with `preset` {config.preset}, "
            "validation merges the weights themselves; leave one of them out"
        )
    scheduled = schedule is not rule or config.rule.merge_from_epoch is not None
    if scheduled or config.rule.merge_every == "epoch":
        raise UsageError(
            f"`preset` {config.preset} merges before each validation image too, for which there is "
            "no schedule; leave out `merge_every`, `merge_from_epoch` and the schedule's ends"
        )


def _check_model(config: TrainConfig, dataset: Dataset) -> None:
    """Refuses a network that does not read what the data set has."""
    name, kind = config.model.name, dataset.modality
    fits = [other for other in model_names(kind) if segments(other) == dataset.segmentation]
    if name in model_names() and name not in model_names(kind):
        raise UsageError(
            f"`model` {name} does not read {kind}s, which `data` {dataset.name} has: choose one of "
            f"{', '.join(fits)}, or another data set"
        )
    if name in model_names() and segments(name) != dataset.segmentation:
        needs, has = ("masks", "labels") if segments(name) else ("labels of images", "masks")
        raise UsageError(
            f"`model` {name} needs {needs}, and `data` {dataset.name} has {has}: choose one of "
            f"{', '.join(fits)}, or another data set, such as "
            f"{'phantom_masks' if segments(name) else 'phantom'}"
        )
    numeric = kind in ("signal", "table")
    changes = vars(config.recipe.augment).items()
    for option, given, unread in (
        ("flip", config.recipe.flip, numeric),
        ("channels", config.data.channels, numeric),
        *((f"augment.{name}", value, kind != "image") for name, value in changes),
    ):
        if given and unread:
            raise UsageError(f"`{option}`: {dataset.name} has {kind}s; leave it out")


def _check_halving(config: TrainConfig, dataset: Dataset, model: nn.Module) -> None:
    """Refuses images that a U-Net cannot halve as often as it has levels."""
    factor = 2**model.levels if isinstance(model, UNet) else 1
    if any(length % factor for length in dataset.train.images.shape[1:-1]):
        raise UsageError(
            f"`size` {dataset.size}: {config.model.name} halves the images of {dataset.name} "
            f"{model.levels} times; choose a multiple of {factor}"
        )


def _check_batch_stats(
    config: TrainConfig,
    model: nn.Module,
    shape: tuple[int, ...],
    recipe: Recipe,
    preset: Preset,
) -> None:
    name = f"`recompute_batch_stats` {recipe.recompute_batch_stats}"
    if not has_batch_stats(model, shape):
        raise UsageError(f"{name}: {config.model.name} has no batch normalisation; leave it out")
    if preset.merge_in_validation:
        raise UsageError(
            f"{name}: with `preset` {config.preset}, weights merge before each validation image, "
            "and statistics cannot follow; leave one of them out"
        )


def _check_updates(steps_per_execution: int, updates: int) -> None:
    if steps_per_execution > updates:
        raise UsageError(
            f"`steps_per_execution` {steps_per_execution}: an epoch has {updates} updates; choose "
            f"{updates} or fewer"
        )


def _check_shares(batch_size: int, devices: int, parts: int) -> None:
    if batch_size % devices:
        raise UsageError(
            f"`batch_size` {batch_size} cannot be split over {devices} devices: choose a multiple "
            f"of {devices}, or fewer `devices`"
        )
    if batch_size % (devices * parts):
        raise UsageError(
            f"`grad_accum_steps` {parts}: {batch_size // devices} images per device cannot be "
            f"split into {parts} equal parts; choose a `batch_size` that is a multiple of "
            f"{devices * parts}"
        )


def _workers(config: TrainConfig, dataset: Dataset) -> int:
    """Number of processes that read images: as configured, or a third of the CPU cores."""
    if dataset.train.in_memory:
        if config.workers:
            raise UsageError(
                f"`workers` {config.workers}: {dataset.name} is in memory, so there is nothing to "
                "read; leave it out"
            )
        return 0
    return min(available_cores() // 3, 16) if config.workers is None else config.workers
