"""Running statistics of batch normalisation, re-estimated for weights that have changed."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_PROBE = 2.0**20
"""An old value so large that what an update keeps of it is exact to float32's rounding; larger yet
where a batch's own statistics are large."""
_MANY = 2**20
"""A number of updates after which an average is not divided by its share, 1 - m ** updates."""


def recompute_batch_stats(
    update: Callable[[Any, Any], Any], batch_stats: Any, batches: Iterable[Any]
) -> Any:
    """The mean over batches of each batch's own statistics, for the weights as they are now.

    Running averages follow the weights of past steps, so they lag behind weights that a merge, or
    an average of weights, has moved. This is what `torch.optim.swa_utils.update_bn` computes: every
    batch counts alike, and the momentum of the layers has no effect.

    A layer updates its statistics to `m * old + (1 - m) * batch`. Updates from zero give
    `(1 - m) * batch`, and one update from a large value gives `m`. Entries that `update` leaves as
    they are, such as those of a frozen layer, keep their values throughout.

    Examples: Flax Linen
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from inmerge_jax import recompute_batch_stats
      >>> net = nn.BatchNorm(use_running_average=False)
      >>> images = jax.random.normal(jax.random.key(0), (3, 8, 2)) + 5
      >>> variables = net.init(jax.random.key(1), images[0])
      >>> def update(batch_stats, x):
      ...     moved = {**variables, "batch_stats": batch_stats}
      ...     return net.apply(moved, x, mutable=["batch_stats"])[1]["batch_stats"]
      >>> found = recompute_batch_stats(jax.jit(update), variables["batch_stats"], images)
      >>> bool(jnp.allclose(found["mean"], images.mean((0, 1)), rtol=1e-4))
      True

    Args:
      update: `update(batch_stats, batch)` runs the network on one batch in training mode, from the
        given statistics, and returns the statistics that it leaves. Deterministic; compile it.
      batch_stats: Statistics of any values, a pytree: of Flax Linen the collection `batch_stats`,
        of Flax NNX `nnx.state(model, nnx.BatchStat)`, of Haiku the state, of Equinox the
        `eqx.nn.State`. `update` is given floats of 16 bits in float32.
      batches: Batches of training images, of equal size and in random order: batches of one class
        each would give too small variances.

    Returns:
      A tree like `batch_stats`. Counters of updates, which Haiku and Equinox have, are so high that
      the averages count as complete.

    Raises:
      ValueError: No batches; `update` leaves every entry as it is, rounds one to 16 bits, or
        normalises with the running statistics (`mode="ema"` of Equinox), so that what one layer
        measures depends on the old values of others; or an entry is no running average.
    """
    # By number, since update may return another kind of container.
    leaves = [jnp.array(x) for x in jax.tree.leaves(batch_stats)]
    structure = jax.tree.structure(batch_stats)
    if leaves and not any(map(_is_float, leaves)):
        raise ValueError("batch_stats holds integers alone, and no running average")

    def filled(values: Iterable[float | None]) -> Any:
        """The statistics with one of these numbers in place of each float, or its own value."""

        def fill(x: jax.Array, value: float | None) -> jax.Array:
            if not _is_float(x):
                return jnp.array(x)  # `update` may donate it.
            # The momentum cannot be read from an update that is rounded to 16 bits.
            dtype = jnp.promote_types(x.dtype, jnp.float32)
            return jnp.array(x, dtype) if value is None else jnp.full_like(x, value, dtype)

        return jax.tree.unflatten(structure, map(fill, leaves, values))

    average, shares = None, None
    moves = [True] * len(leaves)

    def moved_from(values: Iterable[float], batch: Any) -> Any:
        """What `update` returns from these numbers; entries that it leaves alone keep theirs."""
        each = zip(values, moves, strict=True)
        moved = update(filled([x if moving else None for x, moving in each]), batch)
        if (count := len(jax.tree.leaves(moved))) != len(leaves):
            raise ValueError(
                f"update returns {count} arrays, and batch_stats has {len(leaves)}; return the "
                "statistics that the network leaves"
            )
        return moved

    zeros, ones, large = ([value] * len(leaves) for value in (0.0, 1.0, _PROBE))
    for number, batch in enumerate(batches, 1):
        if average is None:
            moves = _moves(*(moved_from(values, batch) for values in (ones, large)))
            if not all(map(_is_float, leaves)):
                leaves = _complete(leaves, jax.tree.leaves(moved_from(zeros, batch)))
        moved = moved_from(zeros, batch)
        if average is None:
            sizes = [_largest(x) for x in jax.tree.leaves(moved)]
            # At least 16 times as large as the statistics of a batch.
            probes = [max(_PROBE, 16 * size) for size in sizes]
            shares = _shares_of_batch(moved, moved_from(probes, batch), probes, moves)
            others = [4 * size or 1.0 for size in sizes]
            _require_independent(moved, moved_from(others, batch), others, shares)
            average = moved
        else:
            # Batches are read as they are used, so that no more than two are on the device.
            average = _add_to_mean(jax.block_until_ready(average), moved, number)
    if average is None:
        raise ValueError("batches is empty; give at least one batch of training images")

    def finish(mean: jax.Array, share: float, old: jax.Array) -> jax.Array:
        if not _is_float(old) or share == 0:
            return old
        return (mean / jnp.asarray(share, mean.dtype)).astype(old.dtype)

    given = jax.tree.unflatten(jax.tree.structure(average), leaves)
    return jax.tree.map(finish, average, shares, given)


