"""The configuration of a training run, and its command line."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from inmerge_jax.data import DEFAULT_SIZE, DataConfig, PhantomConfig, has_own_size
from inmerge_jax.data.medmnist import MEDMNIST_DIR
from inmerge_jax.errors import UsageError
from inmerge_jax.files import path_registry
from inmerge_jax.merging import MergeRule, quantile
from inmerge_jax.training.augment import AugmentConfig
from inmerge_jax.training.environment import COMPILATION_CACHE
from inmerge_jax.training.presets import PresetName, find_preset
from inmerge_jax.training.recipes import RECIPES, Recipe
from inmerge_jax.training.rule_schedule import RuleSchedule

try:
    from tyro.conf import OmitArgPrefixes, arg
except ModuleNotFoundError:  # Only the command line needs it.
    OmitArgPrefixes = None

    def arg(**shown: Any) -> None:
        """Stands in for tyro's annotation of a command-line option."""


Arm = Literal["backbone", "finetune", "inmerge"]
ARMS: tuple[Arm, ...] = ("backbone", "finetune", "inmerge")

DEFAULT_THRESHOLD = MergeRule.threshold
_NOT_COMPARED = ("output", "steps_per_execution", "workers", "resume", "overwrite")
_NOT_COMPARED += ("compilation_cache_dir", "checksums")
_NOT_COMPARED += ("coordinator", "num_processes", "process_id")
_NOT_COMPARED += ("logging",)
"""Fields that may differ between a run and its continuation; config.json does not hold them."""


_SINCE_THE_FIRST_VERSION = ("probability_end", "threshold_end", "quantile_end", "rule_schedule")
_SINCE_THE_FIRST_VERSION += ("merge_every", "merge_from_epoch")
"""Fields of a rule that config.json holds if they are not the default."""


def _optional(metavar: str) -> Any:
    return arg(metavar=metavar, help_behavior_hint="")


_FLAG = arg(help_behavior_hint="")


@dataclass(frozen=True)
class PhantomOptions(PhantomConfig):
    """`PhantomConfig` for the command line."""

    train: Annotated[int, arg(name="phantom.train")] = PhantomConfig.train
    val: Annotated[int, arg(name="phantom.val")] = PhantomConfig.val
    test: Annotated[int, arg(name="phantom.test")] = PhantomConfig.test
    findings: Annotated[
        tuple[str, ...],
        arg(name="phantom.findings", metavar="NAME ...", help_behavior_hint="(default: all)"),
    ] = PhantomConfig.findings
    multi_label: Annotated[bool, arg(name="phantom.multi-label", help_behavior_hint="")] = False
    difficulty: Annotated[float, arg(name="phantom.difficulty")] = PhantomConfig.difficulty
    seed: Annotated[int, arg(name="phantom.seed")] = PhantomConfig.seed


@dataclass(frozen=True)
class DataOptions(DataConfig):
    """`DataConfig` for the command line.

    Attributes:
      name: phantom (generated), a 2-D MedMNIST subset such as breastmnist, folder:PATH (a folder
        per class, or a CSV), tfds:NAME, or chestxray14 (see inmerge data --help).
    """

    name: Annotated[str, arg(name="data", metavar="NAME")] = "phantom"
    size: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: 28, or files')")
    ] = None
    data_dir: Annotated[Path, arg(metavar="FOLDER")] = MEDMNIST_DIR
    file: Annotated[Path | None, _optional("FILE")] = None
    download: Annotated[bool, _FLAG] = True
    allow_unverified: Annotated[bool, _FLAG] = False
    resize: Annotated[Literal["nearest", "bilinear", "bicubic"] | None, _optional("METHOD")] = None
    channels: Annotated[
        Literal[1, 3] | None, arg(metavar="{1,3}", help_behavior_hint="(default: the recipe's)")
    ] = None
    phantom: Annotated[PhantomOptions, arg(name="")] = field(default_factory=PhantomOptions)


