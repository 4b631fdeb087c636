"""Runs in Cloud Storage, against an emulator that the test starts.

It stores and lists objects, and checks generations, as the real service does. It has no rights, no
quotas, no lost connections, and answers one request at a time, so its times mean nothing.
"""

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from experiments.reliability.jobs import run_evidence
from inmerge_jax import buckets
from inmerge_jax.buckets import as_path, bucket_files, local_copy
from inmerge_jax.cli import export, predict, report
from inmerge_jax.cli.train import main
from inmerge_jax.data import DataConfig, load_dataset
from inmerge_jax.errors import UsageError
from inmerge_jax.training.checkpointing import (
    DamagedCheckpointError,
    checkpoint_epochs,
    newest,
    prune,
    read_arrays,
    read_meta,
    restore_checkpoint,
    save_checkpoint,
)
from inmerge_jax.training.environment import enable_compilation_cache
from inmerge_jax.training.init import file_sha256
from inmerge_jax.training.metrics_file import append_metrics, read_metrics, truncate_metrics
from inmerge_jax.training.preemption import TrainingInterrupted
from inmerge_jax.training.workdir import prepare_workdir
from tests.emulator import cloud_storage
from tests.training import tiny
from tests.training.test_train import evidence, run

REPOSITORY = Path(__file__).parents[2]
COMMAND = (
    "--size 16 --phantom.train 32 --phantom.val 8 --phantom.test 8 --model vgg11 --width 0.1 "
    "--skip 4 --batch-size 16 --epochs 2 --merging-epochs 1 --arms inmerge --devices 1 "
    "--quantile 0.5 --partner nearest"
).split()


@pytest.fixture(scope="module")
def bucket():
    """The address of an empty bucket."""
    with cloud_storage("bucket") as url, pytest.MonkeyPatch.context() as patched:
        patched.setenv("STORAGE_EMULATOR_HOST", url)
        patched.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        # Else gcsfs asks Google for the kind of bucket, with credentials that nobody has here.
        patched.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        patched.setenv("NO_GCE_CHECK", "true")
        yield as_path("gs://bucket")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def killed_after_the_first_epoch(output):
    command = [sys.executable, "-m", "inmerge_jax.cli.train", *COMMAND, "--output", str(output)]
    first = output / "seed0" / "backbone" / "checkpoints" / "1" / "manifest.json"
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            deadline = time.monotonic() + 200
            while not first.exists():
                assert process.poll() is None, process.stdout.read().decode()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.long
def test_a_stage_in_a_bucket_resumes_to_the_bits_of_a_local_one(bucket, tmp_path, monkeypatch):
    run(tmp_path, rule=tiny.ALWAYS)
    stopping = dataclasses.replace(tiny.make_setup(), should_stop=tiny.after(8))
    with pytest.raises(TrainingInterrupted, match="saved in gs://bucket/stage/mid_epoch/4"):
        run(bucket / "stage", setup=stopping, rule=tiny.ALWAYS)
    _, text = run(bucket / "stage", rule=tiny.ALWAYS)
    assert "resumes from epoch 1 of 3, update 1 of the next" in text
    assert evidence(bucket / "stage") == evidence(tmp_path)


@pytest.mark.long
def test_the_life_of_a_run_in_a_bucket(bucket, tmp_path, capsys):
    output, local = bucket / "runs" / "a b", tmp_path / "local"
    killed_after_the_first_epoch(output)
    assert main([*COMMAND, "--output", str(output)]) == 2
    assert f"{output} holds an unfinished run" in capsys.readouterr().err
    assert main([*COMMAND, "--output", str(output), "--resume"]) == 0
    said = capsys.readouterr().out
    assert "seed 0 backbone: resumes from epoch" in said and "damaged" not in said
    assert main([*COMMAND, "--output", str(local)]) == 0
    assert run_evidence(output) == run_evidence(local)
    assert not list(Path(REPOSITORY).glob("gs:*"))

    page = (output / "report.html").read_bytes()
    (output / "report.html").unlink()
    assert report.main([str(output)]) == 0
    assert f"report: {output}/report.html" in capsys.readouterr().out
    assert (output / "report.html").read_bytes() == page
    targets = (bucket / "w.safetensors", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    for folder, target in zip((output, output, local), targets, strict=True):
        assert export.main([str(folder), "--to", str(target)]) == 0
    assert len({target.read_bytes() for target in targets}) == 1
    scan = bucket / "new" / "scan.png"
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / scan.name)
    scan.write_bytes((tmp_path / scan.name).read_bytes())
    for place, name in ((scan, "a.csv"), (scan.parent, "b.csv")):
        command = [str(output), "--images", str(place), "--to", str(bucket / name)]
        assert predict.main(command) == 0
        assert predict.main(command) == 2 and f"{name} exists" in capsys.readouterr().err
    assert (bucket / "a.csv").read_bytes() == (bucket / "b.csv").read_bytes()
    assert f"\n,{scan.name},0." in (bucket / "a.csv").read_text()

    prepare_workdir(output, {}, overwrite=True)
    names = {path.name for path in output.iterdir()}
    assert names == {"config.json", "environment.json"}


