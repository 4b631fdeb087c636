import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from inmerge_jax import (
    Kernel,
    MergeRule,
    deep_kernels,
    find_kernels,
    in_model_merging,
    tie,
    trace_kernels,
)
from tests.core import networks
from tests.long import LONG

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
    ],
)
def test_a_computed_weight_is_left_out_and_said_so(compute, by, image, weight):
    params = weight | {"z": jnp.ones((3, 3, 4, 4))}
    with pytest.warns(UserWarning, match=f"'w' is the weight .*by '({by})'; it is not listed"):
        assert names(lambda p, x: conv(conv(x, compute(p["w"])), p["z"]), params, image) == ["z"]


def test_a_layer_whose_result_is_a_weight_is_listed_by_its_own_convolution(image):
    """A Siamese network (SiamFC), whose template convolves the search image."""
    params = {"a": jnp.ones((3, 3, 4, 4)), "b": jnp.ones((3, 3, 4, 4))}

    def features(p, x):
        return jnp.maximum(conv(jnp.maximum(conv(x, p["a"]), 0), p["b"]), 0)

    def siamese(p, x, z):
        return conv(features(p, x), features(p, z).transpose(1, 2, 3, 0))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(siamese, params, image, jnp.ones((1, 5, 5, 4))) == ["a", "b"]


def test_a_weight_with_a_computed_offset_is_passed_over_with_its_reason(image):
    params = {"w": jnp.ones((3, 3, 4, 4)), "h": jnp.ones((5, 144)), "v": jnp.ones((3, 3, 4, 4))}

    def forward(p, x, z):
        return conv(conv(x, p["w"] + (z @ p["h"]).reshape(3, 3, 4, 4)), p["v"])

    found = trace_kernels(forward, params, image, jnp.ones(5))
    assert [kernel.name for kernel in found.kernels] == ["v"]
    assert {one.name for one in found.passed_over} == {"h", "w"}
    assert all("is computed from it by" in one.reason for one in found.passed_over)


@pytest.mark.parametrize(
    "compute", [lambda w, s: w * jnp.exp(s), lambda w, s: w + jnp.exp(s) * jnp.ones(s.shape)]
)
def test_a_scale_of_the_weights_own_shape_is_none_of_its_axes(compute, image):
    """As the deviations of a Bayesian layer."""
    params = {"w": jnp.ones((3, 3, 4, 4)), "s": jnp.ones((3, 3, 4, 4))}
    assert names(lambda p, x: conv(x, compute(p["w"], p["s"])), params, image) == ["w"]


def test_a_bias_of_a_computed_weight_has_no_reason():
    params = {"a": jnp.ones((1, 1, 4, 8)), "bias": jnp.ones(8), "b": jnp.ones((3, 3, 8, 8))}

    def forward(p, x, z):
        template = conv(z, p["a"]) + p["bias"].reshape(1, 1, 1, 8)
        return conv(conv(x, p["b"]), template.reshape(1, 1, 8, 1))

    found = trace_kernels(forward, params, jnp.ones((1, 8, 8, 8)), jnp.ones((1, 1, 1, 4)))
    assert [kernel.name for kernel in found.kernels] == ["a", "b"] and not found.passed_over


def test_no_convolution_raises(image):
    with pytest.raises(ValueError, match=r"no conv operation .* \(1 leaves\).*ops="):
        find_kernels(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 4))}, image)


def test_leaves_that_are_no_arrays_raise(image):
    with pytest.raises(ValueError, match="'activation' is a function, not an array"):
        find_kernels(lambda p, x: x, {"activation": lambda x: x}, image)


def test_deep_kernels():
    kernels = find_kernels(*networks.linen())
    assert deep_kernels(kernels) == kernels[10:]
    assert deep_kernels(kernels, skip=0) == kernels
    chosen = deep_kernels(kernels, skip=3, where=lambda kernel: kernel.name.startswith("Conv_1"))
    assert [k.name for k in chosen] == ["Conv_10/kernel", "Conv_11/kernel"]


def test_deep_kernels_counts_weights_of_a_group_as_one_layer():
    params = {name: {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)} for name in ("fc1", "fc2")}
    neurons = [
        kernel
        for name in params
        for kernel in tie(
            [
                Kernel.named(params, f"{name}/kernel", 1),
                Kernel.named(params, f"{name}/bias", 0),
            ],
            name,
        )
    ]
    assert [k.name for k in deep_kernels(neurons, skip=1)] == ["fc2/kernel", "fc2/bias"]


