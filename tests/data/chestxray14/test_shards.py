"""Writing the shards: in any memory, on a disk that fills up, and one build at a time."""

import os
import tracemalloc
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

from inmerge_jax.data.chestxray14 import build as building
from inmerge_jax.data.chestxray14 import builder, reduce
from inmerge_jax.data.chestxray14.builder import ChestXray14
from inmerge_jax.data.chestxray14.labels import read_labels
from inmerge_jax.data.chestxray14.records import load_chestxray14
from inmerge_jax.data.chestxray14.reduce import Part
from inmerge_jax.errors import UsageError
from inmerge_jax.locking import LOCK, lock
from tests.data.chestxray14.nih import content, make
from tests.training.disk import small_disk


def test_what_exceeds_tfds_memory_is_written_without_tensorflow(nih, built, tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1)
    assert make(nih, tmp_path / "out")[0].manifest == content(built)[0]


def test_a_large_split_has_several_shards_in_the_order_of_the_names(
    nih, built, tmp_path, monkeypatch
):
    monkeypatch.setattr(reduce, "IMAGES_PER_PART", 8)
    monkeypatch.setattr(builder, "SHARD_BYTES", 9_000)  # A part of noise has 8,900 to 9,900.
    manifest = make(nih, tmp_path / "out")[0].manifest
    assert manifest["content_sha256"] == content(built)[0]["content_sha256"]
    shards = {name: shard["records"] for name, shard in manifest["shards"].items()}
    train = [f"chest_xray14-train.array_record-{i:05}-of-00006" for i in range(6)]
    assert [shards[name] for name in train] == [8, 8, 8, 8, 8, 5]
    info = tfds.builder_from_directory(tmp_path / "out" / manifest["records"]).info
    assert info.splits["train"].shard_lengths == [8, 8, 8, 8, 8, 5]
    one, many = load_chestxray14(built).train, load_chestxray14(tmp_path / "out").train
    assert many.images.names.tolist() == one.images.names.tolist()
    np.testing.assert_array_equal(many.images[:], one.images[:])


def test_memory_holds_one_shard_and_not_the_split(nih, tmp_path, monkeypatch):
    labels = read_labels(nih / "Data_Entry_2017_v2020.csv")
    image, parts = os.urandom(200_000), []
    for first in range(0, 60, 5):
        sources = tuple(nih / labels.names[row] for row in range(first, first + 5))
        parts.append(Part(np.arange(first, first + 5), sources, tmp_path / f"{first}.zip"))
        with zipfile.ZipFile(parts[-1].path, "w") as archive:
            for source in sources:
                archive.writestr(source.name, image)
    monkeypatch.setattr(builder, "SHARD_BYTES", 1)
    config = ChestXray14.config_for("patient_hash", 32)
    tfds.disable_progress_bar()
    writes = ChestXray14(
        labels=labels, parts={"train": parts}, data_dir=tmp_path / "records", config=config
    )
    tracemalloc.start()
    writes.download_and_prepare(file_format="array_record")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert writes.info.splits["train"].shard_lengths == [5] * 12
    assert peak < 5_000_000  # Of 12 MB; a shard has one.


def test_a_disk_that_is_full_while_shards_are_written(nih, built, tmp_path, monkeypatch):
    write = building._write_records

    def fill_up(*arguments):
        disk = os.statvfs(tmp_path / "disk")
        ballast.write_bytes(bytes(disk.f_bavail * disk.f_frsize - 32_768))
        return write(*arguments)

    with small_disk(tmp_path / "disk", megabytes=2) as disk:
        ballast, output = disk / "ballast", disk / "out"
        with monkeypatch.context() as patched:
            patched.setattr(building, "_write_records", fill_up)
            with pytest.raises(
                UsageError, match=r"cannot write to .*out: No space left .*keeps what is done"
            ):
                make(nih, output)
        assert sorted(entry.name for entry in output.iterdir()) == ["records", "reduced"]
        ballast.unlink()
        assert make(nih, output)[0].reduced.images == 0
        assert content(output) == content(built)


def test_array_records_disk_errors_are_reported(nih, tmp_path, monkeypatch):
    said = "write() failed: No space left on device; writing /data/x; at byte 1048576"

    def full(*_):
        raise RuntimeError(said)

    monkeypatch.setattr(tfds.core.ExampleWriter, "write", full)
    with pytest.raises(UsageError, match=r"out: No space left on device; make room"):
        make(nih, tmp_path / "out")
    said = "another fault"
    with pytest.raises(RuntimeError, match="another fault"):
        make(nih, tmp_path / "out")


def test_a_second_build_is_refused_while_the_first_is_at_work(nih, built, tmp_path):
    output = tmp_path / "out"
    with lock(output):
        (output / "records").mkdir()
        with pytest.raises(UsageError, match=rf"out is in use: process {os.getpid()} on .* writes"):
            make(nih, output)
        assert (output / "records").is_dir()
    (output / LOCK).write_text("process 1 on a machine that lost its power")
    make(nih, output)
    assert content(output) == content(built) and not (output / LOCK).exists()


def test_a_build_that_another_one_has_just_ended_is_taken_over(nih, copy, tmp_path, monkeypatch):
    finished, calls = building._finished, []

    def later(*arguments):
        calls.append(arguments)
        return None if len(calls) == 1 else finished(*arguments)

    monkeypatch.setattr(building, "_finished", later)
    made, said = make(nih, copy)
    assert made.reduced is None and "writing" not in said and len(calls) == 2


def test_a_folder_without_locks_is_built_in_with_a_warning(nih, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    assert "has no locks: start no second process there" in make(nih, tmp_path / "out")[1]
    assert not (tmp_path / "out" / LOCK).exists()


def die(*_):
    os._exit(9)


@pytest.mark.long
def test_a_killed_process_is_reported_with_a_remedy(nih, tmp_path, monkeypatch):
    monkeypatch.setattr(reduce, "IMAGES_PER_PART", 30)
    monkeypatch.setattr(reduce, "reduce_part", die)
    with pytest.raises(UsageError, match=r"of the 2 processes .* was killed.* fewer `workers`"):
        make(nih, tmp_path / "out", workers=2)
