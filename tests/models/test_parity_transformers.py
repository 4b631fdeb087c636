"""Vision Transformers, Mamba and volumes compute what torchvision's and Hugging Face's do."""

import re

import jax
import numpy as np
import pytest
import torch
import torchvision
from flax.traverse_util import flatten_dict, unflatten_dict

from inmerge_jax.models.mamba import Mamba
from inmerge_jax.models.resnet import ResNet
from inmerge_jax.models.vit import ViT

CLASSES, DEPTH, HEADS = 5, 2, 2


def arrays(network):
    return {name: value.detach().numpy() for name, value in network.state_dict().items()}


def perturb(network):
    """Random norms, biases, class tokens and heads, of which some are zero or one initially."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if value.ndim == 1 or "token" in name or "head" in name:
                value.add_(0.2 * torch.randn_like(value))
        for name, value in network.named_buffers():
            if name.endswith("running_mean"):
                value.add_(0.1 * torch.randn_like(value))
            elif name.endswith("running_var"):
                value.mul_(0.5 + torch.rand_like(value))
    return network


def check_shapes(model, x, params):
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes["params"])


def vit_params(state):
    """The parameters of torchvision's network; see `EncoderBlock` for the attention's shapes."""

    def dense(name):
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    def norm(name):
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    params = {
        "class_token": state["class_token"],
        "pos_embedding": state["encoder.pos_embedding"],
        "patches": {
            "kernel": state["conv_proj.weight"].transpose(2, 3, 1, 0),
            "bias": state["conv_proj.bias"],
        },
        "ln": norm("encoder.ln"),
        "head": dense("heads.head"),
    }
    for number in range(DEPTH):
        block = f"encoder.layers.encoder_layer_{number}"
        weight = state[f"{block}.self_attention.in_proj_weight"]
        d = weight.shape[1]
        weight = weight.T.reshape(d, 3, HEADS, -1)
        bias = state[f"{block}.self_attention.in_proj_bias"].reshape(3, HEADS, -1)
        attention = {
            name: {"kernel": weight[:, part], "bias": bias[part]}
            for part, name in enumerate(("query", "key", "value"))
        }
        out = dense(f"{block}.self_attention.out_proj")
        attention["out"] = out | {"kernel": out["kernel"].reshape(HEADS, -1, d)}
        params[f"block_{number}"] = {
            "attention": attention,
            "ln_1": norm(f"{block}.ln_1"),
            "ln_2": norm(f"{block}.ln_2"),
            "fc1": dense(f"{block}.mlp.0"),
            "fc2": dense(f"{block}.mlp.3"),
        }
    return params


def test_the_vision_transformer_is_torchvisions():
    network = torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=DEPTH,
        num_heads=HEADS,
        hidden_dim=64 * HEADS,
        mlp_dim=256 * HEADS,
        num_classes=CLASSES,
    )
    network = perturb(network).eval()
    model = ViT(CLASSES, depth=DEPTH, heads=HEADS, patch=8)
    x = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
    params = vit_params(arrays(network))
    check_shapes(model, x, params)

    def loss(params):
        logits = model.apply({"params": params}, x, train=True)
        return (logits**2).mean(), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    theirs = network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    (theirs**2).mean().backward()
    np.testing.assert_allclose(logits, theirs.detach().numpy(), rtol=1e-5, atol=1e-5)
    expected = vit_params({name: p.grad.numpy() for name, p in network.named_parameters()})
    for path, value in flatten_dict(gradients).items():
        there = flatten_dict(expected)[path]
        # A key's bias shifts all scores of a query alike, so its gradient is rounding.
        scale = 1e-4 * np.abs(there).max() + 1e-7
        np.testing.assert_allclose(value, there, rtol=1e-3, atol=scale, err_msg=str(path))


def mamba_params(state):
    params = {"norm_f": {"scale": state["norm_f.weight"]}}
    for number in range(DEPTH):
        mixer = f"layers.{number}.mixer"
        params[f"norm_{number}"] = {"scale": state[f"layers.{number}.norm.weight"]}
        params[f"mixer_{number}"] = {
            "A_log": state[f"{mixer}.A_log"],
            "D": state[f"{mixer}.D"],
            "conv1d": {
                "kernel": state[f"{mixer}.conv1d.weight"].transpose(2, 1, 0),
                "bias": state[f"{mixer}.conv1d.bias"],
            },
            "dt_proj": {
                "kernel": state[f"{mixer}.dt_proj.weight"].T,
                "bias": state[f"{mixer}.dt_proj.bias"],
            },
            **{
                name: {"kernel": state[f"{mixer}.{name}.weight"].T}
                for name in ("in_proj", "x_proj", "out_proj")
            },
        }
    return params


def test_mamba_is_hugging_faces():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=DEPTH, state_size=16, vocab_size=1
    )
    torch.manual_seed(0)
    network = perturb(transformers.MambaModel(config)).eval()
    x = np.random.default_rng(0).normal(size=(2, 12, 32)).astype(np.float32)
    model = Mamba(CLASSES, depth=DEPTH, features=32, patch=1)
    fixed = {
        "patches": {"kernel": np.eye(32, dtype=np.float32)[None], "bias": np.zeros(32, np.float32)},
        "head": {"kernel": np.zeros((32, CLASSES), np.float32), "bias": np.zeros(CLASSES)},
    }
    params = mamba_params(arrays(network)) | fixed
    check_shapes(model, x, params)

    def hidden(params):
        _, kept = model.apply(
            {"params": params},
            x,
            train=True,
            capture_intermediates=lambda module, _: module.name == "norm_f",
            mutable=["intermediates"],
        )
        states = kept["intermediates"]["norm_f"]["__call__"][0]
        return (states**3).mean(), states

    (_, states), gradients = jax.jit(jax.value_and_grad(hidden, has_aux=True))(params)
    theirs = network(inputs_embeds=torch.from_numpy(x)).last_hidden_state
    (theirs**3).mean().backward()
    np.testing.assert_allclose(states, theirs.detach().numpy(), rtol=1e-4, atol=1e-5)
    given = {n: p.grad.numpy() for n, p in network.named_parameters() if p.grad is not None}
    for path, there in flatten_dict(mamba_params(given)).items():
        value = flatten_dict(gradients)[path]
        scale = 1e-4 * np.abs(there).max()
        np.testing.assert_allclose(value, there, rtol=1e-3, atol=scale, err_msg=str(path))


def r3d_name(path):
    """torchvision's name of a leaf of a ResNet for volumes."""
    _, *module, leaf = path
    name = re.sub(r"^(layer\d)_", r"\1.", ".".join(module))
    name = name.replace("shortcut_conv", "downsample.0").replace("shortcut_bn", "downsample.1")
    name = {"conv1": "stem.0", "bn1": "stem.1"}.get(name, name)
    name = re.sub(r"\.conv(\d)$", r".conv\1.0", name)
    name = re.sub(r"\.bn(\d)$", r".conv\1.1", name)
    leaves = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    return f"{name}.{leaves.get(leaf, leaf)}"


def test_a_residual_network_for_volumes_is_torchvisions():
    torch.manual_seed(0)
    network = perturb(torchvision.models.video.r3d_18(num_classes=CLASSES)).eval()
    model = ResNet((2, 2, 2, 2), CLASSES, stem="imagenet")
    x = np.random.default_rng(0).normal(size=(2, 4, 16, 24, 3)).astype(np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    state = arrays(network)
    leaves = {}
    for path in flatten_dict(shapes):
        array = state[r3d_name(path)]
        leaves[path] = array.transpose(2, 3, 4, 1, 0) if array.ndim == 5 else array.T
    named = {name for name in state if "num_batches_tracked" not in name}
    assert {r3d_name(path) for path in leaves} == named
    logits = jax.jit(lambda v: model.apply(v, x, train=False))(unflatten_dict(leaves))
    with torch.no_grad():
        theirs = network(torch.from_numpy(x.transpose(0, 4, 1, 2, 3).copy())).numpy()
    np.testing.assert_allclose(logits, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
