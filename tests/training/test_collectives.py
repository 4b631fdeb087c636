"""Merging adds no communication to a training step, on any number of devices."""

import collections
import dataclasses
import re

import jax
import pytest

from inmerge_jax.data import train_batch
from inmerge_jax.training.parallel import broadcast_to_devices, replicate, shard_batch
from inmerge_jax.training.train_step import make_optimizer, new_state, zero_totals
from tests.long import long_unless
from tests.training import tiny


def collectives(devices, rule):
    """How many of each kind the compiled step has, with the shapes that they send."""
    layers = 0 if rule is None else len(tiny.kernels())
    state = new_state(*tiny.init(), make_optimizer(tiny.RECIPE), 0.1)
    state, totals = replicate(state, devices), replicate(zero_totals(layers), devices)
    batch = train_batch(tiny.make_dataset().train, seed=1, step=0, batch_size=16)
    root = broadcast_to_devices(jax.random.key(0), devices)
    step = tiny.train_step(devices, rule=rule)
    text = step.lower(state, totals, shard_batch(batch, devices), root).compile().as_text()
    kinds = r"= (\S.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\S*\("
    return collections.Counter((kind, shapes) for shapes, kind in re.findall(kinds, text))


@pytest.mark.parametrize("partner", long_unless(["nearest"], ["random", "nearest"]))
def test_merging_adds_none(partner):
    rule = dataclasses.replace(tiny.ALWAYS, partner=partner)
    counts = {}
    for devices in (2, 8):
        plain = collectives(tuple(jax.local_devices()[:devices]), None)
        assert plain and collectives(tuple(jax.local_devices()[:devices]), rule) == plain
        counts[devices] = sum(plain.values())
    assert counts[2] == counts[8], "no more of them with more devices"
