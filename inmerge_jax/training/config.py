"""The options of a training run, as nested frozen dataclasses that tyro turns into flags."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from inmerge_jax.data import DEFAULT_SIZE, DataConfig
from inmerge_jax.errors import UsageError
from inmerge_jax.merging import MergeRule, quantile
from inmerge_jax.training.presets import PresetName, find_preset
from inmerge_jax.training.recipes import RECIPES, Recipe

try:
    from tyro.conf import OmitArgPrefixes, arg
except ModuleNotFoundError:  # Only the command line needs it.
    OmitArgPrefixes = None

    def arg(**shown: Any) -> None:
        """How the command line shows an option."""


Arm = Literal["backbone", "finetune", "inmerge"]
ARMS: tuple[Arm, ...] = ("backbone", "finetune", "inmerge")

DEFAULT_THRESHOLD = MergeRule.threshold
_NOT_COMPARED = ("output", "steps_per_execution", "workers", "resume", "overwrite")
_NOT_COMPARED += ("compilation_cache_dir", "coordinator", "num_processes", "process_id")
"""Fields that may differ between a run and its continuation; config.json does not hold them."""


def _of_recipe(metavar: str) -> Any:
    return arg(metavar=metavar, help_behavior_hint="(default: the recipe's)")


@dataclass(frozen=True)
class DataOptions(DataConfig):
    """`DataConfig` whose name is the option --data.

    Attributes:
      name: "phantom" (made on the spot: no file, no network), chestxray14 (built from NIH's files
        by inmerge data build) or a 2-D MedMNIST subset, such as breastmnist,
        chestmnist or bloodmnist.
    """

    name: Annotated[str, arg(name="data", metavar="NAME")] = "phantom"


@dataclass(frozen=True)
class ModelConfig:
    """The network.

    Attributes:
      name: resnet18, resnet34, resnet50, densenet121, vgg11, vgg13, vgg16 or vgg19; the last four
        also with batch normalisation: vgg11_bn and so on.
      stem: small is the form for images of about 28 to 64 px (the MedMNIST benchmark's ResNet; a
        DenseNet whose stem is changed likewise; a VGG with a pooled linear head), imagenet is
        torchvision's network.
      width: Factor on the number of channels of every layer.
      dtype: What activations are computed in. Weights are always float32.
      remat: Keep less of the forward pass in memory and compute it again for the backward pass; for
        densenet121 on GPU and TPU (on CPU, XLA undoes it).
      init_from: Start the backbone from the weights in this file (.safetensors, .pth or .pt: a
        state dict of torchvision's network or a checkpoint of the MedMNIST benchmark) instead of
        from random ones.
      replace_head: Draw a new last layer where that of the file has another number of outputs.
    """

    name: Annotated[str, arg(name="model", metavar="NAME")] = "resnet18"
    stem: Literal["small", "imagenet"] = "small"
    width: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    init_from: Annotated[Path | None, arg(metavar="FILE")] = None
    replace_head: bool = False


@dataclass(frozen=True)
class RecipeConfig:
    """How the network is trained: by a recipe, and by what is given here in place of its values.

    Attributes:
      name: medmnist, the MedMNIST v2 benchmark's recipe (Adam 1e-3, batch 128, 100 epochs, rate
        x0.1 at 1/2 and 3/4 of a stage, best validation AUC), or released, the recipe of the
        released InMerge code (SGD 0.1 with momentum 0.9 and weight decay 1e-4, batch 324, 30
        epochs, flips, ImageNet normalisation, rate x0.1 at every epoch that is 8 or more past the
        lowest validation loss, which also chooses the checkpoint). Both have 10 merging epochs.
      epochs: Epochs of the backbone stage.
      merging_epochs: Epochs of the second stage, of the arms finetune and inmerge.
      batch_size: Examples of one update, over all devices together.
      learning_rate: Learning rate at the start of the backbone stage.
      merging_learning_rate: Learning rate at the start of the second stage.
      optimizer: The optimizer, as PyTorch computes it.
      momentum: Momentum of sgd.
      weight_decay: Coupled L2: this share of a weight is added to its gradient.
      schedule: When the rate falls to a tenth: at 1/2 and 3/4 of a stage, or at every epoch 8 or
        more past the lowest validation loss.
      select: What makes a checkpoint the best: highest validation AUC or lowest validation loss.
      flip: Mirror training images left to right with probability 1/2.
      pos_weight: For data of several labels per image: a label that is present counts as
        often in the loss as there are training images without it for each one with it, but at most
        this often. By default each counts once.
    """

    name: Annotated[
        str | None,
        arg(
            name="recipe",
            metavar="NAME",
            help_behavior_hint="(default: medmnist, with a preset released)",
        ),
    ] = None
    epochs: Annotated[int | None, _of_recipe("INT")] = None
    merging_epochs: Annotated[int | None, _of_recipe("INT")] = None
    batch_size: Annotated[int | None, _of_recipe("INT")] = None
    learning_rate: Annotated[float | None, _of_recipe("FLOAT")] = None
    merging_learning_rate: Annotated[
        float | None,
        arg(
            metavar="FLOAT",
            help_behavior_hint="(default: that of the backbone's best epoch)",
        ),
    ] = None
    optimizer: Annotated[Literal["adam", "sgd"] | None, _of_recipe("{adam,sgd}")] = None
    momentum: Annotated[float | None, _of_recipe("FLOAT")] = None
    weight_decay: Annotated[float | None, _of_recipe("FLOAT")] = None
    schedule: Annotated[
        Literal["milestones", "plateau"] | None, _of_recipe("{milestones,plateau}")
    ] = None
    select: Annotated[Literal["val_auc", "val_loss"] | None, _of_recipe("{val_auc,val_loss}")] = (
        None
    )
    flip: Annotated[bool | None, _of_recipe("{True,False}")] = None
    pos_weight: Annotated[float | None, _of_recipe("FLOAT")] = None


@dataclass(frozen=True)
class RuleConfig:
    """In-model merging: K_i <- alpha K_i + (1 - alpha) K_j, before every step of the arm inmerge.

    Attributes:
      probability: Chance of a kernel to be selected at a step.
      threshold: The cosine similarity with its partner above which a selected kernel merges.
      quantile: In place of --threshold, not beside it: each layer merges those of its selected
        kernels whose similarity is above this quantile, so 0.9 merges one in ten of them whatever
        the network.
      alpha: Share of the kernel that stays.
      partner: random is any other kernel of the layer, as in the released code; nearest is the most
        similar one.
      skip: Number of convolutions, counted from the input, that are left alone; of residual blocks
        with the preset released_intent and a ResNet.
    """

    probability: float = 0.3
    threshold: Annotated[
        float | None,
        arg(
            metavar="FLOAT",
            help_behavior_hint=f"(default: {DEFAULT_THRESHOLD}, without --quantile)",
        ),
    ] = None
    quantile: Annotated[float | None, arg(metavar="FLOAT")] = None
    alpha: float = 0.8
    partner: Annotated[
        Literal["random", "nearest"] | None,
        arg(
            metavar="{random,nearest}",
            help_behavior_hint="(default: random, with the preset paper nearest)",
        ),
    ] = None
    skip: int = 10


@dataclass(frozen=True)
class TrainConfig:
    """Trains a classifier, then goes on training it with and without in-model merging.

    For every seed: the arm backbone is trained from random weights; finetune and inmerge go on from
    its best checkpoint, with the same batches in the same order, so that merging alone is what
    differs between them. Each arm reads the test images once, at its end, with its best checkpoint.
    The output folder gets the configuration, the environment, metrics, scores and checkpoints of
    every arm, results.json and report.html.

    SIGTERM and Ctrl-C end it after the update under way, with a checkpoint of it; the exit status
    is then 143 or 130, and the same command with --resume goes on. Other statuses: 0 done, 1
    training diverged or one of several processes broke, 2 bad input or a disk that is full, 3
    another process of the run was lost.

    Attributes:
      preset: A reading of the method, which decides what merges, when, and the defaults of --recipe
        and --partner. paper: the convolutions after the first --skip, with the most similar
        partner, in training only. released: the released code as it runs, with a random partner
        and one merge more before each validation image, before the checkpoint is written; it merges
        nothing in a ResNet, and in a DenseNet at most the stem. released_intent: the same, but in a
        ResNet it merges conv2 of the blocks after the first --skip, as the code meant to, and a
        DenseNet is refused. None: the convolutions after the first --skip, in training only.
      output: Folder for all that the run writes: a new or empty one, unless --resume or --overwrite
        is given.
      seeds: One backbone, and one of each other arm, per seed, such as 0 1 2.
      arms: Arms to train: backbone, finetune, inmerge. The backbone is always among them, because
        the others start from it.
      devices: Number of local devices that share every batch; with several processes, all do.
      grad_accum_steps: Number of microbatches that each device splits its batch into, to save
        memory. Their gradients are averaged into one update. Batch normalisation sees each
        microbatch on its own.
      steps_per_execution: Updates per dispatch, for small steps on GPU and TPU.
      fused: On TPUs from v4 on, merge each layer in one Pallas kernel, which moves a fifth of the
        bytes; --no-fused merges by XLA's own operations, as is done elsewhere.
      workers: Processes that read and decode images; 0 for threads of the training process. Only
        for data that is read from files while it trains (chestxray14). By default one for every
        three CPU cores there, at most 16.
      coordinator: Address of process 0 as HOST:PORT, where several processes share every batch.
        Each is started with this, --num-processes and --process-id; process 0 alone writes the
        output folder. On a TPU pod, start the same command on every host without these three.
      num_processes: How many processes there are.
      process_id: Which of them this one is, from 0.
      resume: Continue the unfinished run in the output folder, on CPU to the same results bit for
        bit.
      overwrite: Empty the output folder first, if it holds a run; other files in it go too.
      compilation_cache_dir: Folder of JAX's persistent compilation cache; None disables it.
    """

    data: Annotated[DataConfig, arg(name="", constructor=DataOptions)] = field(
        default_factory=DataOptions
    )
    model: Annotated[ModelConfig, OmitArgPrefixes] = field(default_factory=ModelConfig)
    recipe: Annotated[RecipeConfig, OmitArgPrefixes] = field(default_factory=RecipeConfig)
    rule: Annotated[RuleConfig, OmitArgPrefixes] = field(default_factory=RuleConfig)
    preset: Annotated[PresetName | None, arg(metavar="{paper,released,released_intent}")] = None
    output: Path = Path("runs/train")
    seeds: Annotated[tuple[int, ...], arg(metavar="INT ...")] = (0,)
    arms: Annotated[tuple[Arm, ...], arg(metavar="ARM ...")] = ARMS
    devices: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: all of them)")
    ] = None
    grad_accum_steps: int = 1
    steps_per_execution: int = 1
    fused: bool = True
    workers: Annotated[
        int | None,
        arg(metavar="INT", help_behavior_hint="(default: by the number of CPU cores)"),
    ] = None
    coordinator: Annotated[str | None, arg(metavar="HOST:PORT")] = None
    num_processes: Annotated[int | None, arg(metavar="INT")] = None
    process_id: Annotated[int | None, arg(metavar="INT")] = None
    resume: bool = False
    overwrite: bool = False
    compilation_cache_dir: Annotated[Path | None, arg(metavar="PATH")] = Path(
        "~/.cache/inmerge_jax/xla"
    )


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The command line of `inmerge train`; None for this process's own.

    Raises:
      SystemExit: 0 after --help; 2, with a message, for an unknown option or value.
    """
    import tyro

    config = tyro.cli(
        TrainConfig,
        prog="inmerge train",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return apply_preset(config)


def apply_preset(config: TrainConfig) -> TrainConfig:
    """`config` with the defaults of its preset and data; applied again, it changes nothing.

    These are the preset's recipe and partner, the threshold, and the size of images; that of
    ChestX-ray14 stays None, which stands for the size of its build.

    Raises:
      UsageError: on an unknown preset.
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
    """The named recipe with the options that were given in its place; see `apply_preset` first.

    Raises:
      UsageError: on an unknown name, a number out of range, or a momentum for Adam.
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
    """The merging rule; see `apply_preset` first.

    Raises:
      UsageError: on a number out of range, or a threshold and a quantile.
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
    """Checks the options that are of no other group.

    Raises:
      UsageError: on no seed, a seed below 0 or named twice, no arm, or contradicting flags.
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
        # A Path has made one slash of the two, and would make a local folder of that name.
        _require(
            path is None or not path.parts[:1] or not path.parts[0].endswith(":"),
            name,
            path,
            "buckets can't be read or written; mount it, and give the folder where it is",
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
      UsageError: below 1, or above 1 on CPU.
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
    """What config.json holds: the options that decide the results, resolved, JSON-ready.

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