def test_selecting_nothing_says_how_many_there_are():
    kernels = find_kernels(*networks.linen())
    with pytest.raises(ValueError, match="skip=12 selects none of the 12 weights"):
        deep_kernels(kernels, skip=12)
    with pytest.raises(ValueError, match="predicate selects none of the 12"):
        deep_kernels(kernels, skip=0, where=lambda kernel: "Dense" in kernel.name)
    with pytest.raises(ValueError, match="skip is -1"):
        deep_kernels(kernels, skip=-1)


# ---- groups, stacks, ensembles, Dense layers


def places(forward, params, *args, **rest):
    return {
        k.name: (k.out_axis, k.batch_axes, k.groups, k.op)
        for k in find_kernels(forward, params, *args, **rest)
    }


def test_kernels_of_different_groups_are_different_problems(image):
    for groups in (1, 2, 4):
        params = {"w": jnp.ones((3, 3, 4 // groups, 8))}
        found = places(lambda p, x, g=groups: conv(x, p["w"], feature_group_count=g), params, image)
        assert found == {"w": (3, (), groups, "conv")}


STACKS = {
    "scan": lambda p, x: lax.scan(lambda x, w: (conv(x, w), None), x, p)[0],
    "map": lambda p, x: lax.map(lambda w: conv(x, w), p),
    "index": lambda p, x: conv(conv(x, p[0]), p[1]),
    "traced index": lambda p, x: lax.fori_loop(0, 2, lambda i, x: conv(x, p[i]), x),
    "slice": lambda p, x: conv(conv(x, p[:1].squeeze(0)), lax.index_in_dim(p, 1, 0, False)),
    "ensemble": lambda p, x: jax.vmap(lambda w: conv(x, w))(p),
    "ensemble with inputs": lambda p, x: jax.vmap(conv)(jnp.stack([x, x]), p),
}


@pytest.mark.parametrize("form", STACKS)
@pytest.mark.parametrize("outputs", [4, 1])
def test_layers_of_a_stack_are_different_problems(form, outputs, image):
    if outputs == 1 and "ensemble" not in form and form != "map":
        pytest.skip("layers in sequence have as many outputs as inputs")
    params = jnp.ones((2, 3, 3, 4, outputs))
    (kernel,) = find_kernels(STACKS[form], params, image)
    # Nothing of one layer may meet a kernel of another one.
    assert kernel.problems >= 2 and kernel.units <= outputs
    if outputs > 1:
        assert (kernel.out_axis, kernel.batch_axes, kernel.groups) == (4, (0,), 1)


def test_all_convolutions_in_a_scan_are_found(image):
    assert places(STACKS["scan"], jnp.ones((2, 3, 3, 4, 4)), image) == {"": (4, (0,), 1, "conv")}


def test_dense_layers_are_listed_on_request(image):
    params = {"w": jnp.ones((3, 3, 4, 4)), "fc": jnp.ones((4, 5)), "out": jnp.ones((6, 5))}

    def forward(p, x):
        hidden = jax.nn.relu(conv(x, p["w"]).mean((1, 2)) @ p["fc"])
        return jnp.einsum("bi,oi->bo", hidden, p["out"])

    assert places(forward, params, image) == {"w": (3, (), 1, "conv")}
    assert places(forward, params, image, ops=("conv", "dense")) == {
        "w": (3, (), 1, "conv"),
        "fc": (1, (), 1, "dense"),
        "out": (0, (), 1, "dense"),
    }
    assert list(places(forward, params, image, ops=("dense",))) == ["fc", "out"]


def test_experts_and_heads_are_problems_of_their_own():
    params = {"moe": jnp.ones((3, 4, 5)), "query": jnp.ones((4, 2, 6))}

    def forward(p, x):
        return jnp.einsum("ecd,edf->ecf", x, p["moe"]), jnp.einsum("ecd,dhk->echk", x, p["query"])

    assert places(forward, params, jnp.ones((3, 7, 4)), ops=("dense",)) == {
        "moe": (2, (0,), 1, "dense"),
        "query": (2, (1,), 1, "dense"),
    }


def transformer(scan):
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
            return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (4, 4), (4, 4))(x)
            x = x.reshape(len(x), -1, 8)
            x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], 8))
            if scan:
                stack = nn.scan(
                    lambda block, x, _: (block(x), None),
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    length=3,
                )
                x, _ = stack(Block(), x, None)
            else:
                x = Block()(x)
            return nn.Dense(3)(x.mean(1))

    return Net()


