"""Several updates in one dispatch are the same updates; on CPU the command line refuses them."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inmerge_jax.cli.options import parse_config
from inmerge_jax.cli.train import main
from inmerge_jax.data import train_batch
from inmerge_jax.errors import UsageError
from inmerge_jax.progress import Progress
from inmerge_jax.training import run_spec
from inmerge_jax.training.parallel import broadcast_to_devices, replicate, shard_batch, unreplicate
from inmerge_jax.training.resolve import check_steps_per_execution
from inmerge_jax.training.train import train_stage
from inmerge_jax.training.train_step import make_optimizer, make_train_step, new_state, zero_totals
from tests.long import LONG
from tests.training import tiny


def several_steps(devices, steps, rule=tiny.ALWAYS):
    merging = {} if rule is None else {"kernels": tiny.kernels(), "rule": rule}
    return make_train_step(
        tiny.Net(),
        make_optimizer(tiny.RECIPE),
        tiny.RECIPE,
        multi_label=False,
        devices=devices,
        steps_per_execution=steps,
        **merging,
    )


@pytest.mark.parametrize("count", [1, pytest.param(4, marks=LONG)])
def test_three_steps_in_one_call_are_three_calls(count):
    devices = tuple(jax.local_devices()[:count])
    train = tiny.make_dataset().train
    batches = [
        shard_batch(train_batch(train, seed=1, step=n, batch_size=16), devices) for n in range(3)
    ]
    root = broadcast_to_devices(jax.random.key(3), devices)

    def fresh():
        state = new_state(*tiny.init(), make_optimizer(tiny.RECIPE), 0.05)
        return replicate(state, devices), replicate(zero_totals(len(tiny.kernels())), devices)

    single = tiny.train_step(devices, rule=tiny.ALWAYS)
    state, totals = fresh()
    for batch in batches:
        state, totals = single(state, totals, batch, root)
    together = jax.tree.map(lambda *arrays: jnp.stack(arrays, axis=1), *batches)
    found = several_steps(devices, 3)(*fresh(), together, root)
    found, expected = unreplicate(found), unreplicate((state, totals))
    assert found[0].step == 3 and found[1].steps == 3
    np.testing.assert_array_equal(found[1].selected, expected[1].selected)
    np.testing.assert_array_equal(found[1].merged, expected[1].merged)
    assert expected[1].merged.sum() > 0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@LONG
def test_a_stage_loses_and_repeats_no_step(tmp_path):
    """Five steps an epoch, two in a call: two calls and one single step."""
    dataset = tiny.make_dataset(train=80)
    setup = tiny.make_setup(dataset=dataset)
    devices = setup.devices
    lines, counted = {}, []

    def counting(step, count):
        def run(*args):
            counted.append(count)
            return step(*args)

        return run

    for name, changes in {
        "single": {},
        "several": {
            "train_step": counting(tiny.train_step(devices, rule=tiny.ALWAYS), 1),
            "multi_step_fn": counting(several_steps(devices, 2), 2),
            "steps_per_execution": 2,
        },
    }.items():
        stage = tiny.make_stage(tmp_path / name, rule=tiny.ALWAYS, **changes)
        with Progress(1) as progress:
            train_stage(setup, stage, *tiny.init(), progress)
        text = (tmp_path / name / "metrics.jsonl").read_text()
        lines[name] = [json.loads(line) for line in text.splitlines()]
    assert counted == [2, 2, 1] * tiny.RECIPE.epochs
    for single, several in zip(lines["single"], lines["several"], strict=True):
        for exact in ("epoch", "step", "selected", "merged"):
            assert single[exact] == several[exact]
        for close in ("train_loss", "val_loss"):
            assert several[close] == pytest.approx(single[close], rel=1e-4)


def test_cpu_refuses_with_the_reason(tmp_path, capsys):
    assert main(["--steps-per-execution", "4", "--output", str(tmp_path / "run")]) == 2
    assert "--steps-per-execution 4" in (message := capsys.readouterr().err)
    assert "45 times slower" in message and "GPU and TPU" in message
    assert not (tmp_path / "run").exists()


def test_more_than_an_epoch_has_is_refused(monkeypatch):
    """2 updates an epoch; one TPU, which is asked nothing before the number is checked."""
    tpu = (types.SimpleNamespace(platform="tpu"),)
    monkeypatch.setattr(run_spec, "choose_devices", lambda _: tpu)
    options = "--phantom.train 64 --batch-size 32 --steps-per-execution".split()
    with pytest.raises(
        UsageError, match="`steps_per_execution` 3: an epoch has 2 updates.*2 or fewer"
    ):
        run_spec.make_run_spec(parse_config([*options, "3"]))
    assert run_spec.make_run_spec(parse_config([*options, "2"])).config.steps_per_execution == 2


def test_the_number_is_checked():
    with pytest.raises(UsageError, match="`steps_per_execution` 0: choose 1 or more"):
        check_steps_per_execution(0, "tpu")
    check_steps_per_execution(8, "tpu")
    check_steps_per_execution(8, "cuda")
    check_steps_per_execution(1, "cpu")
