import hashlib
import importlib.util
import io
import os
import runpy
import sys
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from inmerge_jax.data import DataConfig, load_dataset, load_medmnist
from inmerge_jax.data.medmnist import (
    SIZES,
    SIZES_3D,
    is_3d,
    medmnist_info,
    medmnist_names,
)
from inmerge_jax.data.splitting import SPLITS
from inmerge_jax.errors import UsageError
from inmerge_jax.training.config import ModelConfig, RecipeConfig, TrainConfig
from inmerge_jax.training.run_spec import make_run_spec
from tests.paths import MEDMNIST, needs

COUNTS = {"train": 9, "val": 4, "test": 5}


def make_arrays(name: str, size: int = 28) -> dict[str, np.ndarray]:
    """Arrays as MedMNIST stores them, few and random."""
    info, rng = medmnist_info()[name], np.random.default_rng(0)
    classes, channels = len(info["label"]), info["n_channels"]
    arrays = {}
    for split, count in COUNTS.items():
        shape = (count, *(size,) * (3 if is_3d(name) else 2), *([channels] if channels > 1 else []))
        arrays[f"{split}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        if info["task"] == "multi-label, binary-class":
            labels = rng.integers(0, 2, (count, classes), dtype=np.uint8)
        else:
            labels = rng.integers(0, classes, (count, 1), dtype=np.uint8)
        arrays[f"{split}_labels"] = labels
    return arrays


def load(path: Path, name: str, size: int = 28):
    """Loads a synthetic file; that it is said to be unverified is tested elsewhere."""
    with pytest.warns(UserWarning, match="allow_unverified"):
        return load_medmnist(name, size=size, file=path, allow_unverified=True)


def refusal(path: Path, name: str = "breastmnist", **options) -> str:
    """What the loader says of a file that it must refuse, whatever is allowed."""
    with pytest.raises(UsageError) as caught:
        load_medmnist(name, **{"file": path, "allow_unverified": True, **options})
    return str(caught.value)


@pytest.fixture
def verified(monkeypatch):
    """Makes a file's MD5 the one in medmnist's table, for one test."""

    def enter(path: Path, name: str, size: int = 28) -> None:
        suffix = "" if size == 28 else f"_{size}"
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setitem(medmnist_info()[name], f"MD5{suffix}", md5)

    return enter


def test_the_table_has_twelve_subsets_at_four_sizes_and_six_volumes_at_two():
    names = medmnist_names()
    assert (len(names), sum(map(is_3d, names))) == (18, 6)
    for name in names:
        info = medmnist_info()[name]
        for size in SIZES_3D if is_3d(name) else SIZES:
            suffix = "" if size == 28 else f"_{size}"
            assert len(info[f"MD5{suffix}"]) == 32 and f"{name}{suffix}.npz" in info[f"url{suffix}"]


def test_the_table_is_the_packages_own():
    # The package's module of facts by itself: the package would import torch.
    path = Path(importlib.util.find_spec("medmnist").submodule_search_locations[0]) / "info.py"
    theirs = runpy.run_path(str(path))["INFO"]
    ours = medmnist_info()
    assert list(ours) == list(theirs)
    for name, info in ours.items():
        same = {key: value for key, value in theirs[name].items() if key in info}
        assert info == same
        assert set(theirs[name]) - set(info) == {"description", "license"}


def test_a_file_is_read_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "medmnist", None)  # Importing it now fails.
    medmnist_info.cache_clear()
    np.savez(tmp_path / "file.npz", **make_arrays("breastmnist"))
    assert len(load(tmp_path / "file.npz", "breastmnist").train) == COUNTS["train"]


@pytest.mark.parametrize("name", medmnist_names())
def test_every_subset_loads_as_its_table_says(name, tmp_path):
    arrays, info = make_arrays(name), medmnist_info()[name]
    np.savez(tmp_path / "some.npz", **arrays)
    data = load(tmp_path / "some.npz", name)
    assert (data.name, data.size, data.task) == (name, 28, info["task"])
    assert data.classes == tuple(info["label"].values())
    assert data.channels == info["n_channels"]
    assert data.multi_label == (name == "chestmnist")
    for split in SPLITS:
        part = getattr(data, split)
        stored = arrays[f"{split}_images"]
        np.testing.assert_array_equal(part.images, stored.reshape(part.images.shape))
        labels = arrays[f"{split}_labels"]
        np.testing.assert_array_equal(part.labels, labels if data.multi_label else labels[:, 0])
        assert part.labels.dtype == (np.uint8 if data.multi_label else np.int32)


