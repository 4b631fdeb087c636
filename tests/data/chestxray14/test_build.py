import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from inmerge_jax.cli.data import main
from inmerge_jax.data import DataConfig, load_dataset
from inmerge_jax.data.chestxray14 import build as building
from inmerge_jax.data.chestxray14 import reduce
from inmerge_jax.data.chestxray14.build import Request, build, summary
from inmerge_jax.data.chestxray14.images import Usual, decode, find_images, reduce_image
from inmerge_jax.data.chestxray14.labels import FINDINGS, read_labels
from inmerge_jax.data.chestxray14.records import load_chestxray14
from inmerge_jax.data.chestxray14.splits import assign
from inmerge_jax.data.dataset import names_sha256
from inmerge_jax.data.records import Records
from inmerge_jax.errors import UsageError
from tests.data.chestxray14.nih import content, make, pixels, write_labels, write_lists
from tests.paths import SHARED, needs

NIH = SHARED / "data" / "nih"
REPOSITORY = Path(__file__).parents[3]


def test_what_was_built_is_read_back(nih, built):
    labels = read_labels(nih / "Data_Entry_2017_v2020.csv")
    sources = find_images(nih)
    data = load_dataset(DataConfig(name="chestxray14", data_dir=built))
    assert data.classes == FINDINGS and data.size == 32 and data.multi_label
    assert data.title == "chestxray14 (split patient_hash, a subset: 60 of its 112,120 images)"
    seen = []
    for split in (data.train, data.val, data.test):
        assert split.images.shape == (len(split), 32, 32, 1) and not split.in_memory
        assert data.channels == 1
        names = split.images.names.tolist()
        rows = [labels.names.index(name) for name in names]
        np.testing.assert_array_equal(split.labels, labels.findings[rows])
        expected = [decode(reduce_image(sources[name], 32, Usual(40, 40)), 32) for name in names]
        np.testing.assert_array_equal(split.images[:][..., 0], expected)
        last = len(split) - 1
        np.testing.assert_array_equal(split.images[last], split.images[np.array([last])][0])
        np.testing.assert_array_equal(split.images[-1], split.images[last])
        seen += names
    assert sorted(seen) == list(labels.names)


def test_images_may_be_reduced_as_they_are_read(built):
    data = load_dataset(DataConfig(name="chestxray14", data_dir=built, size=16))
    whole = Image.fromarray(load_chestxray14(built).val.images[2][..., 0])
    expected = np.asarray(whole.resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(data.val.images[2][..., 0], expected)
    assert data.channels == 1 and data.size == 16
    with pytest.raises(UsageError, match=r"`size` 64: .* was built at 32 px; choose 1 to 32"):
        load_chestxray14(built, size=64)


def test_tfds_reads_the_folder_without_tensorflow(built):
    folder = built / json.loads((built / "manifest.json").read_text())["records"]
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        f"source = tfds.builder_from_directory({str(folder)!r}).as_data_source('test')\n"
        "example = source[0]\n"
        "print(example['image'].shape, example['labels'].shape, 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(32, 32, 1) (14,) False", done.stderr


@pytest.mark.long
@pytest.mark.parametrize("split", ["chexnet", "nih_official"])
def test_lists_processes_and_a_second_call_change_nothing(nih, built, tmp_path, split):
    first, said = make(nih, tmp_path / "a", split=split, lists=nih, workers=2)
    assert "60 of the 60 images" in said and "reducing images  60 of 60" in said
    again, said = make(nih, tmp_path / "a", split=split, lists=nih)
    assert again.manifest == first.manifest and again.reduced is None
    assert "reducing" not in said and "no image was reduced" in again.speed()
    if split == "chexnet":  # The lists were made by the hash.
        mine, plain = content(tmp_path / "a")[0], content(built)[0]
        assert mine["content_sha256"] == plain["content_sha256"]
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir()) == [
        "index.npz",
        "manifest.json",
        "records",
        "speed.json",
    ]
    speed = json.loads((tmp_path / "a" / "speed.json").read_bytes())
    assert speed == first.rates and again.rates is None
    assert speed["images"] == speed["reduced"] == 60 and speed["workers"] == 2
    assert min(speed["reducing"], speed["writing"]) > 0
    with pytest.raises(UsageError, match=rf"holds another data set: its split is {split}"):
        make(nih, tmp_path / "a")


