import gzip

import numpy as np
import pytest

from inmerge_jax.data.chestxray14.labels import Labels, read_labels
from inmerge_jax.data.chestxray14.splits import PARTS, SPLITS, assign, hash_places
from inmerge_jax.errors import UsageError
from tests.data.chestxray14.nih import write_labels, write_lists
from tests.paths import SHARED, needs

NIH = SHARED / "data" / "nih"


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return read_labels(write_labels(tmp_path_factory.mktemp("labels") / "a.csv"))


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_no_patient_is_in_two_parts_and_every_image_in_one(tmp_path, labels, split, gz):
    write_lists(tmp_path, labels.path, gz)
    parts = assign(split, labels, None if split == "patient_hash" else tmp_path)
    assert tuple(parts) == PARTS and all(len(chosen) for chosen in parts.values())
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(labels)))
    patients = [set(labels.patients[chosen].tolist()) for chosen in parts.values()]
    assert sum(map(len, patients)) == len(set.union(*patients))


def test_the_hash_knows_nothing_but_the_patient():
    patients = np.arange(1, 30_806)
    place = hash_places(patients)
    assert np.array_equal(hash_places(patients[::-1]), place[::-1])
    assert np.array_equal(hash_places(patients[[4, 4, 9]]), place[[4, 4, 9]])
    # Fixed for ever: a data set that is built again has the same patients in the same parts.
    assert [round(value, 4) for value in place[:3].tolist()] == [0.42, 0.8299, 0.3048]
    assert np.mean(place < 0.7) == pytest.approx(0.7, abs=0.01)


def test_lists_that_are_wrong_are_named(tmp_path, labels):
    def refused(message, split="chexnet", lists=tmp_path):
        with pytest.raises(UsageError, match=message):
            assign(split, labels, lists)

    refused("neither train_list.txt nor train_list.txt.gz")
    write_lists(tmp_path, labels.path)
    train = (tmp_path / "train_list.txt").read_text()
    first = train.split()[0]

    (tmp_path / "train_list.txt").write_text(train + first)
    refused(rf"train_list\.txt names 1 image \({first}\) more than once")
    (tmp_path / "train_list.txt").write_text(train + "a.png\nb.png\nc.png\nd.png")
    refused(r"names 4 images \(a\.png, b\.png, c\.png, \.\.\.\) that .*a\.csv lacks")
    (tmp_path / "train_list.txt").write_text(train + "a.png 0 1")
    refused(r"the line 'a\.png 0 1' holds no image name, alone or followed by 14 labels")
    (tmp_path / "train_list.txt").write_text("\n")
    refused("names no image")
    (tmp_path / "train_list.txt").write_text(train)
    test = (tmp_path / "test_list.txt").read_text()
    (tmp_path / "test_list.txt").write_text(test + first)
    refused(r"1 patient \(\d+\) in both train and test")
    (tmp_path / "test_list.txt").unlink()
    (tmp_path / "test_list.txt.gz").write_bytes(gzip.compress(test.encode())[:-9])
    refused(r"test_list\.txt\.gz cannot be read")

    refused("`split` random: unknown; choose one of chexnet", split="random")
    refused("patient_hash reads no list", split="patient_hash")
    refused("chexnet needs `lists`", lists=None)


@pytest.mark.parametrize("line", ["{} 0 1 0 0 0 0 0 0 0 0 0 0 0 1", "images_001/images/{}"])
def test_lists_with_labels_after_the_name_or_a_folder_before_it(tmp_path, labels, line):
    write_lists(tmp_path, labels.path)
    plain = assign("chexnet", labels, tmp_path)
    for path in tmp_path.glob("*_list.txt"):
        names = path.read_text().split()
        path.write_text("".join(line.format(name) + "\n" for name in names))
    for part, rows in assign("chexnet", labels, tmp_path).items():
        np.testing.assert_array_equal(rows, plain[part])


@pytest.mark.long
@needs(NIH / "train_list.txt.gz")
def test_the_reproductions_own_lists():
    labels = read_labels(NIH / "Data_Entry_2017_v2020.csv.gz")
    parts = assign("chexnet", labels, NIH)
    assert [len(parts[part]) for part in PARTS] == [78_468, 11_219, 22_433]
    shares = [len(chosen) / len(labels) for chosen in assign("patient_hash", labels, None).values()]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.02)


def test_labels_hold_what_assign_needs():
    one = Labels(("a.png",), np.zeros((1, 14), np.uint8), np.array([3]), NIH)
    assert sum(map(len, assign("patient_hash", one, None).values())) == 1
