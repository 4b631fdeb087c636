"""The networks of `inmerge_jax.models` in PyTorch, channels first."""

from collections import OrderedDict

import torch
from torch import nn

_BENCHMARK = {
    "resnet18": (3, (2, 2, 2, 2)),
    "resnet34": (3, (3, 4, 6, 3)),
    "resnet50": (1, (3, 4, 6, 3)),
}
_DENSENET = {"densenet121": (6, 12, 24, 16)}
_VIT = {"vit_s_16": 6, "vit_b_16": 12}
_VGG = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}


def create_network(
    name: str, num_classes: int, *, stem: str, size: int, width: float = 1.0
) -> nn.Module:
    """A classifier of RGB images of `size` px, in training mode.

    Args:
      name: as in `inmerge_jax.models.create_model`.
      num_classes: number of logits.
      stem: "imagenet" is torchvision's network; "small" is the MedMNIST v2 benchmark's 28 px form
        of a ResNet, torchvision's DenseNet with a 3x3 stem of stride 1 and no max-pool, and
        torchvision's VGG with a pooled linear head. Vision Transformers have no stem.
      size: decides which max-pools a small VGG has room for.
      width: factor on the number of channels of every layer; only with the small stem.
    """
    if name in _VIT:
        from torchvision.models import VisionTransformer

        heads = round(_VIT[name] * width)
        return VisionTransformer(
            size, 16, 12, heads, 64 * heads, 256 * heads, num_classes=num_classes
        )
    if stem == "imagenet":
        # Imported where they are used: the benchmark's ResNets need PyTorch alone.
        from torchvision.models import get_model

        return get_model(name, weights=None, num_classes=num_classes)
    if name in _BENCHMARK:
        return BenchmarkResNet(*_BENCHMARK[name], num_classes, round(64 * width))
    if name.startswith("vgg"):
        return _small_vgg(name, num_classes, size, width)
    from torchvision.models import DenseNet

    growth = round(32 * width)
    network = DenseNet(growth, _DENSENET[name], 2 * growth, num_classes=num_classes)
    network.features.conv0 = nn.Conv2d(3, 2 * growth, 3, padding=1, bias=False)
    network.features.pool0 = nn.Identity()
    return network


def _small_vgg(name: str, num_classes: int, size: int, width: float) -> nn.Module:
    from torchvision.models.vgg import cfgs, make_layers

    plan = [x if x == "M" else round(x * width) for x in cfgs[_VGG[name.removesuffix("_bn")]]]
    features = make_layers(plan, batch_norm=name.endswith("_bn"))
    for index, layer in enumerate(features):
        if isinstance(layer, nn.MaxPool2d):
            if size < 4:
                features[index] = nn.Identity()
            size //= 2
    for module in features:
        if isinstance(module, nn.Conv2d):  # as torchvision's VGG
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    layers = {"features": features, "avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    layers["classifier"] = nn.Linear(round(512 * width), num_classes)
    return nn.Sequential(OrderedDict(layers))


class BenchmarkResNet(nn.Module):
    """The residual network that the MedMNIST v2 benchmark trains at 28 px, with its entries' names.

    A 3x3 stem of stride 1 without a max-pool, blocks that end in their ReLU, and a projection
    (`shortcut.0`, `shortcut.1`) where a block changes the shape.
    """

    def __init__(
        self, first: int, stage_sizes: tuple[int, ...], num_classes: int, stem_channels: int
    ) -> None:
        """`first` is the size of a block's first convolution: 3 in a basic block, else 1."""
        super().__init__()
        inputs = stem_channels
        self.conv1 = nn.Conv2d(3, inputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        for stage, blocks in enumerate(stage_sizes):
            channels, layers = stem_channels * 2**stage, []
            for index in range(blocks):
                stride = 2 if stage and not index else 1
                layers.append(_Block(first, inputs, channels, stride))
                inputs = layers[-1].outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (batch, 3, h, w) to (batch, num_classes)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.linear(x.mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, first: int, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        # Size, outputs and stride of each convolution; the first of size 3 has the stride.
        plan = [(3, channels, stride), (3, channels, 1)]
        if first == 1:
            plan = [(1, channels, 1), (3, channels, stride), (1, 4 * channels, 1)]
        self.depth, self.outputs = len(plan), plan[-1][1]
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != self.outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, self.outputs, 1, stride, bias=False),
                nn.BatchNorm2d(self.outputs),
            )
        for number, (size, features, step) in enumerate(plan, 1):
            convolution = nn.Conv2d(inputs, features, size, step, size // 2, bias=False)
            self.add_module(f"conv{number}", convolution)
            self.add_module(f"bn{number}", nn.BatchNorm2d(features))
            inputs = features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for number in range(1, self.depth + 1):
            y = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(y))
            if number < self.depth:
                y = torch.relu(y)
        return torch.relu(y + self.shortcut(x))
