"""Data sets and batches, in one format.

Images and volumes: MedMNIST, ChestX-ray14, TFDS, image files, phantoms. Signals and tables: files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from inmerge_jax.buckets import as_path, in_bucket, local_copy
from inmerge_jax.data.anatomy import FINDINGS
from inmerge_jax.data.batches import eval_batches, steps_per_epoch, train_batch, train_batches
from inmerge_jax.data.dataset import Dataset, Split
from inmerge_jax.data.medmnist import MEDMNIST_DIR, load_medmnist, medmnist_names
from inmerge_jax.data.phantom import make_phantom
from inmerge_jax.data.phantom_volume import make_phantom_volume
from inmerge_jax.data.signals import load_signals
from inmerge_jax.data.tables import load_breast_cancer, load_table
from inmerge_jax.errors import UsageError

__all__ = [
    "DataConfig",
    "Dataset",
    "PhantomConfig",
    "Split",
    "eval_batches",
    "load_breast_cancer",
    "load_dataset",
    "load_medmnist",
    "load_signals",
    "load_table",
    "make_phantom",
    "make_phantom_volume",
    "reads",
    "steps_per_epoch",
    "train_batch",
    "train_batches",
]


@dataclass(frozen=True)
class PhantomConfig:
    """The generated data sets "phantom" and "phantom_masks" of images, "phantom3d" of volumes."""

    train: int = 2000
    """Training examples."""
    val: int = 500
    """Validation examples."""
    test: int = 1000
    """Test examples."""
    findings: tuple[str, ...] = FINDINGS
    """Any of nodule, mass, effusion, cardiomegaly, pneumothorax."""
    multi_label: bool = False
    """Several findings per example, instead of at most one."""
    difficulty: float = 1.0
    """0.25 to 4: contrast of the findings, and noise."""
    seed: int = 0
    """Seed of the examples."""


@dataclass(frozen=True)
class DataConfig:
    """A data set and where its files are.

    Attributes:
      name: "phantom" and "phantom3d" (generated images and volumes), "phantom_masks" (these images
        with masks of lungs and heart), "chestxray14" (built by `inmerge data build`), a MedMNIST
        subset (see `medmnist.medmnist_names`), "folder:PATH" (a folder or CSV of image files, see
        `folder.load_folder`), "tfds:NAME" (see `tfds.load_tfds`), "signals:FILE" (see
        `signals.load_signals`), "table:FILE" (see `tables.load_table`), or "breast_cancer"
        (scikit-learn's table).
      size: Image or volume size; folder:, tfds:, chestxray14: that of the files by default.
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


def default_size(name: str) -> int:
    """Image size in pixels of a data set whose files do not determine it, if none is given.

    That of "phantom_masks" can be halved as often as a U-Net does.
    """
    return 64 if name == "phantom_masks" else DEFAULT_SIZE


_FILES = ("folder", "tfds", "signals", "table")
"""Kinds of data sets whose name is followed by a colon and a place."""
_READ: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "phantom": ("size", "channels"),
        "phantom_masks": ("size", "channels"),
        "phantom3d": ("size", "channels"),
        "folder": ("size", "resize", "channels"),
        "tfds": ("size", "data_dir", "resize", "channels"),
        "chestxray14": ("size", "data_dir", "channels"),
        "signals": (),
        "table": (),
        "breast_cancer": (),
    }
)
"""The options that each kind of data set reads, but for MedMNIST's, which read all."""


def reads(name: str, option: str) -> bool:
    """Whether the data set of this name reads an option of `DataConfig`, such as "size"."""
    return option in _READ.get(name.partition(":")[0], (option,))


def has_own_size(name: str) -> bool:
    """Whether the files of a data set determine its size if none is given."""
    return name == "chestxray14" or ":" in name or not reads(name, "size")


def load_dataset(config: DataConfig, bits: int | None = None) -> Dataset:
    """Loads or generates the data set that `config` describes.

    Args:
      config: the options.
      bits: bits of image files, see `Dataset.bits`: those of the training images, where a trained
        network is to read others. None to find them.

    Raises:
      UsageError: the name or size is unknown, an option is for other data sets, or a file is
        missing or damaged.
    """
    dataset = _load(config, bits)
    if config.channels == 1 and dataset.channels == 3:
        raise UsageError(
            f"`channels` 1: the images of {dataset.name} have colours; leave it out, or give 3"
        )
    return dataset


def _load(config: DataConfig, bits: int | None) -> Dataset:
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

        copy = local_copy(place).expanduser()
        if in_bucket(place) and copy.is_file():  # A CSV; its images are in the same folder.
            copy = local_copy(as_path(place).parent) / copy.name
        return load_folder(
            copy,
            size=config.size,
            channels=config.channels,
            resize=config.resize,
            bits=bits,
        )
    if kind == "signals":
        return load_signals(local_copy(place).expanduser())
    if kind == "table":
        return load_table(local_copy(place).expanduser())
    if config.name == "breast_cancer":
        return load_breast_cancer()
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
    if config.name in ("phantom", "phantom_masks", "phantom3d"):
        chosen = config.phantom
        make = {
            "phantom": make_phantom,
            "phantom_masks": partial(make_phantom, masks=True),
            "phantom3d": make_phantom_volume,
        }[config.name]
        return make(
            size=size,
            train=chosen.train,
            val=chosen.val,
            test=chosen.test,
            findings=chosen.findings,
            multi_label=chosen.multi_label,
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
    forms = ", ".join(f"{one}:{'NAME' if one == 'tfds' else 'PATH'}" for one in _FILES)
    if kind in _FILES and not place:
        raise UsageError(f"`data` {config.name}: give {forms}")
    if colon and kind not in _FILES:
        raise UsageError(f"`data` {config.name}: only {forms} have a colon")
    if config.size is not None and config.size < 1:
        raise UsageError(f"`size` {config.size}: choose 1 or more")
    for option in fields(DataConfig):
        value = getattr(config, option.name)
        given = option.name not in ("name", "phantom") and value != option.default
        if given and not reads(config.name, option.name):
            shown = "" if isinstance(value, bool) else f" {value}"
            raise UsageError(
                f"`{option.name}`{shown} is not read for {config.name}: leave it out, or name the "
                "data set that it is for with `data`"
            )
