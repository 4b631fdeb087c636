"""Part 1: results on the device against the CPU backend of the same process and a NumPy oracle."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from experiments.benchmarks.accelerator.session import Session
from inmerge_jax import (
    Kernel,
    MergeRule,
    in_model_merging,
    kernel_similarity,
    merge_kernels,
    quantile,
)
from inmerge_jax.data import make_phantom
from inmerge_jax.merging import draw_pairs
from inmerge_jax.models import create_model
from inmerge_jax.models.units import find_units
from inmerge_jax.training.init import init_variables
from inmerge_jax.training.parallel import (
    DATA_AXIS,
    broadcast_to_devices,
    replicate,
    shard_batch,
    unreplicate,
)
from inmerge_jax.training.recipes import RECIPES
from inmerge_jax.training.train_step import make_optimizer, make_train_step, new_state, zero_totals

PART = "correctness"
MODEL, TINY_MODEL = "resnet18", "vgg11"
LIMITS = {"float32": 1e-6, "bfloat16": 1e-3}
"""Largest relative error of merged weights, ‖out - ref‖ / ‖ref‖, by dtype."""
NEAR = 1e-5
"""A decision may differ where two similarities, or one and the threshold, are this close."""
SIMILARITY_LIMIT = 1e-5
PRECISIONS = ("highest", "default")
"""Precision of matrix products and convolutions in the training check."""
STEP_LIMIT, COARSE = 5, 0.7
"""Largest error of a training step: a multiple of what rounding explains, but no more than this.

At random weights, errors of 3e-3 in each product change a ResNet-18's gradient by 0.4 of its norm.
"""
LOSS_LIMIT = 30
"""Largest relative error of its loss, as a multiple of a matrix product's."""
_ROUNDING = 1e-6
"""Relative error that a float32 matrix product may have."""
_TF32 = 1e-5
"""A float32 matrix product with a larger relative error used fewer than 24 bits."""


def measure(session: Session) -> None:
    """Runs all cases of this part."""
    cpu, tiny = jax.devices("cpu")[0], session.tiny
    session.attempt(PART, "precision", 2, lambda: precision(128 if tiny else 1024))
    for partner, kind in itertools.product(("random", "nearest"), ("fixed", "quantile")):
        rule = MergeRule(
            probability=0.6, threshold=0.3 if kind == "fixed" else quantile(0.5), partner=partner
        )
        session.attempt(
            PART,
            f"merge_kernels, {partner}, {kind} threshold",
            10,
            functools.partial(check_merge, rule, tiny, cpu),
        )
    session.attempt(PART, "in_model_merging", 5, lambda: check_transformation(tiny, cpu))
    session.attempt(PART, "kernel_similarity", 5, lambda: check_similarity(tiny, cpu))
    products = session.found[PART]["cases"].get("precision", {}).get("errors", {})
    for name in PRECISIONS:
        session.attempt(
            PART,
            f"{TINY_MODEL if tiny else MODEL}, 10 steps, {name} precision",
            0 if tiny else 40,
            functools.partial(check_training, name, products.get(name, 0.0), tiny, cpu),
        )


def precision(size: int) -> dict[str, Any]:
    """How exact a float32 matrix product is at JAX's default precision and at the highest.

    With TF32 the relative error is about 3e-4, with one bfloat16 pass about 3e-3.
    """
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size)).astype(np.float32) for _ in range(2))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    errors = {
        name: relative_error(jnp.matmul(a, b, precision=name), exact)
        for name in ("default", "highest")
    }
    return {
        "errors": errors,
        "reduced_precision_by_default": errors["default"] > _TF32,
        "limit": _TF32,
        "passed": errors["highest"] <= _TF32,
    }


def relative_error(found: Any, reference: Any) -> float:
    """‖found - reference‖ / ‖reference‖ in float64; infinity where `found` holds a NaN."""
    found, reference = (np.asarray(x).astype(np.float64) for x in (found, reference))
    error = np.linalg.norm((found - reference).ravel())
    scale = np.linalg.norm(reference.ravel())
    if not np.isfinite(error):
        return float("inf")
    return float(error / scale) if scale else float(error)