@pytest.mark.parametrize("scan", [pytest.param(False, marks=LONG), True])
@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=LONG)])
def test_a_transformer(scan, batch):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        net, x = transformer(scan), jnp.ones((batch, 8, 8, 3))
        params = net.init(jax.random.key(0), x)["params"]
        found = trace_kernels(lambda p, x: net.apply({"params": p}, x), params, x)
    assert found.passed_over == ()
    weights = [path for path, leaf in jax.tree_util.tree_leaves_with_path(params) if leaf.ndim > 1]
    listed = {kernel.name for kernel in found.kernels}
    everything = {jax.tree_util.keystr(p, simple=True, separator="/") for p in weights}
    biases = {name for name in everything if "bias" in name or "scale" in name}
    assert listed == everything - biases - {"positions"}
    for kernel in found.kernels:
        assert (0 in kernel.batch_axes) == (scan and kernel.name.startswith("Block"))


def test_skipped_weights_have_a_reason(image):
    params = {"w": jnp.ones((3, 3, 4, 4)), "fc": jnp.ones((4, 5)), "v": jnp.ones((3, 3, 4, 4))}

    def forward(p, x):
        x = conv(x, p["w"][..., :2].repeat(2, -1)) + conv(x, p["v"])
        return x.mean((1, 2)) @ p["fc"]

    found = trace_kernels(forward, params, image, ops=("conv",))
    assert [kernel.name for kernel in found.kernels] == ["v"]
    reasons = {one.name: (one.op, one.reason) for one in found.passed_over}
    assert reasons["fc"] == ("dense", "ops is ('conv',)")
    assert reasons["w"][0] == "conv" and "computed from it by" in reasons["w"][1]


@pytest.mark.parametrize("order", [1, -1])
def test_a_weight_used_in_part_and_in_full_is_not_listed(order, image):
    params = {"w": jnp.ones((3, 3, 4, 4)), "z": jnp.ones((3, 3, 4, 4))}

    def forward(p, x):
        for form in (lambda w: w[..., :4:2].repeat(2, -1), lambda w: w)[::order]:
            x = conv(x, form(p["w"]))
        return conv(x, p["z"])

    with pytest.warns(UserWarning, match="'w' is the weight of a conv .*not listed"):
        assert names(forward, params, image) == ["z"]


@pytest.mark.parametrize("swap", ["with each other", "axes"])
@pytest.mark.parametrize("loop", ["scan", "while"])
def test_weights_that_change_places_in_a_loop_are_not_listed(swap, loop, image):
    """What a loop carries is followed until it stays what it is, not through its first turn."""
    params = {name: jnp.ones((3, 3, 4, 4)) for name in "abz"}

    def turn(carry):
        x, a, b = carry
        x = conv(x, a)
        return (x, b, a) if swap == "with each other" else (x, a.swapaxes(2, 3), b)

    def forward(p, x):
        carry = (x, p["a"], p["b"])
        if loop == "scan":
            carry, _ = lax.scan(lambda carry, _: (turn(carry), None), carry, None, length=3)
        else:
            carry = lax.while_loop(lambda carry: carry[0].sum() < 9, turn, carry)
        return conv(carry[0], p["z"])

    found = trace_kernels(forward, params, image)
    assert [kernel.name for kernel in found.kernels] == ["z"]
    expected = {"a", "b"} if swap == "with each other" else {"a"}
    assert {one.name for one in found.passed_over} == expected
    assert all("by" in one.reason and loop in one.reason for one in found.passed_over)


def test_weights_that_a_loop_carries_unchanged_are_listed(image):
    def forward(p, x):
        turn = lambda i, carry: (conv(carry[0], carry[1]), carry[1])  # noqa: E731
        return lax.fori_loop(0, 3, turn, (x, p["w"]))[0]

    assert names(forward, {"w": jnp.ones((3, 3, 4, 4))}, image) == ["w"]


