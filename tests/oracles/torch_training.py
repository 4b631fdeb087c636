"""Training in plain PyTorch, by PyTorch's own optimizers: what ours must repeat to rounding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize


@torch.no_grad()
def merge(
    weight: torch.Tensor,
    selected: np.ndarray,
    partner: np.ndarray | None,
    threshold: float,
    alpha: float,
) -> tuple[int, float]:
    """Merges one layer (OIHW) in place with the given draws; None takes the most similar partner.

    Computed in float32 whatever the weight's type, as ours is. Returns how many kernels were mixed,
    and how near a selected pair's similarity came to the threshold.
    """
    kernels = weight.flatten(1).float()
    if partner is None:
        unit = normalize(kernels, dim=1)
        chosen = (unit @ unit.T).fill_diagonal_(-2).argmax(1)
    else:
        chosen = torch.tensor(np.array(partner), dtype=torch.long)
    similarity = cosine_similarity(kernels, kernels[chosen])
    gate = torch.tensor(np.array(selected))
    mixed = gate & (similarity > threshold)
    share = torch.tensor(alpha)
    new = (share * kernels + (1 - share) * kernels[chosen]).to(weight.dtype)
    weight.copy_(torch.where(mixed[:, None], new, weight.flatten(1)).view_as(weight))
    margins = (similarity - threshold).abs()[gate]
    return int(mixed.sum()), float(margins.min()) if len(margins) else 1.0


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
