"""In-model merging as an optax transformation, for any training loop."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from inmerge_jax.merging.backends import Implementation, check_implementation
from inmerge_jax.merging.merge import MergeStats, as_key, merge_kernels
from inmerge_jax.merging.rule import MergeRule, Quantile, check_rule
from inmerge_jax.merging.units import Kernel, PyTree, as_kernels, group_weights, weights_of

Kernels = Sequence[Kernel] | Callable[[PyTree], Sequence[Kernel]]
Rule = MergeRule | Callable[[jax.Array], MergeRule]


class InModelMergingState(NamedTuple):
    """State of the transformation: plain arrays, which every checkpointing library can store.

    Attributes:
      count: Number of updates, int32 ().
      key: Data of the key that each merge's key is folded from, uint32 (n,), of the key's kind.
      stats: Counts of all merges: `selected` and `merged` are sums, at most 2 ** 31 - 1;
        `similarity` is the mean over all pairs that were mixed.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's states name it so; tuple has a count
    key: jax.Array
    stats: MergeStats


def with_merging(
    tx: optax.GradientTransformation,
    kernels: Kernels,
    rule: Rule,
    key: jax.Array | int,
    *,
    implementation: Implementation = "auto",
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that each update is followed by a merge.

    The same as `optax.chain(tx, in_model_merging(...))`. The other order is wrong: the optimizer
    would take the merge for a gradient.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from inmerge_jax import MergeRule, find_kernels, merge_report, with_merging
      >>> forward = lambda params, x: jax.lax.conv(x, params["w"], (1, 1), "SAME")
      >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 3, 3, 3))}
      >>> kernels = find_kernels(forward, params, jnp.zeros((1, 3, 8, 8)))
      >>> tx = with_merging(optax.sgd(1e-3), kernels, MergeRule(1.0, threshold=-1.0), key=0)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(merge_report(state, kernels))
      layer  units  selected  merged  mean similarity
      w          8         8       8           -0.004

    Args:
      tx: The optimizer, with everything that changes its updates.
      kernels: See `in_model_merging`.
      rule: See `in_model_merging`.
      key: See `in_model_merging`.
      implementation: See `in_model_merging`.

    Returns:
      A gradient transformation whose state holds an `InModelMergingState` last, `state[-1]`.

    Raises:
      ValueError: `tx` is no gradient transformation; and as `in_model_merging`.
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise ValueError(f"tx is {tx!r:.80}; give a transformation, such as optax.adam(1e-3)")
    return optax.chain(tx, in_model_merging(kernels, rule, key, implementation=implementation))


