"""One process at a time writes a run's folder in Cloud Storage."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from inmerge_jax import locking
from inmerge_jax.errors import UsageError
from inmerge_jax.locking import FolderInUseError, lock, require_free
from tests.emulator import cloud_storage
from tests.long import LONG
from tests.training.lock_holder import another_process

HOLDER = """
import sys
from inmerge_jax import locking

locking.LEASE_SECONDS = float(sys.argv[2])
with locking.lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
print("released", flush=True)
"""


@pytest.fixture(scope="module")
def bucket():
    with cloud_storage("bucket") as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        yield "gs://bucket"


@pytest.fixture
def folder(bucket, request):
    return f"{bucket}/runs/{request.node.name}"


def blob(folder):
    from google.cloud import storage

    name = f"{folder}/.lock".removeprefix("gs://bucket/")
    return storage.Client(project=None).bucket("bucket").blob(name)


def of_another_host(folder, seconds):
    lease = {"holder": "process 7 on tpu-3", "token": "a", "pid": 7, "system": ["tpu-3", "b", "c"]}
    blob(folder).upload_from_string(json.dumps({**lease, "expires": time.time() + seconds}))


def test_another_process_is_named_and_no_obstacle_once_it_is_killed(folder):
    with another_process(HOLDER, folder, 60) as process:
        words = f"^{folder} is in use: process {process.pid} on .*choose another folder$"
        for take in (require_free, lambda folder: lock(folder).__enter__()):
            with pytest.raises(FolderInUseError, match=words):
                take(folder)
        process.kill()
        process.wait()
        require_free(folder)
        with lock(folder):
            assert json.loads(blob(folder).download_as_bytes())["pid"] == os.getpid()
    assert not blob(folder).exists()


def test_a_path_of_etils_means_the_same_folder(folder):
    from etils import epath

    with lock(epath.Path(folder)), pytest.raises(FolderInUseError, match=f"^{folder} is in use"):
        require_free(folder)


def test_a_lease_of_another_host_is_taken_over_when_it_ends(folder):
    of_another_host(folder, seconds=0.5)
    with pytest.raises(FolderInUseError, match="process 7 on tpu-3 writes there.* ends at .*:"):
        require_free(folder)
    with lock(folder, wait=True):
        assert json.loads(blob(folder).download_as_bytes())["pid"] == os.getpid()


def test_a_lease_is_renewed_while_it_is_held(folder, monkeypatch):
    monkeypatch.setattr(locking, "LEASE_SECONDS", 0.6)
    with lock(folder):
        time.sleep(1.2)
        with pytest.raises(FolderInUseError):
            require_free(folder)


@LONG
def test_of_several_processes_at_once_a_single_one_gets_the_lease(folder):
    of_another_host(folder, seconds=-1)
    together, done = threading.Barrier(4), threading.Event()

    def attempt(_):
        together.wait()
        try:
            with lock(folder):
                return done.wait(2)
        except FolderInUseError:
            return None

    with ThreadPoolExecutor(4) as pool:
        assert sorted(map(str, pool.map(attempt, range(4)))) == ["False", "None", "None", "None"]


def test_a_write_whose_answer_is_lost_counts(folder, monkeypatch):
    from google.api_core.exceptions import PreconditionFailed
    from google.cloud.storage import Blob

    upload, tries = Blob.upload_from_string, []

    def retried(self, *arguments, **options):
        upload(self, *arguments, **options)
        tries.append(options["if_generation_match"])
        raise PreconditionFailed("the first try has written it")

    monkeypatch.setattr(Blob, "upload_from_string", retried)
    monkeypatch.setattr(locking, "LEASE_SECONDS", 0.6)
    with lock(folder):
        time.sleep(0.5)
    assert len(tries) > 1 and not blob(folder).exists()


@LONG
@pytest.mark.parametrize(
    ("take", "words"),
    [
        (lambda folder: of_another_host(folder, 60), "process 7 on tpu-3 has taken it"),
        (lambda folder: blob(folder).delete(), "it was removed"),
    ],
)
def test_a_process_that_loses_its_lease_ends(folder, take, words):
    with another_process(HOLDER, folder, 0.9) as process:
        take(folder)
        output, errors = process.communicate("", timeout=20) if process.wait(20) else ("", "")
        assert process.returncode == 1 and "released" not in output
        assert f"error: the lease on {folder} is lost ({words})" in errors


def test_other_storage_and_a_missing_bucket_are_refused(bucket):
    with pytest.raises(UsageError, match="s3:// has no locks; choose a local or a gs://"):
        require_free("s3://bucket/run")
    with pytest.raises(UsageError, match="^gs://none/run cannot be locked: .*name of the bucket"):
        lock("gs://none/run").__enter__()
