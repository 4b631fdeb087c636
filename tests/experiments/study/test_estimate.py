from dataclasses import replace

import pytest

from experiments.study.cells import Backbone
from experiments.study.estimate import guess_seconds_per_image, operations_per_image

RETINA = Backbone("retinamnist", "resnet18", 0, 16, width=0.25)
CHEST = Backbone("chestxray14", "resnet18", 0, 4, width=0.25)


def test_a_guess_is_by_the_networks_own_speed_on_other_data():
    known = {
        ("breastmnist", "resnet18", 0.25, "small"): 0.01,
        ("breastmnist", "vgg16", 0.25, "small"): 5.0,
        ("breastmnist", "resnet18", 1.0, "small"): 5.0,
    }
    assert guess_seconds_per_image(RETINA, known) == pytest.approx(0.01)  # Images of one size.
    more = operations_per_image(CHEST) / operations_per_image(RETINA)
    assert 3 < more < 8  # 64 x 64 px against 28 x 28.
    assert guess_seconds_per_image(CHEST, known) == pytest.approx(0.01 * more)
    other = replace(CHEST, stem="imagenet")
    less = operations_per_image(CHEST) / operations_per_image(other)
    assert 10 < less < 20
    assert guess_seconds_per_image(other, known) == pytest.approx(0.01 * more / less)
    assert guess_seconds_per_image(RETINA, {}) == pytest.approx(operations_per_image(RETINA) / 60e9)