@dataclass(frozen=True)
class ModelConfig:
    """The network.

    Attributes:
      name: resnet18, resnet34, resnet50, densenet121, or vgg11, vgg13, vgg16, vgg19 (with batch
        normalisation: vgg11_bn).
      stem: small for images of 28 to 64 px, imagenet for torchvision's network.
      width: Factor on the number of channels.
      init_from: PyTorch file (torchvision, timm, MedMNIST) whose layers that fit are loaded.
      init_min_match: Lowest share of the convolution weights that must fit.
      replace_head: Initialize the last layer, even if the file's has the same number of outputs.
      dtype: Dtype of activations; weights are float32.
      remat: Recompute activations in the backward pass (densenet121 on GPU and TPU).
    """

    name: Annotated[str, arg(name="model", metavar="NAME")] = "resnet18"
    stem: Literal["small", "imagenet"] = "small"
    width: float = 1.0
    init_from: Annotated[Path | None, _optional("FILE")] = None
    init_min_match: float = 0.9
    replace_head: Annotated[bool, _FLAG] = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Annotated[bool, _FLAG] = False


@dataclass(frozen=True)
class AugmentOptions(AugmentConfig):
    """`AugmentConfig` for the command line."""

    crop: Annotated[int, arg(name="augment.crop")] = 0
    rotate: Annotated[float, arg(name="augment.rotate")] = 0.0
    brightness: Annotated[float, arg(name="augment.brightness")] = 0.0
    contrast: Annotated[float, arg(name="augment.contrast")] = 0.0


@dataclass(frozen=True)
class RecipeConfig:
    """A training recipe, and values that replace the recipe's own.

    Attributes:
      name: medmnist (the benchmark's: Adam 1e-3, batch 128, 100 epochs) or released (InMerge's:
        SGD 0.1, batch 324, 30 epochs).
      epochs: Epochs of the backbone stage.
      merging_epochs: Epochs of the second stage (finetune, inmerge).
      batch_size: Examples per update, over all devices.
      learning_rate: Initial learning rate of the backbone stage.
      merging_learning_rate: Initial learning rate of the second stage.
      optimizer: Optimizer, as in PyTorch.
      momentum: Momentum of SGD.
      weight_decay: Coefficient of coupled L2 regularization.
      schedule: Divide the rate by 10 at 1/2 and 3/4 of a stage, or on a loss plateau.
      select: Criterion for the best checkpoint.
      flip: Flip training images left to right with probability 1/2.
      pos_weight: Weight positive labels by negatives / positives, at most by this.
      class_weights: Weight each class of single-label data by the inverse of its images.
      augment: random changes of training images.
      recompute_batch_stats: Arms evaluated with statistics re-estimated on the training images.
      batch_stats_batches: Number of training batches for that.
      average_weights: Evaluate an exponential moving average of the weights, with this decay.
    """

    name: Annotated[
        str | None,
        arg(
            name="recipe",
            metavar="NAME",
            help_behavior_hint="(default: medmnist; presets: released)",
        ),
    ] = None
    epochs: Annotated[int | None, _optional("INT")] = None
    merging_epochs: Annotated[int | None, _optional("INT")] = None
    batch_size: Annotated[int | None, _optional("INT")] = None
    learning_rate: Annotated[float | None, _optional("FLOAT")] = None
    merging_learning_rate: Annotated[
        float | None,
        arg(metavar="FLOAT", help_behavior_hint="(default: the backbone's)"),
    ] = None
    optimizer: Annotated[Literal["adam", "sgd"] | None, _optional("{adam,sgd}")] = None
    momentum: Annotated[float | None, _optional("FLOAT")] = None
    weight_decay: Annotated[float | None, _optional("FLOAT")] = None
    schedule: Annotated[
        Literal["milestones", "plateau"] | None, _optional("{milestones,plateau}")
    ] = None
    select: Annotated[Literal["val_auc", "val_loss"] | None, _optional("{val_auc,val_loss}")] = None
    flip: Annotated[bool | None, _optional("{True,False}")] = None
    pos_weight: Annotated[float | None, _optional("FLOAT")] = None
    class_weights: Annotated[Literal["balanced"] | None, _optional("balanced")] = None
    augment: Annotated[AugmentConfig, arg(name="")] = field(default_factory=AugmentOptions)
    recompute_batch_stats: Annotated[
        Literal["off", "inmerge", "all"] | None,
        arg(metavar="{off,inmerge,all}", help_behavior_hint="(default: off)"),
    ] = None
    batch_stats_batches: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: all)")
    ] = None
    average_weights: Annotated[float | None, _optional("FLOAT")] = None


