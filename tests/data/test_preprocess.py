"""Preprocessing is torchvision's, on real radiographs and on awkward shapes."""

import numpy as np
import pytest
from PIL import Image

from inmerge_jax.errors import UsageError
from inmerge_jax.training.recipes import RECIPES
from inmerge_jax.training.train_step import normalise
from tests.oracles.images import load_image
from tests.paths import SHARED, needs

ORIGINALS = SHARED / "data" / "nih" / "images_original"


def assert_equal_to_torchvision(path, size, resize):
    transforms = pytest.importorskip("torchvision.transforms")
    recipe = RECIPES["released"]
    with Image.open(path) as file:
        pixels = transforms.Compose(
            [transforms.Resize(resize), transforms.CenterCrop(size), transforms.ToTensor()]
        )(file.convert("RGB"))
    ours = load_image(path, size, resize=resize)
    assert ours.shape == (size, size, 3) and ours.dtype == np.uint8 and ours.std() > 5
    expected = pixels.numpy().transpose(1, 2, 0)
    assert np.abs(ours / 255 - expected).max() <= 1 / 255 + 1e-6
    normalised = transforms.Normalize(recipe.mean, recipe.std)(pixels).numpy().transpose(1, 2, 0)
    difference = np.abs(np.asarray(normalise(ours[None], recipe))[0] - normalised)
    assert (difference * np.array(recipe.std)).max() <= 1 / 255 + 1e-6


@needs(ORIGINALS)
def test_real_radiographs_equal_torchvision():
    paths = sorted(path for path in ORIGINALS.rglob("*") if path.suffix in (".png", ".jpg"))[:6]
    assert paths, f"no image in {ORIGINALS}"
    for path in paths:
        for size, resize in ((224, 224), (224, 256)):
            assert_equal_to_torchvision(path, size, resize)


@pytest.mark.parametrize("shape", [(61, 90), (90, 61), (33, 32), (40, 40)])
@pytest.mark.parametrize(("size", "resize"), [(32, 32), (31, 40)])
def test_any_shape_equals_torchvision(tmp_path, shape, size, resize):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    assert_equal_to_torchvision(tmp_path / "image.png", size, resize)


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(UsageError, match=r"a\.png cannot be read"):
        load_image(tmp_path / "a.png", 8)
    with pytest.raises(ValueError, match="size 9, resize 8"):
        load_image(tmp_path / "a.png", 9, resize=8)
