import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.oracles import merging_numpy
from inmerge_jax import Kernel, MergeRule, MergeStats, merge_kernels
from inmerge_jax.merging import draw_pairs

ROUNDING = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
MARGIN = 1e-5  # similarities this close to the threshold may fall on either side of it


def kernel(name, shape, out_axis=-1):
    return Kernel((jax.tree_util.DictKey(name),), tuple(shape), out_axis % len(shape))


def similar_weight(seed, shape, out_axis=-1, spread=1.0):
    """A weight whose kernels share a common part, so that similarities take all values."""
    rng = np.random.default_rng(seed)
    count = shape[out_axis]
    rest = [n for d, n in enumerate(shape) if d != out_axis % len(shape)]
    common = rng.standard_normal(rest)
    signs = rng.choice([-1.0, 1.0], count)
    kernels = [s * common + spread * rng.standard_normal(rest) for s in signs]
    return np.moveaxis(np.stack(kernels), 0, out_axis).astype(np.float32)


@partial(jax.jit, static_argnums=2)
def _merge(weight, key, layer, rule):
    return merge_kernels({"w": weight}, key, [layer], rule)


def merge(weight, key=0, rule=MergeRule(), out_axis=-1):
    """Merges a tree of one layer; returns the weight as NumPy and the counts as numbers."""
    layer = kernel("w", weight.shape, out_axis)
    params, stats = _merge(jnp.asarray(weight), jax.random.key(key), layer, rule)
    return np.asarray(params["w"]), MergeStats(*(np.asarray(n).item() for n in stats))


layouts = st.sampled_from(
    [((3, 3, 4, 6), 3), ((5, 4, 3, 3), 0), ((3, 4, 7), 2), ((2, 2, 2, 3, 4), 4), ((1, 1, 4, 2), 3)]
)
probabilities = st.floats(0, 1, width=32)
cosines = st.floats(-1, 1, width=32)


@st.composite
def merges(draw):
    shape, axis = draw(layouts)
    weight = similar_weight(draw(st.integers(0, 99)), shape, axis, draw(st.sampled_from([0.3, 2])))
    dtype = draw(st.sampled_from(sorted(ROUNDING)))
    rule = MergeRule(
        draw(probabilities),
        draw(cosines),
        draw(probabilities),
        draw(st.sampled_from(["random", "nearest"])),
    )
    return jnp.asarray(weight).astype(dtype), axis, rule, draw(st.integers(0, 10**6))


@settings(deadline=None)
@given(merges())
def test_every_changed_kernel_is_a_mix_with_a_similar_one(case):
    """For any draw: K_i is bit-equal, or alpha K_i + (1-alpha) K_j for a j != i above tau."""
    weight, axis, rule, seed = case
    out, stats = merge(weight, seed, rule, axis)
    old = np.moveaxis(np.asarray(weight), axis, 0)
    new = np.moveaxis(out, axis, 0)
    assert new.dtype == old.dtype
    cosine = merging_numpy.similarities(np.asarray(weight), axis)
    alpha, changed = np.float64(np.float32(rule.alpha)), 0
    for i in range(len(old)):
        if old[i].tobytes() == new[i].tobytes():
            continue
        changed += 1
        candidates = [
            j for j in range(len(old)) if j != i and cosine[i, j] > rule.threshold - MARGIN
        ]
        if rule.partner == "nearest":
            best = max(cosine[i, j] for j in range(len(old)) if j != i)
            candidates = [j for j in candidates if cosine[i, j] > best - MARGIN]
        mixes = [
            alpha * old[i].astype(float) + (1 - alpha) * old[j].astype(float) for j in candidates
        ]
        tolerance = ROUNDING[str(old.dtype)] * np.abs(old.astype(float)).max()
        assert any(np.abs(new[i].astype(float) - m).max() <= tolerance for m in mixes)
    assert changed <= stats.merged <= stats.selected <= stats.kernels == len(old)


