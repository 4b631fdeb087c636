"""The networks are torchvision's and the MedMNIST benchmark's, on any number of devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inmerge_jax import find_kernels
from inmerge_jax.errors import UsageError
from inmerge_jax.models import create_model, model_names
from inmerge_jax.models.densenet import DenseNet
from inmerge_jax.models.resnet import ResNet
from inmerge_jax.models.vgg import VGG
from tests.long import LONG, long_unless
from tests.models.names import CNNS, OTHERS, VGGS

VGG19_STAGES = {1: 2, 2: 2, 3: 4, 4: 4, 5: 4}


def abstract_variables(model, size, channels=3):
    images = jnp.zeros((1, size, size, channels))
    return jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def random_images(batch, size):
    return jax.random.normal(jax.random.key(1), (batch, size, size, 3))


@pytest.mark.parametrize("name", long_unless(("vgg11_bn", "resnet18"), CNNS))
def test_imagenet_stem_has_as_many_parameters_as_torchvision(name):
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None, num_classes=14)
    variables = abstract_variables(create_model(name, 14, stem="imagenet"), 224)
    assert count(variables["params"]) == sum(p.numel() for p in theirs.parameters())
    statistics = [b for key, b in theirs.named_buffers() if "running" in key]
    assert count(variables.get("batch_stats", {})) == sum(b.numel() for b in statistics)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # What is widely given for the same networks on CIFAR-10.
    [("resnet18", 11_173_962), ("resnet34", 21_282_122), ("resnet50", 23_520_842)],
)
def test_small_resnets_are_the_benchmarks(name, parameters):
    assert count(abstract_variables(create_model(name, 10), 28)["params"]) == parameters


@LONG
def test_small_densenet_differs_in_the_stem_alone():
    small, imagenet = (
        abstract_variables(create_model("densenet121", 10, stem=stem), 32)["params"]
        for stem in ("small", "imagenet")
    )
    assert small.pop("conv0")["kernel"].shape == (3, 3, 3, 64)
    assert imagenet.pop("conv0")["kernel"].shape == (7, 7, 3, 64)
    assert small == imagenet
    assert len([path for path in small if "denselayer" in path]) == 6 + 12 + 24 + 16


def test_what_there_is():
    assert [*model_names()] == [*CNNS[-4:], *VGGS, *OTHERS]
    assert model_names("table") == ("mlp",)
    assert model_names("volume") == ("resnet18", "resnet34", "resnet50", "unet")
    assert model_names("signal") == (*CNNS[-4:-1], "mamba_tiny", "mamba_130m")


@pytest.mark.parametrize(
    ("name", "parameters"),
    # torchvision's vit_b_16, timm's vit_small_patch16_224 and DeiT's tiny network, each with 1000
    # classes; the last has patches of 16 px, and ours of 4.
    [("vit_b_16", 86_567_656), ("vit_s_16", 22_050_664), ("vit_tiny", 5_717_416)],
)
def test_vision_transformers_have_as_many_parameters_as_others(name, parameters):
    size = 56 if name == "vit_tiny" else 224
    found = count(abstract_variables(create_model(name, 1000), size)["params"])
    patches = (16**2 - 4**2) * 3 * 192 if name == "vit_tiny" else 0
    assert found == parameters - patches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vit_tiny", "modality": "volume"}, "`model` vit_tiny reads images, not volumes"),
        ({"name": "resnet18", "modality": "table"}, "reads images and volumes and signals, not ta"),
        ({"name": "mlp", "modality": "table", "stem": "imagenet"}, "mlp has no stem"),
        ({"name": "vit_tiny", "remat": True}, "`remat` is for densenet121"),
    ],
)
def test_a_network_for_something_else_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        create_model(num_classes=3, **options)


def copy_layers(theirs, layers):
    """Our parameters and statistics from PyTorch's modules, given by our names."""
    params, stats = {}, {}
    for path, module in layers.items():
        # Copied: PyTorch's next forward pass writes to its running statistics in place.
        tensors = {
            k: v.detach().numpy().copy()
            for k, v in theirs.get_submodule(module).state_dict().items()
        }
        weight = tensors["weight"]
        if weight.ndim == 1:
            params[path] = {"scale": weight, "bias": tensors["bias"]}
            stats[path] = {"mean": tensors["running_mean"], "var": tensors["running_var"]}
            continue
        params[path] = {"kernel": weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T}
        if "bias" in tensors:
            params[path]["bias"] = tensors["bias"]
    return params, stats


