import errno
import json
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
from inmerge_jax.training import checkpointing
from inmerge_jax.training.checkpointing import (
    DamagedCheckpointError,
    checkpoint_epochs,
    latest_valid_checkpoint,
    prune,
    read_meta,
    restore_checkpoint,
    save_checkpoint,
)
from tests.training.disk import small_disk

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


def test_placement_follows_the_template(tmp_path):
    mesh = jax.make_mesh((8,), ("d",))
    spread = jax.NamedSharding(mesh, jax.P("d"))
    whole = jax.NamedSharding(mesh, jax.P())
    tree = {
        "spread": jax.device_put(jnp.arange(16.0), spread),
        "whole": jax.device_put(jnp.arange(5), whole),
        "free": jnp.ones(2),
        "third": jax.device_put(jnp.ones(2), jax.devices()[3]),
    }
    path = save_checkpoint(tmp_path, 0, tree, {})
    found, _ = restore_checkpoint(path, tree)
    assert_same(found, tree)
    for name, leaf in tree.items():
        assert found[name].sharding == leaf.sharding and found[name].committed == leaf.committed
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    found, _ = restore_checkpoint(path, shapes)
    assert_same(found, jax.tree.map(np.asarray, tree))
    assert all(isinstance(leaf, np.ndarray) for leaf in found.values())


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
            ["params.Conv_1.kernel: not in the checkpoint"],
        ),
        (
            lambda s: s.replace(params={"Dense_0": s.params["Dense_0"]}),
            ["params.Conv_0.kernel: only in the checkpoint"],
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
                assert latest_valid_checkpoint(tmp_path)[0] is None
        file.write_bytes(data)
    assert latest_valid_checkpoint(tmp_path) == (path, ())


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


def test_newest_whole_passes_over_the_damaged(tmp_path):
    for epoch in (2, 9, 10, 11):
        save_checkpoint(tmp_path, epoch, {"w": np.full(1000, epoch)}, {})
    file = max(bits(tmp_path / "11"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:100])
    (tmp_path / "10" / "manifest.json").unlink()
    (tmp_path / "notes").mkdir()
    path, damaged = latest_valid_checkpoint(tmp_path)
    assert path == tmp_path / "9"
    assert len(damaged) == 2
    assert f"{tmp_path / '11'} is damaged" in damaged[0] and "bytes instead of" in damaged[0]
    assert f"{tmp_path / '10'} is damaged: manifest.json is missing" in damaged[1]
    assert checkpoint_epochs(tmp_path) == [2, 9, 10, 11]


def test_folders_without_checkpoints(tmp_path):
    assert (
        latest_valid_checkpoint(tmp_path)
        == latest_valid_checkpoint(tmp_path / "absent")
        == (None, ())
    )
    assert checkpoint_epochs(tmp_path / "absent") == []
    with pytest.raises(UsageError, match="no checkpoint at"):
        restore_checkpoint(tmp_path / "5", {})
    with pytest.raises(UsageError, match="no checkpoint at"):
        read_meta(tmp_path / "5")


def test_prune_keeps_what_it_is_told(tmp_path):
    for epoch in range(1, 5):
        save_checkpoint(tmp_path, epoch, {"w": np.ones(3)}, {})
    (tmp_path / "notes").mkdir()
    prune(tmp_path, {1, 3, 99})
    assert sorted(os.listdir(tmp_path)) == ["1", "3", "notes"]
    assert latest_valid_checkpoint(tmp_path) == (tmp_path / "3", ())


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from inmerge_jax.training import checkpointing

folder, point = Path(sys.argv[1]), sys.argv[2]
checkpointing.save_checkpoint(folder, 1, {"w": np.arange(10_000)}, {})
before = getattr(checkpointing, point)

def die(*args):
    if point == "_write_arrays":
        before(*args)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(checkpointing, point, die)
checkpointing.save_checkpoint(folder, 2, {"w": np.arange(10_000)}, {})
"""


@pytest.mark.parametrize("point", ["_write_arrays", "_put"])
def test_killed_writer_leaves_no_half_checkpoint(tmp_path, point):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, point], capture_output=True, cwd=REPOSITORY
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert latest_valid_checkpoint(tmp_path) == (tmp_path / "1", ())
    assert len(os.listdir(tmp_path)) == 2
    path = save_checkpoint(tmp_path, 2, {"w": np.zeros(3)}, {})
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]
    assert latest_valid_checkpoint(tmp_path) == (path, ())


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("point", ["_write_arrays", "write_json", "write_json_with_checksum"])
def test_full_disk_leaves_the_earlier_whole(tmp_path, monkeypatch, point):
    first = save_checkpoint(tmp_path, 1, make_state(), META)
    before = bits(first)
    monkeypatch.setattr(checkpointing, point, full)
    for epoch in (1, 2):
        with pytest.raises(UsageError, match=rf"{tmp_path / str(epoch)}: No space left.*room"):
            save_checkpoint(tmp_path, epoch, make_state(), META)
    assert os.listdir(tmp_path) == ["1"] and bits(first) == before


def test_failed_exchange_puts_the_old_one_back(tmp_path, monkeypatch):
    first = save_checkpoint(tmp_path, 1, make_state(), META)
    before, rename = bits(first), os.rename

    def refuse(source, target):
        full() if str(source).endswith("writing-1") else rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UsageError, match="No space left"):
        save_checkpoint(tmp_path, 1, make_state(1), META)
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
    for epoch in (1, 2):
        with pytest.raises(UsageError, match=f"{tmp_path / str(epoch)}: File too large"):
            save_checkpoint(tmp_path, epoch, {"w": np.ones(10**6)}, {})
    assert os.listdir(tmp_path) == ["1"] and bits(first) == before
    assert not caplog.records


@pytest.mark.parametrize("looks_first", [True, False])
def test_really_full_disk(tmp_path, monkeypatch, looks_first):
    if not looks_first:
        monkeypatch.setattr(checkpointing, "_check_room", lambda *_: None)
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        first = save_checkpoint(disk, 1, {"w": np.ones(10_000)}, {})
        before = bits(first)
        with pytest.raises(UsageError, match=f"{disk / '2'}: No space left on device"):
            save_checkpoint(disk, 2, {"w": np.ones(200_000)}, {})
        assert os.listdir(disk) == ["1"] and bits(first) == before
        assert latest_valid_checkpoint(disk) == (first, ())
        save_checkpoint(disk, 2, {"w": np.ones(10_000)}, {})


def test_another_fault_keeps_its_own_error(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"w": np.zeros(3)}, {})
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(tmp_path, 2, {"w": np.zeros(3)}, {"bad": object()})
    assert os.listdir(tmp_path) == ["1"]


def test_manifest_lists_arrays_for_readers(tmp_path):
    path = save_checkpoint(tmp_path, 1, make_state(), META)
    arrays = json.loads((path / "manifest.json").read_bytes())["arrays"]
    assert arrays["params.Conv_0.kernel"] == [[3, 3, 2, 4], "bfloat16"]
    assert len(arrays) == len(jax.tree.leaves(make_state()))


def test_a_checkpoint_outlasts_a_loss_of_power_before_it_has_its_name(tmp_path, monkeypatch):
    synced, when_named = [], []
    sync, rename = os.fsync, os.rename

    def record(handle):
        sync(handle)
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))

    def note(source, target):
        if Path(target) == tmp_path / "3":
            whole = {str(path) for path in Path(source).rglob("*")}
            when_named.append(whole - set(synced))
            synced.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "rename", note)
    save_checkpoint(tmp_path, 3, {"a": np.zeros(3)}, META)
    assert when_named == [set()]
    assert str(tmp_path) in synced


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