def test_all_parameters_of_a_computed_weight_are_skipped():
    params = {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 5)), "w": jnp.ones((5, 3))}
    found = trace_kernels(lambda p, x: x @ (p["a"] @ p["b"]) @ p["w"], params, jnp.ones((2, 4)))
    assert [kernel.name for kernel in found.kernels] == ["w"]
    assert {(one.name, one.reason) for one in found.passed_over} == {
        (name, "is computed from it by 'dot_general'") for name in "ab"
    }


def test_low_rank_factors_of_a_weight_are_skipped():
    params = {"w": jnp.ones((4, 5)), "a": jnp.ones((4, 2)), "b": jnp.ones((2, 5))}
    found = trace_kernels(lambda p, x: x @ (p["w"] + p["a"] @ p["b"]), params, jnp.ones((2, 4)))
    assert [kernel.name for kernel in found.kernels] == ["w"]
    assert {(one.name, one.reason) for one in found.passed_over} == {
        (name, "is multiplied by another parameter") for name in "ab"
    }


def test_experts_of_a_ragged_product_are_problems_of_their_own():
    params = {"moe": jnp.ones((3, 4, 5))}
    sizes = jnp.array([2, 3, 1], jnp.int32)
    found = places(
        lambda p, x: lax.ragged_dot(x, p["moe"], sizes), params, jnp.ones((6, 4)), ops=("dense",)
    )
    assert found == {"moe": (2, (0,), 1, "dense")}


def test_transposed_convolutions_are_recognised(image, weight):
    def forward(p, x):
        return lax.conv_transpose(x, p["w"], (2, 2), "SAME")

    assert places(forward, weight, image) == {"w": (3, (), 1, "conv_transpose")}


def test_a_warning_points_at_the_caller(image):
    params = {"w": jnp.ones((3, 3, 4, 4)), "z": jnp.ones((3, 3, 4, 4))}
    with pytest.warns(UserWarning) as caught:
        find_kernels(lambda p, x: conv(conv(x, p["w"] + p["w"].mT), p["z"]), params, image)
    assert {warning.filename for warning in caught} == {__file__}


REDUCTIONS = {
    "max from 0": lambda x: lax.reduce(x, 0.0, jnp.maximum, (1, 2)),
    "own computation": lambda x: lax.reduce(x, 0.0, lambda a, b: jnp.maximum(a, b) + 0.0, (1, 2)),
    "window": lambda x: lax.reduce_window(
        x, 0.0, lambda a, b: jnp.maximum(a, b), (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    ),
    "log-sum-exp": lambda x: jax.nn.logsumexp(x, (1, 2)),
    "argmax": lambda x: jnp.argmax(x, -1),
    "cumulative": lambda x: lax.cumsum(x, 1),
    "sort": lambda x: lax.sort(x, dimension=-1),
}


@pytest.mark.parametrize("form", REDUCTIONS)
def test_reductions_of_values_that_depend_on_a_parameter(form, image):
    params = {"w": jnp.ones((3, 3, 4, 4)), "b": jnp.ones(4)}

    def forward(p, x):
        return REDUCTIONS[form](conv(x, p["w"]) + p["b"][None, None, None])

    assert names(forward, params, image) == ["w"]


def test_loops_that_no_parameter_reaches(image):
    def forward(p, x):
        y = lax.fori_loop(0, 3, lambda _, y: y * 2, x)
        z = lax.scan(lambda c, _: (c + 1, None), x, None, length=2)[0]
        return conv(y + z + lax.map(jnp.sin, x), p["w"])

    assert names(forward, {"w": jnp.ones((3, 3, 4, 4))}, image) == ["w"]


def test_keyword_and_static_arguments_reach_forward(image, weight):
    def forward(p, x, *, train, name="same"):
        assert train is False and name == "other"
        return conv(x, p["w"])

    (kernel,) = find_kernels(forward, weight, image, train=False, name="other")
    assert kernel.name == "w"


def test_positional_bools_and_strings_are_not_traced(image, weight):
    def forward(p, name, x, train):
        assert train is True and name == "same"
        return conv(x, p["w"])

    assert names(forward, weight, "same", image, True) == ["w"]


class Variable:
    """Holds an array, as Keras's and others' do."""

    def __init__(self, value):
        self.value, self.shape, self.dtype = value, value.shape, str(value.dtype)

    def __jax_array__(self):
        return self.value


def test_variables_are_refused_in_tracing_and_read_in_merging(image, weight):
    held = {"w": Variable(weight["w"].at[..., 0].set(0.5))}
    with pytest.raises(ValueError, match=r"'w' is a Variable, not an array.*variable\.value"):
        find_kernels(lambda p, x: conv(x, p["w"]), held, image)
    kernels = find_kernels(lambda p, x: conv(x, p["w"]), weight, image)
    tx = in_model_merging(kernels, MergeRule(1.0, -1.0, 0.5), 0)
    updates, state = tx.update({"w": jnp.zeros((3, 3, 4, 4))}, tx.init(held), held)
    assert int(state.stats.merged[0]) == 4 and (updates["w"] != 0).any()


def test_a_forward_with_a_mapped_axis_is_traced_inside_vmap(image, weight):
    def forward(p, x):
        return lax.pmean(conv(x, p["w"]), "batch")

    def mapped(p, x):
        return jax.vmap(lambda x: forward(p, x), axis_name="batch")(x[None])

    assert names(mapped, weight, image) == ["w"]


def test_unknown_operations_are_refused(image, weight):
    with pytest.raises(ValueError, match=r"ops is \('attention',\); give a tuple"):
        find_kernels(lambda p, x: conv(x, p["w"]), weight, image, ops=("attention",))


def test_an_error_for_a_network_without_convolutions_names_its_dense_layers():
    with pytest.raises(ValueError, match=r'ops=\("conv", "dense"\) also takes matrix products'):
        find_kernels(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 4))}, jnp.ones((2, 4)))


