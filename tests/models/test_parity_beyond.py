"""Signals, volumes, segmentation and MLPs: logits and gradients are PyTorch's."""

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from inmerge_jax.models.mlp import MLPMixer
from inmerge_jax.models.resnet import ResNet
from inmerge_jax.models.unet import UNet
from tests.oracles import torch_models

CLASSES = 3
CASES = {
    "resnet18 1-D": (
        ResNet((2, 2, 2, 2), CLASSES, width=1 / 8),
        lambda: torch_models.ResNet1d(2, CLASSES, 8),
        (4, 36, 2),
    ),
    "unet 2-D": (
        UNet(CLASSES, channels=4, levels=2),
        lambda: torch_models.UNet(2, CLASSES, 4, 2, 2),
        (3, 8, 12, 2),
    ),
    "unet 3-D": (
        UNet(CLASSES, channels=4, levels=1),
        lambda: torch_models.UNet(2, CLASSES, 4, 1, 3),
        (2, 4, 6, 8, 2),
    ),
    "mixer": (
        MLPMixer(CLASSES, depth=2, features=16, patch=4),
        lambda: torch_models.MLPMixer(2, CLASSES, 12, 4, 2, 16),
        (3, 12, 12, 2),
    ),
}
LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def theirs(path):
    """PyTorch's name of a leaf."""
    _, *module, leaf = path
    return ".".join([*module, LEAVES.get(leaf, leaf)])


def ours(path, array):
    """A PyTorch array in our layout."""
    if path[1].startswith("up") and array.ndim > 2:  # Transposed convolutions are (in, out, ...).
        spatial = tuple(range(2, array.ndim))
        return np.flip(array, spatial).transpose(*spatial, 0, 1)
    return array.transpose(*range(2, array.ndim), 1, 0) if array.ndim > 1 else array


def channels_first(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    """Our network and its variables, theirs with the same, and inputs."""
    model, make, shape = CASES[request.param]
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    network = make()
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.ndim == 1 and "running_var" not in name:
                value.add_(0.1 * torch.randn_like(value))
    x = rng.normal(size=shape).astype(np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    state = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    leaves = {path: ours(path, state[theirs(path)]) for path in flatten_dict(shapes)}
    assert {path: leaf.shape for path, leaf in leaves.items()} == {
        path: leaf.shape for path, leaf in flatten_dict(shapes).items()
    }
    named = {name for name in state if "num_batches_tracked" not in name}
    assert {theirs(path) for path in leaves} == named
    return model, jax.tree.map(np.array, unflatten_dict(leaves)), network, x


def test_logits(pair):
    model, variables, network, x = pair
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x)
    with torch.no_grad():
        expected = network.eval()(channels_first(x)).numpy()
    expected = np.moveaxis(expected, 1, -1)
    assert logits.shape == expected.shape and np.ptp(expected) > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_gradients_and_batch_statistics(pair):
    model, variables, network, x = pair
    stats = variables.get("batch_stats", {})

    def loss(params):
        logits, new = model.apply(
            {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
        )
        return (logits**2).mean(), new

    gradients, new = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    network.train()
    (network(channels_first(x)) ** 2).mean().backward()
    expected = {name: value.grad.numpy() for name, value in network.named_parameters()}
    for path, gradient in flatten_dict(gradients).items():
        there = ours(("params", *path), expected[theirs(("params", *path))])
        np.testing.assert_allclose(
            gradient, there, rtol=1e-3, atol=1e-4 * np.abs(there).max() + 1e-7, err_msg=str(path)
        )
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    for path, value in flatten_dict(new.get("batch_stats", {})).items():
        np.testing.assert_allclose(
            value, state[theirs(("batch_stats", *path))], rtol=1e-5, atol=1e-6
        )
