import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.oracles import merging_numpy
from inmerge_jax import Kernel, kernel_similarity
from inmerge_jax.merging import similarity


def layer(name, shape, axis=-1):
    return Kernel((jax.tree_util.DictKey(name),), shape, axis % len(shape))


@pytest.mark.parametrize(("shape", "axis"), [((3, 3, 4, 12), 3), ((12, 4, 3, 3), 0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_of_all_pairs(shape, axis, dtype):
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_normal(shape) + 0.3, dtype)
    (found,) = kernel_similarity(
        {"w": weight}, [layer("w", shape, axis)], quantiles=(0.1, 0.5, 0.9), thresholds=(0.0, 0.2)
    )
    cosine = merging_numpy.similarities(np.asarray(weight), axis)
    pairs = cosine[np.triu_indices(12, 1)]
    np.fill_diagonal(cosine, -np.inf)
    assert (found.name, found.kernels) == ("w", 12)
    np.testing.assert_allclose(
        [found.mean, found.minimum, found.maximum, found.nearest],
        [pairs.mean(), pairs.min(), pairs.max(), cosine.max(1).mean()],
        atol=1e-5,
    )
    for q, value in found.quantiles.items():
        assert value == pytest.approx(np.quantile(pairs, q), abs=1e-5)
    assert found.above == pytest.approx({t: (pairs > t).mean() for t in (0.0, 0.2)})


def test_one_kernel_has_no_pairs_and_zero_kernels_none_alike():
    params = {"one": jnp.ones((3, 3, 2, 1)), "zero": jnp.zeros((3, 3, 2, 4))}
    one, zero = kernel_similarity(params, [layer("one", (3, 3, 2, 1)), layer("zero", (3, 3, 2, 4))])
    assert np.isnan([one.mean, one.nearest, *one.quantiles.values(), *one.above.values()]).all()
    assert (zero.mean, zero.maximum, zero.nearest) == (0, 0, 0)


def test_quantiles_and_thresholds_of_any_kind():
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 4, 12)), jnp.float32)
    kernels = [layer("w", weight.shape)]
    (plain,) = kernel_similarity({"w": weight}, kernels, quantiles=(0.5,), thresholds=(0.25,))
    (found,) = kernel_similarity(
        {"w": weight}, kernels, quantiles=(q for q in [0.5]), thresholds=jnp.array([0.25])
    )
    assert found == plain and found.quantiles[0.5] == plain.quantiles[0.5]


def test_a_unit_with_a_nan_leaves_no_number_but_the_fractions():
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((5, 6)), jnp.float32)
    (found,) = kernel_similarity({"w": weight.at[0, 2].set(jnp.nan)}, [layer("w", (5, 6))])
    assert np.isnan([found.mean, found.minimum, found.maximum, *found.quantiles.values()]).all()
    assert not np.isnan(list(found.above.values())).any()


def test_to_dict_is_ready_for_json():
    (found,) = kernel_similarity(
        {"w": jnp.eye(3)}, [layer("w", (3, 3))], quantiles=(0.5,), thresholds=(0.3,)
    )
    assert found.to_dict() == {
        "name": "w", "kernels": 3, "mean": 0.0, "minimum": 0.0, "maximum": 0.0,
        "quantiles": {"0.5": 0.0}, "above": {"0.3": 0.0}, "nearest": 0.0,
    }  # fmt: skip
    (alone,) = kernel_similarity({"w": jnp.ones((3, 1))}, [layer("w", (3, 1))], quantiles=(0.5,))
    assert alone.to_dict()["quantiles"] == {"0.5": None} and alone.to_dict()["mean"] is None


def test_only_one_layers_matrix_is_held_at_a_time(monkeypatch):
    """No layer is begun before the last one's numbers are there, and no C x C array is kept."""
    count = 64
    params = {f"w{i}": jnp.ones((2, 2, count)) * i for i in range(8)}
    kernels = [layer(name, (2, 2, count)) for name in params]
    before, order = {id(a) for a in jax.live_arrays()}, []
    begin, wait = similarity._cosines, jax.device_get

    def begin_one(*arguments):
        order.append("begin")
        left = [a for a in jax.live_arrays() if id(a) not in before and a.size >= count**2]
        assert left == []
        return begin(*arguments)

    def wait_for_it(numbers):
        order.append("wait")
        return wait(numbers)

    monkeypatch.setattr(similarity, "_cosines", begin_one)
    monkeypatch.setattr(jax, "device_get", wait_for_it)
    assert len(kernel_similarity(params, kernels)) == 8
    assert order == ["begin", "wait"] * 8


def test_bad_input():
    with pytest.raises(ValueError, match="quantiles holds 1.5"):
        kernel_similarity({"w": jnp.eye(3)}, [layer("w", (3, 3))], quantiles=(0.5, 1.5))
    with pytest.raises(ValueError, match="kernel 'v' is not in params"):
        kernel_similarity({"w": jnp.eye(3)}, [layer("v", (3, 3))])
