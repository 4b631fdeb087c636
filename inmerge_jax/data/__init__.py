"""Data sets and batches: MedMNIST, ChestX-ray14 and the chest phantom, in one format."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from inmerge_jax.data.batches import eval_batches, steps_per_epoch, train_batch, train_batches
from inmerge_jax.data.dataset import Dataset, Split
from inmerge_jax.data.medmnist import MEDMNIST_DIR, load_medmnist
from inmerge_jax.data.phantom import FINDINGS, make_phantom
from inmerge_jax.errors import UsageError
from inmerge_jax.files import in_bucket, local_copy

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
    """The generated data set "phantom"."""

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
      name: "phantom" (generated), "chestxray14" (built by `inmerge data build`), or a 2-D MedMNIST
        subset, see `medmnist.medmnist_names`.
      size: Image size in pixels; MedMNIST: 28, 64, 128 or 224.
      data_dir: Folder of MedMNIST files, or of a ChestX-ray14 build.
      file: MedMNIST npz file to read instead.
      download: Missing MedMNIST files are downloaded, unless this is off.
      allow_unverified: Load a file whose MD5 is not MedMNIST's; results say so.
      phantom: options of the phantom.
    """

    name: str = "phantom"
    size: int | None = None
    data_dir: Path = MEDMNIST_DIR
    file: Path | None = None
    download: bool = True
    allow_unverified: bool = False
    phantom: PhantomConfig = field(default_factory=PhantomConfig)


DEFAULT_SIZE = 28
"""Image size in pixels, unless the options or the files determine it."""


def load_dataset(config: DataConfig) -> Dataset:
    """Loads or generates the data set that `config` describes.

    Raises:
      UsageError: the name or size is unknown, or a file is missing or damaged.
    """
    if in_bucket(config.data_dir):
        needed = "*" if config.name == "chestxray14" else f"{config.name}*"
        config = replace(config, data_dir=local_copy(config.data_dir, needed))
    if config.file is not None:
        config = replace(config, file=local_copy(config.file))
    if config.name == "chestxray14":
        from inmerge_jax.data.chestxray14.records import load_chestxray14

        if config.file is not None:
            raise UsageError(f"`file` {config.file} is not read for chestxray14: give `data_dir`")
        if config.data_dir == MEDMNIST_DIR:
            raise UsageError(
                "the data set chestxray14 needs `data_dir`, the folder that the command inmerge "
                "data build has written"
            )
        return load_chestxray14(config.data_dir, size=config.size)
    size = DEFAULT_SIZE if config.size is None else config.size
    if config.name == "phantom":
        if config.file is not None:
            raise UsageError(
                f"`file` {config.file} is not read for the phantom: name the MedMNIST subset that "
                "it holds"
            )
        chosen = config.phantom
        return make_phantom(
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
    )