def example_weights(tiny: bool) -> tuple[dict[str, np.ndarray], tuple[Kernel, ...]]:
    """Weights with kernels about half of whose pairs have a cosine above 0.3.

    float32 and bfloat16, 3x3 and 1x1, with the kernels as last axis (HWIO) and as first (OIHW);
    two of these if `tiny`.
    """
    rng, count = np.random.default_rng(0), 16 if tiny else 64
    kinds = list(itertools.product(LIMITS, (3, 1), ("HWIO", "OIHW")))
    params, kernels = {}, []
    for dtype, size, layout in (kinds[0], kinds[-1]) if tiny else kinds:
        inputs = 32 if size == 3 else 128
        common = rng.standard_normal((size, size, inputs, 1))
        weight = common + 1.5 * rng.standard_normal((size, size, inputs, count))
        if layout == "OIHW":
            weight = weight.transpose(3, 2, 0, 1)
        name = f"{dtype} {size}x{size} {layout}"
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
        params[name] = np.ascontiguousarray(weight).astype(kind)
        path = (jax.tree_util.DictKey(name),)
        kernels.append(Kernel(path, weight.shape, out_axis=3 if layout == "HWIO" else 0))
    return params, tuple(kernels)


def check_merge(rule: MergeRule, tiny: bool, cpu: jax.Device) -> dict[str, Any]:
    """One merge of every kind of weight, on the device, on CPU and by the oracle."""
    params, kernels = example_weights(tiny)
    key = jax.random.key(1)

    def run(device: jax.Device) -> Any:
        # A new function for each device, since `jit` would return the other's program.
        merge = jax.jit(lambda params, key: merge_kernels(params, key, kernels, rule)[0])
        return jax.device_get(merge(*jax.device_put((params, key), device)))

    device = jax.local_devices()[0]
    on_device = run(device)
    on_cpu = on_device if device.platform == "cpu" else run(cpu)
    rows = {}
    for kernel in kernels:
        name = kernel.path[0].key
        with jax.default_device(cpu):
            selected, partner = jax.device_get(draw_pairs(jax.device_put(key, cpu), kernel, rule))
        reference = oracle_merge(params[name], kernel.out_axis, selected, partner, rule)
        old, new, other = (
            kernels_as_rows(x, kernel.out_axis)
            for x in (params[name], on_device[name], on_cpu[name])
        )
        merged = (new != old).any(1)
        differs = merged != reference.merged
        same = ~differs
        rows[name] = {
            "selected": int(selected.sum()),
            "merged": int(merged.sum()),
            "decisions_differ": int(differs.sum()),
            "unexplained": int((differs & (reference.margin > NEAR)).sum()),
            "error": relative_error(new[same], reference.weight[same]),
            "error_to_cpu": relative_error(new[same], other[same]),
            "unmerged_changed": int((new != old)[~selected].sum()),
            "limit": LIMITS[name.split()[0]],
        }
    passed = all(
        row["error"] <= row["limit"]
        and row["error_to_cpu"] <= row["limit"]
        and not row["unexplained"]
        and not row["unmerged_changed"]
        and row["merged"]
        for row in rows.values()
    )
    return {"weights": rows, **_worst(rows), "passed": passed}


def _worst(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "error": max(row["error"] for row in rows.values() if row["limit"] == LIMITS["float32"]),
        "error_bfloat16": max(
            row["error"] for row in rows.values() if row["limit"] == LIMITS["bfloat16"]
        ),
        "decisions_differ": sum(row["decisions_differ"] for row in rows.values()),
        "merged": sum(row["merged"] for row in rows.values()),
    }


@dataclasses.dataclass(frozen=True)
class OracleMerge:
    """One layer, merged by the oracle.

    Attributes:
      weight: float64 (kernels, n), the merged kernels as rows.
      merged: bool (kernels,).
      margin: float64 (kernels,), how much a similarity may change without another decision.
    """

    weight: np.ndarray
    merged: np.ndarray
    margin: np.ndarray


def oracle_merge(
    weight: np.ndarray,
    axis: int,
    selected: np.ndarray,
    partner: np.ndarray | None,
    rule: MergeRule,
) -> OracleMerge:
    """The merge in float64; the kernels come from `experiments.oracles.merging_numpy`.

    Args:
      weight: any floating dtype; `axis` indexes its kernels.
      axis: the kernels' axis.
      selected: bool (kernels,).
      partner: int (kernels,), or None for the most similar kernel.
      rule: with a number or a `quantile` as its threshold.
    """
    from experiments.oracles.merging_numpy import merge_layer, similarities

    cosines = similarities(weight, axis)
    others = np.where(np.eye(len(cosines), dtype=bool), -np.inf, cosines)
    if partner is None:
        # A second partner as close as the first may be chosen by rounding.
        best = np.sort(others, axis=1)
        similarity, choice = best[:, -1], best[:, -1] - best[:, -2]
    else:
        similarity = cosines[np.arange(len(cosines)), partner]
        choice = np.full(len(cosines), np.inf)
    threshold = rule.threshold
    if not isinstance(threshold, float):
        compared = np.sort(similarity[selected])
        stay = int(np.ceil(float(threshold.share) * len(compared) - 1e-4))
        threshold = compared[stay - 1] if stay else -np.inf
    merged_weight, merged = merge_layer(weight, axis, selected, partner, threshold, rule.alpha)
    margin = np.minimum(np.abs(similarity - threshold), choice)
    return OracleMerge(kernels_as_rows(merged_weight, axis), merged, margin)


