import warnings

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from inmerge_jax import Kernel, deep_kernels, find_kernels
from tests.core import networks

NHWC = ("NHWC", "HWIO", "NHWC")


def conv(x, w, **options):
    options = {"dimension_numbers": NHWC} | options
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", **options)


def names(forward, params, *args):
    return [kernel.name for kernel in find_kernels(forward, params, *args)]


@pytest.fixture
def image():
    return jnp.ones((1, 8, 8, 4))


@pytest.fixture
def weight():
    return {"w": jnp.ones((3, 3, 4, 4))}


@pytest.mark.parametrize(
    ("library", "out_axis"), [("linen", 3), ("nnx", 3), ("equinox", 0), ("haiku", 3)]
)
def test_the_same_network_in_four_libraries(library, out_axis):
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")  # the libraries' own deprecations are not ours
        forward, params, x = getattr(networks, library)()
        kernels = find_kernels(forward, params, x)
    assert len(kernels) == networks.COUNT
    assert [k.out_axis for k in kernels] == [out_axis] * networks.COUNT
    assert [k.count for k in kernels] == [networks.WIDTH] * (networks.COUNT - 1) + [networks.LAST]
    sizes = [max(k.shape[d] for d in range(4) if d != out_axis) for k in kernels]
    assert sizes[-1] == networks.WIDTH  # the 1x1 is last, wherever its name sorts
    inputs = {3: lambda k: k.shape[2], 0: lambda k: k.shape[1]}[out_axis]
    expected = [3] + [networks.WIDTH] * (networks.COUNT - 1)
    expected[networks.DEPTHWISE] = 1
    assert [inputs(k) for k in kernels] == expected
    leaves = dict(jax.tree_util.tree_leaves_with_path(params))
    assert all(leaves[k.path].shape == k.shape for k in kernels)


def test_order_is_that_of_use_not_of_names():
    forward, params, x = networks.linen()
    found = names(forward, params, x)
    assert found == [f"Conv_{i}/kernel" for i in range(networks.COUNT)]
    assert found != sorted(found)


def test_tracing_runs_nothing_and_takes_abstract_arrays(image, weight):
    shapes = jax.eval_shape(lambda: (weight, image))
    (kernel,) = find_kernels(lambda p, x: conv(x, p["w"]), *shapes)
    assert kernel == Kernel((jax.tree_util.DictKey("w"),), (3, 3, 4, 4), 3)