def test_the_counts_that_are_printed_are_those_of_the_labels(nih, built):
    manifest, _ = content(built)
    labels = read_labels(nih / "Data_Entry_2017_v2020.csv")
    parts = manifest["positives"].values()
    totals = [sum(part[finding] for part in parts) for finding in FINDINGS]
    assert totals == labels.findings.sum(0).tolist()
    assert sum(manifest["counts"].values()) == 60 and sum(manifest["patients"].values()) == 20
    console = Console(file=io.StringIO(), width=120)
    console.print(summary(manifest))
    printed = console.file.getvalue()
    line = next(line for line in printed.splitlines() if "Hernia" in line)
    assert [int(word) for word in line.split() if word.isdigit()] == [
        manifest["positives"][part]["Hernia"] for part in ("train", "val", "test")
    ]


def test_missing_images_are_counted_and_named_or_allowed(nih, tmp_path):
    place = shutil.copytree(nih, tmp_path / "nih")
    gone = sorted(find_images(place).values())[:4]
    for path in gone:
        path.unlink()
    with pytest.raises(UsageError, match=rf"4 images \({gone[0].name}, .*\.\.\.\) of the 60"):
        make(place, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    made, said = make(place, tmp_path / "out", allow_missing=True)
    assert "56 of the 60 images" in said
    assert sum(made.manifest["counts"].values()) == 56
    data = load_chestxray14(tmp_path / "out")
    assert "a subset: 56 of its 112,120 images" in data.title
    assert sum(data.full_counts.values()) == 60


def test_a_link_to_nothing_is_a_missing_image(nih, tmp_path):
    place = shutil.copytree(nih, tmp_path / "nih")
    path = sorted(find_images(place).values())[0]
    path.unlink()
    path.symlink_to(tmp_path / "gone.png")
    with pytest.raises(UsageError, match=rf"1 image \({path.name}\) of the 60"):
        make(place, tmp_path / "out")


def test_a_finished_build_is_verified_before_it_is_reported_complete(nih, copy):
    made, _ = make(nih, copy)
    assert made.verified().startswith("60 images and their labels were verified by")
    shard = next(path for path in copy.rglob("*train*array_record*") if path.is_file())
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UsageError, match=f"{shard.name} was cut short"):
        make(nih, copy)
    shard.unlink()
    with pytest.raises(UsageError, match=f"{shard.name} is missing"):
        make(nih, copy)


def test_a_finished_build_without_its_index_is_refused(nih, copy):
    (copy / "index.npz").unlink()
    with pytest.raises(UsageError, match=r"index\.npz is missing"):
        make(nih, copy)


def test_training_needs_the_folder_of_a_build():
    with pytest.raises(UsageError, match="chestxray14 needs `data_dir`"):
        load_dataset(DataConfig(name="chestxray14"))


def test_a_split_without_images_is_refused(nih, tmp_path):
    labels = read_labels(nih / "Data_Entry_2017_v2020.csv")
    few = tmp_path / "few"
    few.mkdir()
    train = (nih / "train_list.txt").read_text().split()
    for name in train[:3]:
        shutil.copy(find_images(nih)[name], few)
    with pytest.raises(UsageError, match="has no image of val and test in the split chexnet"):
        make(few, tmp_path / "out", labels=nih, split="chexnet", lists=nih, allow_missing=True)
    assert set(train[:3]) <= set(labels.names)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_damaged_image_stops_the_build_and_is_named(nih, tmp_path, workers):
    place = shutil.copytree(nih, tmp_path / "nih")
    victim = sorted(find_images(place).values())[7]
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=rf"{victim.name} is cut short or damaged"):
        make(place, tmp_path / "out", workers=workers)
    with pytest.raises(UsageError, match="holds no finished ChestX-ray14"):
        load_chestxray14(tmp_path / "out")
    Image.fromarray(pixels(0, 39)).save(victim)
    with pytest.raises(UsageError, match=rf"{victim.name} has 39 x 39 pixels, the others 40 x 40"):
        make(place, tmp_path / "out", workers=workers)
    victim.write_bytes(whole)
    made, _ = make(place, tmp_path / "out", workers=1)
    assert sum(made.manifest["counts"].values()) == 60


def test_a_first_image_of_another_size_is_the_one_that_is_named(nih, tmp_path):
    place = shutil.copytree(nih, tmp_path / "nih")
    first = sorted(find_images(place).values())[0]
    Image.fromarray(pixels(0, 48)).save(first)
    with pytest.raises(UsageError, match=rf"{first.name} has 48 x 48 pixels, the others 40 x 40"):
        make(place, tmp_path / "out")


