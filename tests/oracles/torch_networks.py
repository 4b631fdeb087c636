"""The networks of `inmerge_jax.models` in PyTorch, channels first, made from torchvision's."""

from torch import nn
from torchvision.models import resnet18, vgg16, vgg19

_STAGE_CHANNELS = (64, 128, 256, 512, 512)
_STAGE_SIZES = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
_TORCHVISION = {"resnet18": resnet18, "vgg16": vgg16, "vgg19": vgg19}


def create_network(name: str, num_classes: int, *, stem: str, size: int) -> nn.Module:
    """A classifier of RGB images of `size` px, in training mode.

    Args:
      name: "resnet18", "vgg16" or "vgg19".
      num_classes: number of logits.
      stem: "imagenet" is torchvision's network; "small" is the MedMNIST v2 benchmark's 28 px form
        of the ResNet, and a VGG with a pooled linear head.
      size: decides which max-pools a small VGG has room for.
    """
    if stem == "imagenet":
        return _TORCHVISION[name](num_classes=num_classes)
    if name in _STAGE_SIZES:
        return _small_vgg(_STAGE_SIZES[name], num_classes, size)
    network = resnet18(num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def _small_vgg(stage_sizes: tuple[int, ...], num_classes: int, size: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for outputs, convolutions in zip(_STAGE_CHANNELS, stage_sizes, strict=True):
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU(inplace=True)]
            channels = outputs
        if size >= 4:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    return nn.Sequential(*layers, *head)
