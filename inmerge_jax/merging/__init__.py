"""The method: which weights merge (`units`, `tracing`), when (`rule`) and how (`merge`)."""

from inmerge_jax.merging.merge import MergeStats, draw_pairs, merge_kernels
from inmerge_jax.merging.rule import MergeRule, Quantile, quantile
from inmerge_jax.merging.similarity import LayerSimilarity, kernel_similarity
from inmerge_jax.merging.tracing import PassedOver, Trace, find_kernels, trace_kernels
from inmerge_jax.merging.transform import (
    InModelMergingState,
    in_model_merging,
    merge_report,
    with_merging,
)
from inmerge_jax.merging.units import Kernel, attention_heads, deep_kernels, experts, tie

__all__ = [
    "InModelMergingState",
    "Kernel",
    "LayerSimilarity",
    "MergeRule",
    "MergeStats",
    "PassedOver",
    "Quantile",
    "Trace",
    "attention_heads",
    "deep_kernels",
    "draw_pairs",
    "experts",
    "find_kernels",
    "in_model_merging",
    "kernel_similarity",
    "merge_kernels",
    "merge_report",
    "quantile",
    "tie",
    "trace_kernels",
    "with_merging",
]
