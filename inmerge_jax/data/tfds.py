"""Image classification data sets of TensorFlow Datasets, read without TensorFlow."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inmerge_jax.data.dataset import Dataset, Split, plain
from inmerge_jax.data.images import Decoder, Resize, RowImages, kept_in_memory
from inmerge_jax.data.records import Records
from inmerge_jax.data.splitting import SPLITS, add_splits
from inmerge_jax.errors import UsageError

_UNLABELLED = -1
_SPLIT_NAMES = {"train": "train", "validation": "val", "val": "val", "valid": "val", "test": "test"}


@dataclass(frozen=True)
class StoredImages(RowImages):
    """Images of some records, decoded on indexing.

    Attributes:
      records: the records of a split.
      rows: int64 (n,), the numbers of the records.
      decoder: decodes an image.
    """

    records: Records
    rows: np.ndarray
    decoder: Decoder

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return (len(self.rows), *self.decoder.shape)

    def read(self, row: int) -> np.ndarray:
        """Image number `row`.

        Raises:
          UsageError: the record cannot be read or decoded.
        """
        records, number = self.records, int(self.rows[row])
        try:
            return self.decoder(records.open()[number][records.image])
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"{records.folder}: record {number} of {records.split} is damaged: {error}; "
                "prepare the data set again"
            ) from error


def load_tfds(
    name: str,
    data_dir: Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    resize: Resize | None = None,
) -> Dataset:
    """Opens a data set that TensorFlow Datasets prepared as ArrayRecord.

    The image and the label are those of the builder's `supervised_keys`, or the only features of
    their kind. Splits that are missing are taken from the training images, see
    `splitting.add_splits`, and so are those without any label; splits other than train, validation
    and test are not read.

    Args:
      name: name of the data set, with its configuration and version as in TFDS: "cifar10",
        "eurosat/rgb:2.0.0".
      data_dir: folder of TFDS's data sets.
      size: height and width in pixels; None for that of the features.
      channels: 1 or 3; None for that of the features.
      resize: interpolation; None for bilinear.

    Raises:
      UsageError: the data set is not prepared, is not of images and classes, or is damaged.
    """
    builder = _find(name, data_dir)
    image, label = _features(builder, name)
    feature, classes = builder.info.features[image], builder.info.features[label].names
    decoder = _decoder(feature.shape, name, size, channels, resize)
    sources, labels, splits, keys, unlabelled = {}, [], [], [], []
    for theirs, ours in _SPLIT_NAMES.items():
        if theirs in builder.info.splits:
            records = Records(Path(builder.data_dir), theirs, image)
            found = _read_labels(records, label, len(classes), name)
            if ours != "train" and found and set(found) == {_UNLABELLED}:
                unlabelled.append(theirs)
                continue
            sources[ours] = records
            labels += found
            splits += [ours] * len(found)
            keys += [f"{theirs}/{row}" for row in range(len(found))]
    if "train" not in sources:
        raise UsageError(f"tfds:{name} has no split train, but {', '.join(builder.info.splits)}")
    all_labels, stored = np.array(labels, np.int32), np.array(splits)
    names = add_splits(stored, all_labels, keys, f"tfds:{name}")
    # A split that is not stored is part of the split train, which comes first.
    rows = {split: np.flatnonzero(names == split) for split in SPLITS}
    starts = {split: int(np.argmax(stored == split)) for split in sources}
    images = kept_in_memory(
        [
            StoredImages(
                sources.get(split, sources["train"]), rows[split] - starts.get(split, 0), decoder
            )
            for split in SPLITS
        ]
    )
    parts = {
        split: Split(array, all_labels[rows[split]])
        for split, array in zip(SPLITS, images, strict=True)
    }
    carved = [split for split in SPLITS if split not in sources]
    return Dataset(
        name=f"tfds-{plain(builder.info.full_name)}",
        size=decoder.size,
        task="multi-class" if len(classes) > 2 else "binary-class",
        classes=tuple(classes),
        **parts,
        source=f"TensorFlow Datasets, {builder.info.full_name}"
        + (f", {' and '.join(carved)} from its split train" if carved else "")
        + "".join(f", without labels in its split {split}" for split in unlabelled),
        fingerprint=_fingerprint(Path(builder.data_dir), all_labels, images),
    )


def prepare_tfds(name: str, data_dir: Path) -> Path:
    """Downloads a data set and prepares it as ArrayRecord, and returns its folder.

    Raises:
      UsageError: the name is unknown, the download fails, or the builder needs a package that is
        not installed.
    """
    import tensorflow_datasets as tfds

    data_dir = _folder(data_dir)
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    except tfds.core.registered.DatasetNotFoundError as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(f"TensorFlow Datasets has no data set {name}: {first}") from error
    except ImportError as error:
        raise UsageError(
            f"the builder of tfds:{name} needs a package that is not installed ({error}); install "
            "it (pip install tensorflow), or prepare the data set elsewhere with "
            'tfds.builder(NAME, file_format="array_record").download_and_prepare() and copy it to '
            f"{data_dir}"
        ) from error
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise UsageError(
            f"tfds:{name} could not be downloaded and prepared in {data_dir} "
            f"({type(error).__name__}: {error}); check the network, or copy a prepared data set "
            "there"
        ) from error
    return Path(builder.data_dir)


def _folder(data_dir: Path) -> Path:
    return Path(data_dir).expanduser()


def _find(name: str, data_dir: Path) -> Any:
    """The builder of a prepared data set, from its files alone."""
    try:
        from tensorflow_datasets.core import read_only_builder, registered
    except ImportError as error:
        raise UsageError(
            f"tfds:{name} needs a package that cannot be imported ({error}); install it with "
            'pip install "inmerge-jax[train]"'
        ) from error
    folder = _folder(data_dir)
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=folder)
    except (registered.DatasetNotFoundError, ValueError) as error:
        raise UsageError(
            f"there is no data set {name} in `data_dir` {folder}; prepare it there with the "
            f"command inmerge data prepare tfds:{name}, or name its configuration, NAME/CONFIG"
        ) from error
    if "array_record" not in {form.value for form in builder.info.available_file_formats()}:
        raise UsageError(
            f"{builder.data_dir} is not prepared as ArrayRecord, but as "
            f"{builder.info.file_format.value}; prepare it in another folder with the command "
            f"inmerge data prepare tfds:{name}"
        )
    return builder


def _features(builder: Any, name: str) -> tuple[str, str]:
    """The names of the image and the label."""
    import tensorflow_datasets as tfds

    keys = []
    given = builder.info.supervised_keys or ()
    for position, kind in enumerate((tfds.features.Image, tfds.features.ClassLabel)):
        features = builder.info.features
        found = [key for key in features if type(features[key]) is kind]
        if len(given) == 2 and given[position] in found:
            found = [given[position]]
        if len(found) != 1:
            raise UsageError(
                f"tfds:{name} is no data set of one image and one label: it has "
                f"{', '.join(found) or 'no feature'} of type {kind.__name__}"
            )
        keys.append(found[0])
    if np.dtype(builder.info.features[keys[0]].np_dtype) != np.uint8:
        raise UsageError(f"tfds:{name}: its images are not uint8")
    return keys[0], keys[1]


def _decoder(
    shape: tuple[int | None, int | None, int | None],
    name: str,
    size: int | None,
    channels: int | None,
    resize: Resize | None,
) -> Decoder:
    height, width, depth = shape
    if size is None:
        if height is None or height != width:
            raise UsageError(
                f"tfds:{name} has images of different sizes, or no squares: give the `size` that "
                "they are resized to"
            )
        size = height
    return Decoder(size, 1 if depth == 1 else channels or 3, resize or "bilinear")


def _read_labels(source: Records, label: str, classes: int, name: str) -> list[int]:
    """The labels of a split; reading each record verifies its checksum."""
    labels = []
    records = source.open()
    for row in range(len(records)):
        where = f"tfds:{name}: record {row} of {source.split}"
        try:
            labels.append(int(records[row][label]))
        except RuntimeError as error:
            raise UsageError(f"{where} is damaged: {error}; prepare the data set again") from error
    if set(labels) == {_UNLABELLED} and source.split != "train":
        return labels
    for row, one in enumerate(labels):
        if not 0 <= one < classes:
            raise UsageError(
                f"tfds:{name}: record {row} of {source.split} has no label ({one}); use folder: "
                "with a CSV of the labelled images"
            )
    return labels


def _fingerprint(folder: Path, labels: np.ndarray, images: Any) -> str:
    digest = hashlib.sha256(labels.tobytes())
    for name in ("dataset_info.json", "features.json"):
        digest.update((folder / name).read_bytes())
    for part in images:
        if isinstance(part, np.ndarray):
            digest.update(part)
    return digest.hexdigest()