@dataclass(frozen=True)
class RuleConfig:
    """In-model merging, K_i <- alpha K_i + (1 - alpha) K_j, before each step of the arm inmerge.

    From the paper: threshold, partner nearest, probability, alpha, skip; preset names its readings.
    Extensions: quantile, the schedules (..._end), merge-every, merge-from-epoch.

    Attributes:
      threshold: Cosine similarity above which a selected kernel merges.
      quantile: Instead of a threshold: 0.9 merges the most similar tenth.
      partner: A random other kernel of the layer, or the nearest (most similar) one.
      probability: Probability that a kernel is selected at a step.
      alpha: Fraction of the kernel that is kept.
      skip: Number of convolutions, from the input, that are not merged.
      probability_end: The probability moves to this over the stage.
      threshold_end: The threshold moves to this over the stage.
      quantile_end: The quantile moves to this over the stage.
      rule_schedule: How they move.
      merge_every: Merge at every so many updates, or once per epoch.
      merge_from_epoch: Instead of a second stage, inmerge trains like the backbone from its first
        weights, and merges from this epoch on.
    """

    threshold: Annotated[
        float | None,
        arg(metavar="FLOAT", help_behavior_hint=f"(default: {DEFAULT_THRESHOLD})"),
    ] = None
    quantile: Annotated[float | None, _optional("FLOAT")] = None
    partner: Annotated[
        Literal["random", "nearest"] | None,
        arg(metavar="{random,nearest}", help_behavior_hint="(default: random)"),
    ] = None
    probability: float = 0.3
    alpha: float = 0.8
    skip: int = 10
    probability_end: Annotated[float | None, _optional("FLOAT")] = None
    threshold_end: Annotated[float | None, _optional("FLOAT")] = None
    quantile_end: Annotated[float | None, _optional("FLOAT")] = None
    rule_schedule: Annotated[
        Literal["linear", "cosine"] | None,
        arg(metavar="{linear,cosine}", help_behavior_hint="(default: linear)"),
    ] = None
    merge_every: Annotated[int | Literal["epoch"], arg(metavar="{INT,epoch}")] = 1
    merge_from_epoch: Annotated[int | None, _optional("INT")] = None


@dataclass(frozen=True)
class OutputConfig:
    """What to train, and where the results go.

    Attributes:
      output: Folder of the run, local or gs://BUCKET/NAME.
      seeds: Seeds; every arm is trained once per seed.
      arms: The backbone and: finetune (without merging), inmerge.
      resume: Continue the run in the output folder.
      overwrite: Replace the run in the output folder.
      checksums: Detect damaged checkpoints by checksums, unless this is off.
      compilation_cache_dir: JAX's compilation cache; None disables it.
    """

    output: Annotated[Path, arg(metavar="FOLDER")] = Path("runs/train")
    seeds: Annotated[tuple[int, ...], arg(metavar="INT ...")] = (0,)
    arms: Annotated[
        tuple[Arm, ...], arg(metavar="ARM ...", help_behavior_hint="(default: all)")
    ] = ARMS
    resume: Annotated[bool, _FLAG] = False
    overwrite: Annotated[bool, _FLAG] = False
    checksums: Annotated[bool, _FLAG] = True
    compilation_cache_dir: Annotated[Path | None, arg(metavar="FOLDER")] = COMPILATION_CACHE


