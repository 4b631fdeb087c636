"""Re-estimated batch statistics: PyTorch's `update_bn`, for Flax Linen and NNX."""

import doctest

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from inmerge_jax import batch_stats as module
from inmerge_jax import recompute_batch_stats
from inmerge_jax.models.layers import BatchNorm

BATCHES = [
    np.random.default_rng(seed).normal(3, 2, (6, 4, 4, 3)).astype(np.float32) for seed in range(3)
]


class Linen(nn.Module):
    layer: str = "torch"

    @nn.compact
    def __call__(self, x, *, train):
        for features in (5, 4):
            x = nn.Conv(features, (1, 1))(x)
            if self.layer == "torch":
                x = BatchNorm(train=train)(x)
            else:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.99)(x)
            x = nn.relu(x)
        return x


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.convolutions = nnx.List(
            [nnx.Conv(*sizes, (1, 1), rngs=rngs) for sizes in ((3, 5), (5, 4))]
        )
        self.norms = nnx.List([nnx.BatchNorm(count, rngs=rngs) for count in (5, 4)])

    def __call__(self, x):
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.relu(norm(convolution(x)))
        return x


def linen(layer):
    """The network, its variables with statistics of other weights, and its update."""
    net = Linen(layer)
    variables = net.init(jax.random.key(0), BATCHES[0], train=False)
    stale = jax.tree.map(lambda x: x + 7, variables["batch_stats"])

    @jax.jit
    def update(batch_stats, x):
        moved = {"params": variables["params"], "batch_stats": batch_stats}
        return net.apply(moved, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    return variables, stale, update


def test_they_are_pytorchs_update_bn():
    torch = pytest.importorskip("torch")
    variables, stale, update = linen("torch")
    layers = []
    for index, (inputs, features) in enumerate(((3, 5), (5, 4))):
        convolution = torch.nn.Conv2d(inputs, features, 1)
        ours = variables["params"][f"Conv_{index}"]
        convolution.weight.data = torch.tensor(np.array(ours["kernel"]).transpose(3, 2, 0, 1))
        convolution.bias.data = torch.tensor(np.array(ours["bias"]))
        layers += [convolution, torch.nn.BatchNorm2d(features), torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers)
    loader = [torch.tensor(x.transpose(0, 3, 1, 2)) for x in BATCHES]
    torch.optim.swa_utils.update_bn(loader, network)
    found = recompute_batch_stats(update, stale, BATCHES)
    for index in (0, 1):
        theirs, ours = network[3 * index + 1], found[f"BatchNorm_{index}"]
        np.testing.assert_allclose(ours["mean"], theirs.running_mean.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ours["var"], theirs.running_var.numpy(), rtol=1e-5)


def test_linen_and_nnx_give_the_same():
    variables, stale, update = linen("flax")
    model = Nnx()
    for index in (0, 1):
        model.convolutions[index].kernel[...] = variables["params"][f"Conv_{index}"]["kernel"]
    model.train()
    graph, state, rest = nnx.split(model, nnx.BatchStat, ...)

    @jax.jit
    def update_nnx(state, x):
        merged = nnx.merge(graph, state, rest)
        merged(x)
        return nnx.state(merged, nnx.BatchStat)

    nnx.update(model, recompute_batch_stats(update_nnx, state, BATCHES))
    found = recompute_batch_stats(update, stale, BATCHES)
    for index in (0, 1):
        ours, theirs = found[f"BatchNorm_{index}"], model.norms[index]
        np.testing.assert_allclose(ours["mean"], theirs.mean[...], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ours["var"], theirs.var[...], rtol=1e-4)
    # The mean of the batches' own, whatever the momentum.
    first = [x @ variables["params"]["Conv_0"]["kernel"][0, 0] for x in BATCHES]
    expected = np.mean([x.var((0, 1, 2)) for x in first], 0)
    np.testing.assert_allclose(found["BatchNorm_0"]["var"], expected, rtol=1e-4)


def test_what_is_no_running_average_is_refused():
    def update(stats, x):
        return {"mean": 0.9 * stats["mean"] + 0.1 * x, "u": jnp.ones_like(stats["u"])}

    stats = {"mean": jnp.zeros(2), "u": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"\['u'\], which is no running average"):
        recompute_batch_stats(update, stats, [jnp.ones(2)])
    with pytest.raises(
        ValueError, match="leaves all .* as they are; run the network in training m"
    ):
        recompute_batch_stats(lambda stats, x: stats, {"mean": jnp.zeros(2)}, [jnp.ones(2)])
    with pytest.raises(ValueError, match="batches is empty"):
        recompute_batch_stats(update, stats, [])


def test_frozen_layers_keep_their_statistics():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(x)
            return nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))

    network, images = Network(), jnp.stack([jnp.asarray(batch) for batch in BATCHES])
    variables = network.init(jax.random.key(0), images[0])
    frozen = variables["batch_stats"]["BatchNorm_0"]
    frozen |= {"mean": frozen["mean"] + 0.5, "var": frozen["var"] * 4}

    def update(batch_stats, x):
        moved = {**variables, "batch_stats": batch_stats}
        return network.apply(moved, x, mutable=["batch_stats"])[1]["batch_stats"]

    found = recompute_batch_stats(update, variables["batch_stats"], images)
    jax.tree.map(np.testing.assert_array_equal, found["BatchNorm_0"], frozen)
    # The statistics of the other layer follow from the frozen ones.
    scaled = (np.asarray(images) - 0.5) / np.sqrt(4 + 1e-5)
    seen = scaled @ np.asarray(variables["params"]["Dense_0"]["kernel"])
    expected = np.mean([x.var((0, 1, 2)) for x in seen], 0)
    np.testing.assert_allclose(found["BatchNorm_1"]["var"], expected, rtol=1e-4)

    # Weights that are given along with the statistics keep their values too.
    def update_all(everything, x):
        return {**everything, **network.apply(everything, x, mutable=["batch_stats"])[1]}

    every = recompute_batch_stats(update_all, variables, images)
    jax.tree.map(np.testing.assert_array_equal, every["params"], variables["params"])
    jax.tree.map(np.testing.assert_array_equal, every["batch_stats"], found)