@pytest.mark.parametrize("size", SIZES)
def test_files_are_found_under_their_own_names(size, tmp_path, verified):
    path = tmp_path / ("octmnist.npz" if size == 28 else f"octmnist_{size}.npz")
    np.savez_compressed(path, **make_arrays("octmnist", size))
    verified(path, "octmnist", size)
    data = load_medmnist("octmnist", size=size, data_dir=tmp_path)
    assert data.train.images.shape == (9, size, size, 1)
    assert (data.title, data.note) == ("octmnist", "")
    assert path.name in data.source


def test_volumes_are_for_networks_of_volumes(tmp_path, verified):
    np.savez(tmp_path / "organmnist3d.npz", **make_arrays("organmnist3d"))
    verified(tmp_path / "organmnist3d.npz", "organmnist3d")
    config = DataConfig(name="organmnist3d", size=28, data_dir=tmp_path)
    assert load_dataset(config).train.images.shape == (9, 28, 28, 28, 1)
    message = "`model` vgg16 does not read volumes, which `data` organmnist3d has"
    with pytest.raises(UsageError, match=message):
        make_run_spec(
            TrainConfig(
                data=config,
                model=ModelConfig(name="vgg16"),
                devices=1,
                recipe=RecipeConfig(batch_size=4),
            )
        )
    with pytest.raises(UsageError, match="`size` 128: organmnist3d has 28, 64 px"):
        load_medmnist("organmnist3d", size=128, data_dir=tmp_path)
    with pytest.raises(UsageError, match="`resize` nearest: the volumes .* are not resized"):
        load_medmnist("organmnist3d", size=64, data_dir=tmp_path, resize="nearest")


@pytest.mark.parametrize("name", ["breastmnist", "retinamnist"])
@pytest.mark.parametrize("method", ["nearest", "bicubic"])
def test_the_28_px_file_is_resized_as_pillow_does(name, method, tmp_path, verified):
    arrays = make_arrays(name)
    np.savez(tmp_path / f"{name}.npz", **arrays)
    verified(tmp_path / f"{name}.npz", name)
    data = load_medmnist(name, size=64, data_dir=tmp_path, resize=method)
    # Files of several sizes can be resized to one, so that a resumed run has to know which it was.
    digest = hashlib.sha256((tmp_path / f"{name}.npz").read_bytes()).hexdigest()
    assert (data.size, data.fingerprint) == (64, digest)
    assert data.title == f"{name} (resized from 28 px, {method})"
    for split in SPLITS:
        for image, stored in zip(
            getattr(data, split).images, arrays[f"{split}_images"], strict=True
        ):
            expected = Image.fromarray(stored).resize((64, 64), Image.Resampling[method.upper()])
            np.testing.assert_array_equal(image.squeeze(), np.asarray(expected))
    same = load_medmnist(name, size=28, data_dir=tmp_path, resize=method)
    assert same.title == name


def test_a_file_of_another_size_is_resized(tmp_path, verified):
    path = tmp_path / "mine.npz"
    np.savez(path, **make_arrays("breastmnist", 64))
    with pytest.warns(UserWarning, match="allow_unverified"):
        data = load_medmnist(
            "breastmnist", size=40, file=path, allow_unverified=True, resize="bicubic"
        )
    assert data.note == "unverified file mine.npz, resized from 64 px, bicubic"
    verified(path, "breastmnist", 64)
    with pytest.raises(UsageError, match=r"mine.npz is the file of breastmnist at 64 px, .*64, or"):
        load_medmnist("breastmnist", size=28, file=path)
    data = load_medmnist("breastmnist", size=40, file=path, resize="bicubic")
    assert data.note == "resized from 64 px, bicubic" and data.train.images.shape[1] == 40