@dataclass(frozen=True)
class DeviceConfig:
    """How the work is divided over devices and processes.

    Attributes:
      devices: Number of devices that share each batch.
      workers: Processes that read image files; 0 for threads.
      grad_accum_steps: Microbatches per device and update, to save memory.
      steps_per_execution: Updates per dispatch, for small steps on GPU and TPU.
      fused: On TPU v4 and newer one Pallas kernel merges a layer, unless this is off.
      coordinator: Address of process 0; for several processes, not needed on a TPU pod.
      num_processes: Number of processes.
      process_id: Number of this process, from 0.
    """

    devices: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: all)")] = None
    workers: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: cores / 3)")
    ] = None
    grad_accum_steps: int = 1
    steps_per_execution: int = 1
    fused: Annotated[bool, _FLAG] = True
    coordinator: Annotated[str | None, _optional("HOST:PORT")] = None
    num_processes: Annotated[int | None, _optional("INT")] = None
    process_id: Annotated[int | None, _optional("INT")] = None


@dataclass(frozen=True)
class LoggingConfig:
    """What is written for people to watch; a run and its continuation may differ in it.

    Attributes:
      tensorboard: Write losses, metrics, merges and similarities for TensorBoard.
      profile: Number of updates of each arm, of the first seed, to profile.
    """

    tensorboard: Annotated[bool, _FLAG] = False
    profile: Annotated[int | None, _optional("INT")] = None


