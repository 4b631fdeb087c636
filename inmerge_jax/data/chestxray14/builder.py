"""The TensorFlow Datasets builder; it does not need TensorFlow."""

import functools
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from inmerge_jax.data.chestxray14.labels import FINDINGS, Labels
from inmerge_jax.data.chestxray14.reduce import Part
from inmerge_jax.data.chestxray14.splits import SPLITS

SIZES = (224, 256, 512)
SHARD_BYTES = 64 << 20
"""Size at which a shard is full; TFDS holds one shard in memory while it writes."""

_DESCRIPTION = """\
ChestX-ray14: 112,120 frontal chest radiographs of 30,805 patients, labelled with 14 findings that
were mined from the reports, reduced to one size.
"""
_HOMEPAGE = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
_CITATION = """\
@inproceedings{wang2017chestxray,
  title = {ChestX-ray8: Hospital-scale Chest X-ray Database and Benchmarks on Weakly-Supervised
           Classification and Localization of Common Thorax Diseases},
  author = {Wang, Xiaosong and Peng, Yifan and Lu, Le and Lu, Zhiyong and Bagheri, Mohammadhadi and
            Summers, Ronald M.},
  booktitle = {CVPR}, year = {2017}
}
"""


@dataclass(kw_only=True)
class ChestXray14Config(tfds.core.BuilderConfig):
    """The split, and the height and width of the images in pixels."""

    split: str = "chexnet"
    size: int = 224


def _config(split: str, size: int) -> ChestXray14Config:
    description = f"Split {split}, {size} x {size} pixels."
    return ChestXray14Config(
        name=f"{split}_{size}", description=description, split=split, size=size
    )


class _Writer(tfds.core.ExampleWriter):
    """Raises OSError where ArrayRecord reports a system error as a RuntimeError."""

    def write(self, path: Path, examples: Iterable[Any]) -> Any:
        try:
            return super().write(path, examples)
        except RuntimeError as error:
            if said := re.search(r"\(\) failed: ([^;]+)", str(error)):
                raise OSError(said[1]) from error
            raise


# Shard by shard, because a GeneratorBasedBuilder sorts each split first, above 1 GB in files that
# only TensorFlow can write.
class ChestXray14(tfds.core.ShardBasedBuilder):
    """Writes reduced images and their labels; `build.build` runs and verifies it.

    Examples, ordered by name, have "image", an 8-bit grey PNG; "labels", uint8 (14,) in the order
    of `FINDINGS`; "name", NIH's file name; and "patient", NIH's patient number.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [_config(split, size) for split in SPLITS for size in SIZES]

    def __init__(
        self,
        *,
        labels: Labels | None = None,
        parts: Mapping[str, Sequence[Part]] | None = None,
        advance: Callable[[int], None] = lambda images: None,
        **options: Any,
    ) -> None:
        """Creates the builder.

        Args:
          labels: labels of all images.
          parts: finished parts by split, see `reduce.reduce_parts`.
          advance: called with 1 after each example.
          **options: options of TFDS, such as data_dir and config.
        """
        self._labels, self._parts, self._advance = labels, parts, advance
        super().__init__(**options)

    @classmethod
    def config_for(cls, split: str, size: int) -> ChestXray14Config:
        """The configuration of a split and any size."""
        config = _config(split, size)
        return cls.builder_configs.get(config.name, config)

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.size
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            homepage=_HOMEPAGE,
            citation=_CITATION,
            disable_shuffling=True,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 1), encoding_format="png"),
                    "labels": tfds.features.Tensor(shape=(len(FINDINGS),), dtype=np.uint8),
                    "name": tfds.features.Text(),
                    "patient": tfds.features.Scalar(dtype=np.int64),
                }
            ),
        )

    def _example_writer(self) -> tfds.core.ExampleWriter:
        return _Writer(file_format=self.info.file_format)

    def _shard_iterators_per_split(
        self, dl_manager: Any
    ) -> dict[str, list[Callable[[], Iterator[tuple[int, Any]]]]]:
        del dl_manager  # Users provide NIH's files.
        if self._labels is None or self._parts is None:
            raise ValueError(
                "the builder needs labels and parts: use inmerge_jax.data.chestxray14.build"
            )
        return {
            split: [functools.partial(self._examples, shard) for shard in _shards(parts)]
            for split, parts in self._parts.items()
        }

    def _examples(self, parts: Sequence[Part]) -> Iterator[tuple[int, Any]]:
        assert self._labels is not None
        for part in parts:
            for row, png in zip(part.rows.tolist(), part.read(), strict=True):
                yield (
                    row,
                    {
                        # A file object, because TFDS needs TensorFlow to encode an array.
                        "image": io.BytesIO(png),
                        "labels": self._labels.findings[row],
                        "name": self._labels.names[row],
                        "patient": int(self._labels.patients[row]),
                    },
                )
                self._advance(1)


def _shards(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts in order, grouped into shards of about `SHARD_BYTES`."""
    shards: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if size >= SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.path.stat().st_size
    return shards
