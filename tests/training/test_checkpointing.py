import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from inmerge_jax import files
from inmerge_jax.errors import UsageError
from inmerge_jax.training.checkpointing import (
    DamagedCheckpointError,
    check_folder,
    checkpoint_epochs,
    newest,
    prune,
    read_arrays,
    read_meta,
    restore_checkpoint,
    save_checkpoint,
)
from tests.long import long_unless
from tests.training.disk import look_away, small_disk

REPOSITORY = Path(__file__).parents[2]
META = {"epoch": 3, "best_epoch": 2, "val_auc": 0.1 + 0.2, "note": None}


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any
    learning_rate: float = flax.struct.field(pytree_node=False, default=0.1)


def make_state(seed=0, width=4):
    rng = np.random.default_rng(seed)
    params = {
        "Conv_0": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 2, width)), jnp.bfloat16)},
        "Dense_0": {"bias": jnp.asarray(rng.normal(size=width), jnp.float32)},
    }
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.adam(1e-3), optax.trace(0.9))
    opt_state = tx.init(params)
    _, opt_state = tx.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
    return State(jnp.int32(7), params, opt_state)


def valid(folder):
    """The path of the newest undamaged checkpoint, and what is said of damaged ones."""
    return newest(folder, lambda path: (path, read_meta(path))[0])


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def bits(path):
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_state_comes_back(tmp_path):
    state = make_state()
    path = save_checkpoint(tmp_path / "new" / "checkpoints", 3, state, META)
    assert path == tmp_path / "new" / "checkpoints" / "3"
    found, meta = restore_checkpoint(path, jax.tree.map(jnp.zeros_like, state))
    assert_same(found, state)
    assert meta == META == read_meta(path)
    assert os.listdir(path.parent) == ["3"]


@pytest.mark.parametrize(
    "dtype",
    ["float32", "float64", "float16", "bfloat16", "int8", "int32", "int64", "uint8", "uint32"],
)
def test_every_bit_pattern_comes_back(tmp_path, dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    data = np.random.default_rng(0).bytes(dtype.itemsize * 4096)
    tree = {
        "all": np.frombuffer(data, dtype).reshape(64, 64),
        "zero": np.zeros(3, dtype),
        "negative_zero": (-np.zeros(3)).astype(dtype),
    }
    found, _ = restore_checkpoint(save_checkpoint(tmp_path, 0, tree, {}), tree)
    assert_same(found, tree)


def test_odd_leaves_and_names_come_back(tmp_path):
    tree = {
        "linear/~/conv": {"w": np.ones((2, 1))},
        "a b": np.array(3.5, np.float32),
        "é.x": [np.array([True, False]), (np.zeros((0, 3), np.int8), None)],
        "number": 3,
        "rate": 0.1,
        "scalar": np.float32(0.2),
        "empty": {},
    }
    found, _ = restore_checkpoint(save_checkpoint(tmp_path, 0, tree, {}), tree)
    assert_same(found, tree)
    kinds = [type(found[name]) for name in ("number", "rate", "scalar")]
    assert kinds == [int, float, np.float32]


@pytest.mark.parametrize("tree", [{}, np.arange(3), {"none": np.zeros((0,), np.float32)}])
def test_smallest_trees_come_back(tmp_path, tree):
    found, _ = restore_checkpoint(save_checkpoint(tmp_path, 0, tree, {}), tree)
    assert_same(found, tree)


def test_restored_state_may_be_donated(tmp_path):
    state = {"w": jnp.arange(4096.0)}
    path = save_checkpoint(tmp_path, 0, state, {})
    found, again = (restore_checkpoint(path, state)[0] for _ in range(2))
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    for _ in range(3):
        found = step(found)
    np.testing.assert_array_equal(found["w"], state["w"] + 3)
    assert_same(again, state)


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (lambda: jax.random.key(0), "key_data"),
        (lambda: "text", "not an array"),
        (lambda: object(), "not an array"),
    ],
)
def test_refuses_leaves_that_are_no_arrays(tmp_path, leaf, words):
    with pytest.raises(ValueError, match=f"a.b.*{words}"):
        save_checkpoint(tmp_path / "new", 0, {"a": {"b": leaf()}}, {})
    assert not (tmp_path / "new").exists()


