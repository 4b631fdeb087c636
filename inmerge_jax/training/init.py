"""Initialization of a network: its first weights."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from inmerge_jax.buckets import local_copy
from inmerge_jax.errors import UsageError
from inmerge_jax.models.torchvision import LoadReport, match_state_dict, read_state_dict
from inmerge_jax.training.config import ModelConfig


def has_batch_stats(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a network has batch normalisation; arguments as in `find_units`."""
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    make = functools.partial(model.init, train=False)
    return "batch_stats" in jax.eval_shape(make, jax.random.key(0), image)


def init_variables(model: nn.Module, shape: tuple[int, ...], seed: int) -> tuple[Any, Any]:
    """Random parameters, and batch statistics ({} if there are none), as trees of NumPy arrays.

    Args:
      model: the network, called with images and `train`.
      shape: shape of one example, such as (h, w, c).
      seed: random seed.
    """
    # XLA's CPU backend takes 8 s for ResNet-18, and 2.6 s at level 1, with the same bits.
    cheap = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}
    image = jnp.zeros((1, *shape))
    init = jax.jit(lambda key: model.init(key, image, train=False), compiler_options=cheap)
    variables = jax.device_get(init(jax.random.key(seed)))
    return variables["params"], variables.get("batch_stats", {})


def pretrained_variables(
    chosen: ModelConfig, sha256: str, num_classes: int, shape: tuple[int, ...], seed: int
) -> tuple[Any, Any, LoadReport]:
    """Parameters, batch statistics, and what of them is from the file `init_from`.

    Args:
      chosen: the network and the file.
      sha256: the file's hash when the run was configured, see `file_sha256`.
      num_classes: number of outputs of the network.
      shape: shape of one example, such as (h, w, c).
      seed: random seed of the layers that the file does not have.

    Raises:
      UsageError: the file has changed, cannot be read, or holds another network's weights.
    """
    if file_sha256(chosen.init_from) != sha256:
        raise UsageError(f"`init_from` {chosen.init_from}: the file changed during the run")
    try:
        variables, report = match_state_dict(
            chosen.name,
            read_state_dict(local_copy(chosen.init_from)),
            stem=chosen.stem,
            num_classes=num_classes,
            channels=shape[-1],
            spatial=shape[:-1],
            key=jax.random.key(seed),
            width=chosen.width,
            replace_head=chosen.replace_head,
            min_match=chosen.init_min_match,
        )
    except UsageError as error:
        raise UsageError(f"`init_from` {chosen.init_from}: {error}") from error
    return variables["params"], variables.get("batch_stats", {}), report


def file_sha256(path: Path) -> str:
    """SHA-256 of the file `init_from`.

    Raises:
      UsageError: the file cannot be read.
    """
    try:
        with open(local_copy(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(
            f"`init_from` {path}: {error.strerror}; give a file of PyTorch weights"
        ) from error
