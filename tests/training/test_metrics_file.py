"""metrics.jsonl: what is written comes back, what is torn goes, what was lost is named."""

import errno
import math
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest

from inmerge_jax.errors import UsageError
from inmerge_jax.training.metrics_file import append_metrics, read_metrics, truncate_metrics


def records(count):
    return [{"epoch": k + 1, "val_auc": 0.1 * k, "layers": [k, k]} for k in range(count)]


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "seed0" / "inmerge" / "metrics.jsonl"
    for record in records(4):
        append_metrics(path, record)
    return path


def test_metrics_come_back(metrics):
    assert read_metrics(metrics) == records(4)
    assert read_metrics(metrics.with_name("absent")) == []


def test_metrics_take_array_values(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(
        path,
        {"epoch": np.int64(1), "loss": np.float32(0.5), "merged": jnp.arange(2), "auc": math.nan},
    )
    (found,) = read_metrics(path)
    assert math.isnan(found.pop("auc"))
    assert found == {"epoch": 1, "loss": 0.5, "merged": [0, 1]}


@pytest.mark.parametrize("torn", [b"", b'{"epoch": 5, "va', b'{"epoch": 5}', b'{"epo\n', b"\xff\n"])
@pytest.mark.parametrize("epoch", [0, 2, 4])
def test_truncate_drops_later_and_torn_lines(metrics, torn, epoch):
    lines = metrics.read_bytes().splitlines(keepends=True)
    with open(metrics, "ab") as file:
        file.write(torn)
    assert read_metrics(metrics) == records(4)
    truncate_metrics(metrics, epoch)
    assert metrics.read_bytes() == b"".join(lines[:epoch])
    append_metrics(metrics, {"epoch": epoch + 1})
    assert read_metrics(metrics) == [*records(epoch), {"epoch": epoch + 1}]
    assert os.listdir(metrics.parent) == ["metrics.jsonl"]


def test_truncate_of_an_absent_file(tmp_path):
    truncate_metrics(tmp_path / "metrics.jsonl", 0)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("lost", [0, 2, 3])
def test_a_lost_line_is_named_and_not_made_up_for(metrics, lost):
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:lost] + lines[lost + 1 :]))
    left = [epoch for epoch in (1, 2, 3, 4) if epoch != lost + 1]
    with pytest.raises(UsageError, match=re.escape(f"has the epochs {left}")):
        truncate_metrics(metrics, 4)


def test_damage_inside_is_named(metrics):
    data = metrics.read_bytes().split(b"\n")
    metrics.write_bytes(b"\n".join([data[0], b"oops", *data[2:]]))
    for read in (read_metrics, lambda path: truncate_metrics(path, 1)):
        with pytest.raises(UsageError, match=r"metrics\.jsonl, line 2 is damaged"):
            read(metrics)


def test_line_without_epoch_is_named(metrics):
    append_metrics(metrics, {"loss": 1})
    with pytest.raises(UsageError, match="without its epoch"):
        truncate_metrics(metrics, 1)


def test_full_disk_leaves_metrics_as_they_were(metrics, monkeypatch):
    before = metrics.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=f"{metrics}: No space left on device.*make room"):
        append_metrics(metrics, {"epoch": 5})
    assert metrics.read_bytes() == before
    with pytest.raises(UsageError, match="No space left"):
        truncate_metrics(metrics, 2)
    assert metrics.read_bytes() == before and os.listdir(metrics.parent) == ["metrics.jsonl"]


def test_partly_written_line_is_taken_back(metrics):
    import resource

    before = metrics.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, hard))
    try:
        with pytest.raises(UsageError, match="File too large"):
            append_metrics(metrics, {"epoch": 5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert metrics.read_bytes() == before