def test_refuses_two_entries_of_one_name(tmp_path):
    with pytest.raises(ValueError, match=r"'a\.b'"):
        save_checkpoint(tmp_path, 0, {"a": {"b": 1}, "a.b": 2}, {})


def test_saving_an_epoch_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, 2, make_state(0), {"try": 1})
    path = save_checkpoint(tmp_path, 2, make_state(1), {"try": 2})
    found, meta = restore_checkpoint(path, make_state())
    assert_same(found, make_state(1))
    assert meta == {"try": 2} and os.listdir(tmp_path) == ["2"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s.replace(params={**s.params, "Conv_1": {"kernel": jnp.ones(2)}}),
            ["params.Conv_1.kernel: nothing in the checkpoint, float32[2] expected"],
        ),
        (
            lambda s: s.replace(params={"Dense_0": s.params["Dense_0"]}),
            ["params.Conv_0.kernel: bfloat16[3,3,2,4] in the checkpoint, nothing expected"],
        ),
        (
            lambda s: s.replace(step=jnp.zeros(2, jnp.int32)),
            ["step: int32[] in the checkpoint, int32[2] expected"],
        ),
        (
            lambda s: s.replace(step=jnp.float32(0)),
            ["step: int32[] in the checkpoint, float32[] expected"],
        ),
        (lambda _: make_state(width=5), ["bfloat16[3,3,2,4]", "bfloat16[3,3,2,5]", "and 3 more"]),
    ],
)
def test_another_structure_is_named(tmp_path, change, words):
    path = save_checkpoint(tmp_path, 0, make_state(), {})
    with pytest.raises(UsageError) as raised:
        restore_checkpoint(path, change(make_state()))
    assert not isinstance(raised.value, DamagedCheckpointError)
    assert str(path) in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_every_flipped_byte_is_seen(tmp_path):
    path = save_checkpoint(tmp_path, 4, make_state(), META)
    rng = np.random.default_rng(0)
    for file, data in bits(path).items():
        for place in {0, len(data) - 1, int(rng.integers(len(data)))}:
            for mask in (0x01, 0xFF):
                changed = bytearray(data)
                changed[place] ^= mask
                file.write_bytes(bytes(changed))
                with pytest.raises(DamagedCheckpointError, match=str(path)):
                    restore_checkpoint(path, make_state())
                assert valid(tmp_path)[0] is None
        file.write_bytes(data)
    assert valid(tmp_path) == (path, ())


def test_every_missing_truncated_or_longer_file_is_seen(tmp_path):
    path = save_checkpoint(tmp_path, 4, make_state(), META)
    for file, data in bits(path).items():
        for broken in (None, data[:-2], b"", data + b"\0"):
            file.unlink() if broken is None else file.write_bytes(broken)
            with pytest.raises(DamagedCheckpointError) as raised:
                restore_checkpoint(path, make_state())
            assert file.relative_to(path).as_posix() in str(raised.value)
            file.write_bytes(data)
    assert_same(restore_checkpoint(path, make_state())[0], make_state())


def test_the_latest_valid_checkpoint_is_found(tmp_path):
    for epoch in (2, 9, 10, 11):
        save_checkpoint(tmp_path, epoch, {"w": np.full(1000, epoch)}, {})
    file = max(bits(tmp_path / "11" / "state"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:100])
    (tmp_path / "10" / "manifest.json").unlink()
    (tmp_path / "notes").mkdir()
    path, damaged = valid(tmp_path)
    assert path == tmp_path / "9"
    assert len(damaged) == 2
    assert f"{tmp_path / '11'} is damaged" in damaged[0] and "bytes instead of" in damaged[0]
    assert f"{tmp_path / '10'} is damaged: manifest.json is missing" in damaged[1]
    assert checkpoint_epochs(tmp_path) == [2, 9, 10, 11]


def test_folders_without_checkpoints(tmp_path):
    assert valid(tmp_path) == valid(tmp_path / "absent") == (None, ())
    assert checkpoint_epochs(tmp_path / "absent") == []
    with pytest.raises(UsageError, match="no checkpoint at"):
        restore_checkpoint(tmp_path / "5", {})
    with pytest.raises(UsageError, match="no checkpoint at"):
        read_meta(tmp_path / "5")