MIXED = {
    "positions": lambda p, x: jnp.tanh((x + p["a"]) @ p["w"]) @ p["v"],
    "a scale": lambda p, x: jnp.tanh((x * p["a"]) @ p["w"]) @ p["v"],
}


@pytest.mark.parametrize("form", MIXED)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_parameter_that_meets_the_input_hides_no_dense_layer(form, batch):
    params = {"a": jnp.ones((batch, 3, 4)), "w": jnp.ones((4, 8)), "v": jnp.ones((8, 3))}
    found = places(MIXED[form], params, jnp.ones((batch, 3, 4)), ops=("dense",))
    assert found == {"w": (1, (), 1, "dense"), "v": (1, (), 1, "dense")}


def test_a_masked_weight_is_still_followed():
    mask = jnp.ones((4, 8))
    found = places(
        lambda p, x, m: x @ (p["w"] * m), {"w": mask}, jnp.ones((2, 4)), mask, ops=("dense",)
    )
    assert found == {"w": (1, (), 1, "dense")}


@pytest.mark.parametrize(
    "compute",
    [
        lambda p: jnp.exp(p["w"]),
        lambda p: jnp.concatenate([p["w"], p["w"]], -1),
        lambda p: jnp.pad(p["w"], ((0, 0), (0, 2))),
    ],
)
def test_a_computed_dense_weight_is_skipped_with_its_reason(compute):
    found = trace_kernels(lambda p, x: x @ compute(p), {"w": jnp.ones((4, 4))}, jnp.ones((2, 4)))
    assert found.kernels == ()
    assert [(one.name, one.op) for one in found.passed_over] == [("w", "dense")]
    assert "is computed from it by" in found.passed_over[0].reason


def test_callbacks_without_results_are_passed(image, weight):
    def forward(p, x):
        x = conv(x, p["w"])
        jax.debug.print("mean {} {}", x.mean(), p["w"].mean())
        jax.debug.callback(lambda value: None, x)
        return conv(x, p["v"])

    assert names(forward, {**weight, "v": weight["w"]}, image) == ["w", "v"]


def test_results_that_are_no_arrays_and_numpys_bools_are_allowed(image, weight):
    def forward(p, x, flag):
        return (conv(x, p["w"]) if flag else x), "a name", len

    assert names(forward, weight, image, np.bool_(True)) == ["w"]


def test_keyword_arguments_may_have_any_name(image, weight):
    assert names_with_keywords(weight, image) == ["w"]