def test_layers_that_normalise_with_running_statistics_are_refused():
    """What the second layer sees depends on the old statistics of the first."""

    def update(stats, x):
        for name in ("one", "two"):
            mean = 0.9 * stats[name] + 0.1 * x.mean((0, 1, 2))
            stats, x = {**stats, name: mean}, 3 * (x - mean)
        return stats

    given = {"one": jnp.zeros(3), "two": jnp.zeros(3)}
    with pytest.raises(ValueError, match=r"\['two'\] of batch_stats depends on the old"):
        recompute_batch_stats(update, given, BATCHES)


@pytest.mark.parametrize("scale", [1e4, 1e7, 1e12])
def test_large_activations_have_their_own_statistics(scale):
    layer = nn.BatchNorm(use_running_average=False, momentum=0.99)
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(64, 2)).astype(np.float32) * [15, scale] for _ in range(3)]
    variables = layer.init(jax.random.key(0), batches[0])

    def update(batch_stats, x):
        moved = {**variables, "batch_stats": batch_stats}
        return layer.apply(moved, x, mutable=["batch_stats"])[1]["batch_stats"]

    found = recompute_batch_stats(update, variables["batch_stats"], batches)
    expected = np.mean([batch.var(0) for batch in batches], 0)
    np.testing.assert_allclose(found["var"], expected, rtol=1e-4)