def test_prune_keeps_the_given_epochs(tmp_path):
    for epoch in range(1, 5):
        save_checkpoint(tmp_path, epoch, {"w": np.ones(3)}, {})
    (tmp_path / "notes").mkdir()
    prune(tmp_path, {1, 3, 99})
    assert sorted(os.listdir(tmp_path)) == ["1", "3", "notes"]
    assert valid(tmp_path) == (tmp_path / "3", ())


def test_a_write_that_was_interrupted_before_its_manifest_is_no_damage(tmp_path):
    for epoch in (1, 2):
        save_checkpoint(tmp_path, epoch, {"w": np.full(1000, epoch)}, {})
    (tmp_path / "2" / "manifest.json").unlink()
    assert valid(tmp_path) == (tmp_path / "1", ())
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is missing"):
        restore_checkpoint(tmp_path / "2", {"w": np.zeros(1000)})
    path = save_checkpoint(tmp_path, 2, {"w": np.full(1000, 3)}, {})
    assert valid(tmp_path) == (path, ())


def test_keeping_deletes_the_others_once_the_new_one_is_complete(tmp_path):
    for epoch in range(1, 5):
        save_checkpoint(tmp_path, epoch, {"w": np.ones(3)}, {}, keep={1, epoch - 1, epoch})
    assert checkpoint_epochs(tmp_path) == [1, 3, 4]
    assert sorted(os.listdir(tmp_path)) == ["1", "3", "4"]


def test_unreadable_checkpoints_are_skipped_without_checksums(tmp_path):
    for epoch in (1, 2):
        path = save_checkpoint(tmp_path, epoch, make_state(epoch), META, checksums=False)
    assert not (path / "manifest.json").exists()
    found, meta = restore_checkpoint(path, make_state())
    assert_same(found, make_state(2))
    assert meta == META
    shutil.rmtree(path / "state" / "d")
    found, damaged = newest(tmp_path, lambda path: restore_checkpoint(path, make_state())[0])
    assert_same(found, make_state(1))
    assert damaged == ()  # Without checksums it may as well be one that was interrupted.
    with pytest.raises(DamagedCheckpointError, match=f"{path} is damaged"):
        restore_checkpoint(path, make_state())


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from inmerge_jax import files
from inmerge_jax.training import checkpointing

folder, point, calls = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
checkpointing.save_checkpoint(folder, 1, {"w": np.arange(10_000)}, {})
module = {"rename": os, "write_json_with_checksum": files}[point]
function, called = getattr(module, point), []

def die(*args):
    called.append(args)
    if len(called) == calls:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args)

setattr(module, point, die)
checkpointing.save_checkpoint(folder, 2, {"w": np.arange(10_000)}, {})
"""


@pytest.mark.parametrize(
    ("point", "calls"),
    long_unless([("rename", 3)], [("rename", 1), ("rename", 3), ("write_json_with_checksum", 1)]),
)
def test_killed_writer_leaves_no_half_checkpoint(tmp_path, point, calls):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, point, str(calls)],
        capture_output=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert valid(tmp_path) == (tmp_path / "1", ())
    assert len(os.listdir(tmp_path)) == 2
    path = save_checkpoint(tmp_path, 2, {"w": np.zeros(3)}, {})
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]
    assert valid(tmp_path) == (path, ())


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "point", ["ocp.CheckpointManager.save", "files.sync_all", "files.write_json_with_checksum"]
)
def test_a_full_disk_leaves_the_earlier_checkpoint_valid(tmp_path, monkeypatch, point):
    first = save_checkpoint(tmp_path, 1, make_state(), META)
    before = bits(first)
    monkeypatch.setattr(f"inmerge_jax.training.checkpointing.{point}", full)
    with pytest.raises(UsageError, match=rf"{tmp_path / '2'}: No space left.*room"):
        save_checkpoint(tmp_path, 2, make_state(), META)
    assert os.listdir(tmp_path) == ["1"] and bits(first) == before


def test_too_little_room_is_seen_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    save_checkpoint(tmp_path, 1, {"w": np.zeros(100)}, {})
    with pytest.raises(UsageError, match=r"8\.0 MB needed, 1\.5 MB free"):
        save_checkpoint(tmp_path, 2, {"w": np.zeros(10**6)}, {})
    assert os.listdir(tmp_path) == ["1"]


@pytest.fixture
def small_files():
    """The system refuses files of more than 100 kB, in the middle of writing them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_failure_in_the_middle_of_a_file(tmp_path, small_files, caplog):
    first = save_checkpoint(tmp_path, 1, {"w": np.zeros(10)}, {})
    before = bits(first)
    with pytest.raises(UsageError, match=f"{tmp_path / '2'}: File too large"):
        save_checkpoint(tmp_path, 2, {"w": np.random.default_rng(0).normal(size=10**6)}, {})
    assert os.listdir(tmp_path) == ["1"] and bits(first) == before
    assert not caplog.records