@pytest.mark.long
def test_damage_in_a_bucket_is_detected_and_skipped(bucket):
    folder, tree = bucket / "checkpoints", {"w": np.arange(1000.0), "none": np.zeros((0, 2))}
    for epoch in range(2, 5):
        save_checkpoint(folder, epoch, tree, {"epoch": epoch}, keep={2, epoch - 1, epoch})
    assert checkpoint_epochs(folder) == [2, 3, 4]
    found, meta = restore_checkpoint(folder / "4", tree)
    np.testing.assert_array_equal(found["w"], tree["w"])
    assert meta == {"epoch": 4}
    (data,) = (folder / "4" / "state" / "d").iterdir()
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    with pytest.raises(DamagedCheckpointError, match="content of state/d/.* was changed"):
        read_arrays(folder / "4")
    meta, damaged = newest(folder, read_meta)
    assert meta == {"epoch": 3} and len(damaged) == 1
    (folder / "3" / "commit_success.txt").unlink()  # As in a write that was interrupted.
    assert newest(folder, read_meta)[0] == {"epoch": 2}
    save_checkpoint(folder, 3, tree, {"epoch": 3}, keep={2, 3})
    assert newest(folder, read_meta) == ({"epoch": 3}, ())
    prune(folder, {2})
    assert [path.name for path in folder.iterdir()] == ["2"]
    with pytest.raises(UsageError, match="cannot write gs://nobody/checkpoints/1: "):
        save_checkpoint(as_path("gs://nobody/checkpoints"), 1, tree, {})


def test_metrics_in_a_bucket(bucket):
    path = bucket / "seed0" / "metrics.jsonl"
    assert read_metrics(path) == []
    for epoch in (1, 2, 3):
        append_metrics(path, {"epoch": epoch})
    truncate_metrics(path, 2)
    assert read_metrics(path) == [{"epoch": 1}, {"epoch": 2}]


def test_a_local_copy_is_renewed_when_the_object_changes(bucket, home, tmp_path):
    folder = bucket / "data"
    (folder / "a.npz").write_bytes(b"1" * 1000)
    (folder / "sub" / "b.npz").write_bytes(b"2")
    copy = local_copy(folder)
    assert home in copy.parents and copy.name == "data"
    assert (copy / "a.npz").read_bytes() == b"1" * 1000 and (copy / "sub/b.npz").exists()
    assert local_copy(str(folder)) == copy
    file = local_copy(folder / "a.npz")
    assert file.name == "a.npz" and file.read_bytes() == b"1" * 1000
    only = local_copy(folder, "a*")
    assert [path.name for path in only.iterdir()] == ["a.npz"]
    (folder / "a.npz").write_bytes(b"3" * 1000)
    assert local_copy(folder / "a.npz").read_bytes() == b"3" * 1000
    assert file.read_bytes() == b"1" * 1000  # Another process may be reading it.
    assert local_copy(tmp_path) == tmp_path
    assert file_sha256(folder / "a.npz") == file_sha256(local_copy(folder / "a.npz"))


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("gs://bucket/none", "there is nothing in the bucket; check"),
        ("gs://nobody/none", "there is no such bucket"),
        ("s3://bucket/x", "of buckets only gs://BUCKET/NAME is read"),
    ],
)
def test_an_address_without_a_file_is_named(bucket, home, address, words):
    with pytest.raises(UsageError, match=f"{address}: {words}"):
        local_copy(address)


def test_a_copy_that_arrives_damaged_is_not_kept(bucket, home, monkeypatch):
    (bucket / "weights.pth").write_bytes(b"1" * 100)
    found = buckets.bucket_files

    def changed(path):
        return {name: info | {"md5Hash": "AAAA"} for name, info in found(path).items()}

    monkeypatch.setattr(buckets, "bucket_files", changed)
    with pytest.raises(UsageError, match="arrived damaged, with 100 bytes"):
        local_copy(bucket / "weights.pth")
    assert not list(home.rglob("weights.pth"))
    monkeypatch.undo()


@pytest.mark.long
def test_a_folder_of_images_in_a_bucket_is_the_one_that_was_copied_there(bucket, home, tmp_path):
    rows = ["path,label"]
    for number, image in enumerate(np.arange(20 * 16, dtype=np.uint8).reshape(20, 4, 4)):
        name = f"{'ab'[number % 2]}/{number}.png"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
        (bucket / "scans" / name).write_bytes((tmp_path / name).read_bytes())
        rows.append(f"{name},{name[0]}")
    local = load_dataset(DataConfig(f"folder:{tmp_path}"))
    assert load_dataset(DataConfig(f"folder:{bucket}/scans")).fingerprint == local.fingerprint
    (bucket / "scans" / "labels.csv").write_text("\n".join(rows))
    listed = load_dataset(DataConfig(f"folder:{bucket}/scans/labels.csv"))
    assert listed.fingerprint == local.fingerprint


def test_a_data_set_that_is_not_in_the_bucket_is_named(bucket, home):
    with pytest.raises(UsageError, match=r"nothing that matches breastmnist\* in the bucket"):
        load_dataset(DataConfig("breastmnist", data_dir=bucket / "data"))


def test_without_the_package_a_run_ends_at_once(monkeypatch, capsys):
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main([*COMMAND, "--output", "gs://bucket/run"])
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "buckets need the package gcsfs" in said and "inmerge-jax[gcs]" in said


def test_compiled_programs_are_kept_in_a_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
        "jax_persistent_cache_enable_xla_caches",
    )
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    try:
        enable_compilation_cache(bucket / "cache")
        # XLA would look for a local folder of this name, on a GPU.
        assert jax.config.jax_persistent_cache_enable_xla_caches == "none"
        jax.block_until_ready(jax.jit(lambda x: x * 1.25 + 7)(np.ones(3)))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert any(name.endswith("-cache") for name in bucket_files(bucket / "cache"))
    assert not list(tmp_path.iterdir())