@pytest.mark.parametrize(
    ("numbers", "x", "w", "axis"),
    [
        (("NWC", "WIO", "NWC"), (1, 8, 4), (3, 4, 5), 2),
        (("NCW", "OIW", "NCW"), (1, 4, 8), (5, 4, 3), 0),
        (("NDHWC", "DHWIO", "NDHWC"), (1, 4, 4, 4, 2), (3, 3, 3, 2, 5), 4),
        (("NHWC", "OHWI", "NHWC"), (1, 8, 8, 2), (5, 3, 3, 2), 0),
        (("NHWC", "HWOI", "NHWC"), (1, 8, 8, 2), (3, 3, 5, 2), 2),
    ],
)
def test_any_rank_and_layout(numbers, x, w, axis):
    strides = (1,) * (len(x) - 2)

    def forward(params, x):
        return lax.conv_general_dilated(x, params, strides, "SAME", dimension_numbers=numbers)

    (kernel,) = find_kernels(forward, jnp.ones(w), jnp.ones(x))
    assert (kernel.out_axis, kernel.count) == (axis, 5)


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_and_depthwise(groups, image):
    params = {"w": jnp.ones((3, 3, 4 // groups, 8))}
    (kernel,) = find_kernels(
        lambda p, x: conv(x, p["w"], feature_group_count=groups), params, image
    )
    assert kernel.count == 8


def convert(w):
    return w.astype(jnp.bfloat16).astype(jnp.float32)


WRAPPERS = {
    "jit": lambda f: jax.jit(jax.jit(f)),
    "remat": jax.checkpoint,
    "cond": lambda f: lambda p, x: lax.cond(x.sum() > 0, f, lambda p, x: x, p, x),
    "platform": lambda f: lambda p, x: lax.platform_dependent(p, x, cpu=lambda p, x: x, default=f),
    "custom_jvp": lambda f: _custom_jvp(f),
    "custom_vjp": lambda f: _custom_vjp(f),
    "fori_loop": lambda f: lambda p, x: lax.fori_loop(0, 3, lambda _, x: f(p, x), x),
    "while_loop": lambda f: (
        lambda p, x: lax.while_loop(lambda x: x.sum() < 9, lambda x: f(p, x), x)
    ),
    "scan": lambda f: lambda p, x: lax.scan(lambda x, _: (f(p, x), None), x, None, length=2)[0],
    "vmap": lambda f: lambda p, x: jax.vmap(lambda x: f(p, x[None])[0])(x),
    "bfloat16": lambda f: lambda p, x: f(jax.tree.map(convert, p), x),
    "barrier": lambda f: lambda p, x: f(lax.optimization_barrier(p), x),
    "masked": lambda f: lambda p, x: f(jax.tree.map(lambda w: w * (w > 0).astype(w.dtype), p), x),
    "standardised": lambda f: (
        lambda p, x: f(jax.tree.map(lambda w: w - jnp.mean(w, (0, 1, 2), keepdims=True), p), x)
    ),
    "flattened": lambda f: (
        lambda p, x: f(jax.tree.map(lambda w: w.reshape(-1, 4).reshape(3, 3, 4, 4), p), x)
    ),
    "transposed": lambda f: (
        lambda p, x: f(
            jax.tree.map(lambda w: w[::-1, ::-1].transpose(3, 2, 1, 0).transpose(3, 2, 1, 0), p), x
        )
    ),
}


def _custom_jvp(f):
    wrapped = jax.custom_jvp(f)
    wrapped.defjvp(lambda primals, tangents: (f(*primals), f(*tangents)))
    return wrapped


def _custom_vjp(f):
    wrapped = jax.custom_vjp(f)
    wrapped.defvjp(lambda *a: (f(*a), None), lambda _, g: (None, g))
    return wrapped


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_are_followed_through(wrapper, image, weight):
    forward = WRAPPERS[wrapper](lambda p, x: conv(x, p["w"]))
    (kernel,) = find_kernels(forward, weight, image)
    assert (kernel.name, kernel.out_axis, kernel.shape) == ("w", 3, (3, 3, 4, 4))


def test_output_axis_is_the_parameters_own(image):
    """A weight kept as OIHW but used as HWIO: the axis is that of the stored array."""
    params = {"w": jnp.ones((5, 4, 3, 3))}
    (kernel,) = find_kernels(lambda p, x: conv(x, p["w"].transpose(2, 3, 1, 0)), params, image)
    assert (kernel.out_axis, kernel.count) == (0, 5)


def test_weight_normalisation_lists_the_direction_not_the_scale(image):
    params = {"g": jnp.ones(5), "v": jnp.ones((3, 3, 4, 5))}

    def forward(p, x):
        return conv(x, p["g"][None, None, None, :] * p["v"])

    assert names(forward, params, image) == ["v"]


def deviation(w):
    return jnp.sqrt(jnp.mean(w * w, (0, 1, 2), keepdims=True))


def power_iteration(w):
    flat = w.reshape(-1, w.shape[-1])
    return lax.fori_loop(0, 3, lambda _, v: flat.T @ (flat @ v), jnp.ones(w.shape[-1]))


STATISTICS_FIRST = {
    "standardised": lambda w: (1 / deviation(w)) * (w - jnp.mean(w, (0, 1, 2), keepdims=True)),
    "quantised": lambda w: deviation(w) * jnp.round(w / deviation(w)),
    "pruned": lambda w: jnp.where(jnp.abs(w) > 0.5, w, jnp.zeros_like(w)),
    "clipped": lambda w: jnp.clip(w, -3 * deviation(w), 3 * deviation(w)),
    "spectral": lambda w: (1 / jnp.sum(power_iteration(w))) * w,
    "at times": lambda w: lax.cond(jnp.sum(w) > 0, lambda: deviation(w) * w, lambda: w),
}


@pytest.mark.parametrize("form", STATISTICS_FIRST)
def test_a_weight_scaled_by_its_own_statistics_is_followed(form, image, weight):
    (kernel,) = find_kernels(lambda p, x: conv(x, STATISTICS_FIRST[form](p["w"])), weight, image)
    assert (kernel.name, kernel.out_axis) == ("w", 3)


def test_full_weight_normalisation_lists_the_direction_not_the_scale(image):
    params = {"g": jnp.ones((1, 1, 1, 5)), "v": jnp.ones((3, 3, 4, 5))}

    def forward(p, x):
        return conv(x, p["g"] / deviation(p["v"]) * p["v"])

    assert names(forward, params, image) == ["v"]


def test_a_weight_used_twice_is_listed_once_at_its_first_use(image):
    params = {"a": jnp.ones((3, 3, 4, 4)), "b": jnp.ones((3, 3, 4, 4))}

    def forward(p, x):
        return conv(conv(conv(x, p["b"]), p["a"]), p["b"])

    assert names(forward, params, image) == ["b", "a"]


def test_convolutions_without_parameters_are_not_listed(image, weight):
    def forward(p, x):
        blurred = conv(x, jnp.ones((3, 3, 4, 4)))
        return conv(blurred, p["w"])

    assert names(forward, weight, image) == ["w"]


def test_both_branches_of_a_conditional_are_listed(image):
    params = {"a": jnp.ones((3, 3, 4, 4)), "b": jnp.ones((3, 3, 4, 4))}

    def forward(p, x):
        return lax.cond(x.sum() > 0, lambda: conv(x, p["b"]), lambda: conv(x, p["a"]))

    assert sorted(names(forward, params, image)) == ["a", "b"]


@pytest.mark.parametrize(
    ("compute", "by"),
    [
        (lambda w: lax.fori_loop(0, 2, lambda _, w: w * 2, w), "scan"),
        (lambda w: lax.while_loop(lambda w: w.sum() < 9, lambda w: w * 2, w), "while"),
        (lambda w: lax.cond(w.sum() > 0, lambda: w, lambda: w.transpose(0, 1, 3, 2)), "cond"),
        (lambda w: jnp.split(w, 2, -1)[1].repeat(2, -1), "split|slice"),
        (lambda w: w + w.transpose(0, 1, 3, 2), "add"),
        (lambda w: jnp.einsum("hwio,op->hwip", w, jnp.eye(4)), "dot_general"),
        (lambda w: w.reshape(3, 3, 2, 2, 4).reshape(3, 3, 2, 8).reshape(3, 3, 4, 4), "reshape"),
    ],
)
def test_a_computed_weight_is_left_out_and_said_so(compute, by, image, weight):
    params = weight | {"z": jnp.ones((3, 3, 4, 4))}
    with pytest.warns(UserWarning, match=f"'w' by .*{by}.*not listed"):
        assert names(lambda p, x: conv(conv(x, compute(p["w"])), p["z"]), params, image) == ["z"]


def test_weights_stacked_over_a_scan_are_left_out_and_said_so(image):
    params = {"stack": jnp.ones((2, 3, 3, 4, 4)), "w": jnp.ones((3, 3, 4, 4))}

    def forward(p, x):
        x, _ = lax.scan(lambda x, w: (conv(x, w), None), x, p["stack"])
        return conv(x, p["w"])

    with pytest.warns(UserWarning, match="'stack' by 'scan'"):
        assert names(forward, params, image) == ["w"]


def test_no_convolution_raises(image):
    with pytest.raises(ValueError, match=r"no convolution .* \(1 leaves\)"):
        find_kernels(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 4))}, image)


def test_leaves_that_are_no_arrays_raise(image):
    with pytest.raises(ValueError, match="'activation' is a function, not an array"):
        find_kernels(lambda p, x: x, {"activation": lambda x: x}, image)


def test_deep_kernels():
    kernels = find_kernels(*networks.linen())
    assert deep_kernels(kernels) == kernels[10:]
    assert deep_kernels(kernels, skip=0) == kernels
    chosen = deep_kernels(kernels, skip=3, where=lambda name: name.startswith("Conv_1"))
    assert [k.name for k in chosen] == ["Conv_10/kernel", "Conv_11/kernel"]


def test_selecting_nothing_says_how_many_there_are():
    kernels = find_kernels(*networks.linen())
    with pytest.raises(ValueError, match="skip=12 selects none of the 12 convolutions"):
        deep_kernels(kernels, skip=12)
    with pytest.raises(ValueError, match="predicate selects none of the 12"):
        deep_kernels(kernels, skip=0, where=lambda name: "Dense" in name)
    with pytest.raises(ValueError, match="skip is -1"):
        deep_kernels(kernels, skip=-1)
