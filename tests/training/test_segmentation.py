"""A U-Net on masks, from its loss to its report."""

import dataclasses
import json
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inmerge_jax import models
from inmerge_jax.cli.options import parse_config
from inmerge_jax.cli.report import write_and_print
from inmerge_jax.data import Dataset, Split, make_phantom
from inmerge_jax.errors import UsageError
from inmerge_jax.models.unet import UNet
from inmerge_jax.progress import Progress
from inmerge_jax.training import experiment, train
from inmerge_jax.training.augment import AugmentConfig, augment, augment_masks
from inmerge_jax.training.load import load_run
from inmerge_jax.training.mask_metrics import (
    dice_scores,
    hausdorff95,
    image_metrics,
    mask_metrics,
    read_masks,
)
from inmerge_jax.training.metrics import json_metrics
from inmerge_jax.training.metrics_file import read_metrics
from inmerge_jax.training.parallel import DATA_AXIS
from inmerge_jax.training.recipes import RECIPES, fit_recipe
from inmerge_jax.training.run_spec import make_run_spec
from inmerge_jax.training.stage_results import read_result
from inmerge_jax.training.train import train_stage
from inmerge_jax.training.train_step import (
    example_losses,
    flip,
    make_eval_step,
    make_optimizer,
    make_train_step,
    new_state,
    zero_totals,
)
from tests.training.test_train import check_resumption


