import pickle
import shutil
import sys

import numpy as np
import pytest

from inmerge_jax.cli.data import main as data_main
from inmerge_jax.data import DataConfig, load_dataset, tfds, train_batch
from inmerge_jax.data import images as decoding
from inmerge_jax.data.images import resized
from inmerge_jax.errors import UsageError
from tests.data.shapes.builder import Shapes, picture


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for config in ("grey", "colour", "unlabelled"):
        Shapes(data_dir=folder, config=config, file_format="array_record").download_and_prepare()
    return folder


def load(folder, name="tfds:shapes/grey", **options):
    return load_dataset(DataConfig(name=name, data_dir=folder, **options))


def numbers(folder, config, split):
    """The numbers of the pictures in the order of the records."""
    builder = Shapes(data_dir=folder, config=config, file_format="array_record")
    return [int(example["number"]) for example in builder.as_data_source(split)]


def test_grey_images_labels_and_names_are_the_builders(prepared):
    data = load(prepared)
    assert (data.name, data.size, data.task) == ("tfds-shapes-grey-1-0-0", 20, "multi-class")
    assert data.classes == ("disc", "ring", "square") and data.channels == 1
    order = numbers(prepared, "grey", "test")
    assert data.test.labels.tolist() == [number % 3 for number in order]
    expected = [picture(number, 1, (20, 20))[..., None] for number in order]
    np.testing.assert_array_equal(data.test.images, expected)
    assert data.test.in_memory


def test_a_validation_split_is_taken_from_the_training_images(prepared):
    data = load(prepared)
    assert "val from its split train" in data.source
    kinds = [np.bincount(part.labels, minlength=3).tolist() for part in (data.train, data.val)]
    assert kinds == [[12, 11, 11], [2, 2, 2]]
    seen = {image.tobytes() for part in (data.train, data.val) for image in part.images}
    order = numbers(prepared, "grey", "train")
    assert seen == {picture(number, 1, (20, 20)).tobytes() for number in order}
    again = load(prepared)
    np.testing.assert_array_equal(again.val.images, data.val.images)
    assert again.fingerprint == data.fingerprint


def test_colour_images_of_different_sizes_are_resized(prepared):
    with pytest.raises(UsageError, match="different sizes.*give the `size`"):
        load(prepared, "tfds:shapes/colour")
    data = load(prepared, "tfds:shapes/colour", size=16, resize="bicubic")
    assert [len(part) for part in (data.train, data.val, data.test)] == [40, 5, 10]
    order = numbers(prepared, "colour", "validation")
    expected = [resized(picture(n, 3, (20 + n % 3, 24)), 16, "bicubic") for n in order]
    np.testing.assert_array_equal(data.val.images, expected)
    assert load(prepared, "tfds:shapes/colour", size=16, channels=1).channels == 1


def test_a_split_without_labels_counts_as_missing(prepared, monkeypatch):
    data = load(prepared, "tfds:shapes/unlabelled")
    assert "without labels in its split test" in data.source
    assert [len(part) for part in (data.train, data.val, data.test)] == [28, 3, 9]
    order = numbers(prepared, "unlabelled", "train")
    seen = {image.tobytes() for part in (data.train, data.val, data.test) for image in part.images}
    assert seen == {picture(number, 1, (20, 20)).tobytes() for number in order}
    monkeypatch.setattr(tfds, "_UNLABELLED", None)
    with pytest.raises(UsageError, match=r"record 0 of test has no label \(-1\); use folder:"):
        load(prepared, "tfds:shapes/unlabelled")


def test_large_sets_are_read_while_training(prepared, monkeypatch):
    small = load(prepared)
    monkeypatch.setattr(decoding, "IN_MEMORY", 0)
    large = load(prepared)
    assert not large.train.in_memory
    fresh = pickle.loads(pickle.dumps(large.train))  # As in a worker process.
    for split in (large.train, fresh):
        batch = train_batch(split, seed=0, step=1, batch_size=8)
        np.testing.assert_array_equal(
            batch["image"], train_batch(small.train, seed=0, step=1, batch_size=8)["image"]
        )
    np.testing.assert_array_equal(large.val.images[:], small.val.images)


def test_what_cannot_be_read_is_named(prepared, tmp_path):
    with pytest.raises(UsageError, match=r"no data set mnist in `data_dir` .*prepare tfds:mnist"):
        load(tmp_path, "tfds:mnist")
    with pytest.raises(UsageError, match="name its configuration"):
        load(prepared, "tfds:shapes/none")
    with pytest.raises(UsageError, match="give folder:PATH, tfds:NAME"):
        load(prepared, "tfds:")


def test_a_missing_package_is_named(prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets.core", None)  # Importing it now fails.
    with pytest.raises(UsageError, match="tfds:shapes/grey needs a package"):
        load(prepared)


def test_a_damaged_shard_is_named(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "copy")
    shard = next(folder.glob("shapes/grey/*/*train*array_record*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(UsageError, match=r"record \d+ of train.* prepare the data set again"):
        load(folder)


def test_preparing_from_the_command_line(tmp_path, capsys, monkeypatch):
    assert data_main(["prepare", "tfds:shapes/grey", "--data-dir", str(tmp_path)]) == 0
    assert "train on it: inmerge train --data tfds:shapes/grey" in capsys.readouterr().out
    assert len(load(tmp_path).test) == 10
    assert data_main(["prepare", "tfds:no_such_set", "--data-dir", str(tmp_path)]) == 2
    assert "no data set no_such_set" in capsys.readouterr().err
    assert data_main(["prepare", "mnist"]) == 2
    assert "give tfds:NAME" in capsys.readouterr().err

    def offline(self, dl_manager):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(Shapes, "_split_generators", offline)
    assert data_main(["prepare", "tfds:shapes/colour", "--data-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "could not be downloaded and prepared" in error and "check the network" in error
