"""When and how units are mixed: `MergeRule`, and the threshold that each layer sets itself."""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

PARTNERS = ("random", "nearest")
NOT_COMPARED = -2.0
"""The similarity of units that are not selected or not finite; it exceeds no threshold."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantile:
    """A threshold that every problem sets by its own units; made by `quantile`."""

    share: float | jax.Array


def quantile(share: float | jax.Array) -> Quantile:
    """A threshold for `MergeRule` that each layer sets by its own similarities.

    How similar units are depends on the layer, the network and the optimizer, so a fixed threshold
    can merge everything in one network and nothing in another. With `quantile(share)`, a layer with
    `m` selected units merges the `floor((1 - share) * m)` most similar of them (ties may lower
    this). The fraction of units that merge is about `probability * (1 - share)`, and less in small
    layers: with a share of 0.9, a layer with fewer than ten selected units merges none.

    Examples:
      >>> rule = MergeRule(probability=0.3, threshold=quantile(0.9), partner="nearest")

    Args:
      share: Number in [0, 1], or a traced scalar; in `in_model_merging` also a schedule. 0 merges
        every selected unit, 1 none, 0.9 the most similar tenth.

    Raises:
      ValueError: A number out of range.
    """
    if not callable(share) and not np.ndim(share):
        check_range("quantile", share, 0, 1)
    return Quantile(share)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MergeRule:
    """The rule of a merge: a pytree whose three numbers can be traced.

    In each merge every unit `K_i` is selected with `probability`. A selected unit gets a partner
    `K_j`, `j != i`. If their cosine similarity exceeds `threshold`,

        K_i <- alpha K_i + (1 - alpha) K_j

    Examples: A grid of rules as one pytree, and a schedule
      >>> import jax.numpy as jnp
      >>> grid = MergeRule(*jnp.meshgrid(jnp.array([0.1, 0.3]), jnp.array([0.3]), jnp.array([0.8])))
      >>> grid.probability.shape
      (1, 2, 1)
      >>> warm_up = lambda step: MergeRule(probability=0.3 * jnp.minimum(step / 1000, 1.0))

    Attributes:
      probability: Probability that a unit is selected, in [0, 1]; the paper's p. Each of the three
        may be a schedule in `in_model_merging`: a function of the number of updates so far.
      threshold: Similarity to exceed, in [-1, 1]; the paper's tau. Or `quantile(share)`, with which
        each layer sets its own.
      alpha: Fraction of the unit that is kept, in [0, 1].
      partner: `"random"`, drawn uniformly from the other units of the layer, as in the released
        code; or `"nearest"`, the most similar other unit, as in the paper's text.

    Numbers are checked where a rule is used (`merge_kernels`, `in_model_merging`), because pytree
    transformations make rules of any numbers, such as a gradient with respect to a rule.

    References:
      In-Model Merging for Enhancing the Robustness of Medical Imaging Classification Models,
      arXiv 2502.20516. The defaults are those of its released code.
    """

    probability: float | jax.Array = 0.3
    threshold: float | jax.Array | Quantile = 0.3
    alpha: float | jax.Array = 0.8
    partner: Literal["random", "nearest"] = field(default="random", metadata={"static": True})


def check_rule(rule: MergeRule) -> None:
    """Checks the numbers of a rule; traced ones are not known yet.

    Raises:
      ValueError: no rule, a number out of range or of another type, or an unknown partner.
    """
    if not isinstance(rule, MergeRule):
        raise ValueError(f"rule is {rule!r}; give a MergeRule")
    check_range("probability", rule.probability, 0, 1)
    if isinstance(rule.threshold, Quantile):
        check_range("quantile", rule.threshold.share, 0, 1)
    else:
        check_range("threshold", rule.threshold, -1, 1)
    check_range("alpha", rule.alpha, 0, 1)
    if rule.partner not in PARTNERS:
        raise ValueError(f"partner is {rule.partner!r}; choose one of {', '.join(PARTNERS)}")


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Checks a number; of a traced one, only that it is a scalar.

    Raises:
      ValueError: it is no number, an array of several, or lies outside [low, high].
    """
    numeric = isinstance(value, int | float | np.ndarray | np.generic | jax.Array)
    if not numeric or isinstance(value, bool) or jnp.iscomplexobj(value):
        raise ValueError(f"{name} is {value!r}; give a number between {low} and {high}")
    if np.ndim(value):
        raise ValueError(
            f"{name} has shape {np.shape(value)}; give a scalar, and jax.vmap a grid of rules"
        )
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return
    if not low <= float(value) <= high:
        raise ValueError(f"{name} is {value}; it must lie between {low} and {high}")


def effective_threshold(threshold: Any, similarity: jax.Array) -> Any:
    """The number that a similarity has to exceed.

    Args:
      threshold: of a rule.
      similarity: float32 (units,), of one problem; `NOT_COMPARED` for units that do not count.

    Returns:
      The threshold; of a `Quantile`, float32 (), the similarity that the upper share exceeds.
    """
    if not isinstance(threshold, Quantile):
        return threshold
    compared = jnp.sum(similarity > NOT_COMPARED, dtype=jnp.int32)
    # Less a tolerance: 0.6 * 25 > 15 in float32.
    exact = threshold.share * compared.astype(jnp.float32)
    stay = jnp.ceil(exact - 1e-4 - 2e-7 * exact).astype(jnp.int32)
    place = jnp.maximum(len(similarity) - compared + stay - 1, 0)
    return jnp.where(stay > 0, jnp.sort(similarity)[place], NOT_COMPARED)
