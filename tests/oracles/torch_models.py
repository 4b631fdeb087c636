"""Networks in plain PyTorch that torchvision does not have, with our modules' names."""

import torch
from torch import nn


class _Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv1d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm1d(outputs)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm1d(outputs)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut_conv = nn.Conv1d(inputs, outputs, 1, stride, bias=False)
            self.shortcut_bn = nn.BatchNorm1d(outputs)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (self.shortcut_bn(self.shortcut_conv(x)) if self.projects else x)).relu()


class ResNet1d(nn.Module):
    """ResNet-18 for signals (batch, channels, time), with a stem of three taps."""

    def __init__(self, channels, classes, first=64):
        super().__init__()
        self.conv1 = nn.Conv1d(channels, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm1d(first)
        inputs = first
        for stage in range(4):
            outputs = first * 2**stage
            for index in range(2):
                stride = 2 if stage and not index else 1
                setattr(self, f"layer{stage + 1}_{index}", _Block(inputs, outputs, stride))
                inputs = outputs
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        for stage in range(4):
            for index in range(2):
                x = getattr(self, f"layer{stage + 1}_{index}")(x)
        return self.fc(x.mean(-1))


class UNet(nn.Module):
    """U-Net over two or three spatial axes."""

    def __init__(self, channels, classes, first, levels, ndim):
        super().__init__()
        conv = getattr(nn, f"Conv{ndim}d")
        norm = getattr(nn, f"BatchNorm{ndim}d")
        self.pool = getattr(nn, f"MaxPool{ndim}d")(2)
        self.levels = levels

        def level(name, inputs, outputs):
            for part in ("1", "2"):
                setattr(self, f"{name}_{part}", conv(inputs, outputs, 3, padding=1, bias=False))
                setattr(self, f"{name}_bn{part}", norm(outputs))
                inputs = outputs

        for number in range(levels):
            level(f"encoder{number + 1}", channels, first * 2**number)
            channels = first * 2**number
        level("bottom", channels, 2 * channels)
        for number in range(levels):
            outputs = first * 2**number
            up = getattr(nn, f"ConvTranspose{ndim}d")(2 * outputs, outputs, 2, 2)
            setattr(self, f"up{number + 1}", up)
            level(f"decoder{number + 1}", 2 * outputs, outputs)
        self.head = conv(first, classes, 1)

    def _level(self, x, name):
        for part in ("1", "2"):
            x = getattr(self, f"{name}_bn{part}")(getattr(self, f"{name}_{part}")(x)).relu()
        return x

    def forward(self, x):
        skips = []
        for number in range(self.levels):
            x = self._level(x, f"encoder{number + 1}")
            skips.append(x)
            x = self.pool(x)
        x = self._level(x, "bottom")
        for number in reversed(range(self.levels)):
            x = getattr(self, f"up{number + 1}")(x)
            x = self._level(torch.cat([skips[number], x], 1), f"decoder{number + 1}")
        return self.head(x)


class MLPMixer(nn.Module):
    """MLP-Mixer over patches of an image."""

    def __init__(self, channels, classes, size, patch, depth, features):
        super().__init__()
        tokens = (size // patch) ** 2
        self.patches = nn.Conv2d(channels, features, patch, patch)
        self.depth = depth
        for number in range(depth):
            block = nn.Module()
            block.norm1, block.norm2 = nn.LayerNorm(features, 1e-6), nn.LayerNorm(features, 1e-6)
            block.tokens_fc1 = nn.Linear(tokens, features // 2)
            block.tokens_fc2 = nn.Linear(features // 2, tokens)
            block.channels_fc1 = nn.Linear(features, 4 * features)
            block.channels_fc2 = nn.Linear(4 * features, features)
            setattr(self, f"block_{number}", block)
        self.norm = nn.LayerNorm(features, 1e-6)
        self.head = nn.Linear(features, classes)

    def forward(self, x):
        gelu = nn.functional.gelu
        x = self.patches(x).flatten(2).transpose(1, 2)
        for number in range(self.depth):
            block = getattr(self, f"block_{number}")
            y = block.norm1(x).transpose(1, 2)
            x = x + block.tokens_fc2(gelu(block.tokens_fc1(y))).transpose(1, 2)
            x = x + block.channels_fc2(gelu(block.channels_fc1(block.norm2(x))))
        return self.head(self.norm(x).mean(1))
