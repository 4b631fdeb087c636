"""Data sets and batches: MedMNIST, ChestX-ray14 and the chest phantom, in one shape."""

from dataclasses import dataclass, field
from pathlib import Path

from inmerge_jax.data.batches import eval_batches, steps_per_epoch, train_batch, train_batches
from inmerge_jax.data.dataset import Dataset, Split
from inmerge_jax.data.medmnist import MEDMNIST_DIR, load_medmnist
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
    """The procedural chest phantom; used where the data set's name is "phantom"."""

    train: int = 2000
    """Training images."""
    val: int = 500
    """Validation images."""
    test: int = 1000
    """Test images."""
    findings: tuple[str, ...] = FINDINGS
    """What may be seen: any of nodule, mass, effusion, cardiomegaly, pneumothorax."""
    multi_label: bool = False
    """Each finding present or not on its own, instead of one finding or none per image."""
    difficulty: float = 1.0
    """From 0.25 to 4: the higher, the subtler the findings and the stronger the noise."""
    seed: int = 0
    """Selects the patients. The training seeds do not change it."""


@dataclass(frozen=True)
class DataConfig:
    """Which images to train on, and where they come from.

    Attributes:
      name: "phantom" (made on the spot: no file, no network), chestxray14 (built from NIH's files
        by `inmerge data build`) or a 2-D MedMNIST subset: pathmnist,
        chestmnist, dermamnist, octmnist, pneumoniamnist, retinamnist, breastmnist, bloodmnist,
        tissuemnist, organamnist, organcmnist, organsmnist.
      size: Height and width in pixels: 28, 64, 128 or 224 for MedMNIST, 16 or more for the phantom,
        both 28 by default; for chestxray14 what it was built with, or less, to which images are
        reduced as they are read.
      data_dir: Folder of MedMNIST files under their own names, such as breastmnist_64.npz, or the
        output folder of a ChestX-ray14 build.
      file: Read the MedMNIST subset from this npz instead of the folder.
      download: Whether a MedMNIST file that the folder lacks is downloaded.
      allow_unverified: Load a file whose MD5 is not the one in MedMNIST's table; every result then
        says so.
      phantom: Counts, findings and seed of the phantom.
    """

    name: str = "phantom"
    size: int | None = None
    data_dir: Path = MEDMNIST_DIR
    file: Path | None = None
    download: bool = True
    allow_unverified: bool = False
    phantom: PhantomConfig = field(default_factory=PhantomConfig)


DEFAULT_SIZE = 28
"""Pixels of images where neither the options nor the files say otherwise."""


def load_dataset(config: DataConfig) -> Dataset:
    """Loads or makes the data set that `config` describes.

    Raises:
      UsageError: for an unknown name or size, or a file that is missing or not what it should be.
    """
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
