"""Every VGG equals PyTorch's to rounding."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("torchvision")

from tests.models.parity import check_full_width, check_network

NETWORKS = [
    *((f"vgg{depth}{ending}", "imagenet") for depth in (11, 13, 16, 19) for ending in ("", "_bn")),
    *((name, "small") for name in ("vgg13_bn", "vgg16")),
]


@pytest.mark.long
@pytest.mark.parametrize(("name", "stem"), NETWORKS)
def test_network_is_pytorchs(name, stem):
    check_network(name, stem)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name, stem in NETWORKS if stem == "imagenet"])
def test_full_width_scores_are_pytorchs(name):
    check_full_width(name, "imagenet")
