"""How similar the units of a network are, layer by layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inmerge_jax.merging import backends
from inmerge_jax.merging.merge import cosines, unit_vectors
from inmerge_jax.merging.rule import NOT_COMPARED
from inmerge_jax.merging.units import Kernel, as_kernels, as_rows, group_weights, weights_of

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class LayerSimilarity:
    """Cosine similarities of the pairs of units in one layer.

    Pairs are of different units of the same problem. Without pairs every number is NaN.

    Attributes:
      name: Path of the layer, or label of a group of weights.
      kernels: Number of units.
      mean: Mean over all pairs.
      minimum: Minimum over all pairs.
      maximum: Maximum over all pairs.
      quantiles: `{q: value}` over all pairs.
      above: `{threshold: fraction}`, the fraction of pairs above a threshold: the probability that
        a selected unit merges with a random partner.
      nearest: Mean similarity of a unit to its most similar other unit.
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
        """The attributes as a dict for JSON: numeric keys become text, and NaN None."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {str(key): plain(one) for key, one in value.items()}
            return None if isinstance(value, float) and math.isnan(value) else value

        return {name: plain(value) for name, value in vars(self).items()}


def kernel_similarity(
    params: Any,
    kernels: Sequence[Kernel],
    *,
    quantiles: Sequence[float] = QUANTILES,
    thresholds: Sequence[float] = THRESHOLDS,
) -> tuple[LayerSimilarity, ...]:
    """Measures the similarity of the units of each layer, on concrete weights, outside of `jit`.

    Layers are measured one after the other. Peak memory is a few float32 matrices of C x C for a
    layer of C units.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from inmerge_jax import Kernel
      >>> w = jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
      >>> kernel = Kernel((jax.tree_util.DictKey("w"),), shape=(2, 3), out_axis=1)
      >>> (layer,) = kernel_similarity({"w": w}, [kernel])
      >>> layer.kernels, round(layer.mean, 3), round(layer.above[0.5], 3)
      (3, 0.471, 0.667)

    Args:
      params: A parameter tree with the weights of the kernels.
      kernels: Weights to measure, from `find_kernels`.
      quantiles: Quantiles to compute, each in [0, 1].
      thresholds: Similarities for which to compute the fraction of pairs above.

    Returns:
      One entry per layer, in the order given. Weights of one group are one layer.

    Raises:
      ValueError: A kernel is not in `params`, or a quantile is outside [0, 1].
    """
    quantiles, thresholds = (tuple(map(float, given)) for given in (quantiles, thresholds))
    wrong = [q for q in quantiles if not 0 <= q <= 1]
    if wrong:
        raise ValueError(f"quantiles holds {wrong[0]}; each must lie between 0 and 1")
    kernels = as_kernels(kernels)
    weights, _ = weights_of(kernels, params)
    found = []
    for members in group_weights(kernels):
        compared = [kernel for kernel in members if kernel.compared]
        given = [jnp.asarray(weights[kernel.name]) for kernel in compared]

        def compare(given: list[jax.Array], compared: list[Kernel] = compared) -> jax.Array:
            rows = [as_rows(weight, kernel) for weight, kernel in zip(given, compared, strict=True)]
            return _cosines(rows)

        cosine = None
        if members[0].units > 1:
            cosine = jax.device_get(backends.over_automatic_axes(compare, given)(given))
        found.append(_statistics(members[0], cosine, quantiles, thresholds))
    return tuple(found)


@jax.jit
def _cosines(rows: list[jax.Array]) -> jax.Array:
    return jax.vmap(lambda rows: cosines(unit_vectors(rows)))(rows)


def _statistics(
    layer: Kernel,
    cosine: np.ndarray | None,
    quantiles: Sequence[float],
    thresholds: Sequence[float],
) -> LayerSimilarity:
    """In NumPy, which sorts many times faster than XLA on CPU; NaN for a layer without pairs."""
    if cosine is None:
        pairs = nearest = np.array([math.nan])
        above = dict.fromkeys(thresholds, math.nan)
    else:
        pairs = cosine[:, ~np.tri(layer.units, dtype=bool)].ravel()
        nearest = np.where(np.eye(layer.units, dtype=bool), NOT_COMPARED, cosine).max(-1)
        above = {t: float((pairs > t).mean()) for t in thresholds}
    return LayerSimilarity(
        name=layer.label,
        kernels=layer.count,
        mean=float(pairs.mean(dtype=np.float64)),
        minimum=float(pairs.min()),
        maximum=float(pairs.max()),
        quantiles=dict(zip(quantiles, np.quantile(pairs, quantiles).tolist(), strict=True)),
        above=above,
        nearest=float(nearest.mean()),
    )