def kernels_as_rows(weight: np.ndarray, axis: int) -> np.ndarray:
    """The weight as float64 (kernels, n)."""
    return np.moveaxis(np.asarray(weight), axis, 0).reshape(weight.shape[axis], -1).astype(float)


def check_transformation(tiny: bool, cpu: jax.Device) -> dict[str, Any]:
    """Three updates of SGD with `in_model_merging` after it, on the device and on CPU."""
    params, kernels = example_weights(tiny)
    params = {name: weight.astype(np.float32) for name, weight in params.items()}
    rule = MergeRule(probability=0.5, threshold=0.3)

    def run(device: jax.Device) -> Any:
        now = jax.device_put(params, device)
        with jax.default_device(device):
            merging = in_model_merging(kernels, rule, jax.random.key(2))
            optimizer = optax.chain(optax.sgd(0.01, momentum=0.9), merging)
            state = jax.jit(optimizer.init)(now)

            @jax.jit
            def update(now: Any, state: Any) -> Any:
                grads = jax.tree.map(jnp.sin, now)
                updates, state = optimizer.update(grads, state, now)
                return optax.apply_updates(now, updates), state

            for _ in range(3):
                now, state = update(now, state)
        return jax.device_get((now, state[-1].stats.merged))

    (found, merged), (reference, expected) = run(jax.local_devices()[0]), run(cpu)
    error = max(relative_error(found[name], reference[name]) for name in params)
    limit = 3 * LIMITS["float32"]
    differs = int(np.abs(merged - expected).sum())
    passed = error <= limit and not differs and merged.sum() > 0
    return {
        "error": error,
        "limit": limit,
        "merged": int(merged.sum()),
        "decisions_differ": differs,
        "passed": bool(passed),
    }


def check_similarity(tiny: bool, cpu: jax.Device) -> dict[str, Any]:
    """`kernel_similarity` on the device, on CPU and by the oracle; largest absolute difference."""
    from experiments.oracles.merging_numpy import similarities

    params, kernels = example_weights(tiny)
    found, other = (
        kernel_similarity(jax.device_put(params, device), kernels)
        for device in (jax.local_devices()[0], cpu)
    )
    error = 0.0
    for kernel, one, two in zip(kernels, found, other, strict=True):
        cosines = similarities(params[kernel.path[0].key], kernel.out_axis)
        pairs = cosines[np.triu_indices(len(cosines), 1)]
        nearest = np.where(np.eye(len(cosines), dtype=bool), -np.inf, cosines).max(1).mean()
        expected = (pairs.mean(), pairs.min(), pairs.max(), nearest)
        for layer in (one, two):
            numbers = (layer.mean, layer.minimum, layer.maximum, layer.nearest)
            error = max(error, *np.abs(np.subtract(numbers, expected)).tolist())
    return {"error": error, "limit": SIMILARITY_LIMIT, "passed": error <= SIMILARITY_LIMIT}


def check_training(name: str, product: float, tiny: bool, cpu: jax.Device) -> dict[str, Any]:
    """Ten training steps with merging under `jax.pmap` over all local devices, and on one CPU.

    Rounding can move an activation across a ReLU's zero, which changes single gradients by far more
    than the rounding. How much is explained is measured: on the CPU, from initial weights with
    random errors of the size of a matrix product's.

    Args:
      name: the precision of matrix products and convolutions on the device.
      product: relative error of a matrix product there, see `precision`.
      tiny: a narrow network of eight convolutions.
      cpu: the device of the reference, which computes in float32.
    """
    rounding = max(product, _ROUNDING)
    on_device = ten_steps(tuple(jax.local_devices()), name, tiny)
    on_cpu = ten_steps((cpu,), "highest", tiny)
    explained = _step_errors(ten_steps((cpu,), "highest", tiny, rounding), on_cpu)
    errors = _step_errors(on_device, on_cpu)
    rows = {
        kind: {"error": error, "limit": min(COARSE, STEP_LIMIT * explained[kind])}
        for kind, error in errors.items()
    }
    # A single number, which may be exact by chance.
    rows["loss"]["limit"] = LOSS_LIMIT * rounding
    worst = max(rows.values(), key=lambda row: row["error"] - row["limit"])
    merged, expected = np.array(on_device["merged"]), np.array(on_cpu["merged"])
    differ = int(np.abs(merged - expected).sum())
    passed = all(row["error"] <= row["limit"] for row in rows.values())
    return {
        "devices": jax.local_device_count(),
        **worst,
        "quantities": rows,
        "error_after_ten": relative_error(on_device["losses"][-1], on_cpu["losses"][-1]),
        "merged": int(merged.sum()),
        "decisions_differ": differ,
        "passed": bool(passed and not differ and merged[0].sum()),
    }


