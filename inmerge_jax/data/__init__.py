"""Data sets and batches, in one format: MedMNIST, ChestX-ray14, TFDS, image files, a phantom."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from inmerge_jax.buckets import in_bucket, local_copy
from inmerge_jax.data.batches import eval_batches, steps_per_epoch, train_batch, train_batches
from inmerge_jax.data.dataset import Dataset, Split
from inmerge_jax.data.medmnist import MEDMNIST_DIR, load_medmnist, medmnist_names
from inmerge_jax.data.phantom import FINDINGS, make_phantom
from inmerge_jax.errors import UsageError

__all__ = [
    "DataConfig",
    "Dataset",
    "PhantomConfig",
    "Split",
    "eval_batches",
    "load_dataset",
    "load_medmnist",
    "make_phantom",
    "steps_per_epoch",
    "train_batch",
    "train_batches",
]


@dataclass(frozen=True)
class PhantomConfig:
    """The generated data sets "phantom" and "phantom_masks"."""

    train: int = 2000
    """Training images."""
    val: int = 500
    """Validation images."""
    test: int = 1000
    """Test images."""
    findings: tuple[str, ...] = FINDINGS
    """Any of nodule, mass, effusion, cardiomegaly, pneumothorax."""
    multi_label: bool = False
    """Several findings per image, instead of at most one."""
    difficulty: float = 1.0
    """0.25 to 4: contrast of the findings, and noise."""
    seed: int = 0
    """Seed of the images."""


@dataclass(frozen=True)
class DataConfig:
    """A data set and where its files are.

    Attributes:
      name: "phantom" (generated), "phantom_masks" (the same images with masks of lungs and heart),
        "chestxray14" (built by `inmerge data build`), a MedMNIST subset
        (see `medmnist.medmnist_names`), "folder:PATH" (a folder or CSV of image files, see
        `folder.load_folder`), or "tfds:NAME" (see `tfds.load_tfds`).
      size: Image size in pixels; folder:, tfds:, chestxray14: that of the files by default.
      data_dir: Folder of MedMNIST files, of a ChestX-ray14 build, or of TFDS's data sets.
      file: MedMNIST npz file to read instead.
      download: Missing MedMNIST files are downloaded, unless this is off.
      allow_unverified: Load a file whose MD5 is not MedMNIST's; results say so.
      resize: Interpolation to that size: nearest, bilinear, bicubic; MedMNIST: of 28 px.
      channels: Input channels for grey images; 3 repeats them.
      phantom: options of the phantom.
    """

    name: str = "phantom"
    size: int | None = None
    data_dir: Path = MEDMNIST_DIR
    file: Path | None = None
    download: bool = True
    allow_unverified: bool = False
    resize: Literal["nearest", "bilinear", "bicubic"] | None = None
    channels: Literal[1, 3] | None = None
    phantom: PhantomConfig = field(default_factory=PhantomConfig)


TFDS_DIR = Path("~/tensorflow_datasets")
DEFAULT_SIZE = 28
"""Image size in pixels, unless the options or the files determine it."""
_GENERATED = ("phantom", "phantom_masks")


def default_size(name: str) -> int:
    """Image size in pixels of a data set whose files do not determine it, if none is given.

    That of "phantom_masks" can be halved as often as a U-Net does.
    """
    return 64 if name == "phantom_masks" else DEFAULT_SIZE


def has_own_size(name: str) -> bool:
    """Whether the files of a data set determine its image size if none is given."""
    return name == "chestxray14" or ":" in name


def load_dataset(config: DataConfig) -> Dataset:
    """Loads or generates the data set that `config` describes.

    Raises:
      UsageError: the name or size is unknown, an option is for other data sets, or a file is
        missing or damaged.
    """
    dataset = _load(config)
    if config.channels == 1 and dataset.channels == 3:
        raise UsageError(
            f"`channels` 1: the images of {dataset.name} have colours; leave it out, or give 3"
        )
    return dataset


def _load(config: DataConfig) -> Dataset:
    _check_options(config)
    kind, _, place = config.name.partition(":")
    if in_bucket(config.data_dir):
        needed = f"{config.name}*" if config.name in medmnist_names() else "*"
        config = replace(config, data_dir=local_copy(config.data_dir, needed))
    if config.file is not None:
        config = replace(config, file=local_copy(config.file))
    data_dir = None if config.data_dir == MEDMNIST_DIR else config.data_dir
    if kind == "folder":
        from inmerge_jax.data.folder import load_folder

        return load_folder(
            local_copy(place).expanduser(),
            size=config.size,
            channels=config.channels,
            resize=config.resize,
        )
    if kind == "tfds":
        from inmerge_jax.data.tfds import load_tfds

        return load_tfds(
            place,
            data_dir or TFDS_DIR,
            size=config.size,
            channels=config.channels,
            resize=config.resize,
        )
    if config.name == "chestxray14":
        from inmerge_jax.data.chestxray14.records import load_chestxray14

        if data_dir is None:
            raise UsageError(
                "the data set chestxray14 needs `data_dir`, the folder that the command inmerge "
                "data build has written"
            )
        return load_chestxray14(data_dir, size=config.size)
    size = default_size(config.name) if config.size is None else config.size
    if config.name in _GENERATED:
        chosen = config.phantom
        return make_phantom(
            size=size,
            train=chosen.train,
            val=chosen.val,
            test=chosen.test,
            findings=chosen.findings,
            multi_label=chosen.multi_label,
            masks=config.name == "phantom_masks",
            difficulty=chosen.difficulty,
            seed=chosen.seed,
        )
    return load_medmnist(
        config.name,
        size=size,
        data_dir=config.data_dir,
        file=config.file,
        download=config.download,
        allow_unverified=config.allow_unverified,
        resize=config.resize,
    )


def _check_options(config: DataConfig) -> None:
    """Refuses options that the chosen data set does not read."""
    kind, colon, place = config.name.partition(":")
    if kind in ("folder", "tfds"):
        if not place:
            raise UsageError(
                f"`data` {config.name}: give folder:PATH, a folder or CSV, or tfds:NAME"
            )
    elif colon:
        raise UsageError(f"`data` {config.name}: only folder:PATH and tfds:NAME have a colon")
    if config.size is not None and config.size < 1:
        raise UsageError(f"`size` {config.size}: choose 1 or more")
    generated = config.name in _GENERATED
    unread = {
        "data_dir": (generated or kind == "folder") and config.data_dir != MEDMNIST_DIR,
        "file": (generated or has_own_size(config.name)) and config.file is not None,
        "resize": (generated or kind == "chestxray14") and config.resize is not None,
    }
    for name, given in unread.items():
        if given:
            raise UsageError(
                f"`{name}` {getattr(config, name)} is not read for {config.name}: leave it out, "
                "or name the data set that it is for with `data`"
            )
