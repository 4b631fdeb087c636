import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from inmerge_jax.data import (
    DataConfig,
    Dataset,
    PhantomConfig,
    Split,
    load_dataset,
    load_medmnist,
    make_phantom,
)
from inmerge_jax.errors import UsageError

SMALL = PhantomConfig(train=5, val=3, test=2, findings=("mass", "nodule"), multi_label=True, seed=7)


def split(n: int, channels: int = 1) -> Split:
    return Split(np.zeros((n, 4, 4, channels), np.uint8), np.zeros(n, np.int32))


def test_title_carries_the_note():
    parts = {"train": split(3, 3), "val": split(2, 3), "test": split(1, 3)}
    data = Dataset("retinamnist", 4, "ordinal-regression", ("a", "b"), **parts, source="x.npz")
    assert (data.title, data.channels, data.num_classes) == ("retinamnist", 3, 2)
    assert not data.multi_label
    noted = replace(data, note="unverified file x.npz", task="multi-label, binary-class")
    assert noted.title == "retinamnist (unverified file x.npz)"
    assert noted.multi_label


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int32), r"found uint8 \(2, 4, 4\)"),
        (np.zeros((2, 4, 4, 1)), np.zeros(2, np.int32), "found float64"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros((2, 1), np.int32), r"found int32 \(2, 1\)"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, np.int32), "2 images but 3 labels"),
    ],
)
def test_a_split_of_another_shape_is_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Split(images, labels)


def test_a_task_and_its_classes_must_agree():
    parts = {"train": split(1), "val": split(1), "test": split(1), "source": ""}
    with pytest.raises(ValueError, match="unknown task 'regression'"):
        Dataset("x", 4, "regression", ("a", "b"), **parts)
    with pytest.raises(ValueError, match="2 classes, not 1"):
        Dataset("x", 4, "binary-class", ("a",), **parts)


def test_config_reaches_the_phantom():
    data = load_dataset(DataConfig(size=20, phantom=SMALL))
    direct = make_phantom(
        size=20, train=5, val=3, test=2, findings=("mass", "nodule"), multi_label=True, seed=7
    )
    assert data.classes == ("mass", "nodule")
    for part in ("train", "val", "test"):
        np.testing.assert_array_equal(getattr(data, part).images, getattr(direct, part).images)
        np.testing.assert_array_equal(getattr(data, part).labels, getattr(direct, part).labels)


def test_a_file_for_the_phantom_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"`file` .*mine\.npz is not read for phantom"):
        load_dataset(DataConfig(file=tmp_path / "mine.npz"))


def test_config_reaches_medmnist(tmp_path):
    config = DataConfig(name="breastmnist", size=64, data_dir=tmp_path, download=False)
    with pytest.raises(UsageError) as by_config:
        load_dataset(config)
    with pytest.raises(UsageError) as direct:
        load_medmnist("breastmnist", size=64, data_dir=tmp_path, download=False)
    assert str(by_config.value) == str(direct.value)


def test_heavy_packages_stay_out_until_needed():
    """Loading an npz needs medmnist's table, but neither medmnist's package nor what it imports."""
    code = (
        "import sys, inmerge_jax.data as data\n"
        "try: data.load_medmnist('breastmnist', data_dir='/nowhere', download=False)\n"
        "except ValueError as error: assert 'downloading is off' in str(error), error\n"
        "print([m for m in ('medmnist', 'torch', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
