"""A small data set of drawn shapes, prepared with TFDS without TensorFlow."""

import io
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def picture(index: int, channels: int, size: tuple[int, int]) -> np.ndarray:
    shape = size if channels == 1 else (*size, channels)
    return np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)


def encoded(array: np.ndarray, kind: str) -> io.BytesIO:
    """A file object, because TFDS needs TensorFlow to encode an array."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    buffer.seek(0)
    return buffer


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Configurations: grey (square), colour (images of different sizes), unlabelled (its test)."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=name) for name in ("grey", "colour", "unlabelled")
    ]

    def _info(self):
        shape = (None, None, 3) if self.builder_config.name == "colour" else (20, 20, 1)
        features = tfds.features.FeaturesDict(
            {
                "picture": tfds.features.Image(shape=shape, encoding_format="png"),
                "kind": tfds.features.ClassLabel(names=["disc", "ring", "square"]),
                "number": tfds.features.Scalar(dtype=np.int64),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self, features=features, supervised_keys=("picture", "kind")
        )

    def _split_generators(self, dl_manager):
        splits = {"train": range(40), "test": range(40, 50)}
        if self.builder_config.name == "colour":
            splits["validation"] = range(50, 55)
        return {name: self._generate_examples(numbers) for name, numbers in splits.items()}

    def _generate_examples(self, numbers):
        for number in numbers:
            grey = self.builder_config.name != "colour"
            kind = -1 if self.builder_config.name == "unlabelled" and number >= 40 else number % 3
            size = (20, 20) if grey else (20 + number % 3, 24)
            array = picture(number, 1 if grey else 3, size)
            yield (
                number,
                {"picture": encoded(array, "PNG"), "kind": kind, "number": number},
            )
