"""The training step merges in one Pallas kernel a layer where its devices can."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from inmerge_jax.cli.options import parse_config
from inmerge_jax.merging.backends import supports_pallas
from inmerge_jax.training import experiment, train_step
from inmerge_jax.training.parallel import broadcast_to_devices, replicate
from inmerge_jax.training.resolve import config_dict
from inmerge_jax.training.run_spec import make_run_spec
from inmerge_jax.training.train_step import make_optimizer, make_train_step, new_state, zero_totals
from tests.training import tiny

SMALL = ["--size", "16", "--phantom.train", "32", "--phantom.val", "16", "--phantom.test", "16"]
SMALL += ["--batch-size", "16"]


@pytest.mark.parametrize(
    ("platform", "kind", "can"),
    [
        ("tpu", "TPU v5 lite", True),
        ("tpu", "TPU v6 lite", True),
        ("tpu", "TPU v4", True),
        ("tpu", "TPU v3", False),
        ("tpu", "TPU v2", False),
        ("cpu", "cpu", False),
        ("gpu", "NVIDIA H100", False),
    ],
)
def test_which_devices_can(platform, kind, can):
    assert supports_pallas(SimpleNamespace(platform=platform, device_kind=kind)) == can


@pytest.mark.parametrize(("options", "pallas"), [([], True), (["--no-pallas"], False)])
@pytest.mark.parametrize(
    "preset", [[], ["--preset", "released", "--model", "vgg11", "--skip", "5"]]
)
def test_the_option_reaches_every_step_that_merges(options, pallas, preset, monkeypatch):
    config = parse_config([*SMALL, *preset, *options])
    plan = make_run_spec(config)
    given = []
    for name in ("make_train_step", "make_merging_eval_step"):
        monkeypatch.setattr(experiment, name, lambda *args, **rest: given.append(rest))
    experiment._steps(plan, tiny.make_setup())
    merging = [rest for rest in given if "rule" in rest]
    assert len(merging) == 1 + bool(preset)
    assert all(rest["pallas"] == pallas for rest in merging)
    values = config_dict(config, plan.recipe, devices=1)
    assert values.get("pallas", True) == pallas and ("pallas" in values) == (not pallas)


@pytest.mark.parametrize(("able", "pallas"), [(True, True), (True, False), (False, True)])
def test_the_step_asks_for_it_where_the_devices_can(able, pallas, monkeypatch):
    asked = []

    def merge(*args, implementation):
        asked.append(implementation)
        return merge_kernels(*args, implementation=implementation)

    merge_kernels = train_step.merge_kernels
    monkeypatch.setattr(train_step, "merge_kernels", merge)
    monkeypatch.setattr(train_step, "supports_pallas", lambda device: able)
    devices = tuple(jax.local_devices()[:2])
    optimizer = make_optimizer(tiny.RECIPE)
    step = make_train_step(
        tiny.Net(),
        optimizer,
        tiny.RECIPE,
        multi_label=False,
        devices=devices,
        kernels=tiny.kernels(),
        rule=tiny.ALWAYS,
        pallas=pallas,
    )
    split = tiny.make_dataset().train
    batch = {
        "image": split.images[:8],
        "label": split.labels[:8],
        "index": np.arange(8, dtype="i4"),
    }
    batch = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), batch)
    state = replicate(new_state(*tiny.init(), optimizer, 0.05), devices)
    totals = replicate(zero_totals(len(tiny.kernels())), devices)
    step.lower(state, totals, batch, broadcast_to_devices(jax.random.key(0), devices))
    assert asked == ["tpu" if able and pallas else "auto"]
