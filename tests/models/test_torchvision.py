"""Weights come in from PyTorch's files and go back unchanged; what doesn't fit is named."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from inmerge_jax.errors import UsageError
from inmerge_jax.models import create_model, model_names
from inmerge_jax.models.torchvision import (
    from_state_dict,
    read_state_dict,
    to_state_dict,
    write_state_dict,
)

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")

from experiments.oracles.torch_networks import create_network  # noqa: E402
from tests.long import long_unless  # noqa: E402

CLASSES = 3
# Peak memory of a process that holds a VGG19 as tensors and as arrays, and its time for it: that of
# the processor, which other processes do not change much. The benchmark has the time on a clock.
CONVERSION = """
import re, sys, time
from pathlib import Path
from inmerge_jax.models.torchvision import from_state_dict, read_state_dict, to_state_dict
from tests.long import long_unless
tensors = read_state_dict(sys.argv[1])
started = time.process_time()
variables = from_state_dict("vgg19", tensors)
inward = time.process_time()
del tensors
to_state_dict("vgg19", variables)
outward = time.process_time()
# Not getrusage, whose figure starts at that of the parent process.
peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(inward - started, outward - inward, peak * 1024 / 1e9)
"""


def theirs(name="resnet18", stem="small", classes=CLASSES):
    torch.manual_seed(0)
    return create_network(name, classes, stem=stem, size=16)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        found, value = np.asarray(actual[key]), np.asarray(value)
        assert (found.dtype, found.shape) == (value.dtype, value.shape), key
        assert found.tobytes() == value.tobytes(), key


@pytest.mark.parametrize(
    "name",
    long_unless(
        ("resnet50", "vgg11_bn").__contains__,
        [n for n in model_names() if n not in ("vgg13_bn", "vgg16")],
    ),
)
def test_small_networks_come_back_bit_for_bit(name):
    # Every other pair of network and stem does so in the tests of parity.
    state_dict = theirs(name).state_dict()
    names = "medmnist" if name.startswith("resnet") else "torchvision"
    assert_same(to_state_dict(name, from_state_dict(name, state_dict), names=names), state_dict)


@pytest.mark.long
def test_small_densenet_computes_what_pytorchs_does():
    network = theirs("densenet121").eval()
    images = np.random.default_rng(0).normal(size=(2, 16, 24, 3)).astype(np.float32)
    variables = from_state_dict("densenet121", network.state_dict())
    model = create_model("densenet121", CLASSES)
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    with torch.no_grad():
        expected = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_every_entry_of_the_full_networks_has_torchvisions_name_and_shape():
    # The round trip of a narrow VGG can't tell whether a full one's entries have these shapes.
    with torch.device("meta"):
        expected = {k: v.shape for k, v in theirs("vgg16_bn", "imagenet").state_dict().items()}
    small = {k: np.zeros(v, np.float32) for k, v in expected.items()}
    variables = from_state_dict("vgg16_bn", small)
    back = to_state_dict("vgg16_bn", variables)
    assert {key: value.shape for key, value in back.items()} == expected


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_vgg19_converts_in_5_seconds_and_2_gigabytes(tmp_path, suffix):
    with torch.device("meta"):
        network = create_network("vgg19", 1000, stem="imagenet", size=224)
    state_dict = {key: np.ones(x.shape, np.float32) for key, x in network.state_dict().items()}
    write_state_dict(tmp_path / f"vgg19{suffix}", state_dict)
    del state_dict
    command = [sys.executable, "-c", CONVERSION, str(tmp_path / f"vgg19{suffix}")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    inward, outward, gigabytes = map(float, done.stdout.split())
    assert inward < 5 and outward < 5 and gigabytes < 2, done.stdout


def test_the_variables_are_copies():
    network = theirs()
    variables = from_state_dict("resnet18", network.state_dict())
    before = jax.tree.map(np.copy, variables)
    with torch.no_grad():
        for entry in network.state_dict().values():
            entry += 1
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    state_dict = to_state_dict("resnet18", variables)
    for entry in state_dict.values():
        entry += 1
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_small_resnet_loads_into_torchvisions_with_its_stem_changed():
    import torchvision

    network = torchvision.models.resnet18(num_classes=CLASSES)
    network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    state_dict = to_state_dict("resnet18", from_state_dict("resnet18", theirs().state_dict()))
    network.load_state_dict({k: torch.from_numpy(v) for k, v in state_dict.items()}, strict=True)
    assert_same(to_state_dict("resnet18", from_state_dict("resnet18", state_dict)), state_dict)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_files_hold_what_was_written(tmp_path, suffix):
    state_dict = to_state_dict("resnet18", from_state_dict("resnet18", theirs().state_dict()))
    path = tmp_path / f"weights{suffix}"
    write_state_dict(path, state_dict)
    assert_same(read_state_dict(path), state_dict)
    if suffix != ".safetensors":
        assert_same(torch.load(path, weights_only=True), state_dict)
    with pytest.raises(UsageError, match="exists; .*`overwrite`"):
        write_state_dict(path, {})
    write_state_dict(path, {"a": np.ones(2, np.float32)}, overwrite=True)
    assert_same(read_state_dict(path), {"a": np.ones(2, np.float32)})


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_the_benchmark_is_read(tmp_path, zipped):
    network = theirs()
    path = tmp_path / "resnet18_28_1.pth"
    torch.save({"net": network.state_dict()}, path, _use_new_zipfile_serialization=zipped)
    variables = from_state_dict("resnet18", read_state_dict(path))
    unread = from_state_dict("resnet18", {"net": network.state_dict()})
    jax.tree.map(np.testing.assert_array_equal, variables, unread)
    assert_same(to_state_dict("resnet18", variables, names="medmnist"), network.state_dict())


def test_torchvisions_oldest_spelling_and_half_precision_are_read():
    state_dict = theirs("densenet121").state_dict()
    old = {
        key.replace("norm1", "norm.1").replace("conv2", "conv.2"): value.half().bfloat16()
        for key, value in state_dict.items()
        if not key.endswith("num_batches_tracked")
    }
    variables = from_state_dict("densenet121", old)
    expected = state_dict["features.denseblock4.denselayer16.conv2.weight"].half().bfloat16()
    kernel = variables["params"]["denseblock4_denselayer16"]["conv2"]["kernel"]
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), expected.float().numpy())
    assert kernel.dtype == np.float32


def test_what_does_not_fit_is_listed():
    state_dict = dict(theirs().state_dict())
    del state_dict["layer1.0.conv1.weight"], state_dict["bn1.running_mean"]
    state_dict["layer9.weight"] = state_dict["layer8.num_batches_tracked"] = torch.zeros(1)
    state_dict["layer2.0.bn1.bias"] = torch.zeros(7)
    with pytest.raises(UsageError) as raised:
        from_state_dict("resnet18", state_dict)
    lines = str(raised.value).splitlines()
    assert "resnet18 with the small stem, 3 image channels and 3 classes" in lines[0]
    assert {*lines[1].strip().removeprefix("missing: ").split(", ")} == {
        "layer1.0.conv1.weight",
        "bn1.running_mean",
    }
    assert lines[2] == "  surplus: layer9.weight, layer8.num_batches_tracked"
    assert lines[3] == "  layer2.0.bn1.bias: (7,) found, (128,) expected"
    assert len(lines) == 5


@pytest.mark.long
def test_a_head_of_another_size_is_replaced_only_when_asked():
    state_dict = theirs().state_dict()
    with pytest.raises(
        UsageError, match=r"(?s)linear.weight: \(3, 512\) found, \(7, 512\).*head_key"
    ):
        from_state_dict("resnet18", state_dict, num_classes=7)
    key = jax.random.key(5)
    variables = from_state_dict("resnet18", state_dict, num_classes=7, head_key=key)
    fresh = jax.jit(
        lambda: create_model("resnet18", 7).init(key, np.zeros((1, 32, 32, 3)), train=False)
    )
    drawn = variables["params"].pop("fc")
    jax.tree.map(np.testing.assert_array_equal, drawn, fresh()["params"]["fc"])
    whole = from_state_dict("resnet18", state_dict, num_classes=CLASSES, head_key=key)
    kept = whole["params"].pop("fc")
    np.testing.assert_array_equal(kept["bias"], state_dict["linear.bias"].numpy())
    jax.tree.map(np.testing.assert_array_equal, variables, whole)


def test_a_mismatch_of_stem_or_channels_is_an_error():
    state_dict = theirs().state_dict()
    expected = r"conv1.weight: \(64, 3, 3, 3\) found, "
    with pytest.raises(UsageError, match=expected + r"\(64, 3, 7, 7\)"):
        from_state_dict("resnet18", state_dict, stem="imagenet")
    with pytest.raises(UsageError, match=expected + r"\(64, 1, 3, 3\)"):
        from_state_dict("resnet18", state_dict, channels=1)
    with pytest.raises(UsageError, match="unknown model 'resnet19'"):
        from_state_dict("resnet19", state_dict)


def test_variables_of_another_network_are_refused():
    variables = from_state_dict("resnet18", theirs().state_dict())
    with pytest.raises(UsageError, match="not those of resnet34.*\n  missing: .*layer1_2/bn1"):
        to_state_dict("resnet34", variables)
    with pytest.raises(UsageError, match="vgg11.*no names in the MedMNIST benchmark"):
        variables = from_state_dict("vgg11", theirs("vgg11").state_dict())
        to_state_dict("vgg11", variables, names="medmnist")


class Unsafe:
    pass


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.npz", lambda path: path.touch(), "ends in one of .safetensors, .pth, .pt"),
        ("a.pth", lambda path: None, "there is no file"),
        ("a.pth", lambda path: path.touch(), "can't be read"),
        (
            "a.pth",
            lambda path: path.write_bytes(b"hello"),
            "can't be read as weights",
        ),
        (
            "a.safetensors",
            lambda path: path.write_bytes(b"hello"),
            "not a complete safetensors file",
        ),
        ("a.pth", lambda path: torch.save(Unsafe(), path), "holds more than weights"),
        ("a.pth", lambda path: torch.save({"epoch": 3}, path), "not a state dict: 'epoch'"),
        ("a.pth", lambda path: torch.save([1], path), "not a state dict: it holds no dict"),
    ],
)
def test_files_that_hold_no_weights_are_refused(tmp_path, name, write, message):
    path = tmp_path / name
    write(path)
    with pytest.raises(UsageError, match=message) as raised:
        read_state_dict(path)
    assert str(path) in str(raised.value)


def test_reading_safetensors_needs_no_torch(tmp_path):
    write_state_dict(tmp_path / "a.safetensors", {"a": np.ones(2, np.float32)})
    code = (
        "import sys; from inmerge_jax.models.torchvision import read_state_dict;"
        "read_state_dict(sys.argv[1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.safetensors")], check=True)
