"""What the merge pass of the method's released code does, in plain PyTorch (arXiv 2502.20516).

Written from a description of its behaviour, for comparison of results and of speed: a Python loop
over the selected kernels, one cosine per pair, every read from the old weight, every write to a
copy. Weights are OIHW, so a kernel is `weight[i]`.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import cosine_similarity


def draw(count: int, probability: float, generator: torch.Generator) -> tuple[list, list]:
    """The selected kernels' indices, and for every kernel another one drawn uniformly."""
    selected = torch.rand(count, generator=generator) < probability
    partner = torch.randint(count - 1, (count,), generator=generator)
    partner += partner >= torch.arange(count)
    return selected.nonzero().flatten().tolist(), partner.tolist()


def merge_layer(
    weight: torch.Tensor,
    selected: Sequence[int],
    partner: Sequence[int],
    threshold: float,
    alpha: float,
) -> tuple[torch.Tensor, int]:
    """The merged copy of one layer's weight, and how many kernels were mixed."""
    kernels = weight.flatten(1).unbind()
    new = weight.clone()
    rows = new.flatten(1)
    merged = 0
    for i in selected:
        kernel, other = kernels[i], kernels[partner[i]]
        if cosine_similarity(kernel, other, dim=0) > threshold:
            rows[i] = alpha * kernel + (1 - alpha) * other
            merged += 1
    return new, merged


@torch.no_grad()
def merge_pass(
    weights: Sequence[torch.Tensor],
    generator: torch.Generator,
    probability: float,
    threshold: float,
    alpha: float,
) -> tuple[list[torch.Tensor], int]:
    """One merge of several layers: the new weights, and how many kernels were mixed in all."""
    new, total = [], 0
    for weight in weights:
        selected, partner = draw(len(weight), probability, generator)
        merged, count = merge_layer(weight, selected, partner, threshold, alpha)
        new.append(merged)
        total += count
    return new, total
