"""The variants of the rule do what they say, held to `merge_kernels` and to plain NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.study import variants
from experiments.study.trials import Treatment
from experiments.study.variants import make_variant, numbers, selection
from inmerge_jax import Kernel, find_kernels, merge_kernels
from inmerge_jax.models import create_model
from tests.core.test_merging import similar_weight

RULE = Treatment("variant", probability=0.7, threshold=0.1, alpha=0.6, skip=0)


@pytest.fixture(scope="module")
def network():
    """Parameters of a ResNet-18 with similar kernels, and its convolutions."""
    model = create_model("resnet18", num_classes=2, width=0.1)
    images = jnp.zeros((1, 28, 28, 1))
    variables = model.init(jax.random.key(0), images, train=False)
    params = variables.pop("params")

    def forward(params, x):
        return model.apply({"params": params, **variables}, x, train=False)

    kernels = find_kernels(forward, params, images)
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(params)
    leaves = [
        similar_weight(n, x.shape) if x.ndim == 4 else rng.normal(size=x.shape).astype(np.float32)
        for n, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, [jnp.asarray(x) for x in leaves]), kernels


def merge(network, variant, step=0):
    params, kernels = network
    chosen = selection(variant, kernels)
    found, stats = jax.jit(make_variant(variant, chosen))(
        params, jax.random.key(1), jnp.int32(step), numbers(variant, 5, 4)
    )
    return jax.tree.map(np.asarray, found), stats, chosen


def leaf(params, name):
    for part in name.split("/"):
        params = params[part]
    return np.asarray(params)


def rows(params, kernel):
    return np.moveaxis(leaf(params, kernel.name), kernel.out_axis, 0).reshape(kernel.count, -1)


def plain(network):
    """What `merge_kernels` does with the same rule."""
    params, kernels = network
    found, _ = merge_kernels(params, jax.random.key(1), kernels, numbers(RULE, 5, 4).rule)
    return found


def moved(before, after, kernel):
    return (rows(before, kernel) != rows(after, kernel)).any(1)


def cosine_of(params, kernel):
    own = rows(params, kernel).astype(np.float64)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    cosine = own @ own.T
    np.fill_diagonal(cosine, -2)
    return cosine


def test_without_more_it_is_the_rule(network):
    found, stats, kernels = merge(network, RULE)
    assert kernels == network[1]
    assert int(stats.merged.sum()) > 20
    jax.tree.map(np.testing.assert_array_equal, found, plain(network))


def test_nothing_merges_after_the_end_of_the_schedule(network):
    half = dataclasses.replace(RULE, until=0.5)
    assert int(merge(network, half, step=9)[1].merged.sum()) > 20
    found, stats, _ = merge(network, half, step=10)
    assert int(stats.merged.sum()) == 0
    jax.tree.map(np.testing.assert_array_equal, found, network[0])
    once = dataclasses.replace(RULE, every=0)
    assert int(merge(network, once, step=5)[1].merged.sum()) > 20
    assert int(merge(network, once, step=6)[1].merged.sum()) == 0


def test_mutual_partners(network):
    params = network[0]
    found, stats, kernels = merge(network, dataclasses.replace(RULE, partner="mutual"))
    some = 0
    for index, kernel in enumerate(kernels):
        partner = cosine_of(params, kernel).argmax(1)
        mutual = partner[partner] == np.arange(kernel.count)
        expected = moved(params, plain(network), kernel) & mutual
        np.testing.assert_array_equal(moved(params, found, kernel), expected)
        same = rows(plain(network), kernel)[expected]
        np.testing.assert_array_equal(rows(found, kernel)[expected], same)
        assert int(stats.merged[index]) == expected.sum()
        if expected.any():
            mean = cosine_of(params, kernel).max(1)[expected].mean()
            np.testing.assert_allclose(stats.similarity[index], mean, rtol=1e-5)
        some += expected.sum() < moved(params, plain(network), kernel).sum()
    assert int(stats.merged.sum()) > 5 and some > 5


def redundant(params, kernels):
    """Which layers are the half with the largest similarity relative to random kernels."""
    means = []
    for kernel in kernels:
        # The most similar of so many cosines in so many dimensions.
        random = np.sqrt(2 * np.log(kernel.count) / (np.prod(kernel.shape) / kernel.count))
        means.append(cosine_of(params, kernel).max(1).mean() / random)
    return np.array(means) >= np.median(means)


def test_redundant_layers(network):
    params = network[0]
    found, stats, kernels = merge(network, dataclasses.replace(RULE, layers="redundant", skip=10))
    assert len(kernels) == 20
    most = redundant(params, kernels)
    assert most.sum() == 10
    for kernel, chosen in zip(kernels, most, strict=True):
        expected = plain(network) if chosen else params
        np.testing.assert_array_equal(rows(found, kernel), rows(expected, kernel))
    for counts in (stats.merged, stats.selected):
        assert (np.asarray(counts)[~most] == 0).all() and int(counts.sum()) > 5


def test_random_kernels_of_any_size_are_about_as_redundant():
    rng = np.random.default_rng(0)
    ratios = []
    for shape in ((3, 3, 1, 16), (1, 1, 64, 128), (3, 3, 128, 128)):
        kernel = Kernel((jax.tree_util.DictKey("w"),), shape, 3)
        weight = jnp.asarray(rng.normal(size=shape), jnp.float32)
        ratios.append(float(variants._redundancy([kernel], variants._nearest(weight, kernel))))
    assert 0.6 < min(ratios) and max(ratios) < 1.1


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_equal_kernels_count_as_merged(alpha):
    """Though mixing them changes nothing."""
    weight = np.random.default_rng(0).normal(size=(3, 3, 4, 6)).astype(np.float32)
    weight[..., 3:] = weight[..., :3]
    kernel = Kernel((jax.tree_util.DictKey("w"),), weight.shape, 3)
    rule = dataclasses.replace(RULE, probability=1.0, partner="mutual", alpha=alpha)
    treat = make_variant(rule, (kernel,))
    params, stats = treat({"w": weight}, jax.random.key(0), jnp.int32(0), numbers(rule, 5, 4))
    np.testing.assert_allclose(params["w"], weight, rtol=1e-6)
    assert stats.merged.tolist() == [6] and stats.similarity[0] == pytest.approx(1)


@pytest.mark.parametrize("along", ["norm", "consumer"])
def test_what_is_mixed_along(along, network):
    params = network[0]
    found, stats, kernels = merge(network, dataclasses.replace(RULE, along=along))
    compared = [kernel for kernel in kernels if kernel.compared]
    assert int(stats.merged.sum()) > 5
    assert len(compared) == len(stats.merged) == (20 if along == "norm" else 8)
    changed = {kernel.name for kernel in kernels}
    for kernel in compared:
        merged = moved(params, found, kernel)
        np.testing.assert_array_equal(merged, moved(params, plain(network), kernel))
        np.testing.assert_allclose(
            rows(found, kernel), rows(plain(network), kernel), rtol=1e-4, atol=1e-6
        )
        partner = cosine_of(params, kernel).argmax(1)
        norm = kernel.name.replace("conv", "bn").removesuffix("/kernel")
        also = [Kernel.named(params, f"{norm}/{name}", 0) for name in ("scale", "bias")]
        if along == "consumer":
            consumer = kernel.name.replace("conv1", "conv2")
            also.append(Kernel.named(params, consumer, 2))
        for one in also:
            changed.discard(one.name)
            old = rows(params, one)
            mixed = np.where(merged[:, None], 0.6 * old + 0.4 * old[partner], old)
            np.testing.assert_allclose(rows(found, one), mixed, rtol=1e-5, atol=1e-6)
    assert changed == {kernel.name for kernel in compared}


def test_all_at_once_leaves_what_is_not_named_bit_for_bit(network):
    params = network[0]
    variant = dataclasses.replace(RULE, partner="mutual", along="consumer", layers="redundant")
    found, stats, kernels = merge(network, variant)
    named = {kernel.name for kernel in kernels}
    assert int(stats.merged.sum()) > 0
    for path, old in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(key.key for key in path)
        if name not in named:
            np.testing.assert_array_equal(leaf(found, name), old)
    compared = [kernel for kernel in kernels if kernel.compared]
    for kernel, most in zip(compared, redundant(params, compared), strict=True):
        partner = cosine_of(params, kernel).argmax(1)
        mutual = partner[partner] == np.arange(kernel.count)
        expected = moved(params, plain(network), kernel) & mutual & most
        for one in kernels:
            if one.group == kernel.group:
                np.testing.assert_array_equal(moved(params, found, one), expected)