def nested(flat):
    tree = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def randomise(torch, module):
    """Every parameter and statistic random, so that none can stand in for another."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.1)


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=LONG)])
def test_imagenet_resnet18_computes_what_torchvision_does(train):
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet18(weights=None, num_classes=5).train(train)
    randomise(torch, theirs)
    names = [n for n, m in theirs.named_modules() if not list(m.children()) and m.state_dict()]
    ours = {
        n.replace("downsample.0", "shortcut_conv")
        .replace("downsample.1", "shortcut_bn")
        .replace(".", "_", 1 if n.startswith("layer") else 0)
        .replace(".", "/"): n
        for n in names
    }
    params, stats = copy_layers(theirs, ours)
    model = create_model("resnet18", 5, stem="imagenet")
    images = np.random.default_rng(0).normal(size=(4, 63, 70, 3)).astype(np.float32)
    variables = {"params": nested(params), "batch_stats": nested(stats)}
    logits, written = jax.jit(lambda v, x: model.apply(v, x, train=train, mutable=["batch_stats"]))(
        variables, images
    )
    expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    mean = theirs.layer4[1].bn2.running_mean.numpy()
    np.testing.assert_allclose(
        written["batch_stats"]["layer4_1"]["bn2"]["mean"], mean, rtol=1e-3, atol=1e-3
    )


def torch_vgg19_bn(torch, make_layers):
    """torchvision's VGG19 with a sixteenth of the channels."""
    nn = torch.nn
    plan = []
    for channels, convolutions in zip((4, 8, 16, 32, 32), VGG19_STAGES.values(), strict=True):
        plan += [channels] * convolutions + ["M"]
    return nn.Sequential(
        make_layers(plan, batch_norm=True),
        nn.AdaptiveAvgPool2d((7, 7)),
        nn.Flatten(),
        nn.Linear(32 * 49, 256),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(256, 5),
    )


def test_imagenet_vgg19_bn_computes_what_torchvision_does():
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    from torchvision.models.vgg import make_layers

    theirs = torch_vgg19_bn(torch, make_layers).eval()
    randomise(torch, theirs)
    numbers = [f"{stage}_{i + 1}" for stage, n in VGG19_STAGES.items() for i in range(n)]
    layers = [n for n, m in theirs[0].named_children() if m.state_dict()]
    ours = dict(
        zip([f"{kind}{n}" for n in numbers for kind in ("conv", "bn")], layers, strict=True)
    )
    params, stats = copy_layers(theirs[0], ours)
    head, _ = copy_layers(theirs, {"fc1": "3", "fc2": "6", "fc3": "9"})
    chw = head["fc1"]["kernel"].reshape(32, 7, 7, 256)
    head["fc1"]["kernel"] = chw.transpose(1, 2, 0, 3).reshape(-1, 256)
    model = create_model("vgg19_bn", 5, stem="imagenet", width=1 / 16)
    images = np.random.default_rng(0).normal(size=(2, 100, 64, 3)).astype(np.float32)
    variables = {"params": params | head, "batch_stats": stats}
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "size"),
    long_unless(
        lambda case: case in (("resnet18", 28), ("vgg16", 64)),
        itertools.product(CNNS, (28, 64)),
    ),
)
def test_small_stem_trains_on_grey_and_on_bfloat16(name, size):
    model = create_model(name, 5, width=1 / 16, dtype=jnp.bfloat16)
    variables = abstract_variables(model, size)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    images = jnp.zeros((2, size, size, 3))
    logits, written = jax.eval_shape(
        lambda v: model.apply(v, images, train=True, mutable=["batch_stats"]), variables
    )
    assert (logits.shape, logits.dtype) == ((2, 5), jnp.float32)
    plain_vgg = name in ("vgg11", "vgg13", "vgg16", "vgg19")
    assert bool(written) == ("batch_stats" in variables) == (not plain_vgg)
    grey = abstract_variables(create_model(name, 2), size, channels=1)
    first = grey["params"][{"r": "conv1", "d": "conv0", "v": "conv1_1"}[name[0]]]
    assert first["kernel"].shape == (3, 3, 1, 64)