@settings(deadline=None)
@given(merges())
def test_agrees_with_the_oracle_on_the_same_draws(case):
    weight, axis, rule, seed = case
    layer = kernel("w", weight.shape, axis)
    selected, partner = draw_pairs(jax.random.key(seed), layer, rule)
    partner = None if partner is None else np.asarray(partner)
    cosine = merging_numpy.similarities(np.asarray(weight), axis)
    if np.any(np.abs(cosine - rule.threshold) < MARGIN):
        return  # rounding decides
    out, stats = merge(weight, seed, rule, axis)
    expected, mixed = merging_numpy.merge_layer(
        np.asarray(weight), axis, np.asarray(selected), partner, rule.threshold,
        float(np.float32(rule.alpha)),
    )  # fmt: skip
    assert stats.merged == mixed.sum()
    assert stats.selected == np.asarray(selected).sum()
    scale = np.abs(np.asarray(weight, np.float32)).max()
    np.testing.assert_allclose(
        out.astype(np.float32),
        expected.astype(np.float32),
        rtol=0,
        atol=ROUNDING[str(weight.dtype)] * scale,
    )


@pytest.mark.parametrize("partner", ["random", "nearest"])
@pytest.mark.parametrize(
    "rule",
    [dict(probability=0.0), dict(threshold=1.0), dict(alpha=1.0)],
    ids=lambda r: next(iter(r)),
)
def test_identities(rule, partner):
    weight = similar_weight(0, (3, 3, 8, 16), spread=0.1)
    weight[..., 1] = weight[..., 0]  # identical kernels: similarity 1 does not exceed 1
    everything = dict(probability=1.0, threshold=-1.0, alpha=0.5) | rule
    out, stats = merge(weight, rule=MergeRule(**everything, partner=partner))
    np.testing.assert_array_equal(out, weight)
    assert (stats.merged == 0) == ("alpha" not in rule)


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.9])
def test_rates_match_the_probability(probability):
    """Selected over 200 merges of 64 kernels lies within five standard deviations."""
    weight = jnp.asarray(similar_weight(1, (3, 3, 2, 64)))
    rule = MergeRule(probability=probability, threshold=-1.0)
    layer = kernel("w", weight.shape)
    keys = jax.random.split(jax.random.key(0), 200)
    stats = jax.vmap(lambda key: merge_kernels({"w": weight}, key, [layer], rule)[1])(keys)
    n = 200 * 64
    deviation = (n * probability * (1 - probability)) ** 0.5
    assert abs(int(stats.selected.sum()) - n * probability) < 5 * deviation
    assert int(stats.merged.sum()) == int(stats.selected.sum())  # every cosine exceeds -1


def test_random_partners_are_uniform_among_the_others():
    rule = MergeRule(probability=1.0)
    keys = jax.random.split(jax.random.key(0), 6000)
    _, partners = jax.vmap(lambda key: draw_pairs(key, kernel("w", (4, 5)), rule))(keys)
    for i in range(5):
        counts = np.bincount(np.asarray(partners)[:, i], minlength=5)
        assert counts[i] == 0
        expected = 6000 / 4
        assert np.abs(np.delete(counts, i) - expected).max() < 5 * (expected * 0.75) ** 0.5


def test_reads_are_from_the_old_weights():
    """A chain of identical directions: an update in place would mix already mixed kernels."""
    weight = np.array([[1.0, 10.0, 100.0]], np.float32)
    out, _ = merge(weight, rule=MergeRule(1.0, 0.9, 0.5, "random"))
    possible = {(a + b) / 2 for a in weight[0] for b in weight[0] if a != b}
    assert set(out[0].tolist()) <= possible


def test_nearest_takes_the_most_similar_other():
    angles = np.deg2rad([0.0, 10.0, 60.0, 63.0])
    weight = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    out, stats = merge(weight, rule=MergeRule(1.0, 0.99, 0.75, "nearest"))
    expected = weight.copy()
    expected[:, 2] = 0.75 * weight[:, 2] + 0.25 * weight[:, 3]
    expected[:, 3] = 0.75 * weight[:, 3] + 0.25 * weight[:, 2]
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert stats.merged == 2  # cos 10 degrees is 0.985
    assert stats.similarity == pytest.approx(np.cos(np.deg2rad(3.0)), abs=1e-6)