@pytest.mark.parametrize("stage", ["_write_records", "_verify", "write_manifest"])
def test_a_build_that_stops_late_is_as_if_it_had_not(nih, built, tmp_path, monkeypatch, stage):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(building, stage, stop)
        with pytest.raises(KeyboardInterrupt):
            make(nih, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    again, said = make(nih, tmp_path / "out")
    assert again.reduced.images == 0 and "reducing" not in said
    assert content(tmp_path / "out") == content(built)


@pytest.mark.long
def test_a_killed_build_resumes_to_the_same_bytes(tmp_path):
    nih = tmp_path / "nih"
    table = [(f"{i:08}_000.png", FINDINGS[i % 14], 0, i, 50) for i in range(1, 401)]
    labels = write_labels(nih / "Data_Entry_2017.csv", table)
    write_lists(nih, labels)
    for index in range(4):
        Image.fromarray(pixels(index, 400)).save(nih / f"{index}.bin", "PNG")
    for index, (name, *_) in enumerate(table):
        os.link(nih / f"{index % 4}.bin", nih / name)

    def options(output, workers):
        place = ["--images", str(nih), "--output", str(output), "--workers", str(workers)]
        return ["build", *place, "--split", "chexnet", "--size", "224"]

    command = [sys.executable, "-m", "inmerge_jax.cli.data", *options(tmp_path / "killed", 2)]
    reduced = tmp_path / "killed" / "reduced"
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 200
        while not list(reduced.glob("*.zip")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    time.sleep(0.5)  # A worker that had begun to write may end that.
    parts = len(list(reduced.glob("*.zip")))
    assert 0 < parts < 8 and not (tmp_path / "killed" / "manifest.json").exists()
    with pytest.raises(UsageError, match="holds no finished"):
        load_chestxray14(tmp_path / "killed")

    assert main(options(tmp_path / "killed", 1)) == 0
    assert main(options(tmp_path / "whole", 1)) == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_folder_with_other_files_is_left_alone(nih, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds 1 other file \(thesis\.txt\)"):
        make(nih, tmp_path)
    with pytest.raises(UsageError, match="is a file; choose a folder"):
        make(nih, tmp_path / "thesis.txt")
    with pytest.raises(UsageError, match="`workers` 0"):
        make(nih, tmp_path / "out", workers=0)


def shard(output, split="train"):
    (path,) = (output / content(output)[0]["records"]).glob(f"*-{split}.array_record-*")
    return path


def test_a_shard_cut_short_is_refused_before_training(copy, tmp_path, capsys):
    from inmerge_jax.cli.train import main as train

    path = shard(copy)
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(UsageError, match=rf"{path.name} was cut short or changed"):
        load_chestxray14(copy)
    status = train(
        ["--data", "chestxray14", "--data-dir", str(copy), "--output", str(tmp_path / "o")]
    )
    assert status == 2 and "cut short" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    path.unlink()
    with pytest.raises(UsageError, match=rf"{path.name} is missing"):
        load_chestxray14(copy)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_flipped_byte_in_a_shard_stops_reading(copy, workers):
    from inmerge_jax.data import train_batches

    path = shard(copy)
    data = bytearray(path.read_bytes())
    place = data.rindex(b"IDAT") + 100
    data[place] ^= 1
    path.write_bytes(data)
    split = load_chestxray14(copy).train
    with pytest.raises(UsageError, match=r"record \d+ of train, \w+\.png, is damaged"):
        for _ in train_batches(split, seed=0, batch_size=4, stop=len(split), workers=workers):
            pass


def test_threads_that_read_at_once_open_the_shards_once(built, monkeypatch):
    """TFDS's lazy imports deadlock where two threads are the first to use it."""
    images = load_chestxray14(built).train.images
    fresh = pickle.loads(pickle.dumps(images))  # As in a worker process.
    opened, source = [], Records._source

    def slowly(self):
        opened.append(threading.get_ident())
        time.sleep(0.1)
        return source(self)

    monkeypatch.setattr(Records, "_source", slowly)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(fresh.__getitem__, range(8)))
    np.testing.assert_array_equal(found, images[:8])
    assert len(opened) == 1


def test_test_images_are_identified_by_name(built, nih):
    data = load_chestxray14(built)
    labels = read_labels(nih / "Data_Entry_2017_v2020.csv")
    rows = assign("patient_hash", labels, None)["test"].tolist()
    assert data.test_names_sha256 == names_sha256(labels.names[row] for row in rows[::-1])


def test_loading_opens_the_shards_before_any_thread_reads(built, monkeypatch):
    data = load_chestxray14(built)
    monkeypatch.setattr(Records, "_source", None)
    for split in (data.train, data.val, data.test):
        assert split.images[0].shape == (32, 32, 1)


def test_records_of_another_build_are_noticed(copy):
    data = load_chestxray14(copy)
    names = data.train.images.names[::-1]
    swapped = type(data.train.images)(data.train.images.records, names, 32)
    with pytest.raises(UsageError, match=rf"record 0 of train, {names[0]}, is .*\.png instead"):
        swapped[0]


def test_a_damaged_index_is_refused(copy):
    index = copy / "index.npz"
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"index\.npz is missing or damaged"):
        load_chestxray14(copy)


def change(path):
    """Another image of as many bytes, as far as their number can be kept."""
    size = path.stat().st_size
    Image.fromarray(pixels(99)).save(path)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))


