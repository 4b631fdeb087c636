"""Twenty steps of the library's own loop are PyTorch's, without merging and with it.

In float64, at the recipes' own rates, losses and weights agree to many digits: both do the same. In
float32 rounding turns over a ReLU now and then, which changes what follows by a percent, in other
steps on another processor; so there the steps are small.
"""

import dataclasses
import io
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console

from inmerge_jax import MergeRule, deep_kernels, find_kernels, models
from inmerge_jax.data import Dataset, Split
from inmerge_jax.merging import draw_pairs
from inmerge_jax.models import create_model
from inmerge_jax.models.densenet import DenseNet
from inmerge_jax.models.torchvision import from_state_dict, to_state_dict
from inmerge_jax.progress import Progress
from inmerge_jax.training.checkpointing import restore_checkpoint
from inmerge_jax.training.metrics_file import read_metrics
from inmerge_jax.training.parallel import DATA_AXIS, unreplicate
from inmerge_jax.training.recipes import RECIPES
from inmerge_jax.training.train import StageConfig, TrainContext, train_stage
from inmerge_jax.training.train_step import (
    FLIPPING,
    MERGING,
    flip,
    make_eval_step,
    make_optimizer,
    make_train_step,
    new_state,
    normalise,
)

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")

from experiments.oracles import torch_networks  # noqa: E402
from tests.long import long_unless  # noqa: E402
from tests.oracles import torch_training  # noqa: E402

CLASSES, SIZE, WIDTH, SKIP = 3, 16, 0.125, 10
EPOCHS, BATCH, TRAIN, VAL = 4, 16, 80, 24
STEPS = EPOCHS * TRAIN // BATCH
PLAN = {
    "medmnist": torch_training.Plan("adam", 1e-3, 0.0, 0.0, "steps"),
    # The tolerance lets the rule fire within four epochs.
    "released": torch_training.Plan("sgd", 0.1, 0.9, 1e-4, "released", tolerance=1),
}


@dataclass(frozen=True)
class Case:
    """One trajectory: a network, a recipe, a partner or None, a type, and another rate."""

    name: str
    recipe: str
    partner: str | None
    dtype: str = "float64"
    rate: float | None = None

    def __str__(self):
        return "-".join((self.name, self.recipe, self.partner or "without", self.dtype))

    @property
    def plan(self):
        plan = PLAN[self.recipe]
        return dataclasses.replace(plan, rate=self.rate or plan.rate)

    @property
    def ours(self):
        changes = {"batch_size": BATCH, "tolerance": self.plan.tolerance}
        changes |= {"learning_rate": self.rate} if self.rate else {}
        return dataclasses.replace(RECIPES[self.recipe], **changes)

    @property
    def rule(self):
        return self.partner and MergeRule(0.3, 0.3, 0.8, self.partner)

    @property
    def names(self):
        return "medmnist" if self.name.startswith("resnet") else "torchvision"


