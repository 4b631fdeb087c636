"""Training in plain PyTorch, by PyTorch's own optimizers: what ours must repeat to rounding.

The networks are `inmerge_jax.models`' VGGs with fewer channels, made from torchvision's parts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from torchvision.models.vgg import make_layers

_STAGE_SIZES = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
_STAGE_CHANNELS = (64, 128, 256, 512, 512)


def narrow_network(name: str, width: float, num_classes: int, size: int) -> nn.Module:
    """The VGG of `create_model(name, num_classes, width=width)` for RGB images of `size` px."""
    plan: list[int | str] = []
    for channels, convolutions in zip(_STAGE_CHANNELS, _STAGE_SIZES[name[:5]], strict=True):
        plan += [round(channels * width)] * convolutions
        if size >= 4:
            plan.append("M")
            size //= 2
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(round(512 * width), num_classes)]
    network = nn.Sequential(make_layers(plan, batch_norm=name.endswith("_bn")), *head)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # as torchvision's VGG
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return network


def module_names(name: str, network: nn.Module) -> dict[str, str]:
    """The network's layers in order of definition: our name to PyTorch's."""
    leaves = [n for n, m in network.named_modules() if not list(m.children()) and m.state_dict()]
    places = [f"{i}_{j + 1}" for i, n in enumerate(_STAGE_SIZES[name[:5]], 1) for j in range(n)]
    kinds = ("conv", "bn") if name.endswith("_bn") else ("conv",)
    ours = [kind + place for place in places for kind in kinds] + ["fc"]
    return dict(zip(ours, leaves, strict=True))


def to_jax(name: str, network: nn.Module) -> tuple[dict, dict]:
    """The network's weights as our nested parameters and batch statistics, NumPy copies."""
    params, stats = {}, {}
    for ours, theirs in module_names(name, network).items():
        state = network.get_submodule(theirs).state_dict()
        arrays = {key: value.numpy().copy() for key, value in state.items()}
        weight = arrays["weight"]
        if "running_mean" in arrays:
            params[ours] = {"scale": weight, "bias": arrays["bias"]}
            stats[ours] = {"mean": arrays["running_mean"], "var": arrays["running_var"]}
            continue
        kernel = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
        params[ours] = {"kernel": kernel, "bias": arrays["bias"]}
    return params, stats


@torch.no_grad()
def merge(
    weight: torch.Tensor,
    selected: np.ndarray,
    partner: np.ndarray | None,
    threshold: float,
    alpha: float,
) -> tuple[int, float]:
    """Merges one layer (OIHW) in place with the given draws; None takes the most similar partner.

    Returns how many kernels were mixed, and how near a selected pair's similarity came to the
    threshold.
    """
    kernels = weight.flatten(1).clone()
    if partner is None:
        unit = normalize(kernels, dim=1)
        chosen = (unit @ unit.T).fill_diagonal_(-2).argmax(1)
    else:
        chosen = torch.tensor(np.array(partner), dtype=torch.long)
    similarity = cosine_similarity(kernels, kernels[chosen])
    gate = torch.tensor(np.array(selected))
    mixed = gate & (similarity > threshold)
    new = torch.where(mixed[:, None], alpha * kernels + (1 - alpha) * kernels[chosen], kernels)
    weight.copy_(new.view_as(weight))
    return int(mixed.sum()), float((similarity - threshold).abs()[gate].min())


@dataclass
class Trajectory:
    """What happened: a loss per step, a validation loss and a learning rate per epoch."""

    losses: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """How to train: `schedule` is "steps" (x0.1 at 1/2 and 3/4) or "released"."""

    optimizer: str
    rate: float
    momentum: float
    weight_decay: float
    schedule: str
    tolerance: int = 8


def train(
    network: nn.Module,
    plan: Plan,
    epochs: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]],
    validation: tuple[torch.Tensor, torch.Tensor],
    before_step: Callable[[int], None] = lambda step: None,
    on_validation: Callable[[nn.Module, int], float] | None = None,
) -> Trajectory:
    """Trains `network` in place on batches of images (n, 3, h, w) and labels, epoch by epoch.

    `before_step` is called with the number of every step before its forward pass; `on_validation`,
    with the steps done so far, replaces the plain validation loss.
    """
    told, step, best, since = Trajectory(), 0, np.inf, 0
    optimizer = _optimizer(network, plan, plan.rate)
    milestones = [len(epochs) // 2, len(epochs) * 3 // 4]
    steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    for batches in epochs:
        told.rates.append(optimizer.param_groups[0]["lr"])
        network.train()
        for images, labels in batches:
            before_step(step)
            optimizer.zero_grad()
            loss = cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            told.losses.append(loss.item())
            step += 1
        network.eval()
        with torch.no_grad():
            if on_validation is None:
                told.val_losses.append(cross_entropy(network(validation[0]), validation[1]).item())
            else:
                told.val_losses.append(on_validation(network, step))
        if plan.schedule == "steps":
            steps.step()
            continue
        since = 0 if told.val_losses[-1] < best else since + 1
        best = min(best, told.val_losses[-1])
        if since >= plan.tolerance:
            optimizer = _optimizer(network, plan, told.rates[-1] * 0.1)
    return told


def _optimizer(network: nn.Module, plan: Plan, rate: float) -> torch.optim.Optimizer:
    if plan.optimizer == "adam":
        return torch.optim.Adam(network.parameters(), rate, weight_decay=plan.weight_decay)
    return torch.optim.SGD(
        network.parameters(), rate, momentum=plan.momentum, weight_decay=plan.weight_decay
    )