def test_a_finished_build_of_images_that_changed_is_not_taken_for_theirs(nih, tmp_path):
    place = shutil.copytree(nih, tmp_path / "nih")
    make(place, tmp_path / "out")
    victim = sorted(find_images(place).values())[7]
    whole, times = victim.read_bytes(), victim.stat()
    change(victim)
    with pytest.raises(UsageError, match="out was built from other versions .* delete it"):
        make(place, tmp_path / "out")
    victim.write_bytes(whole)
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert make(place, tmp_path / "out")[0].reduced is None


@pytest.mark.long
def test_a_run_is_not_resumed_on_images_that_changed(nih, tmp_path, capsys):
    from inmerge_jax.cli.options import parse_config
    from inmerge_jax.cli.train import main as train
    from inmerge_jax.training.experiment import run_experiment
    from inmerge_jax.training.preemption import TrainingInterrupted
    from inmerge_jax.training.run_spec import make_run_spec

    place = shutil.copytree(nih, tmp_path / "nih")
    data, output = tmp_path / "data", tmp_path / "run"
    make(place, data)
    options = ["--data", "chestxray14", "--data-dir", str(data), "--output", str(output)]
    options += "--model vgg11 --width 0.05 --skip 4 --batch-size 8 --devices 1 --workers 0".split()
    with pytest.raises(TrainingInterrupted, match="stopped before the first update"):
        run_experiment(make_run_spec(parse_config(options)), lambda: True)
    change(sorted(find_images(place).values())[7])
    shutil.rmtree(data)
    make(place, data)
    assert train([*options, "--resume"]) == 2
    assert "started with another configuration:\n  data.content_sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module, write",
    [(reduce, "write_bytes"), (building, "write_bytes"), (building, "write_manifest")],
)
def test_a_full_disk_is_said_and_loses_nothing(nih, built, tmp_path, monkeypatch, module, write):
    def full(path, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, write, full)
        with pytest.raises(UsageError, match=r"cannot write .*out.*: No space left.*what is done"):
            make(nih, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    make(nih, tmp_path / "out")
    assert content(tmp_path / "out") == content(built)


def test_bad_input_on_the_command_line_is_status_2(nih, tmp_path, capsys):
    options = ["build", "--images", str(nih / "none"), "--labels", str(nih), "--output"]
    assert main([*options, str(tmp_path / "out")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


@pytest.mark.long
@needs(NIH / "images_224")
def test_the_real_folder_of_224_px(tmp_path):
    made, said = make(
        NIH / "images_224",
        tmp_path / "out",
        labels=NIH,
        split="chexnet",
        lists=NIH,
        size=224,
        allow_missing=True,
    )
    assert "1,000 of the 112,120 images" in said
    assert made.manifest["counts"] == {"train": 704, "val": 77, "test": 219}
    assert made.manifest["positives"]["test"]["Pneumonia"] == 94
    assert made.manifest["positives"]["test"]["Hernia"] == 0


@pytest.mark.long
@needs(NIH / "images_original")
def test_the_real_folder_of_originals(tmp_path):
    made = build(
        Request(NIH / "images_original", NIH, "patient_hash", None, 512, tmp_path / "out", 1, True),
        Console(file=io.StringIO()),
    )
    assert sum(made.manifest["counts"].values()) == 24
    assert load_chestxray14(tmp_path / "out").test.images[0].std() > 20


def test_no_flipped_bit_of_a_reduced_part_is_read_or_a_traceback(tmp_path):
    images = {"a.png": b"one" * 9, "b.png": b"two" * 9}
    path = tmp_path / "part.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in images.items():
            archive.writestr(name, data)
    part = reduce.Part(np.arange(2), tuple(map(Path, images)), path)
    whole, refused = path.read_bytes(), 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert list(part.read()) == list(images.values()), bit
        except UsageError as error:
            assert "build again" in str(error)
            refused += 1
    assert refused > 4 * len(whole)