@pytest.mark.parametrize("looks_first", [True, False])
def test_really_full_disk(tmp_path, monkeypatch, looks_first):
    if not looks_first:
        look_away(monkeypatch)
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        first = save_checkpoint(disk, 1, {"w": np.ones(10_000)}, {})
        before = bits(first)
        with pytest.raises(UsageError, match=f"{disk / '2'}: No space left on device"):
            save_checkpoint(disk, 2, {"w": np.random.default_rng(0).normal(size=200_000)}, {})
        assert os.listdir(disk) == ["1"] and bits(first) == before
        assert valid(disk) == (first, ())
        save_checkpoint(disk, 2, {"w": np.ones(10_000)}, {})


def test_another_fault_keeps_its_own_error(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"w": np.zeros(3)}, {})
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(tmp_path, 2, {"w": np.zeros(3)}, {"bad": object()})
    assert os.listdir(tmp_path) == ["1"]


def test_arrays_are_read_by_name_without_a_template(tmp_path):
    state = make_state()
    arrays = read_arrays(save_checkpoint(tmp_path, 1, state, META))
    assert len(arrays) == len(jax.tree.leaves(state))
    assert_same(arrays["params.Conv_0.kernel"], state.params["Conv_0"]["kernel"])


def test_a_checkpoint_outlasts_a_loss_of_power_before_it_is_complete(tmp_path, monkeypatch):
    synced, when_complete = set(), []
    sync, replace = os.fsync, os.replace

    def record(handle):
        sync(handle)
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))

    def note(source, target):
        if Path(target) == tmp_path / "3" / "manifest.json":
            needed = {str(tmp_path), str(tmp_path / "3"), *map(str, (tmp_path / "3").rglob("*"))}
            when_complete.append(needed - synced)
            synced.clear()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", note)
    save_checkpoint(tmp_path, 3, {"a": np.zeros(3)}, META)
    assert when_complete == [set()]
    assert str(tmp_path / "3") in synced


@pytest.mark.parametrize("name", ["b[1]", "b\\1", "*", "a?"])
def test_a_folder_whose_name_orbax_cannot_read_is_refused_or_works(tmp_path, name):
    folder = tmp_path / name
    try:
        check_folder(folder)
    except UsageError as error:
        assert name in ("b[1]", "b\\1") and f"{folder}: checkpoints" in str(error)
        assert "choose one without [ ]" in str(error)
        assert os.listdir(tmp_path) == []
    else:
        assert_same(read_arrays(save_checkpoint(folder, 1, {"w": np.ones(3)}, {}))["w"], np.ones(3))


def test_a_check_leaves_no_folders_but_those_that_another_run_has_begun(tmp_path, monkeypatch):
    check_folder(tmp_path / "a" / "b" / "c")
    assert os.listdir(tmp_path) == []
    remove_tree = files.remove_tree

    def another_starts(place):
        remove_tree(place)
        (tmp_path / "d" / "environment.json").touch()

    monkeypatch.setattr(files, "remove_tree", another_starts)
    check_folder(tmp_path / "d" / "e")
    assert os.listdir(tmp_path) == ["d"] and os.listdir(tmp_path / "d") == ["environment.json"]


@pytest.mark.parametrize("name", ["a b", "é ü 雪", "100%25", "it's", "#x", "~", "$HOME", "a:b"])
def test_folders_of_other_names_work(tmp_path, name):
    folder = tmp_path / name
    check_folder(folder)
    assert os.listdir(tmp_path) == []
    path = save_checkpoint(folder, 1, {"w": np.ones(3)}, {})
    assert_same(read_arrays(path)["w"], np.ones(3))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_mount_that_cannot_sync_folders_is_no_error(tmp_path, monkeypatch, number):
    def refuse(handle):
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").write_text("1")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        files.sync(tmp_path / "file")
    if number == errno.EINVAL:
        files.sync(tmp_path)
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            files.sync(tmp_path)
