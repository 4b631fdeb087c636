"""Every ResNet and DenseNet equals PyTorch's to rounding."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("torchvision")

from tests.models.parity import check_network

LONG = [
    ("resnet18", "imagenet"),
    *((f"resnet{depth}", stem) for depth in (34, 50) for stem in ("imagenet", "small")),
    ("densenet121", "imagenet"),
]
NETWORKS = [("resnet18", "small"), *(pytest.param(*one, marks=pytest.mark.long) for one in LONG)]


@pytest.mark.parametrize(("name", "stem"), NETWORKS)
def test_network_is_pytorchs(name, stem):
    check_network(name, stem)