def blobs(rng, shape, classes=3):
    """Masks whose classes are blocks of at least 2 pixels a side."""
    small = rng.integers(0, classes, [-(-length // 2) for length in shape])
    for axis, length in enumerate(shape):
        small = np.take(np.repeat(small, 2, axis), range(length), axis)
    return small.astype(np.uint8)


@pytest.mark.parametrize("shape", [(3, 5, 6), (2, 4, 3, 5)])
def test_the_loss_is_cross_entropy_plus_soft_dice(shape):
    rng = np.random.default_rng(0)
    logits, masks = rng.normal(size=(*shape, 3)).astype(np.float32), blobs(rng, shape)
    expected = []
    for x, y in zip(logits.astype(np.float64).reshape(len(masks), -1, 3), masks, strict=True):
        p, y = np.exp(x) / np.exp(x).sum(-1, keepdims=True), y.ravel()
        entropy = -np.log(p[np.arange(len(y)), y]).mean()
        dice = [
            (2 * p[y == c, c].sum() + 1) / (p[:, c].sum() + np.count_nonzero(y == c) + 1)
            for c in (1, 2)
        ]
        expected.append(entropy + 1 - np.mean(dice))
    found = example_losses(jnp.array(logits), jnp.array(masks), False)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    sure = 40 * np.eye(3, dtype=np.float32)[masks]
    np.testing.assert_allclose(
        example_losses(jnp.array(sure), jnp.array(masks), False), 0, atol=1e-6
    )


@pytest.mark.long
def test_masks_are_flipped_cropped_and_rotated_like_their_images():
    masks = blobs(np.random.default_rng(1), (8, 12, 12))
    images, index, key = masks[..., None] * 100, jnp.arange(8), jax.random.key(3)
    mirrored = flip(jnp.array(masks[..., None]), index, key)[..., 0]
    np.testing.assert_array_equal(flip(jnp.array(images), index, key)[..., 0], mirrored * 100)
    assert len({bool((a == b).all()) for a, b in zip(mirrored, masks, strict=True)}) == 2

    crop = AugmentConfig(crop=3, brightness=0.5, contrast=0.5)
    moved = augment_masks(jnp.array(masks), index, key, crop)
    plain = augment(
        jnp.array(images), index, key, dataclasses.replace(crop, brightness=0, contrast=0)
    )
    np.testing.assert_array_equal(plain[..., 0], moved * 100)
    assert moved.dtype == np.uint8 and (moved != masks).any()

    rotate = AugmentConfig(rotate=30)
    turned = augment_masks(jnp.array(masks), index, key, rotate)
    smooth = augment(jnp.array(images), index, key, rotate)[..., 0]
    # Where bilinear interpolation meets one class alone, the nearest pixel has it too.
    inside = (smooth % 100 == 0) & (np.abs(smooth - turned * 100.0) < 100)
    np.testing.assert_array_equal(smooth[inside], (turned * 100.0)[inside])
    assert inside.mean() > 0.3 and (turned != masks).any() and set(np.unique(turned)) <= {0, 1, 2}


def reference_hausdorff95(a, b):
    library = pytest.importorskip("surface_distance")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Its names of SciPy's functions.
        found = library.compute_surface_distances(a, b, (1,) * a.ndim)
    return library.compute_robust_hausdorff(found, 95)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ndim=st.sampled_from([2, 3]), share=st.floats(0.05, 0.95))
def test_hd95_and_dice_are_those_of_surface_distance(seed, ndim, share):
    library = pytest.importorskip("surface_distance")
    rng = np.random.default_rng(seed)
    a, b = rng.random((2, *rng.integers(1, 9, ndim))) < share
    a[(0,) * ndim] = b[(-1,) * ndim] = True
    assert hausdorff95(a, b) == pytest.approx(reference_hausdorff95(a, b))
    found = dice_scores(a[None].astype(np.uint8), b[None].astype(np.uint8), 2)
    assert found[0, 0] == pytest.approx(library.compute_dice_coefficient(a, b))


def test_absent_classes_are_left_out_and_missed_ones_get_the_diagonal():
    true, found = np.zeros((2, 3, 6, 8), np.uint8)
    true[0, 1:3, 1:3] = found[0, 1:3, 1:3] = 1
    true[1, :2, :2] = 1  # Missed.
    true[0, 4:, 4:] = found[0, 4:, 5:] = 2
    images = image_metrics(true, found, 4)
    assert images.dice[:2, 0].tolist() == [1, 0] and np.isnan(images.dice[2]).all()
    assert images.hd95[:2, 0].tolist() == [0, 10] and np.isnan(images.hd95[:, 2]).all()
    metrics = mask_metrics(images)
    assert metrics.dice_per_class[:2] == (0.5, pytest.approx(2 * 6 / 14))
    assert metrics.dice == pytest.approx((0.5 + 6 / 7) / 2) and metrics.hd95 == pytest.approx(3)
    assert (metrics.undefined, metrics.absent) == (1, 9 - 3)
    assert json_metrics(metrics)["dice_per_class"][2] is None


SMALL = (
    "--data phantom_masks --model unet --size 32 --phantom.train 24 --phantom.val 6 "
    "--phantom.test 6 --batch-size 8 --epochs 2 --merging-epochs 1 --learning-rate 0.01 "
    "--flip True --units kernels --layers decoder|up --skip 0 --quantile 0.5 "
    "--augment.crop 2"
).split()


@pytest.fixture(scope="module")
def small_unet():
    """A U-Net of one level under the name unet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models._MODELS, "unet", partial(UNet, channels=4, levels=1))
        yield


@pytest.fixture(scope="module")
def trained(small_unet, tmp_path_factory):
    """A finished run; its specification, context and steps."""
    folder = tmp_path_factory.mktemp("run") / "run"
    spec = make_run_spec(parse_config([*SMALL, "--output", str(folder)]))
    context = experiment.make_context(spec)
    steps = experiment._steps(spec, context)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "make_context", lambda *_: context)
        patch.setattr(experiment, "_steps", lambda *_: steps)
        results = experiment.run_experiment(spec)
    return folder, spec, context, steps, results


def test_a_run_on_masks_leaves_dice_hd95_and_masks(trained):
    folder, spec, _, _, results = trained
    assert results["dataset"]["classes"] == ["background", "lung", "heart"]
    for arm in ("backbone", "finetune", "inmerge"):
        place = folder / "seed0" / arm
        lines, result = read_metrics(place / "metrics.jsonl"), read_result(place)
        assert not {"val_auc", "val_acc"} & lines[0].keys() and "scores" not in result
        dice = [line["val_dice"] for line in lines]
        assert result["best_epoch"] == 1 + dice.index(max(dice))
        stored = read_masks(place / result["masks"]["test"])
        true = spec.dataset.test.labels
        assert stored["masks"].shape == true.shape and stored["masks"].dtype == np.uint8
        metrics = mask_metrics(image_metrics(true, stored["masks"], 3))
        assert result["test"] == json_metrics(metrics)
        np.testing.assert_array_equal(stored["dice"], dice_scores(true, stored["masks"], 3))
    assert spec.recipe.select == "val_dice"
    assert json.loads((folder / "config.json").read_text())["recipe"]["select"] == "val_dice"


def test_it_learns_and_merges_in_the_decoder_only(trained):
    folder = trained[0]
    lines = read_metrics(folder / "seed0" / "backbone" / "metrics.jsonl")
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    result = read_result(folder / "seed0" / "inmerge")
    assert len(result["layers"]) == 3 and sum(result["merged"]) > 0
    assert all(name.startswith(("decoder", "up")) for name in result["layers"])


@pytest.mark.long
def test_a_resumed_stage_has_the_same_bits(trained, tmp_path, monkeypatch):
    _, spec, context, (_, merging, _), _ = trained

    def train_in(folder):
        stage = train.StageConfig(
            arm="inmerge",
            seed=0,
            number=1,
            folder=folder,
            epochs=2,
            learning_rate=0.01,
            train_step=merging,
            deep=spec.deep,
        )
        with Progress(100) as progress:
            train_stage(context, stage, *experiment.initial_variables(spec, 0), progress)

    check_resumption(tmp_path, monkeypatch, train_in, 4)


def test_the_report_names_dice_and_shows_outlines(trained, capsys):
    folder, *_, results = trained
    write_and_print(folder)
    table, page = (folder / "table.md").read_text(), (folder / "report.html").read_text()
    assert "| test Dice | test HD95 |" in table and "standard error of one arm's Dice" in table
    test = results["arms"]["inmerge"][0]["test"]
    assert f"{test['dice']:.3f} / {test['hd95']:.3f}" in table
    for text in (table, page, capsys.readouterr().out):
        assert "AUC" not in text and "ACC" not in text and "Dice" in text
    assert page.count('<figure aria-label="Test image') == 4 and "Validation Dice" in page
    assert "ROC" not in page and "Dice: lung 0." in page


def test_a_finished_run_predicts_masks(trained):
    folder, spec, *_ = trained
    run = load_run(folder)
    stored = read_masks(folder / "seed0" / "inmerge" / "masks" / "test.npz")["masks"]
    found = run.predict(spec.dataset.test.images, batch_size=4)
    assert found.dtype == np.uint8 and found.shape == stored.shape
    assert (found == stored).mean() > 0.999  # Another batch size rounds differently.


@pytest.mark.long
def test_a_3d_unet_learns_volumes(small_unet):
    rng = np.random.default_rng(2)
    masks = blobs(rng, (6, 8, 8, 8), 2)
    volumes = (60 * masks + rng.integers(0, 40, masks.shape)).astype(np.uint8)[..., None]
    split = Split(volumes, masks)
    data = Dataset("cubes", 8, "segmentation", ("background", "cube"), split, split, split, "drawn")
    recipe = dataclasses.replace(RECIPES["medmnist"], flip=True, learning_rate=0.02)
    recipe = fit_recipe(recipe, data, None)
    assert recipe.select == "val_dice"
    devices = tuple(jax.local_devices()[:1])
    model = UNet(num_classes=2, channels=4, levels=1, axis_name=DATA_AXIS)
    optimizer = make_optimizer(recipe)
    options = {"multi_label": False, "devices": devices}
    step = make_train_step(model, optimizer, recipe, **options)
    variables = jax.device_get(
        model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 8, 1)), train=False)
    )
    state = new_state(variables["params"], variables["batch_stats"], optimizer, 0.02)
    batch = {"image": volumes, "label": masks, "index": np.arange(6, dtype=np.int32)}
    state, batch = jax.tree.map(lambda x: jnp.asarray(x)[None], (state, batch))
    losses = []
    for _ in range(8):
        totals = jax.tree.map(lambda x: x[None], zero_totals(0))
        state, totals = step(state, totals, batch, jax.random.key(1))
        losses.append(float(totals.loss[0]))
    assert losses[-1] < 0.7 * losses[0]
    evaluated = make_eval_step(model, recipe, **options)
    batch["mask"] = jnp.ones((1, 6))
    found, values = evaluated(state.params, state.batch_stats, batch)
    assert found.shape == (1, *masks.shape) and found.dtype == np.uint8 and values.shape == (1, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--model resnet18",
            "`model` resnet18 needs labels of images.*phantom-masks has masks.*unet",
        ),
        ("--data phantom", "`model` unet needs masks, and `data` phantom has labels"),
        ("--size 31", "`size` 31: unet halves the images of phantom-masks 1 times.*multiple of 2"),
        ("--class-weights balanced", "`class_weights` balanced.*phantom-masks has masks"),
        ("--pos-weight 3", "`pos_weight` 3.*phantom-masks is segmentation"),
        ("--phantom.multi-label", "`multi_label` is for labels of images"),
    ],
)
def test_options_that_do_not_fit_are_named(small_unet, tmp_path, options, message):
    given = [*SMALL, *options.split(), "--output", str(tmp_path / "run")]
    with pytest.raises(UsageError, match=message):
        make_run_spec(parse_config(given))
    assert not (tmp_path / "run").exists()


def test_a_data_set_has_masks_of_its_images_size():
    part = make_phantom(size=16, train=2, val=1, test=1, masks=True).train
    with pytest.raises(ValueError, match=r"masks of size \(16, 8\) for images of size \(16, 16\)"):
        Split(part.images, part.labels[:, :, :8])
    with pytest.raises(ValueError, match=r"masks uint8 .* found int64"):
        Split(part.images, part.labels.astype(np.int64))
    with pytest.raises(ValueError, match="multi-class: labels of shape"):
        Dataset("a", 16, "multi-class", ("a", "b"), part, part, part, "b")