def in_model_merging(
    kernels: Kernels,
    rule: Rule,
    key: jax.Array | int,
    *,
    implementation: Implementation = "auto",
) -> optax.GradientTransformationExtraArgs:
    """Merges similar units after every update; the last transformation of its chain.

    Applies the incoming updates, merges, and returns the difference,

        merge(params + updates) - params

    so that `optax.apply_updates` gives merged parameters. Apart from the first and the last merge,
    this equals merging before each forward pass.

    Updates of units that are not merged are returned bit for bit. Merged ones are exact to the
    rounding of the difference: to one bit or two in float32, and for bfloat16 parameters with
    float32 updates exactly. With parameters and updates in bfloat16, 10 to 17 % of the entries of a
    merged layer differ from an explicit merge. If that matters, call `merge_kernels` at the start
    of the step.

    The last merge comes after the last forward pass, so the running averages of batch normalisation
    lag behind. If many units merge in each step, recompute them before an evaluation, or call
    `merge_kernels` at the start of the step.

    Only the leaves of the kernels are read. Other leaves may be None, integers or masked nodes.

    Args:
      kernels: Weights to merge, from `find_kernels` or `deep_kernels`; or a function from the
        parameters to them.
      rule: The rule, with a number or a schedule in each field; or a function from the number of
        updates so far, int32 (), to the rule. What a schedule gives inside `jit` is not checked.
      key: A PRNG key, or a seed; the same on all replicas. The merge after update `n`, counted from
        0, uses `fold_in(key, n)`. The state holds the key, so a restored state keeps its own.
      implementation: See `merge_kernels`.

    Returns:
      A gradient transformation with an `InModelMergingState`, for `merge_report`. Inside
      `optax.MultiSteps` it merges once per accumulated update.

    Raises:
      ValueError: At `init`, if `params` does not hold the kernels (because `optax.masked` or
        `optax.partition` hides them), there are none, or a number of the rule is out of range. At
        the update, if `params` is not passed.

    References:
      arXiv 2502.20516, section on the merging stage.
    """
    key = as_key(key)
    key_implementation = jax.random.key_impl(key)
    if not callable(kernels):
        kernels = as_kernels(kernels)
        group_weights(kernels)
    check_implementation(implementation)
    if isinstance(rule, type):
        raise ValueError(f"rule is the class {rule.__name__}; give a rule, such as MergeRule()")
    if not callable(rule):
        check_rule(_at(rule, lambda schedule: 0.5))  # Any schedule passes here.

    def chosen(params: PyTree) -> Sequence[Kernel]:
        return kernels(params) if callable(kernels) else kernels

    def init(params: optax.Params) -> InModelMergingState:
        # optax.tree.map_params gives a placeholder without leaves. It needs the structure alone.
        real = bool(jax.tree.leaves(params))
        members = as_kernels(chosen(params)) if real or not callable(kernels) else ()
        if real:
            weights_of(members, params)
        # A copy, so that donating the state does not delete the caller's key.
        data = jnp.array(jax.random.key_data(key), copy=True)
        layers = group_weights(members) if members or real else ()
        counts = jnp.array([layer[0].count for layer in layers], jnp.int32)
        none = jnp.zeros_like(counts)
        stats = MergeStats(counts, none, jnp.zeros_like(none), jnp.zeros(len(counts), jnp.float32))
        return InModelMergingState(jnp.zeros([], jnp.int32), data, stats)

    def update(
        updates: optax.Updates,
        state: InModelMergingState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, InModelMergingState]:
        del extra_args
        if params is None:
            raise ValueError(
                "in_model_merging rewrites parameters, so it needs them: call "
                "tx.update(grads, state, params)"
            )
        members = as_kernels(chosen(params))
        count, layers = state.stats.kernels.shape[-1], len(group_weights(members))
        if count != layers:
            raise ValueError(
                f"the state is of {count} layers, and kernels has {layers}; give the kernels that "
                "the state was made with, or make a new one with init"
            )
        old, _ = weights_of(members, params)
        incoming, put = weights_of(members, updates, what="updates")
        now = rule(state.count) if callable(rule) else _at(rule, lambda s: s(state.count))
        moved = optax.apply_updates(old, incoming)
        root = jax.random.wrap_key_data(state.key, impl=key_implementation)
        merged, stats = merge_kernels(
            moved,
            jax.random.fold_in(root, state.count),
            [replace(k, path=(jax.tree_util.DictKey(k.name),)) for k in members],
            now,
            implementation=implementation,
        )

        def difference(name: str, u: jax.Array) -> jax.Array:
            wide = jnp.promote_types(u.dtype, old[name].dtype)
            change = merged[name].astype(wide) - old[name].astype(wide)
            return jnp.where(merged[name] == moved[name], u, change.astype(u.dtype))

        new = {name: difference(name, u) for name, u in incoming.items()}
        updates_so_far = optax.safe_increment(state.count)
        return put(new), InModelMergingState(updates_so_far, state.key, _add(state.stats, stats))

    return optax.GradientTransformationExtraArgs(init, update)


