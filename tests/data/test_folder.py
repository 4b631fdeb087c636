import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inmerge_jax.data import DataConfig, load_dataset, train_batches
from inmerge_jax.data import images as decoding
from inmerge_jax.data.csv_rows import natural
from inmerge_jax.data.images import resized
from inmerge_jax.data.splitting import SPLITS, add_splits
from inmerge_jax.errors import UsageError

CLASSES = ("cat", "dog")


def picture(number, shape=(12, 12)):
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, quality=95)
    return path


def make_folders(root, count=20, ending="png", shape=(12, 12)):
    """`count` images of each class."""
    for index, name in enumerate(CLASSES):
        for number in range(count):
            save(root / name / f"{number:02}.{ending}", picture(100 * index + number, shape))
    return root


def make_csv(root, rows, header):
    with open(root / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return root / "labels.csv"


def load(place, **options):
    return load_dataset(DataConfig(name=f"folder:{place}", **options))


def refusal(place, **options):
    with pytest.raises(UsageError) as caught:
        load(place, **options)
    return str(caught.value)


def contents(data):
    """The images of each split, as bytes."""
    return [{image.tobytes() for image in getattr(data, split).images} for split in SPLITS]


def test_a_folder_per_class_is_split_by_class(tmp_path):
    data = load(make_folders(tmp_path / "my_pets"))
    assert (data.name, data.size, data.task) == ("folder-my-pets", 12, "binary-class")
    assert data.classes == CLASSES and data.channels == 1
    counts = [np.bincount(getattr(data, split).labels).tolist() for split in SPLITS]
    assert counts == [[14, 14], [2, 2], [4, 4]]
    for split in SPLITS:
        part = getattr(data, split)
        known = {picture(100 * k + n).tobytes(): k for k in (0, 1) for n in range(20)}
        assert [known[image.tobytes()] for image in part.images] == part.labels.tolist()
        assert [CLASSES.index(name[:3]) for name in part.names] == part.labels.tolist()


def test_the_split_depends_on_neither_the_order_nor_the_place_of_the_files(tmp_path):
    first = load(make_folders(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    for path in sorted((tmp_path / "a").rglob("*.png"), reverse=True):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(path.read_bytes())
    second = load(tmp_path / "b")
    assert contents(first) == contents(second)
    assert first.fingerprint == second.fingerprint
    save(tmp_path / "b" / "cat" / "00.png", picture(7))
    assert load(tmp_path / "b").fingerprint != first.fingerprint


def test_folders_of_splits_are_kept_and_missing_splits_taken_from_train(tmp_path):
    make_folders(tmp_path / "train", 16)
    make_folders(tmp_path / "valid", 3)
    data = load(tmp_path)
    assert [len(getattr(data, split)) for split in SPLITS] == [24, 6, 8]
    make_folders(tmp_path / "test", 2)
    data = load(tmp_path)
    assert [len(getattr(data, split)) for split in SPLITS] == [32, 6, 4]
    (tmp_path / "train2").mkdir()
    assert "has the folders train and train2; name it val or test" in refusal(tmp_path)


def test_jpegs_of_any_size_are_resized(tmp_path):
    make_folders(tmp_path, ending="JPG", shape=(30, 40, 3))
    assert "30.png" not in refusal(tmp_path) and "give the `size`" in refusal(tmp_path)
    for method in ("bilinear", "nearest"):
        data = load(tmp_path, size=16, resize=method)
        assert data.train.images.shape == (28, 16, 16, 3)
        paths = sorted(tmp_path.rglob("*.JPG"))
        expected = {resized(np.asarray(Image.open(path)), 16, method).tobytes() for path in paths}
        assert set.union(*contents(data)) == expected
    grey = load(tmp_path, size=16, channels=1)
    assert grey.channels == 1


def patients(count=30):
    """Rows of a CSV: three images a patient, one label."""
    return [(f"{n:03}.png", CLASSES[n // 3 % 2], f"p{n // 3}") for n in range(3 * count)]


def test_no_patient_of_a_csv_is_in_two_splits(tmp_path):
    rows = patients()
    for number, (name, *_) in enumerate(rows):
        save(tmp_path / name, picture(number))
    path = make_csv(tmp_path, rows, ["path", "label", "patient"])
    data = load(path)
    sets = [set(getattr(data, split).patients.tolist()) for split in SPLITS]
    assert len(set.union(*sets)) == sum(map(len, sets)) == 30
    assert [len(part) for part in sets] == [20, 4, 6]
    make_csv(tmp_path, rows[::-1], ["path", "label", "group"])
    assert contents(load(path)) == contents(data)

    parts = [("train", "val", "test")[n // 3 % 3] for n in range(len(rows))]
    header = ["path", "label", "group", "split"]
    make_csv(tmp_path, [(*row, part) for row, part in zip(rows, parts, strict=True)], header)
    assert [len(getattr(load(path), split)) for split in SPLITS] == [30, 30, 30]
    parts[4] = "train"
    make_csv(tmp_path, [(*row, part) for row, part in zip(rows, parts, strict=True)], header)
    assert "the group p1 is in two splits, train and val" in refusal(path)


def test_columns_of_0_and_1_are_several_labels(tmp_path):
    rows = [(f"{n:02}.png", n % 2, n // 10 % 2) for n in range(40)]
    for number, (name, *_) in enumerate(rows):
        save(tmp_path / name, picture(number))
    path = make_csv(tmp_path, rows, ["path", "mass", "edema"])
    data = load(path)
    assert data.task == "multi-label, binary-class" and data.classes == ("mass", "edema")
    known = {picture(number).tobytes(): row[1:] for number, row in enumerate(rows)}
    for image, label in zip(data.train.images, data.train.labels, strict=True):
        assert known[image.tobytes()] == tuple(label)
    make_csv(tmp_path, [(*row[:2], "yes") for row in rows], ["path", "mass", "edema"])
    assert "edema is 'yes'; without a column label" in refusal(path)
    make_csv(tmp_path, [(*row[:2], 0) for row in rows], ["path", "mass", "edema"])
    assert "no example has the label edema" in refusal(path)


def test_columns_of_splits_and_patients_are_found_however_they_are_written(tmp_path):
    rows = [(*row, "Test" if int(row[2][1:]) > 25 else "train") for row in patients()]
    for number, (name, *_) in enumerate(rows):
        save(tmp_path / name, picture(number))
    for column in ("PatientID", "Patient ID", "patient_id", "SUBJECT-ID"):
        path = make_csv(tmp_path, rows, ["path", "label", column, "Split"])
        data = load(path)
        assert data.test.patients is not None
        assert len(data.test) == sum(row[3] == "Test" for row in rows)


def test_numbers_are_classes_in_their_order():
    for names in (["-1", "1"], ["2.0", "10.0"], ["01", "1", "2"], ["1", "x", "y"]):
        assert sorted(reversed(names), key=natural) == names


def test_a_jpeg_of_several_pictures_is_read(tmp_path):
    make_folders(tmp_path, ending="jpg", shape=(12, 12, 3))
    first, other = (Image.fromarray(picture(n, (12, 12, 3))) for n in (900, 901))
    first.save(tmp_path / "cat" / "00.jpg", format="MPO", save_all=True, append_images=[other])
    assert len(load(tmp_path).train) == 28


def test_layouts_that_would_be_read_wrongly_are_refused(tmp_path):
    root = make_folders(tmp_path)
    save(root / "loose.png", picture(1))
    assert "loose.png is in no class folder" in refusal(root)
    (root / "loose.png").unlink()
    save(root / "cat" / "train" / "a.png", picture(2))
    assert "a split inside a class; put the classes into the splits" in refusal(root)
    shutil.rmtree(root / "cat" / "train")
    save(root / "cat" / "@eaDir" / "THUMB.png", picture(3))
    known = len(load(root).train)
    (root / "cat" / "again").symlink_to(root / "cat")
    assert "again is a link to a folder that is read too" in refusal(root)
    (root / "cat" / "again").unlink()
    assert len(load(root).train) == known
    (root / "cat" / os.fsdecode(b"M\xfcller.png")).write_bytes(b"")
    assert r"M\udcfcller.png': the name is no UTF-8" in refusal(root)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    root, scandir = make_folders(tmp_path), os.scandir
    save(root / "cat" / "patient" / "a.png", picture(2))

    def denied(path):
        if Path(path).name == "patient":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert "cat/patient cannot be read: Permission denied" in refusal(root)


def test_a_class_too_small_for_every_split_is_named(tmp_path):
    root = make_folders(tmp_path)
    save(root / "bird" / "a.png", picture(1000))
    save(root / "bird" / "b.png", picture(1001))
    with pytest.warns(UserWarning, match="the class bird has too few examples for every split: 1"):
        load(root)


def test_the_spelling_of_a_path_changes_no_split(tmp_path):
    rows = patients()[:30]
    for number, (name, *_) in enumerate(rows):
        save(tmp_path / name, picture(number))
    plain = load(make_csv(tmp_path, [row[:2] for row in rows], ("path", "label")))
    other = [(f"./{name}", label) for name, label, *_ in rows]
    dotted = load(make_csv(tmp_path, other, ("path", "label")))
    assert plain.fingerprint == dotted.fingerprint and plain.test.names == dotted.test.names


def test_copies_in_two_splits_are_named(tmp_path):
    root = make_folders(tmp_path)
    for path in sorted((root / "cat").iterdir()):
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
    with pytest.warns(UserWarning, match=r"images equal one of another split, such as cat/"):
        load(root)


def test_large_sets_are_read_while_training(tmp_path, monkeypatch):
    make_folders(tmp_path, ending="jpg", shape=(30, 40, 3))
    small = load(tmp_path, size=16)
    monkeypatch.setattr(decoding, "IN_MEMORY", 0)
    large = load(tmp_path, size=16)
    assert small.train.in_memory and not large.train.in_memory
    for a, b in zip(
        train_batches(small.train, seed=0, batch_size=8, stop=3),
        train_batches(large.train, seed=0, batch_size=8, stop=3, workers=2),
        strict=True,
    ):
        np.testing.assert_array_equal(a["image"], b["image"])
    # Files that are cut short are found before training.
    path = tmp_path / "dog" / "03.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    assert "03.jpg is cut short or damaged" in refusal(tmp_path, size=16)


@pytest.mark.parametrize("length", [0, 60, -20])
def test_damaged_images_are_named(tmp_path, length):
    path = make_folders(tmp_path) / "dog" / "07.png"
    path.write_bytes(path.read_bytes()[:length])
    assert "07.png is cut short or damaged" in refusal(tmp_path)


def test_folders_that_cannot_be_right(tmp_path):
    assert "there is no such folder or CSV" in refusal(tmp_path / "none")
    assert "has no folders: give one folder of images per class" in refusal(tmp_path)
    make_folders(tmp_path)
    (tmp_path / "dog" / "._00.png").write_bytes(b"Mac OS X")
    (tmp_path / "dog" / "Thumbs.db").write_bytes(b"Windows")
    (tmp_path / ".git").mkdir()
    assert len(load(tmp_path).train) == 28
    (tmp_path / "bird").mkdir()
    assert f"{tmp_path / 'bird'} has no PNG or JPEG" in refusal(tmp_path)
    (tmp_path / "bird").rmdir()
    save(tmp_path / "dog" / "20.bmp", picture(1))
    assert "20.bmp: only PNG and JPEG are read" in refusal(tmp_path)
    for name in ("test", "val"):
        make_folders(tmp_path / "splits" / name)
    assert "has folders in test, but no folder train" in refusal(tmp_path / "splits")
    (tmp_path / "splits" / "test").rename(tmp_path / "splits" / "training_set")
    assert "has folders in val, but no folder train" in refusal(tmp_path / "splits")
    make_folders(tmp_path / "one")
    (tmp_path / "one" / "cat").rename(tmp_path / "cat2")
    assert "there is only the class dog" in refusal(tmp_path / "one")
    for name in CLASSES:
        save(tmp_path / "few" / name / "a.png", picture(1))
    assert "2 examples in 2 groups are too few" in refusal(tmp_path / "few")


def test_images_of_mixed_modes_are_named_and_converted_on_request(tmp_path):
    make_folders(tmp_path)
    path = save(tmp_path / "dog" / "05.png", picture(5, (12, 12, 3)))
    assert f"{path} is colour, " in refusal(tmp_path) and "`channels` 1 or 3" in refusal(tmp_path)
    assert [load(tmp_path, channels=channels).channels for channels in (1, 3)] == [1, 3]
    save(path, picture(5).astype(np.uint16) * 257)
    assert "is 16-bit grey" in refusal(tmp_path, channels=1)


def test_16_bit_images_are_scaled_by_the_bits_that_they_use(tmp_path):
    for number in range(40):
        values = picture(number).astype(np.uint16) * 16 + 15  # 12 bits.
        save(tmp_path / CLASSES[number % 2] / f"{number}.png", values)
    images = load(tmp_path).train.images
    assert images.min() < 5 and images.max() == 255


def test_csvs_that_cannot_be_right(tmp_path):
    rows = patients()[:30]
    for number, (name, *_) in enumerate(rows):
        save(tmp_path / name, picture(number))

    def refused(rows, header=("path", "label", "group")):
        return refusal(make_csv(tmp_path, rows, header))

    assert "has no column path; its header is file" in refused(rows, ("file", "label", "group"))
    assert "line 4: 002.png is in line 2 too" in refused([rows[2], rows[1], *rows[2:]])
    assert "line 2: the label of 000.png is missing" in refused([("000.png", "", "p"), *rows[1:]])
    assert "line 2: the group of 000.png is miss" in refused([("000.png", "cat", ""), *rows[1:]])
    assert "line 2: there is no image" in refused([("no.png", "cat", "p"), *rows[1:]])
    assert "line 2: it has not the 3 cells" in refused([("000.png", "cat"), *rows[1:]])
    assert "holds no rows" in refused([])
    assert "the columns patient and group; keep one" in refused(
        [(*row, "p") for row in rows], ("path", "label", "patient", "group")
    )
    assert "split 'dev'; choose train, val or test" in refused(
        [(*row[:2], "dev") for row in rows], ("path", "label", "split")
    )
    only = [("000.png", "cat", "val"), *((*row[:2], "train") for row in rows[3:])]
    assert "rare" in refused([("001.png", "rare", "val"), *only], ("path", "label", "split"))
    assert "2 examples are fewer than the 3 classes" in refused(
        [("000.png", 1, 0, 1), ("001.png", 0, 1, 0)], ("path", "a", "b", "c")
    )


def test_every_label_of_three_groups_is_in_every_split():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [3, 40, 200]).astype(np.int32)
    keys = [f"g{number}" for number in range(len(labels))]
    splits = add_splits(np.full(len(labels), "train"), labels, keys, "test")
    for label in range(3):
        assert set(splits[labels == label]) == set(SPLITS)
    assert [np.sum(splits[labels == 2] == split) for split in SPLITS] == [140, 20, 40]
    order = rng.permutation(len(labels))
    shuffled = add_splits(
        np.full(len(labels), "train"), labels[order], [keys[row] for row in order], "test"
    )
    np.testing.assert_array_equal(shuffled, splits[order])
