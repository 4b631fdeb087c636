"""In-model merging for any JAX training loop (arXiv 2502.20516)."""

from inmerge_jax.kernels import Kernel, deep_kernels, find_kernels
from inmerge_jax.merging import MergeRule, MergeStats, Quantile, merge_kernels, quantile
from inmerge_jax.redundancy import LayerSimilarity, kernel_similarity
from inmerge_jax.transform import InModelMergingState, in_model_merging

__version__ = "0.1.0"

__all__ = [
    "InModelMergingState",
    "Kernel",
    "LayerSimilarity",
    "MergeRule",
    "MergeStats",
    "Quantile",
    "deep_kernels",
    "find_kernels",
    "in_model_merging",
    "kernel_similarity",
    "merge_kernels",
    "quantile",
]
