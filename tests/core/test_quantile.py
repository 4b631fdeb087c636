"""The threshold that each layer sets by its own kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.oracles import merging_numpy
from inmerge_jax import Kernel, MergeRule, merge_kernels, quantile
from inmerge_jax.merging import draw_pairs
from inmerge_jax.merging.rule import effective_threshold
from tests.core.test_merging import kernel, merge, similar_weight

PARTNERS = ("random", "nearest")


@settings(deadline=None)
@given(
    seed=st.integers(0, 99),
    share=st.floats(0, 1, width=32),
    probability=st.floats(0, 1, width=32),
    partner=st.sampled_from(PARTNERS),
    layout=st.sampled_from([((3, 3, 4, 24), 3), ((20, 4, 3, 3), 0), ((1, 1, 6, 2), 3)]),
)
def test_the_most_similar_selected_kernels_merge(seed, share, probability, partner, layout):
    """Against the oracle's similarities: the floor((1 - share) m) highest of m, and no others."""
    shape, axis = layout
    weight = similar_weight(seed, shape, axis)
    rule = MergeRule(probability, quantile(share), 0.8, partner)
    merged, stats = merge(weight, seed, rule, axis)
    changed = np.any(merged != weight, axis=tuple(d for d in range(len(shape)) if d != axis))

    selected, partners = draw_pairs(jax.random.key(seed), kernel("w", shape, axis), rule)
    selected = np.asarray(selected)
    similarity = merging_numpy.similarities(weight, axis)
    np.fill_diagonal(similarity, -2)
    mine = similarity.max(1) if partners is None else similarity[np.arange(len(selected)), partners]
    # What is within 1e-4 above a whole number counts as that number.
    stay = np.ceil(np.float32(share) * np.float32(selected.sum()) - np.float32(1e-4))
    expected = int(selected.sum() - stay)
    assert expected - 1 <= stats.merged <= expected
    assert changed.sum() == stats.merged and not changed[~selected].any()
    left = selected & ~changed
    if changed.any() and left.any():
        assert mine[changed].min() >= mine[left].max() - 1e-5


@pytest.mark.parametrize("partner", PARTNERS)
def test_the_rate_does_not_depend_on_how_alike_kernels_are(partner):
    for spread in (0.1, 1.0, 30.0):
        weight = similar_weight(0, (3, 3, 8, 200), spread=spread)
        rule = MergeRule(1.0, quantile(0.9), 0.8, partner)
        _, stats = merge(weight, 0, rule)
        # Two kernels that are each other's nearest have one similarity between them.
        assert 18 <= stats.merged <= 20


@pytest.mark.parametrize(("share", "count", "merged"), [(0.6, 25, 10), (0.3, 50, 35), (0.9, 9, 0)])
def test_a_share_that_divides_the_kernels_does_so(share, count, merged):
    weight = similar_weight(0, (3, 3, 4, count))
    assert merge(weight, 0, MergeRule(1.0, quantile(share), 0.8, "random"))[1].merged == merged


@pytest.mark.parametrize("partner", PARTNERS)
def test_the_ends_of_the_range(partner):
    weight = similar_weight(0, (3, 3, 4, 12))
    _, all_merge = merge(weight, 0, MergeRule(1.0, quantile(0.0), 0.8, partner))
    _, none_merges = merge(weight, 0, MergeRule(1.0, quantile(1.0), 0.8, partner))
    _, none_selected = merge(weight, 0, MergeRule(0.0, quantile(0.0), 0.8, partner))
    assert (all_merge.merged, none_merges.merged, none_selected.merged) == (12, 0, 0)


@pytest.mark.parametrize("partner", PARTNERS)
def test_kernels_that_are_not_finite_do_not_count(partner):
    weight = similar_weight(0, (3, 3, 4, 12))
    weight[0, 0, 0, 3] = np.nan
    merged, stats = merge(weight, 0, MergeRule(1.0, quantile(0.0), 0.8, partner))
    assert np.isnan(merged).sum() == 1
    assert 10 <= stats.merged <= 11


def test_a_traced_share_is_one_compilation_and_vmaps():
    traces = []
    weight = jnp.asarray(similar_weight(0, (3, 3, 4, 40)))
    layer = kernel("w", weight.shape)

    @jax.jit
    @jax.vmap
    def grid(share):
        traces.append(1)
        rule = MergeRule(1.0, quantile(share), 0.8, "random")
        return merge_kernels({"w": weight}, jax.random.key(0), [layer], rule)[1].merged

    assert grid(jnp.array([0.0, 0.5, 0.75, 1.0]))[:, 0].tolist() == [40, 20, 10, 0]
    assert grid(jnp.array([0.25, 0.5, 0.75, 1.0]))[:, 0].tolist() == [30, 20, 10, 0]
    assert len(traces) == 1


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_out_of_range(share):
    with pytest.raises(ValueError, match=rf"quantile is {share}; it must lie between 0 and 1"):
        quantile(share)


@pytest.mark.parametrize("count", [25, 1000, 4096, 16000])
def test_shares_of_wide_layers_are_exact(count):
    """float32 has no exact 0.6; what stays is nevertheless the whole number that is meant."""
    ranks = jnp.arange(count, dtype=jnp.float32) / count
    for twentieths in range(21):
        limit = effective_threshold(quantile(twentieths / 20), ranks)
        assert int((ranks > limit).sum()) == (20 - twentieths) * count // 20


def test_a_grid_of_quantiles_is_a_pytree():
    shares = jnp.array([0.0, 0.5, 1.0])
    weight = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)}
    kernel = Kernel((jax.tree_util.DictKey("w"),), (5, 8), 1)

    def merged(rule):
        return merge_kernels(weight, 0, [kernel], rule)[1].merged[0]

    grid = MergeRule(jnp.ones(3), quantile(shares), jnp.full(3, 0.8))
    alone = [int(merged(MergeRule(1.0, quantile(float(share))))) for share in shares]
    assert jax.vmap(merged)(grid).tolist() == alone
    assert alone[0] == 8 > alone[1] > alone[2] == 0
    with pytest.raises(ValueError, match=r"quantile has shape \(3,\).* jax.vmap a grid of rules"):
        merged(MergeRule(1.0, quantile(shares)))