@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_vgg_convolutions_are_found_in_the_order_of_execution(stem):
    model = create_model("vgg19", 2, stem=stem, width=1 / 16)
    params = abstract_variables(model, 32)["params"]
    images = jnp.zeros((1, 32, 32, 3))
    kernels = find_kernels(lambda p, x: model.apply({"params": p}, x, train=False), params, images)
    expected = [f"conv{s}_{i + 1}/kernel" for s, n in VGG19_STAGES.items() for i in range(n)]
    assert [kernel.name for kernel in kernels] == expected
    assert [kernel.count for kernel in kernels[-4:]] == [32] * 4


@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_resnet_convolutions_are_found_in_the_order_of_execution(stem):
    model = create_model("resnet18", 2, stem=stem, width=1 / 16)
    variables = abstract_variables(model, 28)
    params, stats = variables["params"], variables["batch_stats"]

    def forward(params, images):
        return model.apply({"params": params, "batch_stats": stats}, images, train=False)

    stats = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), stats)
    names = [k.name for k in find_kernels(forward, params, jnp.zeros((1, 28, 28, 3)))]
    expected = ["conv1/kernel"]
    for stage in range(1, 5):
        for block in range(2):
            prefix = f"layer{stage}_{block}"
            expected += [f"{prefix}/conv1/kernel", f"{prefix}/conv2/kernel"]
            if stage > 1 and block == 0:
                expected += [f"{prefix}/shortcut_conv/kernel"]
    assert names == expected


def test_small_vgg_leaves_out_the_pools_that_would_leave_one_pixel():
    model = create_model("vgg16", 5)
    _, state = jax.eval_shape(
        lambda v: model.apply(
            v,
            jnp.zeros((1, 28, 28, 3)),
            train=False,
            capture_intermediates=True,
            mutable=["intermediates"],
        ),
        abstract_variables(model, 28),
    )
    sizes = [state["intermediates"][f"conv{s}_1"]["__call__"][0].shape[1] for s in range(1, 6)]
    assert sizes == [28, 14, 7, 3, 3]


def split(tree, devices):
    return jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), tree)


def test_batch_statistics_and_gradients_are_those_of_one_device():
    images = random_images(8, 6)

    def network(axis_name):
        return ResNet((1,), num_classes=5, width=1 / 16, axis_name=axis_name)

    variables = jax.jit(lambda x: network(None).init(jax.random.key(0), x, train=False))(images)

    def step(axis_name, images):
        model = network(axis_name)

        def loss(params):
            logits, written = model.apply(
                variables | {"params": params}, images, train=True, mutable=["batch_stats"]
            )
            return jnp.mean(logits**2), written["batch_stats"]

        gradients, stats = jax.grad(loss, has_aux=True)(variables["params"])
        return (jax.lax.pmean(gradients, axis_name) if axis_name else gradients), stats

    one = jax.jit(lambda x: step(None, x))(images)
    four = jax.pmap(lambda x: step("devices", x), axis_name="devices", devices=jax.devices()[:4])(
        split(images, 4)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(b[0], a, rtol=2e-3, atol=1e-4 * np.abs(a).max() + 1e-7)
        np.testing.assert_array_equal(b[0], b[3])


@LONG
def test_imagenet_vgg_is_the_same_however_the_batch_is_split():
    images = random_images(8, 32)

    def network(axis_name):
        return VGG((1, 1), num_classes=5, stem="imagenet", width=1 / 32, axis_name=axis_name)

    variables = jax.jit(lambda x: network(None).init(jax.random.key(0), x, train=False))(images)

    def logits(axis_name, images):
        rngs = {"dropout": jax.random.key(3)}
        return network(axis_name).apply(variables, images, train=True, rngs=rngs)

    whole = jax.jit(lambda x: logits(None, x))(images)
    parts = jax.pmap(
        lambda x: logits("devices", x), axis_name="devices", devices=jax.devices()[:4]
    )(split(images, 4))
    scale = np.abs(whole).max()
    np.testing.assert_allclose(parts.reshape(whole.shape), whole, rtol=1e-4, atol=1e-4 * scale)
    assert np.abs(whole[0] - whole[1]).max() > 1e-3 * scale


@LONG
def test_initial_values_of_a_densenet_have_torchvisions_spread():
    params = initial_parameters(DenseNet((2,), num_classes=500))
    layer = params["denseblock1_denselayer1"]
    assert np.std(layer["conv1"]["kernel"]) == pytest.approx(np.sqrt(2 / 64), rel=0.02)
    assert np.std(layer["conv2"]["kernel"]) == pytest.approx(np.sqrt(2 / (9 * 128)), rel=0.02)
    head = params["classifier"]
    assert np.std(head["kernel"]) == pytest.approx(1 / np.sqrt(3 * 128), rel=0.02)
    assert not head["bias"].any()


def initial_parameters(model):
    images = jnp.zeros((1, 8, 8, 64))
    return jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0))["params"]