def _moves(from_one: Any, from_probe: Any) -> list[bool]:
    """Whether `update` changes each entry; those that are no floats count as changed."""

    def moves(one: jax.Array, probe: jax.Array) -> bool:
        return not _is_float(one) or not bool(jnp.all(one == 1) and jnp.all(probe == _PROBE))

    return list(map(moves, *map(jax.tree.leaves, (from_one, from_probe))))


def _require_independent(
    from_zero: Any, from_others: Any, others: list[float], shares: Any
) -> None:
    """Refuses statistics of a batch that depend on the old ones, by half of the largest or more."""

    def require(path: Any, low: jax.Array, high: jax.Array, old: float, share: float) -> None:
        if not _is_float(low) or not share or not low.size:
            return
        gap = np.asarray(high, np.float64) - (1 - share) * old - np.asarray(low, np.float64)
        # The momentum is known to float32's rounding.
        if np.abs(gap).max() > 0.5 * _largest(low) + 1e-5 * old:
            raise ValueError(
                f"what update measures for {jax.tree_util.keystr(path)} of batch_stats depends on "
                "the old statistics: update has to normalise each batch with its own ones (of "
                'Equinox: BatchNorm with mode="batch")'
            )

    old = jax.tree.unflatten(jax.tree.structure(from_zero), others)
    jax.tree_util.tree_map_with_path(require, from_zero, from_others, old, shares)


def _complete(before: list[jax.Array], after: list[jax.Array]) -> list[jax.Array]:
    """The entries before an update; those that are no floats as after many updates.

    Haiku and Equinox count updates, and divide an average of few of them by its share.
    """

    def complete(old: jax.Array, new: jax.Array) -> jax.Array:
        if _is_float(old):
            return old
        counts = jnp.issubdtype(old.dtype, jnp.integer) and bool(jnp.all(new == old + 1))
        return jnp.full_like(old, _MANY) if counts else jnp.asarray(new)

    return [complete(old, new) for old, new in zip(before, after, strict=True)]


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


@jax.jit
def _add_to_mean(mean: Any, new: Any, number: Any) -> Any:
    def add(m: jax.Array, x: jax.Array) -> jax.Array:
        return m + (x - m) / jnp.asarray(number, m.dtype) if _is_float(m) else m

    return jax.tree.map(add, mean, new)


def _largest(x: jax.Array) -> float:
    return float(jnp.max(jnp.abs(x))) if _is_float(x) and x.size else 0.0


def _shares_of_batch(
    from_zero: Any, from_probe: Any, probes: list[float], moves: list[bool]
) -> Any:
    """`1 - m` of each entry, from two updates by the same batch; 0 for one that stays as it is."""

    def share(path: Any, low: jax.Array, high: jax.Array, probe: float, moving: bool) -> float:
        if not _is_float(low) or not moving:
            return float(moving)
        kept = (np.asarray(high, np.float64) - np.asarray(low, np.float64)) / probe
        name = jax.tree_util.keystr(path)
        if jnp.issubdtype(low.dtype, jnp.floating) and jnp.finfo(low.dtype).bits < 32:
            raise ValueError(
                f"update gives {name} of batch_stats in {low.dtype}, from float32; 16 bits are too "
                "few to re-estimate it: keep the dtype of the statistics in update"
            )
        if not kept.size or np.abs(kept - kept.mean()).max() > 1e-3 or kept.mean() < 1e-3:
            raise ValueError(
                f"batch_stats holds {name}, which is no running average of batch statistics; give "
                "the entries of batch normalisation alone"
            )
        return float(1 - kept.mean())

    each = (jax.tree.unflatten(jax.tree.structure(from_zero), x) for x in (probes, moves))
    found = jax.tree_util.tree_map_with_path(share, from_zero, from_probe, *each)
    floats = [
        s for s, x in zip(*map(jax.tree.leaves, (found, from_zero)), strict=True) if _is_float(x)
    ]
    if floats and not any(floats):
        raise ValueError(
            "update leaves all entries of batch_stats as they are; run the network in training mode"
        )
    return found