def test_a_home_folder_is_expanded(tmp_path, monkeypatch, verified):
    np.savez(tmp_path / "breastmnist.npz", **make_arrays("breastmnist"))
    verified(tmp_path / "breastmnist.npz", "breastmnist")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_medmnist("breastmnist", data_dir=Path("~")).train) == 9


def test_one_column_of_labels_may_be_flat(tmp_path):
    arrays = make_arrays("bloodmnist")
    flat = {k: v[:, 0] if k.endswith("labels") else v for k, v in arrays.items()}
    np.savez(tmp_path / "flat.npz", **flat)
    data = load(tmp_path / "flat.npz", "bloodmnist")
    np.testing.assert_array_equal(data.train.labels, flat["train_labels"])


def test_an_unverified_file_is_refused_then_loaded_and_named(tmp_path):
    path = tmp_path / "breastmnist.npz"
    np.savez(path, **make_arrays("breastmnist"))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    for place in ({"file": path}, {"data_dir": tmp_path}):
        with pytest.raises(UsageError) as caught:
            load_medmnist("breastmnist", **place)
        message = str(caught.value)
        assert str(path) in message and md5 in message and "allow_unverified" in message
        assert medmnist_info()["breastmnist"]["MD5"] in message
        with pytest.warns(UserWarning, match=md5):
            data = load_medmnist("breastmnist", **place, allow_unverified=True)
        assert data.title == "breastmnist (unverified file breastmnist.npz)"
        assert md5 in data.source
        assert data.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("brestmnist", "breastmnist"),
        ("BreastMNIST", "breastmnist"),
        ("fantom", "phantom"),
        ("chestxray", "chestxray14"),
        ("ChestXray14", "chestxray14"),
        ("chestmist", "chestmnist"),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest(name, guess):
    with pytest.raises(UsageError, match=rf"'{name}': did you mean {guess}\?"):
        load_medmnist(name)


def test_an_unknown_name_is_answered_with_all(tmp_path):
    message = refusal(tmp_path, "zzz")
    assert "did you mean" not in message
    assert all(name in message for name in (*medmnist_names(), "phantom", "chestxray14"))
    assert "folder:PATH, tfds:NAME" in message


def test_an_unknown_size_is_answered_with_the_known():
    with pytest.raises(UsageError, match=r"`size` 32: .*28, 64, 128, 224"):
        load_medmnist("breastmnist", size=32)


def test_a_missing_file_is_named(tmp_path):
    assert f"{tmp_path / 'x.npz'} is missing" in refusal(tmp_path / "x.npz")
    assert "is missing or is no file" in refusal(tmp_path)
    with pytest.raises(UsageError) as caught:
        load_medmnist("breastmnist", size=64, data_dir=tmp_path / "no", download=False)
    message = str(caught.value)
    assert str(tmp_path / "no" / "breastmnist_64.npz") in message
    assert "downloading is off" in message and "`data_dir`" in message
    assert medmnist_info()["breastmnist"]["MD5_64"] in message
    assert not (tmp_path / "no").exists()


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_never_half_loaded(share, tmp_path_factory):
    buffer = io.BytesIO()
    np.savez(buffer, **make_arrays("breastmnist"))
    whole = buffer.getvalue()
    path = tmp_path_factory.mktemp("cut") / "cut.npz"
    path.write_bytes(whole[: int(share * len(whole))])
    assert "cut.npz is truncated or is no npz" in refusal(path)


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), compressed=st.booleans())
def test_a_damaged_file_is_never_half_loaded(place, bit, compressed, tmp_path_factory):
    """One flipped bit anywhere in the file, with the MD5 check set aside."""
    path = tmp_path_factory.mktemp("flip") / "flip.npz"
    arrays = make_arrays("breastmnist")
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    whole = bytearray(path.read_bytes())
    whole[int(place * len(whole))] ^= 1 << bit
    path.write_bytes(whole)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = load_medmnist("breastmnist", file=path, allow_unverified=True)
    except UsageError as error:
        assert "flip.npz" in str(error)
    else:
        # A few bits mean nothing: times of day, say, or those after the end of compressed data.
        for split in SPLITS:
            part = getattr(data, split)
            np.testing.assert_array_equal(part.images[..., 0], arrays[f"{split}_images"])
            np.testing.assert_array_equal(part.labels, arrays[f"{split}_labels"][:, 0])