@LONG
def test_initial_values_have_pytorchs_spread():
    params = initial_parameters(ResNet((1,), num_classes=500))
    weight, head = params["layer1_0"]["conv2"]["kernel"], params["fc"]
    limit = 1 / np.sqrt(9 * 64)
    assert np.abs(weight).max() == pytest.approx(limit, rel=1e-3)
    assert np.std(weight) == pytest.approx(limit / np.sqrt(3), rel=0.02)
    assert np.abs(head["bias"]).max() == pytest.approx(1 / np.sqrt(64), rel=0.02)
    assert np.std(head["kernel"]) == pytest.approx(1 / np.sqrt(3 * 64), rel=0.02)

    params = initial_parameters(ResNet((1,), num_classes=5, stem="imagenet"))
    spread = np.std(params["layer1_0"]["conv2"]["kernel"])
    assert spread == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)

    params = initial_parameters(VGG((1,), num_classes=5))
    assert np.std(params["conv1_1"]["kernel"]) == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)
    assert not params["conv1_1"]["bias"].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet19"}, "unknown model 'resnet19'.*resnet18.*vgg19_bn"),
        ({"stem": "large"}, "unknown stem 'large'.*small, imagenet"),
        ({"width": 0.0}, "width 0.0"),
        ({"width": float("nan")}, "width nan"),
        ({"num_classes": 0}, "num_classes 0"),
    ],
)
def test_bad_arguments_say_what_there_is(arguments, message):
    with pytest.raises(UsageError, match=message):
        create_model(**{"name": "resnet18", "num_classes": 2} | arguments)


@pytest.mark.parametrize("name", ["vgg16", "densenet121"])
def test_imagenet_stem_refuses_images_that_vanish(name):
    with pytest.raises(UsageError, match="28x28.*small"):
        abstract_variables(create_model(name, 2, stem="imagenet"), 28)


def test_small_densenet_refuses_images_that_vanish():
    with pytest.raises(UsageError, match="7x7.*small stem 8 px or more"):
        abstract_variables(create_model("densenet121", 2), 7)


@pytest.mark.parametrize(
    ("name", "barriers"),
    [("resnet18", 3), pytest.param("resnet50", 6, marks=LONG), ("vgg16", 0)],
)
def test_a_barrier_precedes_strided_convolutions_on_tpus_only(name, barriers):
    model = create_model(name, 10, stem="small", width=0.125)
    variables = abstract_variables(model, 28)
    traced = jax.jit(lambda v, x: model.apply(v, x, train=False)).trace(
        variables, jax.ShapeDtypeStruct((2, 28, 28, 3), jnp.float32)
    )
    program = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("tpu", "cuda", "cpu")
    }
    assert program["tpu"].count("optimization_barrier") == barriers
    assert "optimization_barrier" not in program["cuda"] + program["cpu"]
