"""What is known of a data set without loading it is true."""

import pytest

from experiments.study import datasets
from inmerge_jax.data import load_dataset
from tests.long import long_unless
from tests.paths import SHARED


@pytest.mark.parametrize("name", long_unless(lambda name: name != "chestxray14", datasets.SOURCES))
def test_counts_and_size(name, tmp_path):
    if name != "phantom" and not (SHARED / "data" / "medmnist").exists():
        pytest.skip("needs the real images")
    source = datasets.SOURCES[name]
    dataset = load_dataset(datasets.config_of(name, SHARED / "data", tmp_path))
    splits = dataset.train, dataset.val, dataset.test
    assert tuple(map(len, splits)) == source.images
    assert dataset.size == source.config.size
