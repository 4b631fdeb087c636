"""Batch normalisation is PyTorch's: its output, its gradients and its running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inmerge_jax.errors import UsageError
from inmerge_jax.models.layers import BatchNorm

CHANNELS = 5


def variables(rng):
    values = rng.uniform(0.5, 2, (4, CHANNELS)).astype(np.float32)
    return {
        "params": {"scale": values[0], "bias": values[1]},
        "batch_stats": {"mean": values[2], "var": values[3]},
    }


def of_torch(given, x, weights, steps):
    """Output, gradient of sum(output * weights) and running statistics after `steps` passes."""
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm2d(CHANNELS)
    layer.load_state_dict(
        {
            "weight": torch.tensor(given["params"]["scale"]),
            "bias": torch.tensor(given["params"]["bias"]),
            "running_mean": torch.tensor(given["batch_stats"]["mean"]),
            "running_var": torch.tensor(given["batch_stats"]["var"]),
            "num_batches_tracked": torch.tensor(0),
        }
    )
    theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    for _ in range(steps):
        output = layer(theirs)
    (output * torch.tensor(weights.transpose(0, 3, 1, 2))).sum().backward()
    arrays = [output.detach().numpy(), theirs.grad.numpy()]
    output, gradient = (array.transpose(0, 2, 3, 1) for array in arrays)
    return output, gradient, layer.running_mean.numpy(), layer.running_var.numpy()


def split(x, devices):
    return x.reshape(devices, -1, *x.shape[1:])


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_training_is_pytorchs_on_any_number_of_devices(devices):
    # Eight values a channel: the unbiased variance is 8/7 of the biased one, of a device's own
    # two values it would be twice.
    rng = np.random.default_rng(0)
    given = variables(rng)
    x = rng.normal(1, 2, (4, 1, 2, CHANNELS)).astype(np.float32)
    weights = rng.normal(size=x.shape).astype(np.float32)
    layer = BatchNorm(train=True, axis_name="devices")

    def run(x, weights):
        def loss(x):
            state = given
            for _ in range(3):
                y, written = layer.apply(state, x, mutable=["batch_stats"])
                state = state | written
            return jnp.sum(y * weights), (y, written["batch_stats"])

        gradient, (y, stats) = jax.grad(loss, has_aux=True)(x)
        return y, gradient, stats["mean"], stats["var"]

    mapped = jax.pmap(run, axis_name="devices", devices=jax.devices()[:devices])
    y, gradient, mean, var = mapped(split(x, devices), split(weights, devices))
    for ours, expected in zip(
        (y.reshape(x.shape), gradient.reshape(x.shape), mean[-1], var[-1]),
        of_torch(given, x, weights, steps=3),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-6)


def test_evaluation_uses_the_running_statistics_and_leaves_them_alone():
    rng = np.random.default_rng(1)
    given = variables(rng)
    x = rng.normal(1, 2, (1, 1, 1, CHANNELS)).astype(np.float32)
    y, written = BatchNorm(train=False).apply(given, x, mutable=["batch_stats"])
    stats, params = given["batch_stats"], given["params"]
    expected = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, written["batch_stats"], stats)


def test_one_value_has_no_variance():
    x = jnp.ones((1, 1, 1, CHANNELS))
    layer = BatchNorm(train=True)
    given = layer.init(jax.random.key(0), x)  # initialisation needs no statistics
    with pytest.raises(UsageError, match="one value per channel.*larger batch"):
        layer.apply(given, x, mutable=["batch_stats"])
    _, written = layer.apply(given, jnp.stack([x[0], x[0] + 2]), mutable=["batch_stats"])
    np.testing.assert_allclose(written["batch_stats"]["var"], 0.9 + 0.1 * 2, rtol=1e-6)
