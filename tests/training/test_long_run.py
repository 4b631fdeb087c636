"""A long training does not grow: memory, compiled programs, threads and open files."""

import os
from pathlib import Path

import jax.monitoring
import pytest
from rich.console import Console

from inmerge_jax.progress import Progress
from inmerge_jax.training.train import train_stage
from tests.training import tiny

EPOCHS, WARM_UP = 200, 40
COMPILED = "/jax/core/compile/backend_compile_duration"
# TensorStore starts its threads when it needs them, up to a limit for each of two pools.
POOL, POOL_LIMIT = "ts_pool_worker", 2 * max(4, os.cpu_count() or 1)


class Watch(Progress):
    """Records what the process holds at the end of every epoch."""

    def __init__(self):
        super().__init__(1, Console(quiet=True))
        self.rows, self.programs = [], 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event, duration, **_):
        self.programs += event == COMPILED

    def milestone(self, details=None, result=""):
        names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        row = {
            "programs": self.programs,
            "files": len(os.listdir("/proc/self/fd")),
            "threads": len(names) - names.count(POOL),
            "pool": names.count(POOL),
            "megabytes": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        }
        self.rows.append(row)


@pytest.mark.long
def test_nothing_grows_in_200_epochs_with_a_checkpoint_each(tmp_path):
    stage = tiny.make_stage(tmp_path / "inmerge", rule=tiny.ALWAYS, epochs=EPOCHS)
    watch = Watch()
    train_stage(tiny.make_setup(), stage, *tiny.init(), watch)
    early, later = watch.rows[:WARM_UP], watch.rows[WARM_UP:]
    assert len(watch.rows) == EPOCHS and early[-1]["programs"] > 0
    for name in ("programs", "files", "threads"):
        assert max(row[name] for row in later) <= max(row[name] for row in early), name
    assert max(row["pool"] for row in later) <= POOL_LIMIT
    assert later[-1]["megabytes"] < 1.05 * early[-1]["megabytes"]
