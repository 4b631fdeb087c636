"""One process of two, each with two simulated devices: `host_worker.py PORT PROCESS OUTPUT`."""

import dataclasses
import errno
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from inmerge_jax.buckets import as_path
from inmerge_jax.data import train_batches
from inmerge_jax.errors import UsageError
from inmerge_jax.training import multihost
from inmerge_jax.training.evaluation import evaluate_merging
from inmerge_jax.training.parallel import (
    broadcast_to_devices,
    choose_devices,
    replicate,
    shard_batch,
    unreplicate,
)
from inmerge_jax.training.preemption import PreemptionHandler
from inmerge_jax.training.train_step import (
    make_merging_eval_step,
    make_optimizer,
    new_state,
    zero_totals,
)
from tests.training import tiny

STEPS = 6
RECIPE = dataclasses.replace(tiny.RECIPE, flip=False)


def message(function, *args, kind=UsageError):
    """What the error says that `function` raises."""
    try:
        function(*args)
    except kind as error:
        return str(error)
    raise AssertionError(f"{function} raised nothing")


def check_agreement():
    process = jax.process_index()
    large = multihost.run_on_primary(
        lambda: np.arange(2**23, dtype=np.int32) if process == 0 else None
    )
    assert large.nbytes > multihost._CHUNK and np.array_equal(large, np.arange(2**23))
    zero = multihost.run_on_primary(lambda: -np.zeros(3, np.float32))
    assert np.signbit(zero).all(), "to the bit"
    calls = []
    assert multihost.run_on_primary(lambda: calls.append(1) or process) == 0
    assert len(calls) == (1 if process == 0 else 0)

    def refuse(wrong):
        if process == wrong:
            raise UsageError(f"process {process} said no")
        return process

    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "file")

    assert message(multihost.run_on_primary, refuse, 0) == "process 0 said no"
    assert "No space" in message(multihost.run_on_primary, full, kind=OSError)
    assert multihost.run_synced(refuse, 7) == process
    assert "process 1 said no" in message(multihost.run_synced, refuse, 1)
    assert "process 0 said no" in message(multihost.run_synced, refuse, 0)
    multihost.require_same_config({"rule": {"alpha": 0.8}})
    different = message(multihost.require_same_config, {"rule": {"alpha": 0.8 + process / 10}})
    assert "configuration of process 1 differs from process 0" in different
    assert "rule.alpha: 0.8 in process 0, 0.9 here" in different
    stop, answers = PreemptionHandler(), []
    alike = multihost.SyncedPreemption(stop)
    for number in range(20):
        if number == 3 and process == 1:
            stop.signal = signal.SIGTERM
        answers.append(alike())
    assert answers == [False] * 8 + [True] * 12 and stop.signal == signal.SIGTERM
    assert "leave it out" in message(choose_devices, 2)
    assert choose_devices(4) == choose_devices(None)


def check_shared_folders(folder):
    process = jax.process_index()
    assert multihost.is_shared(folder / "all")
    assert not multihost.is_shared(folder / f"of {process}")
    left = multihost.run_on_primary(lambda: [path.name for path in folder.glob("*/*")])
    assert left == [], "what was written to find out is removed"
    assert multihost.is_shared(as_path("gs://bucket/cache"))
    assert not multihost.is_shared(as_path(f"gs://bucket/{process}"))
    assert not multihost.is_shared(None if process else folder / "all")
    assert not multihost.is_shared(folder / "all" if process else None)
    assert not multihost.is_shared(as_path("gs://bucket/cache") if process else folder / "all")
    multihost.run_on_primary((folder / "file").write_text, "")
    assert "cannot write" in message(multihost.is_shared, folder / "file" / "cache")


def train(devices, host=0, count=1):
    """Some merging steps and both evaluations; for one process or as one of `count`."""
    setup = dataclasses.replace(
        tiny.make_setup(RECIPE), devices=devices, eval_step=tiny.eval_step(devices, RECIPE)
    )
    state = new_state(*tiny.init(), make_optimizer(RECIPE), RECIPE.learning_rate)
    state = replicate(state, devices)
    zeros = replicate(zero_totals(len(tiny.kernels())), devices)
    root = broadcast_to_devices(jax.random.key(3), devices)
    step, totals, losses = tiny.train_step(devices, RECIPE, tiny.ALWAYS), zeros, []
    batches = train_batches(
        setup.dataset.train, seed=1, batch_size=16, stop=STEPS, host=host, hosts=count
    )
    for batch in batches:
        state, totals = step(state, totals, shard_batch(batch, devices), root)
        losses.append(float(unreplicate(totals).loss))
    scores, loss = setup.evaluate(state, setup.dataset.val)
    merge_and_score = make_merging_eval_step(
        tiny.Net(),
        RECIPE,
        multi_label=False,
        devices=devices,
        kernels=tiny.kernels(),
        rule=tiny.ALWAYS,
    )
    state, merged, merging_scores, merging_loss = evaluate_merging(
        merge_and_score, state, zeros, setup.dataset.val, root, devices
    )
    return {
        "losses": np.array(losses),
        "merged": unreplicate(totals).merged,
        "scores": scores,
        "loss": loss,
        "merged_in_validation": merged.merged,
        "merging_scores": merging_scores,
        "merging_loss": merging_loss,
        **{f"leaf{n}": np.asarray(leaf)[0] for n, leaf in enumerate(jax.tree.leaves(state))},
    }


if __name__ == "__main__":
    port, process, output = sys.argv[1:]
    multihost.connect(f"127.0.0.1:{port}", 2, int(process))
    assert jax.process_count() == 2 and jax.local_device_count() == 2
    check_agreement()
    check_shared_folders(Path(output).parent / "folders")
    np.savez(output, **train(choose_devices(None), int(process), 2))
