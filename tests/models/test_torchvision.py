"""Weights come in from PyTorch's files and go back unchanged; what doesn't fit is named."""

import argparse
import re
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from inmerge_jax.errors import UsageError
from inmerge_jax.models import create_model
from inmerge_jax.models.torchvision import (
    from_state_dict,
    match_state_dict,
    read_state_dict,
    to_state_dict,
    write_state_dict,
)

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
safetensors_torch = pytest.importorskip("safetensors.torch")

from experiments.oracles.torch_networks import create_network  # noqa: E402
from tests.long import long_unless  # noqa: E402
from tests.models.names import CNNS  # noqa: E402
from tests.models.parity import narrow as narrow_all  # noqa: E402

CLASSES = 3
WIDTH = 0.0625
KEY = jax.random.key(5)
LEGACY = {"_use_new_zipfile_serialization": False}
# Peak memory of a process that holds a VGG19 as tensors and as arrays, and its time for it: that of
# the processor, which other processes do not change much. The benchmark has the time on a clock.
CONVERSION = """
import re, sys, time
from pathlib import Path
from inmerge_jax.models.torchvision import from_state_dict, read_state_dict, to_state_dict
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
        ["vgg11_bn"],
        [n for n in CNNS if n not in ("vgg13_bn", "vgg16")],
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


@pytest.mark.long
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


@pytest.mark.long
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
    assert lines[2] == "  not used: layer9.weight, layer8.num_batches_tracked"
    assert lines[3] == "  layer2.0.bn1.bias: (7,) found, (128,) expected"
    assert len(lines) == 5


def match(state_dict, name="vgg11", **changes):
    options = {"stem": "small", "num_classes": CLASSES, "channels": 3, "width": WIDTH}
    return match_state_dict(name, state_dict, **(options | {"key": KEY} | changes))


def fresh(*layers, name="vgg11", stem="small", channels=3):
    """The parameters of some layers as `init` draws them."""
    model = create_model(name, CLASSES, stem=stem, width=WIDTH)
    image = np.zeros((1, 32, 32, channels), np.float32)

    def draw():
        params = model.init(KEY, image, train=False)["params"]
        return {layer: params[layer] for layer in layers}

    return jax.device_get(jax.jit(draw)())


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def narrow(name="vgg11", classes=CLASSES):
    torch.manual_seed(0)
    return create_network(name, classes, stem="small", size=32, width=WIDTH).state_dict()


def prefixed(prefix, state_dict):
    return {f"{prefix}{key}": value for key, value in state_dict.items()}


FORMS = {
    "state_dict": lambda x: {"epoch": 3, "state_dict": x, "optimizer": {"lr": 0.1}},
    "model": lambda x: {"model": x},
    "net": lambda x: {"net": x, "acc": 0.5},
    "model_state_dict": lambda x: {"model_state_dict": x},
    "nested": lambda x: {"model": {"state_dict": x, "epoch": 1}},
    "lightning": lambda x: {
        "pytorch-lightning_version": "2.0",
        "state_dict": prefixed("model.", x) | {"criterion.pos_weight": torch.ones(3)},
    },
    "numbers": lambda x: {"state_dict": x, "best": np.float64(0.9), "epoch": np.int64(3)},
    "module.": lambda x: prefixed("module.", x),
    "backbone.": lambda x: prefixed("backbone.", x),
    "encoder.": lambda x: prefixed("encoder.", x),
    "_orig_mod.": lambda x: prefixed("_orig_mod.", x),
    "several": lambda x: {"state_dict": prefixed("module._orig_mod.model.encoder.", x)},
    "inside": lambda x: {k.replace("features.", "features.module."): v for k, v in x.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_wrapped_and_prefixed_weights_are_those_of_the_bare_state_dict(tmp_path, form):
    state_dict = narrow()
    torch.save(FORMS[form](state_dict), tmp_path / "last.ckpt")
    variables, report = match(read_state_dict(tmp_path / "last.ckpt"))
    assert (report.share, report.initialized, report.misshapen) == (1, (), ())
    assert report.loaded == len(state_dict)
    assert_same(to_state_dict("vgg11", variables), state_dict)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_made_float32(tmp_path, dtype):
    state_dict = {key: value.to(dtype) for key, value in narrow().items()}
    expected = {key: value.float() for key, value in state_dict.items()}
    for name, save in (("a", torch.save), ("b", safetensors_torch.save_file)):
        save(state_dict, tmp_path / name)
        variables, _ = match(read_state_dict(tmp_path / name))
        assert_same(to_state_dict("vgg11", variables), expected)


def test_features_without_a_classifier_are_loaded():
    state_dict = narrow()
    features = {k: v for k, v in state_dict.items() if k.startswith("features")}
    head = fresh("fc")
    for given in (features, {k.removeprefix("features."): v for k, v in features.items()}):
        variables, report = match(given)
        assert report.initialized == ("classifier.bias", "classifier.weight")
        assert (report.share, report.unused) == (1, ())
        assert_equal({"fc": variables["params"]["fc"]}, head)
        kernel = variables["params"]["conv5_2"]["kernel"].transpose(3, 2, 0, 1)
        np.testing.assert_array_equal(kernel, state_dict["features.18.weight"])
        assert "initialized at random: classifier.bias, classifier.weight" in str(report)


def test_a_head_of_another_size_is_initialized_and_one_that_fits_on_request():
    head = fresh("fc")
    variables, report = match(narrow(classes=7))
    assert_equal({"fc": variables["params"]["fc"]}, head)
    assert report.misshapen[1] == "classifier.weight: (7, 32) found, (3, 32) expected"
    variables, report = match(narrow(), replace_head=True)
    assert_equal({"fc": variables["params"]["fc"]}, head)
    assert report.unused == ("classifier.bias", "classifier.weight")
    with pytest.raises(UsageError, match="only the head differs: `match_state_dict`"):
        from_state_dict("vgg11", narrow(), num_classes=7, width=WIDTH)


@pytest.mark.parametrize(
    ("name", "stem", "channels", "remedy"),
    [
        ("resnet18", "imagenet", 3, "`stem=small`"),
        ("resnet18", "small", 1, "`channels=3`"),
        ("resnet18", "imagenet", 1, "`channels=3` and `stem=small`"),
        ("vgg11_bn", "small", 1, "`channels=3`"),
    ],
)
def test_a_first_convolution_that_does_not_fit_is_initialized_with_its_normalisation(
    name, stem, channels, remedy
):
    variables, report = match(narrow(name), name, stem=stem, channels=channels)
    layers = ("conv1", "bn1") if name == "resnet18" else ("conv1_1", "bn1_1")
    expected = fresh(*layers, name=name, stem=stem, channels=channels)
    assert_equal({layer: variables["params"][layer] for layer in layers}, expected)
    assert 0.98 < report.share < 1
    assert report.misshapen[0].endswith(f"expected; it would fit with {remedy}")
    loaded = from_state_dict(name, narrow(name), width=WIDTH)
    for kind, tree in loaded.items():
        others = tree.keys() - {*layers}
        assert_equal({k: variables[kind][k] for k in others}, {k: tree[k] for k in others})


def test_convolutions_are_loaded_from_a_vgg_of_the_other_stem():
    state_dict = narrow()
    variables, report = match(state_dict, stem="imagenet")
    assert report.share == 1 and set(report.unused) == {"classifier.weight", "classifier.bias"}
    layers = {entry.rpartition(".")[0] for entry in report.initialized}
    assert layers == {"classifier.0", "classifier.3", "classifier.6"}
    hidden = fresh("fc1", stem="imagenet")
    assert_equal({"fc1": variables["params"]["fc1"]}, hidden)


def test_timms_names_are_read():
    # timm's VGG: its hidden layers are convolutions, and its last one is in a ClassifierHead.
    with torch.device("meta"):
        network = theirs("vgg11", "imagenet", 5)
        narrow_all(network)  # to a quarter
    generator = np.random.default_rng(0)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    state_dict = {k: generator.normal(size=v).astype("f4") for k, v in shapes.items()}
    timm = {}
    for key, value in state_dict.items():
        if key == "classifier.0.weight":
            value = value.reshape(len(value), -1, 7, 7)
        if key == "classifier.3.weight":
            value = value[..., None, None]
        for old, new in (("0", "pre_logits.fc1"), ("3", "pre_logits.fc2"), ("6", "head.fc")):
            key = key.replace(f"classifier.{old}", new)
        timm[key] = value
    variables, report = match(timm, stem="imagenet", num_classes=5, width=0.25)
    assert report.loaded == len(state_dict)
    assert_same(to_state_dict("vgg11", variables), state_dict)
    assert_equal(from_state_dict("vgg11", timm, width=0.25), variables)
    # Its ResNets and DenseNets have torchvision's names.


def test_too_few_matching_convolutions_are_refused_in_few_lines():
    with pytest.raises(UsageError) as raised:
        match(prefixed("module.encoder.", narrow("vgg13")), "vgg19")
    message = str(raised.value)
    assert re.match(r"\d+\.\d% of the convolution weights fit vgg19 with the small stem", message)
    assert "fewer than `min_match` 0.9" in message and "lower `min_match`" in message
    assert "all names begin with 'module.encoder'" in message
    assert message.count("\n") < 19
    # A deeper network has every layer of a shallower one.
    deeper = narrow("resnet34")
    with pytest.raises(UsageError, match=r"not used: layer1\.2"):
        match(deeper, "resnet18")
    _, report = match(deeper, "resnet18", min_match=0.5)
    assert 0.5 < report.share < 0.6 and report.initialized == ()
    with pytest.raises(UsageError, match="all names begin with 'foo.bar'") as raised:
        match({f"foo.bar.{i}.weight": np.ones((4, 4), np.float32) for i in range(200)})
    assert str(raised.value).count("\n") < 19


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


def truncated(save, path):
    save({"a": torch.ones(4000)}, path)
    path.write_bytes(path.read_bytes()[:9000])


def script(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torch.export
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)


FLOAT8 = {"a": torch.ones(4).to(torch.float8_e4m3fn)}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 553433881\n"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "there is no file"),
        (lambda path: path.touch(), "can't be read as weights: it is empty"),
        (lambda path: path.write_text("hello"), "neither safetensors nor PyTorch's"),
        (lambda path: path.write_text(POINTER), "a pointer of Git LFS.*git lfs pull"),
        (lambda path: path.write_text("\n<!DOCTYPE html><html>"), "web page"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n"), "HDF5"),
        (lambda path: np.savez(path.open("wb"), a=np.ones(2)), "PyTorch did not write"),
        (script, "a TorchScript archive"),
        (partial(truncated, torch.save), "truncated"),
        (partial(truncated, partial(torch.save, **LEGACY)), "truncated"),
        (partial(truncated, safetensors_torch.save_file), "not a complete safetensors file"),
        (lambda path: torch.save(Unsafe(), path), "holds an object of .*Unsafe, or is damaged"),
        (lambda path: torch.save(torch.nn.Linear(2, 2), path), "an object of torch.nn"),
        (lambda path: torch.save({"epoch": 3}, path), "not a state dict: 'epoch'"),
        (lambda path: torch.save([1], path), "not a state dict: it holds no dict"),
        (lambda path: safetensors_torch.save_file(FLOAT8, path), "F8_E4M3.*without its scales"),
    ],
)
@pytest.mark.parametrize("name", ["weights.pth.tar", "weights.safetensors"])
def test_files_that_hold_no_weights_are_refused(tmp_path, name, write, message):
    path = tmp_path / name
    write(path)
    with pytest.raises(UsageError, match=message) as raised:
        read_state_dict(path)
    assert str(path) in str(raised.value)
    assert "weights_only" not in str(raised.value) and "\n" not in str(raised.value)


def test_float8_of_pytorchs_own_files_is_refused(tmp_path):
    state_dict = narrow()
    state_dict["features.0.weight"] = state_dict["features.0.weight"].to(torch.float8_e5m2)
    torch.save(state_dict, tmp_path / "a.bin")
    with pytest.raises(UsageError, match="features.0.weight has the dtype float8_e5m2"):
        match(read_state_dict(tmp_path / "a.bin"))


def test_options_that_a_training_loop_stores_are_ignored(tmp_path):
    content = {"args": argparse.Namespace(lr=0.1), "state_dict": {"a": torch.ones(2)}}
    torch.save(content, tmp_path / "checkpoint")
    assert_same(read_state_dict(tmp_path / "checkpoint"), {"a": torch.ones(2)})


def test_only_known_suffixes_are_written(tmp_path):
    with pytest.raises(UsageError, match="ends in one of .safetensors, .pth, .pt"):
        write_state_dict(tmp_path / "a.npz", {})


def test_reading_safetensors_needs_no_torch(tmp_path):
    write_state_dict(tmp_path / "a.safetensors", {"a": np.ones(2, np.float32)})
    code = (
        "import sys; from inmerge_jax.models.torchvision import read_state_dict;"
        "read_state_dict(sys.argv[1]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.safetensors")], check=True)