@pytest.mark.parametrize("partner", ["random", "nearest"])
def test_zero_kernels_have_similarity_zero(partner):
    weight = similar_weight(2, (3, 3, 4, 8))
    weight[..., 3] = 0
    above, _ = merge(weight, rule=MergeRule(1.0, 0.0, 0.5, partner))
    assert not above[..., 3].any()
    everything, stats = merge(np.zeros_like(weight), rule=MergeRule(1.0, -0.5, 0.5, partner))
    assert not everything.any()
    assert (stats.merged, stats.similarity) == (8, 0.0)  # 0 exceeds -0.5


@pytest.mark.parametrize("partner", ["random", "nearest"])
def test_one_kernel_layers_are_left_alone(partner):
    weight = similar_weight(3, (3, 3, 4, 1))
    out, stats = merge(weight, rule=MergeRule(1.0, -1.0, 0.0, partner))
    np.testing.assert_array_equal(out, weight)
    assert stats == (1, 0, 0, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("partner", ["random", "nearest"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_finite_stays_where_it_is(bad, partner, dtype):
    weight = jnp.asarray(similar_weight(4, (3, 3, 2, 6), spread=0.1)).astype(dtype)
    weight = weight.at[0, 1, 1, 2].set(bad).at[2, 2, 0, 4].set(bad)
    for seed in range(20):
        out, stats = merge(weight, seed, MergeRule(1.0, -1.0, 0.5, partner))
        for i in (2, 4):
            assert out[..., i].tobytes() == np.asarray(weight)[..., i].tobytes()
        others = np.delete(out, [2, 4], axis=-1).astype(np.float32)
        assert np.isfinite(others).all()
        assert np.isfinite(stats.similarity)


def test_other_leaves_are_the_same_objects():
    params = {"w": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4), "scale": jnp.ones(4)}
    out, _ = merge_kernels(params, jax.random.key(0), [kernel("w", (3, 3, 2, 4))], MergeRule())
    assert out["bias"] is params["bias"] and out["scale"] is params["scale"]


@pytest.mark.parametrize("partner", ["random", "nearest"])
def test_numpy_parameters_outside_jit(partner):
    weight = similar_weight(8, (3, 3, 2, 4))
    layer, rule = kernel("w", weight.shape), MergeRule(1.0, -1.0, 0.5, partner)
    params, _ = merge_kernels({"w": weight}, jax.random.key(0), [layer], rule)
    np.testing.assert_allclose(params["w"], merge(weight, 0, rule)[0], rtol=1e-6)


def test_draws_depend_on_the_layers_path_alone():
    """Adding a layer, or giving the layers in another order, changes no other layer's merge."""
    weights = {name: jnp.asarray(similar_weight(i, (3, 3, 4, 8))) for i, name in enumerate("abc")}
    a, b, c = (kernel(name, (3, 3, 4, 8)) for name in "abc")
    rule = MergeRule(0.5, -1.0, 0.5)
    key = jax.random.key(7)
    all_of_them, _ = merge_kernels(weights, key, [a, b, c], rule)
    fewer, _ = merge_kernels(weights, key, [c, b], rule)
    np.testing.assert_array_equal(all_of_them["b"], fewer["b"])
    np.testing.assert_array_equal(all_of_them["c"], fewer["c"])
    same = {name: weights["a"] for name in "ab"}
    merged, _ = merge_kernels(same, key, [a, b], rule)
    assert (merged["a"] != merged["b"]).any()  # alike weights at two paths draw differently


def test_draws_are_the_same_in_every_process():
    """Fixed values: a hash that changed between processes or versions would break resuming."""
    layer = kernel("w", (4, 6))
    selected, partner = draw_pairs(jax.random.key(0), layer, MergeRule(0.5))
    assert np.asarray(selected).tolist() == SELECTED
    assert np.asarray(partner).tolist() == PARTNER


SELECTED = [True, False, False, False, False, True]
PARTNER = [3, 3, 0, 5, 2, 0]


def test_a_grid_of_24_rules_is_one_compilation():
    weight = jnp.asarray(similar_weight(5, (3, 3, 8, 32)))
    layer = kernel("w", weight.shape)
    p, tau, alpha = jnp.meshgrid(
        jnp.array([0.1, 0.3, 1.0]), jnp.array([-0.5, 0.0, 0.3, 0.9]), jnp.array([0.5, 0.8])
    )
    grid = MergeRule(p.ravel(), tau.ravel(), alpha.ravel())
    traces = []

    @jax.jit
    @jax.vmap
    def run(rule):
        traces.append(rule)
        return merge_kernels({"w": weight}, jax.random.key(0), [layer], rule)

    for rules in (grid, jax.tree.map(lambda x: x * 0.5, grid)):
        params, _ = run(rules)
        assert params["w"].shape == (24, 3, 3, 8, 32)
        for i in (0, 11, 23):
            alone = MergeRule(*(float(n[i]) for n in jax.tree.leaves(rules)))
            np.testing.assert_allclose(params["w"][i], merge(weight, 0, alone)[0], atol=1e-6)
    assert len(traces) == 1


def test_a_traced_rule_compiles_once_for_all_values():
    weight = jnp.asarray(similar_weight(6, (3, 3, 4, 8)))
    layer = kernel("w", weight.shape)
    traces = []

    @jax.jit
    def run(key, rule):
        traces.append(rule)
        return merge_kernels({"w": weight}, key, [layer], rule)

    merged = [
        int(run(jax.random.key(0), MergeRule(1.0, threshold))[1].merged[0])
        for threshold in (-1.0, 0.0, 1.0)
    ]
    assert merged[0] == 8 > merged[1] > merged[2] == 0
    assert len(traces) == 1


def test_replicas_with_the_same_key_merge_alike_without_communication():
    weight = jnp.asarray(similar_weight(7, (3, 3, 4, 16)))
    layer = kernel("w", weight.shape)
    n = jax.local_device_count()
    assert n == 8

    def step(params, key):
        return merge_kernels(params, key, [layer], MergeRule(0.5, -1.0))

    params = {"w": jnp.broadcast_to(weight, (n, *weight.shape))}
    keys = jnp.broadcast_to(jax.random.key(3), (n,))
    out, _ = jax.pmap(step)(params, keys)
    for replica in np.asarray(out["w"]):
        assert replica.tobytes() == np.asarray(out["w"])[0].tobytes()
    text = jax.jit(step).lower({"w": weight}, jax.random.key(3)).as_text()
    assert not re.search("all_reduce|all_gather|collective|all_to_all", text)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (dict(probability=1.5), "probability is 1.5; it must lie between 0 and 1"),
        (dict(probability=-0.1), "probability is -0.1"),
        (dict(alpha=2), "alpha is 2; it must lie between 0 and 1"),
        (dict(threshold=-1.01), "threshold is -1.01; it must lie between -1 and 1"),
        (dict(threshold=float("nan")), "threshold is nan"),
        (dict(alpha=np.float32(1.1)), "alpha is 1.1"),
        (dict(probability=jnp.array([0.5, 7.0])), r"probability has shape \(2,\)"),
        (dict(partner="closest"), "partner is 'closest'; choose one of random, nearest"),
    ],
)
def test_rules_out_of_range(numbers, message):
    weight = jnp.ones((3, 3, 2, 4))
    with pytest.raises(ValueError, match=message):
        merge_kernels(
            {"w": weight}, jax.random.key(0), [kernel("w", weight.shape)], MergeRule(**numbers)
        )


