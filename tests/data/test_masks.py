import hashlib
import re

import numpy as np
import pytest
from PIL import Image

from inmerge_jax.data import make_phantom
from inmerge_jax.data.splitting import SPLITS
from tests.data.test_folder import load, make_csv, picture, refusal, save


def write_set(root, count=20, size=(12, 12), mask=None):
    """`count` images with masks of 0, 1 and 2; the CSV."""
    rows = []
    for number in range(count):
        values = np.zeros(size, np.uint8)
        values[2:6, 2:6], values[7:9, 3:8] = 1, 2 if number % 2 else 0
        save(root / "images" / f"{number:02}.png", picture(number, size))
        save(root / "masks" / f"{number:02}.png", values if mask is None else mask(values))
        rows.append((f"images/{number:02}.png", f"masks/{number:02}.png"))
    return make_csv(root, rows, ["path", "mask"])


def test_phantom_masks_are_masks_of_the_phantoms_images():
    options = {"size": 32, "train": 40, "val": 2, "test": 2}
    data, plain = make_phantom(masks=True, **options), make_phantom(**options)
    for split in SPLITS:
        part = getattr(data, split)
        np.testing.assert_array_equal(part.images, getattr(plain, split).images)
        assert part.labels.shape == part.images.shape[:-1] and part.labels.dtype == np.uint8
    assert data.classes == ("background", "lung", "heart") and data.task == "segmentation"
    images, masks = data.train.images[..., 0], data.train.labels
    shares = np.array([(masks == index).mean((1, 2)) for index in range(3)])
    assert (shares.min(1) > (0.3, 0.08, 0.04)).all() and shares.max() < 0.85
    # The lungs are darker than the heart between them, in every image.
    assert all(i[m == 1].mean() < i[m == 2].mean() - 20 for i, m in zip(images, masks, strict=True))
    columns = np.arange(32)
    lungs, hearts = ((masks == index).sum((0, 1)) for index in (1, 2))
    assert (lungs[:14].sum() / lungs.sum()) > 0.35 and (columns * hearts).sum() / hearts.sum() > 15
    # An enlarged heart is larger, and an effusion is part of the lung.
    enlarged = masks[plain.train.labels == 4]
    assert (enlarged == 2).mean() > 1.1 * (masks[plain.train.labels == 0] == 2).mean()


def test_the_phantoms_images_have_not_changed():
    """The published results are of these images."""
    images = make_phantom(size=28, train=9, val=3, test=2, multi_label=True).train.images
    assert hashlib.sha256(images.tobytes()).hexdigest().startswith("1a151c301e9cc13f")


def test_masks_of_a_csv_are_read_with_their_images(tmp_path):
    data = load(write_set(tmp_path))
    assert (data.task, data.classes) == ("segmentation", ("background", "class_1", "class_2"))
    assert [len(getattr(data, split)) for split in SPLITS] == [14, 2, 4]
    for split in SPLITS:
        part = getattr(data, split)
        for name, image, mask in zip(part.names, part.images, part.labels, strict=True):
            place = tmp_path / name
            np.testing.assert_array_equal(image[..., 0], np.asarray(Image.open(place)))
            stored = Image.open(tmp_path / "masks" / place.name)
            np.testing.assert_array_equal(mask, np.asarray(stored))
    assert data.fingerprint != load(write_set(tmp_path, mask=lambda m: m[::-1])).fingerprint


def test_masks_are_resized_without_new_values_and_may_have_a_palette(tmp_path):
    path = write_set(tmp_path, size=(12, 16))
    for file in (tmp_path / "masks").iterdir():
        with Image.open(file) as opened:
            indexed = Image.frombytes("P", opened.size, np.asarray(opened).tobytes())
        indexed.putpalette([0, 0, 0, 200, 10, 10, 10, 10, 200])
        indexed.save(file)
    data = load(path, size=24, resize="bicubic")
    assert data.train.labels.shape == (14, 24, 24)
    assert set(np.unique(data.train.labels)) == {0, 1, 2}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda m: (m > 0).astype(np.uint8) * 255, "values 0, 255.*write 1 in place of 255"),
        (lambda m: m * 2, "values 0, 2, 4, .*without gaps"),
        (lambda m: m * 0, "values 0, .*at least one class by the value 1"),
        (lambda m: m[:-1], r"00\.png has 12 x 11 pixels, and its image .* has 12 x 12"),
        (lambda m: np.stack([m] * 3, -1), r"00\.png: a PNG of mode RGB is no mask"),
    ],
)
def test_masks_that_cannot_be_read_are_named(tmp_path, mask, message):
    assert re.search(message, refusal(write_set(tmp_path, mask=mask)))


def test_a_class_that_vanishes_when_masks_are_resized_is_named(tmp_path):
    def small(mask):
        mask[mask == 2] = 1
        mask[0, 0] = 2
        return mask

    path = write_set(tmp_path, mask=small)
    assert load(path).classes[-1] == "class_2"
    assert "no training mask has class_2 at `size` 4; choose a larger" in refusal(path, size=4)


def test_a_mask_that_is_a_jpeg_is_refused_with_the_reason(tmp_path):
    path = write_set(tmp_path)
    mask = tmp_path / "masks" / "00.png"
    with Image.open(mask) as opened:
        opened.convert("L").save(mask, "JPEG")
    assert "00.png is a JPEG file, whose compression changes class indices" in refusal(path)


def test_a_missing_mask_and_a_second_kind_of_label_are_named(tmp_path):
    path = write_set(tmp_path)
    (tmp_path / "masks" / "03.png").unlink()
    assert "line 5: there is no mask" in refusal(path)
    path = make_csv(tmp_path, [("images/00.png", "", "a")], ["path", "mask", "label"])
    assert "has the columns label and mask: keep label" in refusal(path)
    make_csv(tmp_path, [("images/00.png", "")], ["path", "mask"])
    assert "the mask of images/00.png is missing" in refusal(path)
    rows = [(f"images/{n:02}.png", f"masks/{n:02}.png", s) for n, s in
            ((0, "train"), (2, "train"), (1, "val"), (5, "test"))]  # fmt: skip
    make_csv(tmp_path, rows, ["path", "mask", "split"])
    assert "no training mask has class_2" in refusal(path)