DOUBLE = (
    Case("resnet18", "medmnist", None),
    Case("resnet18", "released", "random"),
    Case("vgg16_bn", "medmnist", "random"),
    Case("vgg16_bn", "released", None),
    Case("densenet121", "medmnist", "nearest"),
    Case("densenet121", "released", "random"),
)
SINGLE = (
    Case("vgg16", "medmnist", None, "float32", rate=1e-4),
    Case("vgg16", "released", "nearest", "float32", rate=0.01),
    Case("resnet18", "released", None, "float32", rate=1e-4),
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A DenseNet of few layers, and LLVM without optimisations, which take minutes here."""
    shallow = (1, 2, 2, 1)
    monkeypatch.setitem(models._MODELS, "densenet121", partial(DenseNet, block_sizes=shallow))
    monkeypatch.setitem(torch_networks._DENSENET, "densenet121", shallow)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_dataset():
    """Classes differ in the brightness of a half, under noise."""
    rng = np.random.default_rng(0)

    def split(count):
        labels = rng.integers(0, CLASSES, count).astype(np.int32)
        images = rng.integers(0, 150, (count, SIZE, SIZE, 3)).astype(np.uint8)
        images[:, :, : SIZE // 2] += (50 * labels)[:, None, None, None].astype(np.uint8)
        return Split(images, labels)

    classes = tuple("abc")
    return Dataset(
        "parity", SIZE, "multi-class", classes, split(TRAIN), split(VAL), split(VAL), "a test"
    )


def make_network(case):
    """PyTorch's network, whose deep layers hold families of like kernels, well above 0.3."""
    torch.manual_seed(0)
    network = torch_networks.create_network(
        case.name, CLASSES, stem="small", size=SIZE, width=WIDTH
    )
    with torch.no_grad():
        convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        for module in convolutions[SKIP:]:
            weight = module.weight
            count = 4 if len(weight) >= 8 else 2
            families = torch.randn(count, *weight.shape[1:])[torch.arange(len(weight)) % count]
            weight.copy_(weight.std() * (families + 0.5 * torch.randn_like(weight)))
    return network.to(getattr(torch, case.dtype))


def torch_keys(case, params):
    """PyTorch's name of each of our parameters, found by giving each a number of its own."""
    paths = list(flatten_dict(params))
    leaves = enumerate(flatten_dict(params).items())
    numbered = unflatten_dict({path: np.full(leaf.shape, i) for i, (path, leaf) in leaves})
    named = to_state_dict(case.name, numbered, names=case.names)
    return {
        paths[int(array.flat[0])]: key
        for key, array in named.items()
        if not key.endswith("num_batches_tracked")
    }


def our_layout(tensor):
    array = tensor.detach().numpy()
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


inputs = jax.jit(normalise, static_argnums=1)


def run_ours(folder, dataset, case, variables):
    """Trains with the library; returns losses, metrics, the last state, the batches and roots."""
    devices, recipe = tuple(jax.local_devices()[:1]), case.ours
    params, stats = variables["params"], variables.get("batch_stats", {})
    model = create_model(
        case.name, CLASSES, width=WIDTH, dtype=jnp.dtype(case.dtype), axis_name=DATA_AXIS
    )
    kernels = find_kernels(
        lambda p, x: model.apply({"params": p, "batch_stats": stats}, x, train=False),
        params,
        jnp.zeros((1, SIZE, SIZE, 3)),
    )
    deep = deep_kernels(kernels, skip=SKIP) if case.rule else ()
    merging = {"kernels": deep, "rule": case.rule} if case.rule else {}
    optimizer = make_optimizer(recipe)
    step = make_train_step(model, optimizer, recipe, multi_label=False, devices=devices, **merging)
    sums, batches = [], []

    def watched(state, totals, batch, root):
        index = np.asarray(batch["index"])[0]
        key = jax.random.fold_in(root, len(batches))
        images = inputs(dataset.train.images[index], recipe)
        if recipe.flip:
            images = flip(images, jnp.asarray(index), jax.random.fold_in(key, FLIPPING))
        batches.append((np.array(images), dataset.train.labels[index], key))
        totals = totals._replace(loss=totals.loss.astype(case.dtype))
        state, totals = step(state, totals, batch, root)
        sums.append(float(unreplicate(totals).loss))
        return state, totals

    setup = TrainContext(
        dataset=dataset,
        recipe=recipe,
        devices=devices,
        optimizer=optimizer,
        eval_step=make_eval_step(model, recipe, multi_label=False, devices=devices),
        kernels=kernels[:1],  # whose similarity is told, which takes time and isn't looked at
    )
    stage = StageConfig(
        arm="inmerge" if case.rule else "backbone",
        seed=0,
        number=0,
        folder=folder,
        epochs=EPOCHS,
        learning_rate=recipe.learning_rate,
        train_step=watched,
        deep=deep,
    )
    with Progress(0, Console(file=io.StringIO())) as progress:
        train_stage(setup, stage, params, stats, progress)
    fresh = new_state(params, stats, optimizer, 0.1)
    state, _ = restore_checkpoint(folder / "checkpoints" / str(EPOCHS), fresh)
    # An epoch's totals are sums, which start anew with it.
    losses = np.diff(np.reshape(sums, (EPOCHS, -1)), prepend=0, axis=1).ravel()
    return losses, read_metrics(folder / "metrics.jsonl"), state, batches, deep


def run_theirs(dataset, case, network, keys, batches, deep):
    """Trains with PyTorch on the same batches, with the same draws; counts merges per layer."""

    def to_torch(images):
        return torch.tensor(np.asarray(images, case.dtype).transpose(0, 3, 1, 2).copy())

    pairs = [(to_torch(images), torch.tensor(labels).long()) for images, labels, _ in batches]
    epochs = [pairs[start : start + STEPS // EPOCHS] for start in range(0, STEPS, STEPS // EPOCHS)]
    merged, margins = np.zeros(len(deep), int), []

    def before_step(step):
        for place, kernel in enumerate(deep):
            weight = network.get_parameter(keys["params", *kernel.name.split("/")])
            key = jax.random.fold_in(batches[step][2], MERGING)
            selected, partner = draw_pairs(key, kernel, case.rule)
            count, margin = torch_training.merge(
                weight, np.asarray(selected), partner, case.rule.threshold, case.rule.alpha
            )
            merged[place] += count
            margins.append(margin)

    val = dataset.val
    validation = to_torch(inputs(val.images, case.ours)), torch.tensor(val.labels).long()
    told = torch_training.train(network, case.plan, epochs, validation, before_step)
    return told, merged, min(margins, default=1.0)


def check(folder, case, loss, weight):
    """Asserts that losses agree to the relative error `loss` and weights to `weight`.

    A weight's error is relative to the largest of its tensor, or to 0.01 where all are smaller: a
    bias in front of batch normalisation stays zero but for rounding.
    """
    dataset, network = make_dataset(), make_network(case)
    variables = from_state_dict(case.name, network.state_dict(), width=WIDTH)
    variables = jax.tree.map(lambda x: x.astype(case.dtype), variables)
    keys = torch_keys(case, variables)
    with jax.enable_x64(case.dtype == "float64"):
        losses, lines, state, batches, deep = run_ours(folder, dataset, case, variables)
        told, merged, margin = run_theirs(dataset, case, network, keys, batches, deep)

    assert len(losses) == STEPS == 20
    np.testing.assert_allclose(losses, told.losses, rtol=loss)
    np.testing.assert_allclose([line["val_loss"] for line in lines], told.val_losses, rtol=loss)
    np.testing.assert_allclose([line["learning_rate"] for line in lines], told.rates, rtol=1e-6)
    assert max(losses) - min(losses) > 0.05, "and so must the training"
    assert len(set(told.rates)) > 1, "the schedule must be seen at work"
    ours = flatten_dict({"params": state.params, "batch_stats": state.batch_stats})
    for path, key in keys.items():
        theirs = our_layout(network.state_dict()[key])
        assert ours[path].dtype == theirs.dtype == case.dtype
        scale = max(np.abs(theirs).max(), 0.01)
        np.testing.assert_allclose(ours[path], theirs, rtol=0, atol=weight * scale, err_msg=key)
    if case.rule:
        np.testing.assert_array_equal(np.sum([line["merged"] for line in lines], axis=0), merged)
        assert margin > 1e-6, "rounding must not decide a merge"
        assert merged.sum() > 100 and (merged > 0).all()


@pytest.mark.long
@pytest.mark.parametrize("case", DOUBLE, ids=str)
def test_twenty_steps_are_pytorchs(tmp_path, case):
    # Merging computes in float32, so a kernel's last bits may differ after it.
    loss, weight = (1e-6, 1e-5) if case.rule else (1e-10, 1e-9)
    check(tmp_path, case, loss, weight)


@pytest.mark.parametrize("case", long_unless(lambda case: case.rule, SINGLE), ids=str)
def test_twenty_small_steps_in_float32_are_pytorchs(tmp_path, case):
    check(tmp_path, case, loss=1e-3, weight=2e-2)
