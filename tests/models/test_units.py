"""The units that each network merges, and that merging them changes nothing else."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from inmerge_jax import MergeRule, merge_kernels
from inmerge_jax.errors import UsageError
from inmerge_jax.merging.units import group_weights
from inmerge_jax.models import create_model, model_names
from inmerge_jax.models.units import default_units, find_units
from tests.long import long_unless

IMAGE, SIGNAL, ROW = (32, 32, 1), (36, 2), (30,)


def layers(name, shape, kinds=None, modality="image", **options):
    """Label, number of units and weights of each layer."""
    model = create_model(name, 3, modality=modality, **options)
    units = find_units(model, shape, kinds or default_units(name))
    return [
        (group[0].label, group[0].count, [kernel.name for kernel in group])
        for group in group_weights(units)
    ]


def names(name, shape, kinds=None, **options):
    return [label for label, _, _ in layers(name, shape, kinds, **options)]


@pytest.mark.long
def test_heads_and_neurons_of_a_vision_transformer():
    found = layers("vit_tiny", IMAGE)
    assert [label for label, _, _ in found[:4]] == [
        "block_0/attention",
        "block_0/fc1",
        "block_1/attention",
        "block_1/fc1",
    ]
    assert len(found) == 24 and found[0][1] == 3 and found[1][1] == 768
    assert {name.removeprefix("block_0/attention/") for name in found[0][2]} == {
        *(f"{name}/{leaf}" for name in ("query", "key", "value") for leaf in ("kernel", "bias")),
        "out/kernel",
    }
    assert found[1][2] == ["block_0/fc1/kernel", "block_0/fc1/bias"]
    assert found[-1][0] == "block_11/fc1"  # In execution order, not by the alphabet.
    assert names("vit_tiny", IMAGE, ("kernels", "heads"))[0] == "patches/kernel"


def test_channels_of_a_state_space_layer():
    found = layers("mamba_tiny", SIGNAL, modality="signal")
    assert [(label, count) for label, count, _ in found[:2]] == [("mixer_0", 192), ("mixer_1", 192)]
    assert {name.removeprefix("mixer_0/") for name in found[0][2]} == {
        *("in_proj/kernel", "conv1d/kernel", "conv1d/bias"),
        *("dt_proj/kernel", "dt_proj/bias", "A_log", "D"),
    }
    assert names("mamba_tiny", IMAGE, ("neurons",))[0] == "mixer_0/in_proj/kernel"


@pytest.mark.parametrize(
    ("name", "shape", "options", "expected"),
    [
        ("mlp", ROW, {"modality": "table"}, ["fc1", "fc2"]),
        ("mixer_tiny", IMAGE, {}, ["block_0/tokens_fc1", "block_0/channels_fc1"]),
        ("resnet18", (8, 8, 8, 1), {"modality": "volume"}, ["conv1/kernel"]),
        ("resnet18", SIGNAL, {"modality": "signal"}, ["conv1/kernel"]),
    ],
)
def test_units_by_default(name, shape, options, expected):
    assert names(name, shape, **options)[: len(expected)] == expected


def test_kernels_of_the_u_net_are_those_of_encoder_and_decoder():
    found = names("unet", IMAGE)
    assert found[:2] == ["encoder1_1/kernel", "encoder1_2/kernel"]
    assert found[-3:] == ["up1/kernel", "decoder1_1/kernel", "decoder1_2/kernel"]
    assert len(found) == 22  # Without the head, whose kernels are the classes.


def test_hidden_neurons_of_a_vgg():
    found = names("vgg11", IMAGE, ("neurons",), stem="imagenet")
    assert found == ["fc1", "fc2"]


@pytest.mark.parametrize(
    ("name", "kinds", "message"),
    [
        ("resnet18", ("heads",), "`units` heads: ResNet has none; choose from kernels"),
        ("mlp", ("kernels",), "`units` kernels: MLP has none; choose from neurons"),
        ("vit_tiny", ("heads", "heads"), "name each kind once"),
        ("vit_tiny", (), "one at least"),
        ("vit_tiny", ("layers",), "`units` layers: unknown; choose from kernels, heads"),
        ("mamba_tiny", ("neurons", "channels"), "choose one of them"),
    ],
)
def test_units_that_a_network_does_not_have_are_refused(name, kinds, message):
    shape, modality = (ROW, "table") if name == "mlp" else (IMAGE, "image")
    model = create_model(name, 3, modality=modality)
    with pytest.raises(UsageError, match=message):
        find_units(model, shape, kinds)


@pytest.mark.parametrize(
    ("name", "shape", "modality"),
    long_unless(
        lambda case: case[0] == "mlp",
        [("vit_tiny", (8, 8, 1), "image"), ("mamba_tiny", (8, 1), "signal"), ("mlp", ROW, "table")],
    ),
)
def test_merging_mixes_the_weights_of_a_unit_together(name, shape, modality):
    """With two units, each mixes with the other, by the formula, in all its weights."""
    model = create_model(name, 3, modality=modality, width=0.3)
    x = np.zeros((1, *shape), np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    first = group_weights(find_units(model, shape, default_units(name)[-1:]))[0]
    rule = MergeRule(probability=1.0, threshold=-1.0, alpha=0.75, partner="nearest")
    merged, stats = merge_kernels(params, jax.random.key(1), first, rule)
    assert int(stats.merged.sum()) == first[0].count
    before, after = flatten_dict(params, sep="/"), flatten_dict(merged, sep="/")

    def rows(kernel, tree):
        weight = np.asarray(tree[kernel.name]).reshape(kernel.dims)
        return np.moveaxis(weight, kernel.out_axis, 0).reshape(kernel.units, -1)

    compared = np.concatenate([rows(k, before) for k in first if k.compared], 1)
    unit = compared / np.linalg.norm(compared, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    partner = cosine.argmax(1)
    for kernel in first:
        old = rows(kernel, before)
        expected = 0.75 * old + 0.25 * old[partner]
        np.testing.assert_allclose(rows(kernel, after), expected, rtol=1e-5, atol=1e-6)
    others = set(before) - {kernel.name for kernel in first}
    for leaf in others:
        np.testing.assert_array_equal(before[leaf], after[leaf], err_msg=leaf)


def test_every_network_has_units():
    for name in model_names():
        kinds = default_units(name)
        assert kinds and len(set(kinds)) == len(kinds)
