import io

import numpy as np
import pytest
from PIL import Image

from inmerge_jax.data.chestxray14.images import (
    Usual,
    decode,
    encode,
    find_images,
    reduce_image,
    usual,
)
from inmerge_jax.errors import UsageError
from tests.data.chestxray14.nih import make_nih, pixels
from tests.oracles.images import load_image
from tests.paths import SHARED, needs

ORIGINAL = SHARED / "data" / "nih" / "images_original"
SIZE = Usual(40, 40)


def save(path, array, mode=None):
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path)
    return path


def reduced(path, size=20):
    return np.asarray(Image.open(io.BytesIO(reduce_image(path, size, SIZE))))


@pytest.mark.parametrize("flat", [False, True])
def test_both_layouts_are_found(tmp_path, flat):
    found = find_images(make_nih(tmp_path, flat=flat))
    assert len(found) == 60 and all(name == path.name for name, path in found.items())
    assert len({path.parent for path in found.values()}) == (1 if flat else 3)


def test_folders_that_cannot_be_right(tmp_path):
    with pytest.raises(UsageError, match="there is no such folder"):
        find_images(tmp_path / "none")
    with pytest.raises(UsageError, match="there is no PNG in it"):
        find_images(tmp_path)
    make_nih(tmp_path)
    name = next(iter(find_images(tmp_path)))
    save(tmp_path / name, pixels(0))
    with pytest.raises(UsageError, match=rf"{name} is there twice"):
        find_images(tmp_path)


def test_reduced_as_torchvision_does_and_kept_where_it_fits(tmp_path):
    path = save(tmp_path / "a.png", pixels(0))
    np.testing.assert_array_equal(reduced(path), load_image(path, 20)[..., 0])
    assert reduce_image(path, 40, SIZE) == path.read_bytes()


def test_every_kind_of_png_becomes_8_bit_grey(tmp_path):
    grey = pixels(1)
    expected = reduced(save(tmp_path / "grey.png", grey))
    alpha = np.random.default_rng(5).integers(0, 256, grey.shape, dtype=np.uint8)
    kinds = {
        "RGB": np.stack([grey] * 3, -1),
        "RGBA": np.stack([grey, grey, grey, alpha], -1),
        "LA": np.stack([grey, alpha], -1),
        "16 bit": grey.astype(np.uint16) * 257,
    }
    for name, array in kinds.items():
        path = save(tmp_path / f"{name}.png", array)
        np.testing.assert_array_equal(reduced(path), expected, err_msg=name)
    path = save(tmp_path / "palette.png", grey, "P")
    np.testing.assert_array_equal(reduced(path), expected)
    # 16 bits are rounded, not cut off: 256 is nearer to 257 than to 0.
    path = save(tmp_path / "low.png", np.full(SIZE[:2], 256, np.uint16))
    assert set(reduced(path).ravel().tolist()) == {1}
    # A 16-bit image of the right size is not kept as it is.
    path = save(tmp_path / "same.png", grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(reduced(path, 40), grey)


@pytest.mark.parametrize(("bits", "used"), [(8, 8), (9, 10), (12, 12), (14, 14), (15, 16)])
def test_16_bit_images_are_scaled_by_the_bits_that_they_use(tmp_path, bits, used):
    rng = np.random.default_rng(bits)
    paths, top = [], 2**bits - 1
    for index in range(3):
        values = rng.integers(0, top, SIZE[:2], dtype=np.uint16)
        values[0, 0] = top
        paths.append(save(tmp_path / f"{index}.png", values))
    assert usual(paths) == (40, 40, used)
    data = reduce_image(paths[2], 40, usual(paths))
    expected = np.rint(values * (255 / (2**used - 1)))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), expected)
    if used < 16:
        brighter = save(tmp_path / "brighter.png", np.full(SIZE[:2], 2**used, np.uint16))
        with pytest.raises(UsageError, match=rf"brighter\.png: .*other images 0 to {2**used - 1}"):
            reduce_image(brighter, 20, usual(paths))


def test_files_that_macos_adds_to_archives_are_skipped(tmp_path):
    (make_nih(tmp_path, flat=True) / "._00000051_000.png").write_bytes(b"Mac OS X")
    assert len(find_images(tmp_path)) == 60


def test_damaged_and_wrong_files_are_named(tmp_path, monkeypatch):
    whole = save(tmp_path / "a.png", pixels(0)).read_bytes()
    path = tmp_path / "damaged.png"
    for length in (0, 7, 30, len(whole) // 2, len(whole) - 14):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"damaged\.png is cut short or damaged"):
            reduce_image(path, 20, SIZE)
    for place in (20, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UsageError, match=r"damaged\.png is cut short or damaged"):
            reduce_image(path, 20, SIZE)
    with (
        monkeypatch.context() as patch,
        pytest.raises(UsageError, match="exceeds limit .*replace"),
    ):
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        reduce_image(tmp_path / "a.png", 20, SIZE)
    save(path, pixels(0, 41))
    with pytest.raises(UsageError, match=r"damaged\.png has 41 x 41 pixels, the others 40 x 40"):
        reduce_image(path, 20, SIZE)
    save(path, np.zeros((40, 30), np.uint8))
    with pytest.raises(UsageError, match=r"30 x 40 pixels; a square of at least 20"):
        reduce_image(path, 20, Usual(30, 40))
    with pytest.raises(UsageError, match=r"40 x 40 pixels; a square of at least 64"):
        reduce_image(tmp_path / "a.png", 64, SIZE)


def test_decoding_what_was_encoded():
    image = Image.fromarray(pixels(3))
    np.testing.assert_array_equal(decode(encode(image), 40), pixels(3))
    smaller = image.resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decode(encode(image), 16), np.asarray(smaller))
    with pytest.raises(ValueError, match="mode RGB"):
        decode(encode(image.convert("RGB")), 40)
    with pytest.raises(ValueError):
        decode(encode(image)[:-30], 40)


@needs(ORIGINAL)
def test_original_images_become_those_that_were_reduced_elsewhere():
    found = find_images(ORIGINAL)
    small = find_images(ORIGINAL.parent / "images_224")
    both = sorted(found.keys() & small.keys())
    assert both, "the folders share images"
    for name in both[:6]:
        mine = decode(reduce_image(found[name], 224, Usual(1024, 1024)), 224).astype(int)
        other = decode(small[name].read_bytes(), 224).astype(int)
        assert np.abs(mine - other).mean() < 3