@pytest.mark.long
def test_a_rule_may_be_learned():
    """Its gradient, and differences of rules, are rules whose numbers may be any."""
    weight = {"w": jax.random.normal(jax.random.key(0), (3, 3, 8, 8))}
    kernels = [kernel("w", (3, 3, 8, 8))]

    def size(rule):
        merged, _ = merge_kernels(weight, jax.random.key(1), kernels, rule)
        return jnp.sum(merged["w"] ** 2) * 100

    rule = MergeRule(jnp.float32(1.0), jnp.float32(-1.0), jnp.float32(0.5))
    gradient = jax.jit(jax.grad(size))(rule)
    step = 1e-2
    above, below = (
        size(dataclasses.replace(rule, alpha=jnp.float32(0.5 + d))) for d in (step, -step)
    )
    assert gradient.alpha > 1
    np.testing.assert_allclose(gradient.alpha, (above - below) / (2 * step), rtol=1e-2)
    assert gradient.probability == gradient.threshold == 0
    moved = jax.tree.map(lambda value: value - 5, rule)
    assert isinstance(moved, MergeRule) and moved.partner == "random" and moved.alpha == -4.5
    with pytest.raises(ValueError, match="probability is -4"):
        size(moved)


@pytest.mark.parametrize("dtype", ["int8", "complex64", "bool"])
def test_weights_that_are_not_floating_are_refused(dtype):
    weight = {"w": np.ones((3, 3, 2, 4), dtype)}
    with pytest.raises(ValueError, match=f"'w' has dtype {dtype}; only floating-point"):
        merge_kernels(weight, jax.random.key(0), [kernel("w", (3, 3, 2, 4))], MergeRule())


