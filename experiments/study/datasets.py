"""The data sets of the study, by the names that its trials use."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inmerge_jax.data import DataConfig, Dataset, PhantomConfig, Split
from inmerge_jax.data.chestxray14.manifest import MANIFEST
from inmerge_jax.errors import UsageError


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
      title: for people, with a caveat where one is needed.
      config: how to load it; paths are relative to the folder of the data.
      images: number of training, validation and test images.
      batch: images per update.
    """

    title: str
    config: DataConfig
    images: tuple[int, int, int]
    batch: int = 128


_MEDMNIST = Path("medmnist")
CHESTXRAY14_LABELS = Path("nih/Data_Entry_2017_v2020.csv.gz")
"""Label file of ChestX-ray14, below the folder of the data."""

SOURCES = {
    "breastmnist": Source(
        "BreastMNIST",
        DataConfig(name="breastmnist", size=28, data_dir=_MEDMNIST, download=False),
        (546, 78, 156),
    ),
    "retinamnist": Source(
        "RetinaMNIST",
        DataConfig(name="retinamnist", size=28, data_dir=_MEDMNIST, download=False),
        (1080, 120, 400),
    ),
    "pneumoniamnist": Source(
        "PneumoniaMNIST (rebuilt)",
        DataConfig(
            name="pneumoniamnist",
            size=28,
            file=_MEDMNIST / "pneumoniamnist_rebuilt.npz",
            allow_unverified=True,
        ),
        (4708, 524, 624),
    ),
    # BloodMNIST's source images in another split: its published numbers are not comparable.
    "bloodmnist_like": Source(
        "PBC blood cells (not BloodMNIST's split)",
        DataConfig(
            name="bloodmnist",
            size=28,
            file=_MEDMNIST / "bloodmnist_like.npz",
            allow_unverified=True,
        ),
        (11959, 1712, 3421),
    ),
    "chestxray14": Source(
        "ChestX-ray14 (1,000 images)",
        DataConfig(name="chestxray14", size=64, data_dir=Path("chestxray14-224")),
        (704, 77, 219),
    ),
    "phantom": Source(
        "chest phantom",
        DataConfig(name="phantom", size=16, phantom=PhantomConfig(train=96, val=64, test=96)),
        (96, 64, 96),
    ),
}


def _for_pretrained(name: str, **changes: Any) -> Source:
    """A data set as docs/protocol.md has it for networks that are pretrained on RGB images."""
    source = SOURCES[name]
    config = dataclasses.replace(source.config, **changes)
    title = f"{source.title}, 64 px" if "resize" in changes else source.title
    return Source(title, config, source.images, batch=64)


_ENLARGED = {"size": 64, "resize": "bilinear"}
SOURCES |= {
    "breastmnist_64": _for_pretrained("breastmnist", channels=3, **_ENLARGED),
    "retinamnist_64": _for_pretrained("retinamnist", **_ENLARGED),
    "chestxray14_rgb": _for_pretrained("chestxray14", channels=3),
    "pneumoniamnist_rgb": _for_pretrained("pneumoniamnist", channels=3),
    "bloodmnist_like_rgb": _for_pretrained("bloodmnist_like"),
}


# Batches of which 250 images give eight.
SOURCES["bloodmnist_like_few"] = dataclasses.replace(SOURCES["bloodmnist_like"], batch=32)


TEST_IMAGES = 1000
"""Most test images of a data set with few training images: scores of all would not be small."""


def damaged(dataset: Dataset, images: int | None, wrong_labels: float, seed: int) -> Dataset:
    """A multi-class data set with few images and wrong training labels, both drawn with the seed.

    Fewer images are a part of more of the same seed, and fewer wrong labels a part of more. The
    validation labels stay. The test images are the first `TEST_IMAGES`, for every seed.

    Args:
      dataset: all images.
      images: number of training images, and the most validation images; None for all.
      wrong_labels: fraction of the training labels that are replaced, each by one of the other
        classes.
      seed: of the draws.
    """
    rng = np.random.default_rng([seed, len(dataset.train)])
    train, val = (_some(split, images, rng) for split in (dataset.train, dataset.val))
    shifts = rng.integers(1, dataset.num_classes, len(dataset.train.labels))[: len(train)]
    order = rng.permutation(len(train))[: round(wrong_labels * len(train))]
    labels = train.labels.copy()
    labels[order] = (labels[order] + shifts[order]) % dataset.num_classes
    test = Split(dataset.test.images[:TEST_IMAGES], dataset.test.labels[:TEST_IMAGES])
    train = dataclasses.replace(train, labels=labels)
    return dataclasses.replace(dataset, train=train, val=val, test=test)


def _some(split: Split, images: int | None, rng: np.random.Generator) -> Split:
    """The first images of a random order."""
    order = rng.permutation(len(split))[:images]
    return Split(split.images[order], split.labels[order])


def config_of(name: str, folder: Path, built: Path) -> DataConfig:
    """The options that load a data set; ChestX-ray14 is built first if it is not built yet.

    Args:
      name: key of `SOURCES`.
      folder: with medmnist/ and nih/.
      built: folder in which ChestX-ray14 is built.

    Raises:
      UsageError: an unknown name.
    """
    if name not in SOURCES:
        raise UsageError(f"data set {name}: unknown; choose one of {', '.join(SOURCES)}")
    config = SOURCES[name].config
    if config.name == "chestxray14":
        config = dataclasses.replace(config, data_dir=built / config.data_dir)
        if not (config.data_dir / MANIFEST).exists():
            _build_chestxray14(folder / "nih", config)
    elif config.file is not None:
        config = dataclasses.replace(config, file=folder / config.file)
    elif name != "phantom":
        config = dataclasses.replace(config, data_dir=folder / config.data_dir)
    return config


def _build_chestxray14(nih: Path, config: DataConfig) -> None:
    from inmerge_jax.cli.data import main as chestxray14

    options = {
        "--images": nih / "images_224",
        "--labels": nih / CHESTXRAY14_LABELS.name,
        "--lists": nih,
        "--split": "chexnet",
        "--size": 224,
        "--output": config.data_dir,
    }
    words = [str(word) for pair in options.items() for word in pair]
    if chestxray14(["build", *words, "--allow-missing"]):
        raise UsageError(f"ChestX-ray14 could not be built from {nih}; see the message above")