def test_a_damaged_array_is_named(tmp_path):
    path = tmp_path / "flip.npz"
    arrays = make_arrays("breastmnist")
    np.savez(path, **arrays)
    whole = bytearray(path.read_bytes())
    whole[whole.index(arrays["val_images"].tobytes()) + 5] ^= 1
    path.write_bytes(whole)
    assert "damaged and was not loaded (BadZipFile: wrong checksum of val_im" in refusal(path)


def test_something_else_than_an_npz_is_refused(tmp_path):
    (tmp_path / "page.npz").write_text("<html>404</html>")
    assert "truncated or is no npz (16 bytes" in refusal(tmp_path / "page.npz")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "lacks the arrays train_images" in refusal(tmp_path / "other.npz")


def test_pickled_arrays_are_refused(tmp_path):
    arrays = make_arrays("breastmnist") | {"val_labels": np.array([{}, []], dtype=object)}
    np.savez(tmp_path / "x.npz", **arrays)
    assert "damaged and was not loaded" in refusal(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("name", "key", "change", "message"),
    [
        ("breastmnist", "val_labels", None, "lacks the arrays val_labels; it holds train_images"),
        ("breastmnist", "val_images", lambda a: a.astype(np.float32), "type float32"),
        ("breastmnist", "val_images", lambda a: a[0], r"val_images: shape (28, 28); breastmnist"),
        ("breastmnist", "val_images", lambda a: a.repeat(3)[:, None], "shape (9408, 1)"),
        ("breastmnist", "val_images", lambda a: a[:0], "val_images holds 0 images"),
        ("retinamnist", "val_images", lambda a: a[..., 0], "shape (4, 28, 28); retinamnist"),
        ("breastmnist", "test_images", lambda a: a[:, 4:], "24 x 28 px, but `size` is 28"),
        ("breastmnist", "test_images", lambda a: a[1:], "4 images but test_labels 5 labels"),
        ("breastmnist", "train_labels", lambda a: a + 2, "outside 0 to 1, the first of them"),
        ("breastmnist", "train_labels", lambda a: a.astype(int) - 2, "outside 0 to 1"),
        ("bloodmnist", "train_labels", lambda a: a * 0 + 8, "9 labels outside 0 to 7"),
        ("chestmnist", "train_labels", lambda a: a * 2, "outside 0 to 1"),
        ("breastmnist", "train_labels", lambda a: a / 2, "type float64; labels must be integers"),
        ("breastmnist", "train_labels", lambda a: a.repeat(2, 1), "shape (9, 2); breastmnist"),
        (
            "chestmnist",
            "train_labels",
            lambda a: a[:, :5],
            "shape (9, 5); chestmnist needs (n, 14)",
        ),
        ("chestmnist", "train_labels", lambda a: a[:, 0], "shape (9,); chestmnist needs (n, 14)"),
    ],
)
def test_a_wrong_array_is_named(name, key, change, message, tmp_path):
    arrays = make_arrays(name)
    if change is None:
        del arrays[key]
    else:
        arrays[key] = change(arrays[key])
    np.savez(tmp_path / "bad.npz", **arrays)
    said = refusal(tmp_path / "bad.npz", name)
    assert message in said and str(tmp_path / "bad.npz") in said and key in said


def test_an_empty_split_is_named(tmp_path):
    arrays = make_arrays("breastmnist")
    arrays |= {key: arrays[key][:0] for key in ("val_images", "val_labels")}
    np.savez(tmp_path / "bad.npz", **arrays)
    assert "val_images is empty" in refusal(tmp_path / "bad.npz")


def test_a_file_of_another_size_is_named(tmp_path):
    np.savez(tmp_path / "big.npz", **make_arrays("breastmnist", 64))
    assert "64 x 64 px, but `size` is 28" in refusal(tmp_path / "big.npz")


