"""What is known of a data set without loading it is true."""

import dataclasses

import numpy as np
import pytest

from experiments.study import datasets
from inmerge_jax.data import Split, load_dataset
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


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return load_dataset(datasets.config_of("phantom", folder, folder))


def test_few_images_and_wrong_labels_are_drawn_with_the_seed(phantom):
    numbers = np.arange(96, dtype=np.uint8).reshape(96, 1, 1, 1)
    numbered = dataclasses.replace(phantom.train, images=numbers)
    dataset = dataclasses.replace(phantom, train=numbered)
    found = {n: datasets.damaged(dataset, n, 0.25, 3) for n in (24, 48)}
    for count, one in found.items():
        assert (len(one.train), len(one.val)) == (count, min(count, 64))
        np.testing.assert_array_equal(one.test.images, phantom.test.images)
        labels = phantom.train.labels[one.train.images.ravel()]
        wrong = one.train.labels != labels
        assert wrong.sum() == count // 4
        assert one.train.labels.min() >= 0 and one.train.labels.max() < phantom.num_classes
        assert len(np.unique(one.train.images)) == count
    np.testing.assert_array_equal(found[48].train.images[:24], found[24].train.images)
    more = datasets.damaged(dataset, 48, 0.5, 3)
    both = (one.train.labels for one in (found[48], more))
    changed = [labels != phantom.train.labels[more.train.images.ravel()] for labels in both]
    assert changed[1].sum() == 24 and (changed[0] <= changed[1]).all()
    other = datasets.damaged(dataset, 48, 0.25, 4)
    assert (other.train.images != found[48].train.images).any()


def test_the_draws_do_not_change(phantom):
    # NumPy does not promise that a later version draws the same.
    numbers = np.arange(96, dtype=np.uint8).reshape(96, 1, 1, 1)
    labels = np.arange(96, dtype=np.int32) % 6
    dataset = dataclasses.replace(phantom, train=Split(numbers, labels))
    train = datasets.damaged(dataset, 24, 0.25, 3).train
    assert train.images.ravel()[:6].tolist() == [79, 7, 78, 43, 67, 28]
    assert (train.labels - labels[train.images.ravel()])[3:5].tolist() == [4, 1]


def test_all_seeds_have_the_same_first_test_images(phantom, monkeypatch):
    monkeypatch.setattr(datasets, "TEST_IMAGES", 10)
    for seed in (0, 1):
        test = datasets.damaged(phantom, 24, 0.25, seed).test
        np.testing.assert_array_equal(test.images, phantom.test.images[:10])
        np.testing.assert_array_equal(test.labels, phantom.test.labels[:10])


def test_undamaged_labels_are_those_of_the_images(phantom):
    found = datasets.damaged(phantom, None, 0.0, 0)
    assert len(found.train) == 96 and len(found.val) == 64
    assert sorted(found.train.labels) == sorted(phantom.train.labels)