def _step_errors(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Relative errors of the first step: of its loss and, by kind, of parameters."""
    kinds = {
        kind: relative_error(found["first"][kind], values)
        for kind, values in reference["first"].items()
    }
    return kinds | {"loss": relative_error(found["losses"][0], reference["losses"][0])}


def ten_steps(
    devices: tuple[jax.Device, ...], precision: str, tiny: bool, noise: float = 0.0
) -> dict[str, Any]:
    """Losses and merges of ten steps, and the parameters of the first.

    Args:
      devices: that share each batch.
      precision: of matrix products and convolutions.
      tiny: see `check_training`.
      noise: standard deviation of relative errors of the initial weights.

    Returns:
      "losses" (10,); "merged" (10, layers); and "first", by kind of parameter (kernel, bias, scale)
      the change in the first step, of layers that do not merge, and as "merged" the weights after
      it, of those that do.
    """
    size, classes = (8, 3) if tiny else (28, 6)
    # Several devices share each batch; every count of them up to 16 divides this number.
    batch_size = 16 if tiny else 32
    batch_size = -(-batch_size // len(devices)) * len(devices)
    recipe = dataclasses.replace(RECIPES["released"], learning_rate=0.01, flip=False)
    name, width = (TINY_MODEL, 0.125) if tiny else (MODEL, 1.0)
    model = create_model(name, classes, width=width, axis_name=DATA_AXIS)
    shape = (size, size, 3)
    kernels = find_units(model, shape, ("kernels",))
    kernels = kernels[min(10, len(kernels) // 2) :]
    optimizer = make_optimizer(recipe)
    with jax.default_device(devices[0]), jax.default_matmul_precision(precision):
        params, batch_stats = _first_weights(model, shape)
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda w: (w * (1 + noise * rng.standard_normal(w.shape))).astype(w.dtype),
            jax.device_get(params),
        )
        state = new_state(params, batch_stats, optimizer, recipe.learning_rate)
        state = replicate(state, devices)
        step = make_train_step(
            model,
            optimizer,
            recipe,
            multi_label=False,
            devices=devices,
            kernels=kernels,
            # All selected kernels merge, so that no decision depends on rounding.
            rule=MergeRule(threshold=-1.0),
        )
        totals = replicate(zero_totals(len(kernels)), devices)
        root = broadcast_to_devices(jax.random.key(3), devices)
        images = make_phantom(size=max(size, 16), train=batch_size, val=1, test=1).train
        batch = {
            "image": images.images[:, :size, :size],
            "label": images.labels % classes,
            "index": np.arange(batch_size, dtype=np.int32),
        }
        batch = shard_batch(batch, devices)
        losses, merged = [], []
        for number in range(10):
            state, totals = step(state, totals, batch, root)
            sums = unreplicate(totals)
            losses.append(float(sums.loss))
            merged.append(sums.merged)
            if number == 0:
                first = _by_kind(params, unreplicate(state.params), kernels)
    return {
        "losses": np.diff([0.0, *losses]),
        "merged": np.diff([np.zeros_like(merged[0]), *merged], axis=0),
        "first": first,
    }


def _by_kind(before: Any, after: Any, kernels: Sequence[Kernel]) -> dict[str, np.ndarray]:
    """See `ten_steps`."""
    merging = {kernel.path for kernel in kernels}
    found = collections.defaultdict(list)
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        new = np.asarray(new, np.float64).ravel()
        if path in merging:
            found["merged"].append(new)
        else:
            found[path[-1].key].append(new - np.asarray(old, np.float64).ravel())
    return {kind: np.concatenate(values) for kind, values in found.items()}


@functools.lru_cache(maxsize=2)
def _first_weights(model: Any, shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """Drawn once: backends need not draw the same bits of a normal distribution."""
    return init_variables(model, shape, seed=0)