class _FakeSubset:
    """Stands in for `medmnist.BreastMNIST`: writes a file, as a download would."""

    def __init__(self, split, download, root, size):
        assert download and os.path.isdir(root)
        name = "breastmnist.npz" if size == 28 else f"breastmnist_{size}.npz"
        np.savez(Path(root) / name, **make_arrays("breastmnist", size))


def _install(monkeypatch, subset) -> None:
    monkeypatch.setitem(sys.modules, "medmnist", types.SimpleNamespace(BreastMNIST=subset))


def test_an_absent_file_is_downloaded_through_medmnist(tmp_path, monkeypatch):
    _install(monkeypatch, _FakeSubset)
    folder = tmp_path / "new" / "folder"
    with pytest.warns(UserWarning, match="allow_unverified"):
        data = load_medmnist("breastmnist", size=64, data_dir=folder, allow_unverified=True)
    assert data.train.images.shape == (9, 64, 64, 1)
    assert [path.name for path in folder.iterdir()] == ["breastmnist_64.npz"]


@pytest.mark.parametrize("failure", [OSError("No route to host"), KeyboardInterrupt()])
def test_a_download_that_fails_leaves_nothing(failure, tmp_path, monkeypatch):
    class Failing:
        def __init__(self, split, download, root, size):
            (Path(root) / "breastmnist.npz").write_bytes(b"half")
            try:
                raise failure
            except BaseException:
                raise RuntimeError("Automatic download failed!")  # noqa: B904, as medmnist does

    _install(monkeypatch, Failing)
    if isinstance(failure, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            load_medmnist("breastmnist", data_dir=tmp_path)
    else:
        with pytest.raises(UsageError) as caught:
            load_medmnist("breastmnist", data_dir=tmp_path)
        message, info = str(caught.value), medmnist_info()["breastmnist"]
        assert "OSError: No route to host" in message
        assert f"download {info['url']} and save it as {tmp_path / 'breastmnist.npz'}" in message
        assert info["MD5"] in message
    assert list(tmp_path.iterdir()) == []


@needs(MEDMNIST / "breastmnist.npz")
def test_real_breastmnist():
    data = load_medmnist("breastmnist", data_dir=MEDMNIST, download=False)
    assert (data.task, data.num_classes, data.channels) == ("binary-class", 2, 1)
    assert [len(s) for s in (data.train, data.val, data.test)] == [546, 78, 156]
    assert data.classes == ("malignant", "normal, benign")
    assert data.test.labels.mean() == pytest.approx(114 / 156)
    assert data.title == "breastmnist"


@needs(MEDMNIST / "retinamnist.npz")
def test_real_retinamnist():
    data = load_medmnist("retinamnist", data_dir=MEDMNIST, download=False)
    assert (data.task, data.num_classes, data.channels) == ("ordinal-regression", 5, 3)
    assert [len(s) for s in (data.train, data.val, data.test)] == [1080, 120, 400]


@needs(MEDMNIST / "breastmnist.npz")
def test_a_file_is_not_taken_for_another_subset():
    message = refusal(MEDMNIST / "breastmnist.npz", "retinamnist")
    assert "retinamnist has n images of (28, 28, 3)" in message


@needs(MEDMNIST / "pneumoniamnist_rebuilt.npz")
def test_real_rebuilt_pneumoniamnist_is_loaded_only_when_allowed():
    path = MEDMNIST / "pneumoniamnist_rebuilt.npz"
    with pytest.raises(UsageError, match="allow_unverified"):
        load_medmnist("pneumoniamnist", file=path)
    data = load(path, "pneumoniamnist")
    assert [len(s) for s in (data.train, data.val, data.test)] == [4708, 524, 624]
    assert data.title == "pneumoniamnist (unverified file pneumoniamnist_rebuilt.npz)"


@needs(MEDMNIST / "breastmnist.npz")
def test_a_truncated_real_file_is_refused(tmp_path):
    whole = (MEDMNIST / "breastmnist.npz").read_bytes()
    (tmp_path / "breastmnist.npz").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refusal(None, data_dir=tmp_path)
