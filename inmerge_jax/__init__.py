"""In-model merging for any JAX training loop (arXiv 2502.20516)."""

from inmerge_jax.batch_stats import recompute_batch_stats
from inmerge_jax.merging import (
    InModelMergingState,
    Kernel,
    LayerSimilarity,
    MergeRule,
    MergeStats,
    attention_heads,
    deep_kernels,
    experts,
    find_kernels,
    in_model_merging,
    kernel_similarity,
    merge_kernels,
    merge_report,
    quantile,
    tie,
    trace_kernels,
    with_merging,
)

__version__ = "0.1.0"

__all__ = [
    "InModelMergingState",
    "Kernel",
    "LayerSimilarity",
    "MergeRule",
    "MergeStats",
    "attention_heads",
    "deep_kernels",
    "experts",
    "find_kernels",
    "in_model_merging",
    "kernel_similarity",
    "merge_kernels",
    "merge_report",
    "quantile",
    "recompute_batch_stats",
    "tie",
    "trace_kernels",
    "with_merging",
]