def test_a_number_as_text_is_refused():
    weight = jnp.ones((3, 3, 2, 4))
    layer = kernel("w", weight.shape)
    with pytest.raises(ValueError, match="threshold is '0.3'; give a number between -1 and 1"):
        merge_kernels({"w": weight}, jax.random.key(0), [layer], MergeRule(threshold="0.3"))


def test_kernels_that_do_not_fit_the_tree():
    params = {"w": jnp.ones((3, 3, 2, 4))}
    key, rule = jax.random.key(0), MergeRule()
    with pytest.raises(ValueError, match="kernels is empty"):
        merge_kernels(params, key, [], rule)
    with pytest.raises(
        ValueError, match="kernel 'v' is not in params, whose 1 leaves begin with w"
    ):
        merge_kernels(params, key, [kernel("v", (3, 3, 2, 4))], rule)
    with pytest.raises(ValueError, match=r"found with shape \(3, 3, 2, 5\) but has \(3, 3, 2, 4\)"):
        merge_kernels(params, key, [kernel("w", (3, 3, 2, 5))], rule)


@pytest.mark.parametrize("partner", ["random", "nearest"])
def test_64_bit_mode_changes_nothing(partner):
    weight = similar_weight(0, (3, 3, 8, 16), spread=0.1)
    rule = MergeRule(probability=0.5, threshold=0.3, partner=partner)
    out, stats = merge(weight, 0, rule, 3)
    with jax.enable_x64(True):
        wide, wide_stats = merge(weight, 0, rule, 3)
        double, _ = merge(weight.astype(np.float64), 0, rule, 3)
    assert stats.merged > 0
    # Two programs may round differently.
    close = {"rtol": 1e-6, "atol": 1e-7, "strict": True}
    np.testing.assert_allclose(wide, out, **close)
    assert wide_stats.merged == stats.merged and wide_stats.selected == stats.selected
    np.testing.assert_allclose(double, out.astype(np.float64), **close)


@pytest.mark.parametrize("partner", ["random", "nearest"])
def test_float64_weights_keep_their_precision(partner):
    weight = similar_weight(0, (3, 3, 8, 16), spread=0.1).astype(np.float64)
    with jax.enable_x64(True):
        same, stats = merge(weight, 0, MergeRule(1.0, -1.0, 1.0, partner), 3)
        tiny, _ = merge(1e-60 * weight, 0, MergeRule(1.0, -1.0, 0.8, partner), 3)
    assert stats.merged > 0
    np.testing.assert_array_equal(same, weight)
    assert np.abs(tiny).min() > 0 and tiny.dtype == np.float64
