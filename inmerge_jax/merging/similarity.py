"""How similar the units of a network are, layer by layer."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inmerge_jax.merging import backends
from inmerge_jax.merging.merge import cosines, unit_vectors
from inmerge_jax.merging.rule import NOT_COMPARED
from inmerge_jax.merging.units import Kernel, as_rows, group_weights, weights_of

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class LayerSimilarity:
    """The cosine similarities of one layer's pairs of different units of the same problem.

    A layer whose problems have one unit has no pairs: every number is then NaN.

    Attributes:
      name: the layer's path, or the label of a group of weights.
      kernels: how many units it has.
      mean, minimum, maximum: over all pairs.
      quantiles: `{q: value}` over all pairs.
      above: `{threshold: share}`, the share of pairs whose similarity exceeds a threshold: the
        chance that a unit and a random partner merge, once selected.
      nearest: mean over units of the similarity to the most similar other unit.
    """

    name: str
    kernels: int
    mean: float
    minimum: float
    maximum: float
    quantiles: dict[float, float]
    above: dict[float, float]
    nearest: float

    def to_dict(self) -> dict[str, Any]:
        """The same as a JSON-ready dict, with numbers that are keys written as text."""
        return vars(self) | {
            "quantiles": {str(q): v for q, v in self.quantiles.items()},
            "above": {str(t): v for t, v in self.above.items()},
        }


def kernel_similarity(
    params: Any,
    kernels: Sequence[Kernel],
    *,
    quantiles: Sequence[float] = QUANTILES,
    thresholds: Sequence[float] = THRESHOLDS,
) -> tuple[LayerSimilarity, ...]:
    """Measures how similar the units within each layer are.

    Goes layer by layer and waits for each: what is in memory at a time is one layer's C x C matrix
    of cosines (C units of a problem, float32) and a few arrays of that size made of it.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from inmerge_jax import Kernel
      >>> w = jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
      >>> kernel = Kernel((jax.tree_util.DictKey("w"),), shape=(2, 3), out_axis=1)
      >>> (layer,) = kernel_similarity({"w": w}, [kernel])
      >>> layer.kernels, round(layer.mean, 3), round(layer.above[0.5], 3)
      (3, 0.471, 0.667)

    Args:
      params: a tree that holds the kernels' weights.
      kernels: which weights to measure, from `find_kernels`.
      quantiles: which quantiles to give, each in [0, 1].
      thresholds: for which similarities to give the share of pairs above.

    Returns:
      One entry per layer, in the order of the kernels given; weights of one group are one layer.

    Raises:
      ValueError: a kernel isn't in `params`, or a quantile lies outside [0, 1].
    """
    wrong = [q for q in quantiles if not 0 <= q <= 1]
    if wrong:
        raise ValueError(f"quantiles holds {wrong[0]}; each must lie between 0 and 1")
    quantiles, thresholds = tuple(quantiles), tuple(thresholds)
    weights, _ = weights_of(kernels, params)
    found = []
    for members in group_weights(kernels):
        compared = [kernel for kernel in members if kernel.compared]
        given = [jnp.asarray(weights[kernel.name]) for kernel in compared]

        def measure(given: list[jax.Array], compared: list[Kernel] = compared) -> jax.Array:
            rows = [as_rows(weight, kernel) for weight, kernel in zip(given, compared, strict=True)]
            return _statistics(rows, quantiles, thresholds)

        numbers = np.full(4 + len(quantiles) + len(thresholds), np.nan)
        if members[0].units > 1:
            numbers = jax.device_get(backends.over_automatic_axes(measure, given)(given))
        mean, minimum, maximum, nearest, *rest = numbers.tolist()
        found.append(
            LayerSimilarity(
                members[0].label,
                members[0].count,
                mean,
                minimum,
                maximum,
                dict(zip(quantiles, rest, strict=False)),
                dict(zip(thresholds, rest[len(quantiles) :], strict=True)),
                nearest,
            )
        )
    return tuple(found)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _statistics(
    rows: list[jax.Array], quantiles: tuple[float, ...], thresholds: tuple[float, ...]
) -> jax.Array:
    cosine = jax.vmap(lambda rows: cosines(unit_vectors(rows)))(rows)
    first, second = np.triu_indices(cosine.shape[-1], k=1)
    pairs = cosine[:, first, second].ravel()
    itself = jnp.eye(cosine.shape[-1], dtype=bool)[None]
    nearest = jnp.max(jnp.where(itself, NOT_COMPARED, cosine), axis=-1)
    extremes = [jnp.mean(pairs), jnp.min(pairs), jnp.max(pairs), jnp.mean(nearest)]
    shares = [jnp.mean(pairs > threshold) for threshold in thresholds]
    at = jnp.quantile(pairs, jnp.asarray(quantiles, jnp.float32))
    return jnp.concatenate([jnp.stack(extremes), at, jnp.array(shares, jnp.float32)])