def _at(rule: Any, call: Callable[[Any], Any]) -> Any:
    """The rule with each schedule called."""

    def value(number: Any) -> Any:
        found = call(number) if callable(number) else number
        if isinstance(found, Quantile):
            raise ValueError(
                "threshold is a function that gives a quantile; give quantile(share), where share "
                "may be a schedule"
            )
        return found

    return jax.tree.map(value, rule)


def _add(total: MergeStats, new: MergeStats) -> MergeStats:
    def plus(old: jax.Array, more: jax.Array) -> jax.Array:
        return old + jnp.minimum(more, np.iinfo(np.int32).max - old)

    def similarities(stats: MergeStats) -> jax.Array:
        return stats.similarity * stats.merged.astype(jnp.float32)

    merged = plus(total.merged, new.merged)
    mean = (similarities(total) + similarities(new)) / jnp.maximum(merged, 1).astype(jnp.float32)
    return MergeStats(total.kernels, plus(total.selected, new.selected), merged, mean)


class LayerMerges(NamedTuple):
    """What merged in one layer so far; see `MergeStats`."""

    name: str
    units: int
    selected: int
    merged: int
    similarity: float


class MergeReport(tuple[LayerMerges, ...]):
    """A `LayerMerges` for each layer; as text, a table."""

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "units", "selected", "merged", "mean similarity")]
        rows += [(row.name, *map(str, row[1:4]), f"{row.similarity:.3f}") for row in self]
        first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
        return "\n".join(
            "  ".join([name.ljust(first), *map(str.rjust, cells, others)]) for name, *cells in rows
        )


def merge_report(opt_state: PyTree, kernels: Sequence[Kernel]) -> MergeReport:
    """The merges of `in_model_merging` so far, per layer.

    Args:
      opt_state: An optimizer state that holds one `InModelMergingState`. Of a replicated or vmapped
        state, the first entry is reported.
      kernels: The kernels of the transformation; if it has a function, `kernels(params)`.

    Returns:
      A tuple with a row per layer: name, units, selected, merged, mean similarity of the merged.
      `print` shows it as a table.

    Warns:
      UserWarning: Nothing has merged in the updates so far.

    Raises:
      ValueError: No such state, several, or one whose layers have other numbers of units.
    """

    def is_state(node: Any) -> bool:
        return isinstance(node, InModelMergingState)

    if callable(kernels):
        raise ValueError("kernels is a function; give what it returns, kernels(params)")
    states = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    if len(states) != 1:
        raise ValueError(
            f"opt_state holds {len(states)} states of in_model_merging; give one that holds one, "
            "such as opt_state[-1] of with_merging"
        )
    columns = [np.asarray(column) for column in jax.device_get(states[0].stats)]
    columns = [column.reshape(-1, column.shape[-1])[0].tolist() for column in columns]
    layers = [members[0] for members in group_weights(kernels)]
    if columns[0] != [layer.count for layer in layers]:
        raise ValueError(
            f"opt_state is of other kernels: its layers have {columns[0]} units, those of "
            f"kernels have {[layer.count for layer in layers]}"
        )
    names = [layer.label for layer in layers]
    report = MergeReport(LayerMerges(*row) for row in zip(names, *columns, strict=True))
    updates = int(np.max(jax.device_get(states[0].count), initial=0))
    if updates and not any(row.merged for row in report):
        selected = sum(row.selected for row in report)
        warnings.warn(
            f"nothing has merged in {updates} updates, so training is as without merging; "
            + _why_nothing(layers, selected),
            stacklevel=2,
        )
    return report


def _why_nothing(layers: Sequence[Kernel], selected: int) -> str:
    if all(layer.units < 2 for layer in layers):
        return (
            "no layer has two units that may merge with each other: of depthwise and other grouped "
            "convolutions, units of different groups never do. Choose other kernels"
        )
    if not selected:
        return "no unit was selected; choose a higher probability"
    return (
        f"{selected} units were selected; choose a lower threshold, quantile(...) or "
        "partner='nearest'. kernel_similarity shows how similar the units are"
    )
