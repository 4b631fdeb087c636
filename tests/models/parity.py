"""One network in both frameworks: logits, batch statistics and gradients of every parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from experiments.oracles.torch_networks import create_network
from inmerge_jax.models import create_model
from inmerge_jax.models.layers import Dropout
from inmerge_jax.models.torchvision import from_state_dict, to_state_dict

CLASSES, BATCH = 5, 4
# LLVM's optimisations change nothing that is looked at here, and take a minute.
CHEAP = {"xla_backend_optimization_level": 0}


def random_images(rng, stem):
    """Neither height and width nor two channels alike; the last maps keep a few pixels."""
    height, width = (64, 96) if stem == "imagenet" else (16, 24)
    return rng.normal((0, 0.5, -0.5), (1, 0.5, 2), (BATCH, height, width, 3)).astype(np.float32)


def nchw(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def width_of(name, stem):
    """A quarter of the channels spares an imagenet VGG a gigabyte of linear layers."""
    return 0.25 if name.startswith("vgg") and stem == "imagenet" else 1.0


def narrow(network):
    """Gives torchvision's VGG a quarter of its channels in every layer."""
    for owner in list(network.modules()):
        for key, layer in list(owner.named_children()):
            if isinstance(layer, torch.nn.Conv2d):
                inputs = layer.in_channels // 4 or 3
                layer = torch.nn.Conv2d(inputs, layer.out_channels // 4, 3, padding=1)
            elif isinstance(layer, torch.nn.BatchNorm2d):
                layer = torch.nn.BatchNorm2d(layer.num_features // 4)
            elif isinstance(layer, torch.nn.Linear):
                outputs = layer.out_features
                outputs = outputs if outputs == CLASSES else outputs // 4
                layer = torch.nn.Linear(layer.in_features // 4, outputs)
            setattr(owner, key, layer)


def make_theirs(name, stem, images, width=None):
    """PyTorch's network with random entries; its running statistics are near those of `images`.

    Biases keep most units away from the kink of their ReLU.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        network = create_network(name, CLASSES, stem=stem, size=min(images.shape[1:3]))
        if (width or width_of(name, stem)) != 1:
            narrow(network)
    network = network.to_empty(device="cpu").train()
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                gain = 2 if norms else 0.5
                parameter.normal_(0, (gain / parameter[0].numel()) ** 0.5, generator=generator)
            else:
                parameter.uniform_(2, 3, generator=generator)
                parameter *= torch.randint(2, parameter.shape, generator=generator) * 2 - 1
        list(network.modules())[-1].weight *= 0.5
        for norm in norms:
            norm.weight.uniform_(0.5, 1, generator=generator)
            norm.reset_running_stats()
            norm.momentum = 1.0
        if norms:
            network(nchw(images))
        for norm in norms:
            norm.momentum = 0.1
            norm.num_batches_tracked.zero_()
            shift = torch.empty(norm.num_features).normal_(0, 0.3, generator=generator)
            norm.running_mean += shift * norm.running_var.sqrt()
            norm.running_var *= shift.exp()
    return network


def compile_ours(model, *arguments):
    """A function of variables, images and weights, compiled for those of `arguments`.

    It gives the logits of evaluation; the logits, gradients and statistics of training; and which
    units dropout kept.
    """

    @jax.jit
    def run(variables, images, weights):
        evaluation = model.apply(variables, images, train=False)

        def weighted_sum(params):
            logits, written = model.apply(
                variables | {"params": params},
                images,
                train=True,
                rngs={"dropout": jax.random.key(0)},
                mutable=["batch_stats", "intermediates"],
                capture_intermediates=lambda module, _: isinstance(module, Dropout),
            )
            return jnp.sum(logits * weights), (logits, written)

        gradients, (logits, written) = jax.grad(weighted_sum, has_aux=True)(variables["params"])
        dropouts = [x["__call__"][0] for x in written.get("intermediates", {}).values()]
        trained = {"params": gradients, "batch_stats": written.get("batch_stats", {})}
        trained = {key: tree for key, tree in trained.items() if tree}
        return evaluation, logits, trained, [x != 0 for x in dropouts]

    return run.lower(*arguments).compile(compiler_options=CHEAP)


class Masked(torch.nn.Module):
    """Dropout at rate 1/2 that keeps what it is told to keep."""

    def __init__(self, kept):
        super().__init__()
        self.kept = torch.from_numpy(kept.copy())

    def forward(self, x):
        return x * self.kept * 2 if self.training else x


def run_theirs(network, state_dict, images, weights, kept):
    """The same of PyTorch's network, with what training gives by its names."""
    network.load_state_dict(state_dict)
    network.to(torch.from_numpy(weights).dtype).zero_grad()
    with torch.no_grad():
        evaluation = network.eval()(nchw(images)).numpy()
    for place, mask in zip((2, 5), kept, strict=False):
        network.classifier[place] = Masked(mask)
    logits = network.train()(nchw(images))
    (logits * torch.from_numpy(weights)).sum().backward()
    trained = {key: entry.grad.numpy() for key, entry in network.named_parameters()}
    trained |= {key: entry.numpy() for key, entry in network.named_buffers()}
    return evaluation, logits.detach().numpy(), trained


def relative_errors(ours, theirs):
    """Per tensor, the norm of the difference by the tensor's own.

    A tensor whose gradient is zero but for rounding (a bias in front of batch normalisation) is
    measured against a thousandth of the whole gradient.
    """
    whole = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in theirs.values()))
    return {
        key: np.linalg.norm(ours[key] - x) / max(np.linalg.norm(x), 1e-3 * whole)
        for key, x in theirs.items()
    }


def in_dtype(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def check_network(name, stem):
    """Asserts that a network equals PyTorch's to rounding, and comes back from here bit for bit.

    At the kink of a ReLU and among equals in a max-pool, rounding decides which way a gradient
    goes: PyTorch's own float32 gradients are off by up to 1.5e-2 from its float64 ones. So
    gradients are compared in float64, to 1e-6; those of float32 to 5e-2, and half of them to 1e-3.
    """
    rng = np.random.default_rng(0)
    network, width = make_theirs(name, stem, random_images(rng, stem)), width_of(name, stem)
    state_dict = {key: entry.clone() for key, entry in network.state_dict().items()}
    names = "medmnist" if (name[0], stem) == ("r", "small") else "torchvision"
    variables = from_state_dict(name, state_dict, width=width)
    images = random_images(rng, stem)
    weights = rng.normal(size=(BATCH, CLASSES)).astype(np.float32)

    for dtype, atol in (("float32", 1e-4), ("float64", 1e-9)):
        model = create_model(name, CLASSES, stem=stem, width=width, dtype=jnp.dtype(dtype))
        given = in_dtype((variables, images, weights), dtype)
        with jax.enable_x64(dtype == "float64"):
            evaluation, logits, trained, kept = jax.device_get(compile_ours(model, *given)(*given))
        theirs = run_theirs(network, state_dict, *given[1:], kept)
        assert evaluation.dtype == logits.dtype == theirs[1].dtype == dtype
        trained = to_state_dict(name, trained, names=names)
        check_forward(evaluation, logits, trained, theirs, state_dict, atol)
        parameters = {key: theirs[2][key] for key, _ in network.named_parameters()}
        errors = relative_errors(trained, parameters)
        limit = 1e-6 if dtype == "float64" else 5e-2
        assert max(errors.values()) <= limit, {k: v for k, v in errors.items() if v > limit}
        assert np.median(list(errors.values())) <= 1e-3

    back = to_state_dict(name, variables, names=names)
    assert back.keys() == state_dict.keys()
    assert all(back[key].tobytes() == x.numpy().tobytes() for key, x in state_dict.items())


def check_full_width(name, stem):
    """Asserts that the scores of a network of full width are PyTorch's, to 1e-4 in float32."""
    rng = np.random.default_rng(0)
    network = make_theirs(name, stem, random_images(rng, stem), width=1)
    variables = from_state_dict(name, network.state_dict())
    images = random_images(rng, stem)
    model = create_model(name, CLASSES, stem=stem)
    forward = jax.jit(lambda variables, x: model.apply(variables, x, train=False))
    forward = forward.lower(variables, images).compile(compiler_options=CHEAP)
    with torch.no_grad():
        theirs = network.eval()(nchw(images)).numpy()
    assert np.ptp(theirs) > 0.1
    np.testing.assert_allclose(forward(variables, images), theirs, rtol=0, atol=1e-4)


def check_forward(evaluation, logits, trained, theirs, before, atol):
    """Logits of both modes, and the running statistics, which must have moved."""
    assert np.ptp(theirs[0]) > 0.1 and np.ptp(theirs[1]) > 0.1
    np.testing.assert_allclose(evaluation, theirs[0], rtol=0, atol=atol)
    np.testing.assert_allclose(logits, theirs[1], rtol=0, atol=atol)
    statistics = [key for key in theirs[2] if "running" in key]
    assert statistics == [key for key in before if "running" in key]
    for key in statistics:
        assert np.abs(trained[key] - before[key].numpy()).max() > 1e-3, key
        np.testing.assert_allclose(trained[key], theirs[2][key], rtol=0, atol=1e-4, err_msg=key)