@dataclass(frozen=True)
class TrainConfig(OutputConfig, DeviceConfig):
    """The configuration of a run.

    Attributes:
      data: the data set.
      model: the network.
      recipe: the training recipe.
      rule: the merging rule.
      logging: what is written for people to watch.
      preset: name of a reading of the method, see `presets`; None merges all convolutions after
        the first `rule.skip`, in training only.
    """

    data: DataConfig = field(default_factory=DataOptions)
    model: ModelConfig = field(default_factory=ModelConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    rule: RuleConfig = field(default_factory=RuleConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    preset: PresetName | None = None


@dataclass(frozen=True)
class _MergingOptions(RuleConfig):
    __doc__ = RuleConfig.__doc__

    preset: Annotated[
        PresetName | None,
        arg(
            metavar="{paper,released,released_intent}",
            help="A reading of the method: the paper's text, the released code as it runs "
            "(merges nothing in a ResNet), or as it was meant.",
            help_behavior_hint="",
        ),
    ] = None


@dataclass(frozen=True)
class _CommandLine:
    """Trains a backbone, then fine-tunes its best checkpoint with and without in-model merging.

    Ctrl-C or SIGTERM saves a checkpoint after the current update; --resume continues.
    """

    data: Annotated[DataOptions, OmitArgPrefixes, arg(help="")]
    model: Annotated[ModelConfig, OmitArgPrefixes, arg(help="")]
    recipe: Annotated[RecipeConfig, OmitArgPrefixes]
    merging: Annotated[_MergingOptions, OmitArgPrefixes]
    output: Annotated[OutputConfig, OmitArgPrefixes, arg(help="")]
    devices_and_processes: Annotated[DeviceConfig, OmitArgPrefixes, arg(help="")]
    logging: Annotated[LoggingConfig, OmitArgPrefixes, arg(help="")]


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Parses the command line of `inmerge train`.

    Args:
      arguments: the arguments; None for those of this process.

    Raises:
      SystemExit: with status 0 after --help, 2 for an unknown option or value.
    """
    import tyro

    options = tyro.cli(
        _CommandLine,
        prog="inmerge train",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
        registry=path_registry(),
    )
    rule = {name: value for name, value in vars(options.merging).items() if name != "preset"}
    config = TrainConfig(
        data=options.data,
        model=options.model,
        recipe=options.recipe,
        rule=RuleConfig(**rule),
        logging=options.logging,
        preset=options.merging.preset,
        **vars(options.output),
        **vars(options.devices_and_processes),
    )
    return apply_preset(config)


def apply_preset(config: TrainConfig) -> TrainConfig:
    """Fills in the defaults of the preset and the data set; idempotent.

    These are the preset's recipe and partner, the threshold, the image size, and the arms of a
    single stage. The size stays None where the files determine it, see `data.has_own_size`.

    Raises:
      UsageError: the preset is unknown.
    """
    preset = find_preset(config.preset)
    recipe = dataclasses.replace(config.recipe, name=config.recipe.name or preset.recipe)
    rule = dataclasses.replace(config.rule, partner=config.rule.partner or preset.partner)
    if rule.threshold is None and rule.quantile is None:
        rule = dataclasses.replace(rule, threshold=DEFAULT_THRESHOLD)
    arms = config.arms
    if config.rule.merge_from_epoch is not None and arms == ARMS:
        arms = ("backbone", "inmerge")
    data = config.data
    if data.size is None and not has_own_size(data.name):
        data = dataclasses.replace(data, size=DEFAULT_SIZE)
    return dataclasses.replace(config, recipe=recipe, rule=rule, data=data, arms=arms)


def resolve_recipe(config: RecipeConfig) -> Recipe:
    """The named recipe, with the given values in place of its own; call `apply_preset` first.

    Raises:
      UsageError: the name is unknown, a number is out of range, or Adam has a momentum.
    """
    if config.name is None or config.name not in RECIPES:
        raise UsageError(f"`recipe` {config.name}: unknown; choose one of {', '.join(RECIPES)}")
    given = {name: value for name, value in vars(config).items() if name != "name"}
    given = {name: value for name, value in given.items() if value is not None}
    given["augment"] = AugmentConfig(**vars(config.augment))
    recipe = dataclasses.replace(RECIPES[config.name], **given)
    for name in ("epochs", "merging_epochs", "batch_size"):
        _require(getattr(recipe, name) >= 1, name, getattr(recipe, name), "choose 1 or more")
    for name in ("learning_rate", "merging_learning_rate"):
        rate = getattr(recipe, name)
        valid = rate is None or (rate > 0 and math.isfinite(rate))
        _require(valid, name, rate, "choose a positive number, such as 0.001")
    _require(0 <= recipe.momentum < 1, "momentum", recipe.momentum, "choose a number in [0, 1)")
    if config.momentum is not None and recipe.optimizer != "sgd":
        raise UsageError(
            f"`momentum` {config.momentum}: {recipe.optimizer} has none; leave it out, or give "
            "`optimizer=sgd`"
        )
    if recipe.batch_stats_batches is not None:
        name, number = "batch_stats_batches", recipe.batch_stats_batches
        _require(number >= 1, name, number, "choose 1 or more")
        remedy = "give `recompute_batch_stats=all` too, or leave it out"
        _require(recipe.recompute_batch_stats != "off", name, number, remedy)
    decay = recipe.average_weights
    _require(decay is None or 0 < decay < 1, "average_weights", decay, "choose a number in (0, 1)")
    cap = recipe.pos_weight
    valid = cap is None or (cap > 0 and math.isfinite(cap))
    _require(valid, "pos_weight", cap, "choose a positive number, such as 10")
    valid = 0 <= recipe.weight_decay < math.inf
    _require(valid, "weight_decay", recipe.weight_decay, "choose 0 or more")
    for name, top in (("crop", math.inf), ("rotate", 180), ("brightness", 1), ("contrast", 1)):
        value = getattr(recipe.augment, name)
        _require(0 <= value <= top, name, value, f"choose a number in [0, {top}]")
    return recipe


def resolve_rule(config: RuleConfig) -> MergeRule:
    """The merging rule; call `apply_preset` first.

    Raises:
      UsageError: a number is out of range, or both a threshold and a quantile are given.
    """
    for name, low in (("probability", 0), ("threshold", -1), ("alpha", 0), ("quantile", 0)):
        value = getattr(config, name)
        _require(value is None or low <= value <= 1, name, value, f"choose a number in [{low}, 1]")
    _require(config.skip >= 0, "skip", config.skip, "choose 0 or more")
    partner = config.partner or find_preset(None).partner
    threshold = DEFAULT_THRESHOLD if config.threshold is None else config.threshold
    if config.quantile is None:
        return MergeRule(config.probability, threshold, config.alpha, partner)
    if config.threshold is not None:
        raise UsageError(
            f"`threshold` {config.threshold} and `quantile` {config.quantile} exclude each other: "
            "give one of them"
        )
    return MergeRule(config.probability, quantile(config.quantile), config.alpha, partner)


def schedule_rule(
    config: RuleConfig, rule: MergeRule, epochs: int, steps: int
) -> MergeRule | RuleSchedule:
    """The rule at each update of the merging stage; `rule` itself if it is always the same.

    Args:
      config: the options.
      rule: the result of `resolve_rule`.
      epochs: number of epochs of the stage.
      steps: updates per epoch.

    Raises:
      UsageError: a number is out of range, or an option has no effect.
    """
    ends = {"probability": config.probability_end, "threshold": config.threshold_end}
    ends = {name: value for name, value in ends.items() if value is not None}
    for name, value in ends.items():
        low = -1 if name == "threshold" else 0
        _require(low <= value <= 1, f"{name}_end", value, f"choose a number in [{low}, 1]")
    if config.quantile_end is not None:
        _require(
            0 <= config.quantile_end <= 1,
            "quantile_end",
            config.quantile_end,
            "choose a number in [0, 1]",
        )
    if config.threshold_end is not None and config.quantile is not None:
        raise UsageError(
            f"`threshold_end` {config.threshold_end}: the rule has a quantile; give `quantile_end`"
        )
    if config.quantile_end is not None:
        _require(
            config.quantile is not None,
            "quantile_end",
            config.quantile_end,
            "give `quantile` too, the value at the start",
        )
        ends["threshold"] = quantile(config.quantile_end)
    if config.rule_schedule is not None and not ends:
        raise UsageError(
            f"`rule_schedule` {config.rule_schedule}: nothing moves; give `probability_end`, "
            "`threshold_end` or `quantile_end` too, or leave it out"
        )
    every = steps if config.merge_every == "epoch" else config.merge_every
    _require(every >= 1, "merge_every", every, "choose 1 or more, or epoch")
    start = 1 if config.merge_from_epoch is None else config.merge_from_epoch
    remedy = f"choose 1 to {epochs}, the number of `epochs`"
    _require(1 <= start <= epochs, "merge_from_epoch", start, remedy)
    if not ends and every == 1 and start == 1:
        return rule
    return RuleSchedule(
        start=rule,
        end=dataclasses.replace(rule, **ends),
        first=(start - 1) * steps,
        last=epochs * steps - 1,
        every=every,
        shape=config.rule_schedule or "linear",
    )


def _check_single_stage(config: TrainConfig) -> None:
    name = f"`merge_from_epoch` {config.rule.merge_from_epoch}"
    for option in ("merging_epochs", "merging_learning_rate"):
        value = getattr(config.recipe, option)
        if value is not None:
            raise UsageError(f"{name}: there is no second stage; leave out `{option}` {value}")
    if config.arms != ARMS and ("finetune" in config.arms or "inmerge" not in config.arms):
        raise UsageError(
            f"{name}: the arms are the backbone, which is the control, and inmerge; leave out "
            f"`arms` {' '.join(config.arms)}"
        )


def check_run(config: TrainConfig) -> None:
    """Checks the options that no other function checks.

    Raises:
      UsageError: no seed, a negative or repeated seed, no arm, a changed address of a bucket, or
        options that exclude each other.
    """
    seeds = " ".join(map(str, config.seeds))
    _require(bool(config.seeds), "seeds", seeds, "give at least one, such as 0 1 2")
    _require(min(config.seeds) >= 0, "seeds", seeds, "choose seeds of 0 or more")
    _require(len(set(config.seeds)) == len(config.seeds), "seeds", seeds, "name each seed once")
    _require(bool(config.arms), "arms", "", f"name at least one of {' '.join(ARMS)}")
    if config.rule.merge_from_epoch is not None:
        _check_single_stage(config)
    if config.model.replace_head and config.model.init_from is None:
        raise UsageError("`replace_head` is for the head of a weight file: give `init_from` too")
    share = config.model.init_min_match
    _require(0 < share <= 1, "init_min_match", share, "choose a number in (0, 1]")
    places = {
        "output": config.output,
        "compilation_cache_dir": config.compilation_cache_dir,
        "data_dir": config.data.data_dir,
    }
    for name, path in (places | {"init_from": config.model.init_from}).items():
        # pathlib collapses the two slashes, and a local folder of that name would be made.
        _require(
            path is None or not path.parts[:1] or not path.parts[0].endswith(":"),
            name,
            path,
            "pathlib.Path changed this address; make the path with inmerge_jax.files.as_path",
        )
    valid = config.workers is None or config.workers >= 0
    _require(valid, "workers", config.workers, "choose 0 or more")
    _require(
        config.grad_accum_steps >= 1,
        "grad_accum_steps",
        config.grad_accum_steps,
        "choose 1 or more",
    )
    if config.resume and config.overwrite:
        raise UsageError("`resume` and `overwrite` exclude each other: give one of them")


def check_steps_per_execution(steps: int, platform: str) -> None:
    """Checks `steps_per_execution` for the platform of the run.

    Raises:
      UsageError: `steps` is below 1, or above 1 on CPU.
    """
    _require(steps >= 1, "steps_per_execution", steps, "choose 1 or more")
    if steps > 1 and platform == "cpu":
        raise UsageError(
            f"`steps_per_execution` {steps}: leave it out on CPU, where XLA's convolutions are "
            "about 45 times slower inside a loop; it is for GPU and TPU"
        )


def config_dict(
    config: TrainConfig,
    recipe: Recipe,
    devices: int,
    init_sha256: str | None = None,
    data_sha256: str | None = None,
) -> dict[str, Any]:
    """The content of config.json: the resolved options that determine the results.

    `init_sha256` is the hash of the file `init_from`; `data_sha256` is that of a data set that was
    built from files. The content of both determines the results.
    """
    values = dataclasses.asdict(config)
    for name in _NOT_COMPARED:
        del values[name]
    del values["model"]["init_min_match"]  # It refuses a run, and changes none.
    if config.model.init_from is None:
        del values["model"]["init_from"], values["model"]["replace_head"]
    else:
        values["model"]["init_sha256"] = init_sha256
    for name in _SINCE_THE_FIRST_VERSION:
        if getattr(config.rule, name) == getattr(RuleConfig, name):
            del values["rule"][name]
    del values["rule"]["threshold" if config.rule.threshold is None else "quantile"]
    if not config.model.remat:
        del values["model"]["remat"]
    for name in ("resize", "channels"):  # Runs of earlier versions have none.
        if values["data"][name] is None:
            del values["data"][name]
    if config.grad_accum_steps == 1:
        del values["grad_accum_steps"]
    if config.fused:
        del values["fused"]
    if data_sha256:
        values["data"]["content_sha256"] = data_sha256
    values["recipe"] = {"name": config.recipe.name, **dataclasses.asdict(recipe)}
    if recipe.class_weights is None:
        del values["recipe"]["class_weights"]
    if recipe.augment.is_off:
        del values["recipe"]["augment"]
    if recipe.recompute_batch_stats == "off":
        del values["recipe"]["recompute_batch_stats"], values["recipe"]["batch_stats_batches"]
    if recipe.average_weights is None:
        del values["recipe"]["average_weights"]
    values["arms"] = [arm for arm in ARMS if arm == "backbone" or arm in config.arms]
    values["devices"] = devices
    return json.loads(json.dumps(values, default=str))


def _require(valid: bool, name: str, value: object, remedy: str) -> None:
    if not valid:
        raise UsageError(f"`{name}` {value}: {remedy}")