def test_a_donating_update_leaves_the_given_statistics():
    def update(stats, x):
        return {"mean": 0.9 * stats["mean"] + 0.1 * x, "count": stats["count"] + 1}

    stats = {"mean": jnp.zeros(2), "count": jnp.zeros((), jnp.int32)}
    donating = jax.jit(update, donate_argnums=0)
    found = recompute_batch_stats(donating, stats, [jnp.ones(2), jnp.full(2, 3.0)])
    np.testing.assert_allclose(found["mean"], 2.0, rtol=1e-6)
    assert not stats["count"].is_deleted() and not stats["mean"].is_deleted()


def test_its_example_runs():
    outcome = doctest.testmod(module)
    assert outcome.attempted and not outcome.failed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_statistics_of_16_bits_are_re_estimated_in_float32(dtype):
    layer = nn.BatchNorm(use_running_average=False, momentum=0.99)
    images = jnp.stack([jnp.asarray(batch) for batch in BATCHES])
    variables = layer.init(jax.random.key(0), images[0])

    def update(batch_stats, x):
        moved = {**variables, "batch_stats": batch_stats}
        return layer.apply(moved, x, mutable=["batch_stats"])[1]["batch_stats"]

    small = jax.tree.map(lambda x: x.astype(dtype), variables["batch_stats"])
    found = recompute_batch_stats(update, small, images)
    expected = recompute_batch_stats(update, variables["batch_stats"], images)
    assert found["mean"].dtype == dtype
    for name in ("mean", "var"):
        np.testing.assert_array_equal(found[name], expected[name].astype(dtype))

    def rounding(batch_stats, x):
        return jax.tree.map(lambda a: a.astype("bfloat16"), update(batch_stats, x))

    with pytest.raises(ValueError, match="16 bits are too few"):
        recompute_batch_stats(rounding, small, images)


def test_update_may_return_another_container():
    statistics = [np.zeros(3, np.float32)]

    def update(batch_stats, x):
        return (0.9 * batch_stats[0] + 0.1 * x.mean((0, 1, 2)),)

    (found,) = recompute_batch_stats(update, statistics, BATCHES)
    np.testing.assert_allclose(found, np.mean(BATCHES, axis=(0, 1, 2, 3)), rtol=1e-5)
    with pytest.raises(ValueError, match="no running average"):
        recompute_batch_stats(lambda b, x: (b[0] * 0,), [np.zeros(3, np.int32)], BATCHES)


def haiku_layer():
    import haiku

    def forward(x, train):
        return haiku.BatchNorm(True, True, 0.9)(x, is_training=train)

    net = haiku.without_apply_rng(haiku.transform_with_state(forward))
    params, state = net.init(jax.random.key(0), BATCHES[0], True)
    return state, lambda state, x, train: net.apply(params, state, x, train)


def equinox_layer(mode):
    import equinox

    layer, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(3, axis_name="b", mode=mode)

    def apply(state, x, train):
        own = equinox.nn.inference_mode(layer, not train)
        mapped = jax.vmap(own, axis_name="b", in_axes=(0, None), out_axes=(0, None))
        return mapped(jnp.moveaxis(x, -1, 1), state)

    return state, apply


@pytest.mark.parametrize("updates", [0, 1, 30])
@pytest.mark.parametrize("library", ["haiku", "equinox ema", "equinox batch"])
def test_averages_that_count_their_updates(library, updates):
    """Haiku and Equinox divide an average of few updates by its share; none is left to divide."""
    name, *mode = library.split()
    state, apply = haiku_layer() if name == "haiku" else equinox_layer(*mode)
    step = jax.jit(lambda state, x: apply(state, x, True)[1])
    for number in range(updates):
        state = step(state, 2 * BATCHES[number % 3])
    found = recompute_batch_stats(step, state, BATCHES)
    x = np.stack(BATCHES)
    mean, variance = x.mean((0, 1, 2, 3)), x.var((1, 2, 3)).mean(0)
    y, _ = apply(found, BATCHES[0], False)
    y = y if name == "haiku" else np.moveaxis(y, 1, -1)
    np.testing.assert_allclose(y, (BATCHES[0] - mean) / np.sqrt(variance + 1e-5), atol=1e-4)
