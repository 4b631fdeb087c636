"""Every ResNet and DenseNet equals PyTorch's to rounding."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("torchvision")

from tests.models.parity import check_network

NETWORKS = [
    *((f"resnet{depth}", stem) for depth in (18, 34, 50) for stem in ("imagenet", "small")),
    ("densenet121", "imagenet"),
]


@pytest.mark.long
@pytest.mark.parametrize(("name", "stem"), NETWORKS)
def test_network_is_pytorchs(name, stem):
    check_network(name, stem)