def names_with_keywords(weight, image):
    def forward(p, x, *, params, forward):
        return conv(x, p["w"]) if params and forward else x

    return [k.name for k in find_kernels(forward, weight, image, params=True, forward=True)]


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.complex64])
def test_weights_that_cannot_be_interpolated_are_passed_over(dtype, image, weight):
    def forward(p, x):
        return conv(conv(x, p["w"]), p["frozen"].real.astype(jnp.float32))

    params = {**weight, "frozen": weight["w"].astype(dtype)}
    with pytest.warns(UserWarning, match="frozen"):
        assert names(forward, params, image) == ["w"]
    (passed,) = trace_kernels(forward, params, image, ops=("conv",)).passed_over
    assert passed.name == "frozen"


def test_a_dtype_that_cannot_be_interpolated_is_the_reason(image, weight):
    params = {"w": weight["w"].astype(jnp.int8)}
    found = trace_kernels(lambda p, x: conv(x, p["w"].astype(jnp.float32)), params, image)
    assert [one.reason for one in found.passed_over] == [
        "has dtype int8, which cannot be interpolated"
    ]


@pytest.mark.parametrize("inputs", [1, 2])
def test_members_of_an_ensemble_that_share_their_input_never_merge(inputs):
    """With one output per group, a convolution's outputs are ordered by group, then by member."""
    weights = jnp.ones((5, 3, 3, inputs, 4))
    x = jnp.ones((2, 8, 8, 4 * inputs))

    def forward(p, x):
        return jax.vmap(lambda w: conv(x, w, feature_group_count=4))(p["w"])

    found = trace_kernels(forward, {"w": weights}, x)
    assert not found.kernels and "cannot be told apart" in found.passed_over[0].reason
    batched = jnp.ones((5, *x.shape))

    def apart(p, x):
        return jax.vmap(lambda w, x: conv(x, w, feature_group_count=4))(p["w"], x)

    assert places(apart, {"w": weights}, batched) == {"w": (4, (0,), 4, "conv")}


def test_a_convolution_in_an_operation_that_is_not_followed_is_passed_over(image, weight):
    def forward(p, x):
        def solve(b):
            return jax.scipy.sparse.linalg.cg(lambda v: v + 0.01 * conv(v, p["v"]), b, maxiter=2)[0]

        return solve(conv(x, p["w"]))

    params = {**weight, "v": weight["w"]}
    with pytest.warns(UserWarning, match="'v' is the weight of a conv operation but"):
        assert names(forward, params, image) == ["w"]


def test_a_string_is_no_tuple_of_operations(image, weight):
    with pytest.raises(ValueError, match="ops is 'conv'; give a tuple"):
        find_kernels(lambda p, x: conv(x, p["w"]), weight, image, ops="conv")


@pytest.mark.parametrize("unstack", [jnp.unstack, lambda w: jnp.split(w, 3), list])
def test_the_layers_of_a_stack_may_be_taken_apart_first(unstack):
    def forward(p, x):
        for w in unstack(p["w"]):
            x = conv(x, w.reshape(w.shape[-4:]))
        return x

    params = {"w": jnp.ones((3, 3, 3, 4, 4))}
    assert places(forward, params, jnp.ones((1, 8, 8, 4))) == {"w": (4, (0,), 1, "conv")}


def test_a_weight_that_is_gathered_for_each_example_is_passed_over():
    """As in a mixture of experts; a row of a table is an activation."""

    def forward(params, x, index):
        x = jnp.einsum("bd,bdf->bf", x, params["experts"][index])
        return (x + params["table"][index]) @ params["w"]

    params = {
        "experts": jnp.ones((3, 4, 6)),
        "table": jnp.ones((5, 6)),
        "w": jnp.ones((6, 7)),
    }
    arguments = (params, jnp.ones((2, 4)), jnp.arange(2))
    found = trace_kernels(forward, *arguments, ops=("dense",))
    assert [kernel.name for kernel in found.kernels] == ["w"]
    assert [(one.name, one.op) for one in found.passed_over] == [("experts", "dense")]
    assert "'gather'" in found.passed_over[0].reason
    with pytest.warns(UserWarning, match="'experts' is the weight of a dense operation"):
        find_kernels(forward, *arguments, ops=("dense",))
