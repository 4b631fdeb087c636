"""Vision Transformers, Mamba and volumes compute what torchvision's and Hugging Face's do."""

import re

import jax
import numpy as np
import pytest
import torch
import torchvision
from flax.traverse_util import flatten_dict

from inmerge_jax.errors import UsageError
from inmerge_jax.models import create_model
from inmerge_jax.models.mamba import Mamba
from inmerge_jax.models.torchvision import from_state_dict, match_state_dict, to_state_dict

CLASSES, DEPTH = 5, 2


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


def vision_transformer():
    """torchvision's vit_b_16 with one head and few classes, for images of 32 px."""
    return perturb(
        torchvision.models.VisionTransformer(
            image_size=32,
            patch_size=16,
            num_layers=12,
            num_heads=1,
            hidden_dim=64,
            mlp_dim=256,
            num_classes=CLASSES,
        )
    ).eval()


def test_the_vision_transformer_is_torchvisions():
    network = vision_transformer()
    model = create_model("vit_b_16", CLASSES, width=1 / 12)
    x = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
    params = from_state_dict("vit_b_16", network.state_dict(), width=1 / 12)["params"]
    check_shapes(model, x, params)

    def loss(params):
        logits = model.apply({"params": params}, x, train=True)
        return (logits**2).mean(), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    theirs = network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    (theirs**2).mean().backward()
    np.testing.assert_allclose(logits, theirs.detach().numpy(), rtol=1e-5, atol=1e-5)
    given = {name: p.grad for name, p in network.named_parameters()}
    expected = from_state_dict("vit_b_16", given, width=1 / 12)["params"]
    for path, value in flatten_dict(gradients).items():
        there = flatten_dict(expected)[path]
        # A key's bias shifts all scores of a query alike, so its gradient is rounding.
        scale = 1e-4 * np.abs(there).max() + 1e-7
        np.testing.assert_allclose(value, there, rtol=1e-3, atol=scale, err_msg=str(path))


def in_timms_names(state):
    """A state dict of torchvision's network by timm's names, some of which it fuses."""
    layer = "encoder.layers.encoder_layer_"
    renamed = (
        (f"{layer}(\\d+).ln_", r"blocks.\1.norm"),
        (f"{layer}(\\d+).self_attention.in_proj_", r"blocks.\1.attn.qkv."),
        (f"{layer}(\\d+).self_attention.out_proj", r"blocks.\1.attn.proj"),
        (f"{layer}(\\d+).mlp.0", r"blocks.\1.mlp.fc1"),
        (f"{layer}(\\d+).mlp.3", r"blocks.\1.mlp.fc2"),
        ("encoder.pos_embedding", "pos_embed"),
        ("class_token", "cls_token"),
        ("conv_proj", "patch_embed.proj"),
        ("encoder.ln", "norm"),
        ("heads.head", "head"),
    )
    found = {}
    for name, value in state.items():
        for pattern, new in renamed:
            name = re.sub(f"^{pattern}", new, name)
        found[name] = value
    return found


@pytest.mark.long
def test_weights_of_a_vision_transformer_in_and_out():
    state = vision_transformer().state_dict()
    variables = from_state_dict("vit_b_16", state, width=1 / 12)
    back = to_state_dict("vit_b_16", variables)
    assert list(sorted(back)) == sorted(state)
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value.numpy(), err_msg=name)
    timm = {f"model.{name}": value for name, value in in_timms_names(state).items()}
    jax.tree.map(
        np.testing.assert_array_equal, variables, from_state_dict("vit_b_16", timm, width=1 / 12)
    )
    options = {"stem": "small", "channels": 3, "key": jax.random.key(0), "width": 1 / 12}
    taken, report = match_state_dict("vit_b_16", timm, num_classes=2, spatial=(48, 48), **options)
    assert set(report.initialized) == {
        "encoder.pos_embedding",
        "heads.head.bias",
        "heads.head.weight",
    }
    assert report.share == 1 and taken["params"]["pos_embedding"].shape == (1, 10, 64)
    ours = flatten_dict(variables)
    for path, value in flatten_dict(taken).items():
        if path[1] not in ("head", "pos_embedding"):
            np.testing.assert_array_equal(value, ours[path])


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


@pytest.mark.long
def test_a_residual_network_for_volumes_is_torchvisions():
    torch.manual_seed(0)
    network = perturb(torchvision.models.video.r3d_18(num_classes=CLASSES)).eval()
    model = create_model("resnet18", CLASSES, modality="volume", stem="imagenet")
    x = np.random.default_rng(0).normal(size=(2, 4, 16, 24, 3)).astype(np.float32)
    variables = from_state_dict("resnet18", network.state_dict())
    check_shapes(model, x, variables["params"])
    back = to_state_dict("resnet18", variables)
    assert sorted(back) == sorted(network.state_dict())
    for name, value in network.state_dict().items():
        np.testing.assert_array_equal(back[name], value.numpy(), err_msg=name)
    logits = jax.jit(lambda v: model.apply(v, x, train=False))(variables)
    with torch.no_grad():
        theirs = network(torch.from_numpy(x.transpose(0, 4, 1, 2, 3).copy())).numpy()
    np.testing.assert_allclose(logits, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_networks_without_a_counterpart_are_refused():
    with pytest.raises(UsageError, match="mamba_tiny has no counterpart in torchvision"):
        from_state_dict("mamba_tiny", {})
    with pytest.raises(UsageError, match="mlp has no counterpart"):
        to_state_dict("mlp", {})
