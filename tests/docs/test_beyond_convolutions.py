"""The samples of docs/beyond-convolutions.md find the units of other people's networks."""

import functools
import operator
import re
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import inmerge_jax
from inmerge_jax.merging.units import path_name
from inmerge_jax.models import create_model
from inmerge_jax.models.units import find_units

PAGE = Path(__file__).parents[2] / "docs" / "beyond-convolutions.md"
LINEN, NNX, EQUINOX, NEURONS, MAMBA, GATES = re.findall(
    r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL
)
D, HEADS, DEPTH = 16, 4, 2
TOKENS = jnp.zeros((1, 3, D))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attn")(x)
        return x + nn.Dense(D, name="fc2")(nn.gelu(nn.Dense(4 * D, name="fc1")(x)))


class LinenViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        for n in range(DEPTH):
            x = LinenBlock(name=f"block_{n}")(x)
        return x


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=rngs)


class NnxViT(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(DEPTH)])


class EquinoxBlock(eqx.Module):
    attn: eqx.nn.MultiheadAttention


class EquinoxViT(eqx.Module):
    blocks: list[EquinoxBlock]


def run(sample, **given):
    """The names after a sample."""
    names = {name: getattr(inmerge_jax, name) for name in inmerge_jax.__all__}
    names |= {"jax": jax, "optax": optax, "eqx": eqx, "nnx": nnx, "functools": functools}
    names |= {"depth": DEPTH, **given}
    exec(sample, names)
    return names


def check_heads(names, params):
    """An update with the sample's optimizer draws among the heads of each block."""
    state = names["tx"].init(params)
    updates = jax.tree.map(jnp.zeros_like, params)
    _, state = names["tx"].update(updates, state, params)
    assert state[-1].stats.selected.shape == (DEPTH,)
    assert {kernel.count for kernel in names["heads"]} == {HEADS}
    # All but the bias of the output, which the heads share.
    leaves = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    own = {name for name in leaves if "attn" in name and not name.endswith("out/bias")}
    assert {kernel.name for kernel in names["heads"]} == own


@pytest.fixture(scope="module")
def linen():
    net = LinenViT()
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), TOKENS))["params"]
    return net, jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)


@pytest.mark.long
def test_heads_in_linen(linen):
    _, params = linen
    check_heads(run(LINEN, params=params), params)


@pytest.mark.long
def test_heads_in_nnx():
    model = NnxViT(nnx.Rngs(0))
    check_heads(run(NNX, model=model), nnx.state(model, nnx.Param))


@pytest.mark.long
def test_heads_in_equinox():
    keys = jax.random.split(jax.random.key(0), DEPTH)
    blocks = [EquinoxBlock(eqx.nn.MultiheadAttention(HEADS, D, key=key)) for key in keys]
    names = run(EQUINOX, model=EquinoxViT(blocks))
    check_heads(names, names["params"])


def test_neurons(linen):
    net, params = linen

    def forward(params, x):
        return net.apply({"params": params}, x)

    names = run(NEURONS, params=params, forward=forward, images=TOKENS)
    assert [kernel.name for kernel in names["neurons"]] == [
        "block_0/fc1/kernel",
        "block_1/fc1/kernel",
    ]


def test_channels_of_mamba():
    model = create_model("mamba_tiny", 2, modality="signal", width=0.1)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 1)), train=False)
    )
    names = run(MAMBA, params=shapes["params"], depth=6)
    ours = {kernel.name: kernel for kernel in find_units(model, (8, 1), ("channels",))}
    fields = operator.attrgetter("dims", "out_axis", "group", "compared")
    assert {kernel.name: fields(kernel) for kernel in names["channels"]} == {
        name: fields(kernel) for name, kernel in ours.items()
    }


def test_gates_of_a_convolutional_lstm():
    width, images = 3, jnp.zeros((1, 6, 6, 2))
    net = nn.RNN(nn.ConvLSTMCell(width, (3, 3), name="cell"))
    params = net.init(jax.random.key(0), images[None])["params"]
    assert params["cell"]["hh"]["kernel"].shape == (3, 3, width, 4 * width)
    gates = run(GATES, params=params, width=width)["gates"]
    assert (gates.problems, gates.units) == (4, width)
    # Weights of two gates differ by 1 or more, so a merge of two gates would change them by 0.5.
    own = jnp.broadcast_to(jnp.repeat(jnp.arange(1.0, 5), width), gates.shape)
    own += 0.01 * jax.random.normal(jax.random.key(1), gates.shape)
    given = {"cell": {"hh": {"kernel": own}}}
    rule = inmerge_jax.MergeRule(1.0, -1.0, 0.5)
    merged, stats = inmerge_jax.merge_kernels(given, 0, [gates], rule)
    assert stats.merged.tolist() == [4 * width]
    gap = merged["cell"]["hh"]["kernel"] - own
    assert 0 < jnp.abs(gap).max() < 0.1
