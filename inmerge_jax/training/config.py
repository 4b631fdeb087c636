"""The configuration of a training run: its options, whose docstrings are the help texts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from inmerge_jax.data import DataConfig, PhantomConfig
from inmerge_jax.data.medmnist import MEDMNIST_DIR
from inmerge_jax.merging import MergeRule
from inmerge_jax.models.units import UnitKind
from inmerge_jax.training.augment import AugmentConfig
from inmerge_jax.training.environment import COMPILATION_CACHE
from inmerge_jax.training.presets import PresetName

Arm = Literal["backbone", "finetune", "inmerge"]
ARMS: tuple[Arm, ...] = ("backbone", "finetune", "inmerge")

DEFAULT_THRESHOLD = MergeRule.threshold
DEFAULT_SKIP = 10
"""L_s of the released code."""


def _optional(metavar: str) -> Any:
    return arg(metavar=metavar, help_behavior_hint="")


_FLAG = arg(help_behavior_hint="")


def _negated(help: str) -> Any:
    """An option --no-NAME, whose help says what it turns off."""
    return arg(help=help, help_behavior_hint="")


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
      name: Images: phantom (generated), phantom_masks (for unet), a 2-D MedMNIST
        subset, folder:PATH (a folder per class, or a CSV), tfds:NAME, chestxray14. Volumes:
        phantom3d, organmnist3d, ... Signals: signals:FILE. Tables: table:FILE, breast_cancer.
    """

    name: Annotated[str, arg(name="data", metavar="NAME")] = "phantom"
    size: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: 28, or files')")
    ] = None
    data_dir: Annotated[Path, arg(metavar="FOLDER")] = MEDMNIST_DIR
    file: Annotated[Path | None, _optional("FILE")] = None
    download: Annotated[bool, _negated("Do not download missing MedMNIST files.")] = True
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
      name: resnet18, resnet34, resnet50 (images, volumes, signals), densenet121, vgg11, vgg13,
        vgg16, vgg19 (with batch normalisation: vgg11_bn), vit_tiny, vit_s_16, vit_b_16,
        mixer_tiny, mamba_tiny, mamba_130m (images, signals), mlp (tables), unet (segmentation).
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
        arg(metavar="FLOAT", help_behavior_hint="(default: at the backbone's best epoch)"),
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

    From the paper: threshold, partner nearest, probability, alpha, skip; preset selects a variant.
    Extensions: other units than kernels, layers, quantile, the schedules (..._end), merge-every,
    merge-from-epoch.

    Attributes:
      units: What merges: kernels of convolutions, attention heads, neurons of hidden layers,
        channels of state-space layers.
      layers: Merge only layers whose name matches it, such as "decoder|up".
      threshold: Cosine similarity above which a selected kernel merges.
      quantile: Instead of a threshold: 0.9 merges the most similar tenth.
      partner: A random other kernel of the layer, or the nearest (most similar) one.
      probability: Probability that a kernel is selected at a step.
      alpha: Fraction of the kernel that is kept.
      skip: Number of layers with such units, from the input, that are not merged.
      probability_end: The probability moves to this over the stage.
      threshold_end: The threshold moves to this over the stage.
      quantile_end: The quantile moves to this over the stage.
      rule_schedule: Shape of these schedules.
      merge_every: Merge every INT updates, or once per epoch.
      merge_from_epoch: Instead of a second stage, inmerge trains like the backbone from its first
        weights, and merges from this epoch on.
    """

    units: Annotated[
        tuple[UnitKind, ...] | None,
        arg(
            metavar="{kernels,heads,neurons,channels} ...",
            help_behavior_hint="(default: the network's)",
        ),
    ] = None
    layers: Annotated[str | None, _optional("REGEX")] = None
    threshold: Annotated[
        float | None,
        arg(metavar="FLOAT", help_behavior_hint=f"(default: {DEFAULT_THRESHOLD})"),
    ] = None
    quantile: Annotated[float | None, _optional("FLOAT")] = None
    partner: Annotated[
        Literal["random", "nearest"] | None,
        arg(metavar="{random,nearest}", help_behavior_hint="(default: random)"),
    ] = None
    probability: float = MergeRule.probability
    alpha: float = MergeRule.alpha
    skip: Annotated[
        int | None,
        arg(
            metavar="INT",
            help_behavior_hint="(default: 10; other units than kernels: half the layers)",
        ),
    ] = None
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
        tuple[Arm, ...] | None, arg(metavar="ARM ...", help_behavior_hint="(default: all)")
    ] = None
    resume: Annotated[bool, _FLAG] = False
    overwrite: Annotated[bool, _FLAG] = False
    checksums: Annotated[
        bool, _negated("Write checkpoints without checksums; damage may then go unnoticed.")
    ] = True
    compilation_cache_dir: Annotated[Path | None, arg(metavar="FOLDER")] = COMPILATION_CACHE


@dataclass(frozen=True)
class DeviceConfig:
    """How the work is divided over devices and processes.

    Attributes:
      devices: Number of devices that share each batch.
      workers: Processes that read image files; 0 for threads.
      grad_accum_steps: Microbatches per device and update, to save memory.
      steps_per_execution: Updates per dispatch, for small steps on GPU and TPU.
      pallas: On TPU v4 and newer one Pallas kernel merges a layer, unless this is off.
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
    pallas: Annotated[
        bool, _negated("Merge without the Pallas kernel, which is for TPU v4 and newer.")
    ] = True
    coordinator: Annotated[str | None, _optional("HOST:PORT")] = None
    num_processes: Annotated[int | None, _optional("INT")] = None
    process_id: Annotated[int | None, _optional("INT")] = None


@dataclass(frozen=True)
class LoggingConfig:
    """Logging. These options may change when a run is resumed.

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
