"""The configuration of a training run, and its command line."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from inmerge_jax.data import DEFAULT_SIZE, DataConfig, PhantomConfig
from inmerge_jax.data.medmnist import MEDMNIST_DIR
from inmerge_jax.errors import UsageError
from inmerge_jax.files import path_registry
from inmerge_jax.merging import MergeRule, quantile
from inmerge_jax.training.environment import COMPILATION_CACHE
from inmerge_jax.training.presets import PresetName, find_preset
from inmerge_jax.training.recipes import RECIPES, Recipe

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
"""Fields that may differ between a run and its continuation; config.json does not hold them."""


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
      name: phantom (generated, no files), chestxray14 (see inmerge data build) or a 2-D MedMNIST
        subset such as breastmnist.
    """

    name: Annotated[str, arg(name="data", metavar="NAME")] = "phantom"
    size: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 28)")] = None
    data_dir: Annotated[Path, arg(metavar="FOLDER")] = MEDMNIST_DIR
    file: Annotated[Path | None, _optional("FILE")] = None
    download: Annotated[bool, _FLAG] = True
    allow_unverified: Annotated[bool, _FLAG] = False
    phantom: Annotated[PhantomOptions, arg(name="")] = field(default_factory=PhantomOptions)


@dataclass(frozen=True)
class ModelConfig:
    """The network.

    Attributes:
      name: resnet18, resnet34, resnet50, densenet121, or vgg11, vgg13, vgg16, vgg19 (with batch
        normalisation: vgg11_bn).
      stem: small for images of 28 to 64 px, imagenet for torchvision's network.
      width: Factor on the number of channels.
      init_from: Weight file to start from (.safetensors, .pth, .pt; torchvision, MedMNIST).
      replace_head: Initialize a new last layer if the file's has another number of outputs.
      dtype: Dtype of activations; weights are float32.
      remat: Recompute activations in the backward pass (densenet121 on GPU and TPU).
    """

    name: Annotated[str, arg(name="model", metavar="NAME")] = "resnet18"
    stem: Literal["small", "imagenet"] = "small"
    width: float = 1.0
    init_from: Annotated[Path | None, _optional("FILE")] = None
    replace_head: Annotated[bool, _FLAG] = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Annotated[bool, _FLAG] = False


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


@dataclass(frozen=True)
class RuleConfig:
    """In-model merging, K_i <- alpha K_i + (1 - alpha) K_j, before each step of the arm inmerge.

    Attributes:
      threshold: Cosine similarity above which a selected kernel merges.
      quantile: Instead of a threshold: 0.9 merges the most similar tenth.
      partner: A random other kernel of the layer, or the nearest (most similar) one.
      probability: Probability that a kernel is selected at a step.
      alpha: Fraction of the kernel that is kept.
      skip: Number of convolutions, from the input, that are not merged.
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
class TrainConfig(OutputConfig, DeviceConfig):
    """The configuration of a run.

    Attributes:
      data: the data set.
      model: the network.
      recipe: the training recipe.
      rule: the merging rule.
      preset: name of a reading of the method, see `presets`; None merges all convolutions after
        the first `rule.skip`, in training only.
    """

    data: DataConfig = field(default_factory=DataOptions)
    model: ModelConfig = field(default_factory=ModelConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    rule: RuleConfig = field(default_factory=RuleConfig)
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
        preset=options.merging.preset,
        **vars(options.output),
        **vars(options.devices_and_processes),
    )
    return apply_preset(config)


def apply_preset(config: TrainConfig) -> TrainConfig:
    """Fills in the defaults of the preset and the data set; idempotent.

    These are the preset's recipe and partner, the threshold, and the image size. For ChestX-ray14
    the size stays None, which means the size of the build.

    Raises:
      UsageError: the preset is unknown.
    """
    preset = find_preset(config.preset)
    recipe = dataclasses.replace(config.recipe, name=config.recipe.name or preset.recipe)
    rule = dataclasses.replace(config.rule, partner=config.rule.partner or preset.partner)
    if rule.threshold is None and rule.quantile is None:
        rule = dataclasses.replace(rule, threshold=DEFAULT_THRESHOLD)
    data = config.data
    if data.size is None and data.name != "chestxray14":
        data = dataclasses.replace(data, size=DEFAULT_SIZE)
    return dataclasses.replace(config, recipe=recipe, rule=rule, data=data)


def resolve_recipe(config: RecipeConfig) -> Recipe:
    """The named recipe, with the given values in place of its own; call `apply_preset` first.

    Raises:
      UsageError: the name is unknown, a number is out of range, or Adam has a momentum.
    """
    if config.name is None or config.name not in RECIPES:
        raise UsageError(f"`recipe` {config.name}: unknown; choose one of {', '.join(RECIPES)}")
    given = {name: value for name, value in vars(config).items() if name != "name"}
    given = {name: value for name, value in given.items() if value is not None}
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
    cap = recipe.pos_weight
    valid = cap is None or (cap > 0 and math.isfinite(cap))
    _require(valid, "pos_weight", cap, "choose a positive number, such as 10")
    valid = 0 <= recipe.weight_decay < math.inf
    _require(valid, "weight_decay", recipe.weight_decay, "choose 0 or more")
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
    if config.model.replace_head and config.model.init_from is None:
        raise UsageError("`replace_head` is for the head of a weight file: give `init_from` too")
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
    if config.model.init_from is None:
        del values["model"]["init_from"], values["model"]["replace_head"]
    else:
        values["model"]["init_sha256"] = init_sha256
    del values["rule"]["threshold" if config.rule.threshold is None else "quantile"]
    if not config.model.remat:
        del values["model"]["remat"]
    if config.grad_accum_steps == 1:
        del values["grad_accum_steps"]
    if config.fused:
        del values["fused"]
    if data_sha256:
        values["data"]["content_sha256"] = data_sha256
    values["recipe"] = {"name": config.recipe.name, **dataclasses.asdict(recipe)}
    values["arms"] = [arm for arm in ARMS if arm == "backbone" or arm in config.arms]
    values["devices"] = devices
    return json.loads(json.dumps(values, default=str))


def _require(valid: bool, name: str, value: object, remedy: str) -> None:
    if not valid:
        raise UsageError(f"`{name}` {value}: {remedy}")
