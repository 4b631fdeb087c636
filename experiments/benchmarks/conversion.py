"""Benchmark of the conversion of weights from and to torchvision's format."""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from experiments.benchmarks.timing import Row, Target, take_turns
from experiments.oracles.torch_networks import create_network
from inmerge_jax.models.torchvision import from_state_dict, to_state_dict

SECONDS = 5


def conversion_rows(*, rounds: int, name: str = "vgg19") -> list[Row]:
    """Times both directions for a network with 1,000 classes, without file access."""
    print(f"conversion: {name}, {rounds} rounds", flush=True)
    with torch.device("meta"):
        network = create_network(name, 1000, stem="imagenet", size=224)
    theirs = {key: np.ones(x.shape, np.float32) for key, x in network.state_dict().items()}
    ours = from_state_dict(name, theirs)
    ways: dict[str, Callable[[], Any]] = {
        "from_state_dict": lambda: from_state_dict(name, theirs),
        "to_state_dict": lambda: to_state_dict(name, ours),
    }
    return [
        Row(
            name=f"conversion of {name}",
            quantity=f"{way}, seconds",
            value=statistics.median(times),
            low=min(times),
            high=max(times),
            target=Target("at most", SECONDS),
            seconds={way: times},
            note="float32 arrays in memory",
        )
        for way, times in take_turns(ways, rounds=rounds).items()
    ]
