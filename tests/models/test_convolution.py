"""The CPU's route computes what the native convolution computes, and only the CPU takes it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from inmerge_jax.models.convolution import conv_general_dilated
from tests.long import long_unless

NHWC = ("NHWC", "HWIO", "NHWC")

# batch, height, width, inputs, outputs, window, stride, padding
SHAPES = {
    "one pixel": (3, 1, 1, 5, 7, 3, 1, [(1, 1), (1, 1)]),
    "two pixels": (4, 2, 2, 8, 6, 3, 1, [(1, 1), (1, 1)]),
    "four pixels": (2, 4, 4, 5, 7, 3, 1, [(1, 1), (1, 1)]),
    "small and strided": (2, 9, 9, 5, 7, 3, 2, [(1, 1), (1, 1)]),
    "small and strided SAME": (2, 8, 8, 5, 7, 3, 2, "SAME"),
    "projection": (2, 28, 28, 3, 4, 1, 2, [(0, 0), (0, 0)]),
    "large": (2, 9, 11, 5, 7, 3, 1, [(1, 1), (1, 1)]),
    "several blocks of rows": (40, 56, 56, 8, 9, 3, 1, [(1, 1), (1, 1)]),
    "large SAME": (2, 9, 12, 5, 7, 3, 1, "SAME"),
    "large VALID": (2, 11, 12, 5, 7, 3, 1, "VALID"),
    "uneven padding": (2, 9, 11, 5, 7, 3, 1, [(0, 1), (2, 0)]),
    "wide padding": (2, 12, 12, 3, 4, 3, 1, [(3, 3), (4, 1)]),
    "cropping padding": (2, 24, 20, 5, 7, 3, 1, [(-1, 1), (1, -2)]),
    "large and strided": (2, 21, 24, 5, 7, 3, 2, [(1, 1), (0, 1)]),
    "stride 3": (2, 30, 31, 5, 7, 3, 3, [(2, 1), (0, 3)]),
    "imagenet stem": (1, 32, 32, 3, 4, 7, 2, [(3, 3), (3, 3)]),
    "tiles": (8, 8, 8, 64, 72, 3, 1, [(1, 1), (1, 1)]),
    "odd tiles": (8, 7, 9, 65, 64, 3, 1, [(1, 1), (1, 1)]),
    "tiles of small maps": (128, 2, 2, 64, 65, 3, 1, [(1, 1), (1, 1)]),
    "tiles SAME": (4, 12, 11, 64, 64, 3, 1, "SAME"),
    "tiles VALID": (4, 15, 14, 64, 64, 3, 1, "VALID"),
    "tiles, uneven padding": (4, 12, 13, 64, 64, 3, 1, [(0, 3), (2, 0)]),
    "tiles, cropping padding": (4, 20, 21, 64, 64, 3, 1, [(-1, 1), (4, -2)]),
}
TAKES_A_CPU_ROUTE = set(SHAPES) - {"imagenet stem"}
# One for each route on CPU, and one that has none.
BRIEFLY = ("one pixel", "small and strided", "large", "stride 3", "imagenet stem", "odd tiles")
TILES = [case for case in SHAPES if "tiles" in case]
# Rounding, relative to the largest value. The tiles' differences cancel part of what they add up.
TOLERANCE = {case: 3e-5 if case in TILES else 1e-5 for case in SHAPES}


def draw(batch, height, width, inputs, outputs, window, dtype=jnp.float32):
    x_key, w_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_key, (batch, height, width, inputs), dtype)
    w = jax.random.normal(w_key, (window, window, inputs, outputs), dtype)
    return x, w


def value_and_gradients(convolve, x, w):
    y, pull = jax.vjp(convolve, x, w)
    return y, *pull(jnp.cos(y))


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


def route_and_native(stride, padding, **options):
    options = {"dimension_numbers": NHWC} | options
    return tuple(
        partial(f, window_strides=(stride, stride), padding=padding, **options)
        for f in (conv_general_dilated, lax.conv_general_dilated)
    )


@pytest.mark.parametrize(
    ("case", "dtype", "tolerance"),
    long_unless(
        lambda case: case[0] in BRIEFLY,
        [(case, jnp.float32, TOLERANCE[case]) for case in SHAPES]
        + [(case, jnp.bfloat16, 3e-2) for case in ("two pixels", "projection", "large", "tiles")],
    ),
)
def test_value_and_both_gradients_equal_the_native_ones(case, dtype, tolerance):
    *sizes, stride, padding = SHAPES[case]
    x, w = draw(*sizes, dtype=dtype)
    route, native = route_and_native(stride, padding)
    actual = jax.jit(partial(value_and_gradients, route))(x, w)
    expected = jax.jit(partial(value_and_gradients, native))(x, w)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert relative_error(a, e) < tolerance


@pytest.mark.parametrize("case", long_unless(BRIEFLY, TILES))
def test_tiles_equal_the_native_convolution_in_float64(case):
    *sizes, stride, padding = SHAPES[case]
    with jax.enable_x64(True):
        x, w = draw(*sizes, dtype=jnp.float64)
        route, native = route_and_native(stride, padding)
        assert lowered_text(route, x, w, "cpu").count("stablehlo.convolution") == 0
        actual, expected = value_and_gradients(route, x, w), value_and_gradients(native, x, w)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == jnp.float64
            assert relative_error(a, e) < 1e-12


@pytest.mark.long
def test_tiles_are_not_for_16_bit_floats():
    *sizes, stride, padding = SHAPES["tiles"]
    route, _ = route_and_native(stride, padding)
    x, w = draw(*sizes, dtype=jnp.bfloat16)
    products = lowered_text(route, x, w, "cpu").count("stablehlo.dot_general")
    assert products < 16 < lowered_text(route, *draw(*sizes), "cpu").count("stablehlo.dot_general")


def lowered_text(convolve, x, w, platform):
    step = jax.jit(partial(value_and_gradients, convolve))
    return step.trace(x, w).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("case", long_unless(BRIEFLY, SHAPES))
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_only_the_cpu_leaves_the_native_convolution(case, platform):
    *sizes, stride, padding = SHAPES[case]
    x, w = draw(*sizes)
    route, native = route_and_native(stride, padding)
    convolutions = lowered_text(route, x, w, platform).count("stablehlo.convolution")
    natively = lowered_text(native, x, w, platform).count("stablehlo.convolution")
    assert natively == 3
    if platform == "cpu" and case in TAKES_A_CPU_ROUTE:
        assert convolutions < 3
    else:
        assert convolutions == 3


@pytest.mark.parametrize(
    "options",
    [
        {"feature_group_count": 2},
        {"rhs_dilation": (2, 2)},
        {"lhs_dilation": (2, 2)},
        {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
    ],
)
def test_anything_but_a_plain_convolution_is_native(options):
    key = jax.random.key(0)
    x = jax.random.normal(key, (2, 4, 4, 4))
    inputs = 4 // options.get("feature_group_count", 1)
    shape = (4, 4, 3, 3) if "dimension_numbers" in options else (3, 3, inputs, 4)
    w = jax.random.normal(key, shape)
    route, native = route_and_native(1, [(2, 2), (2, 2)], **options)
    np.testing.assert_array_equal(route(x, w), native(x, w))
    assert "platform_index" not in str(jax.make_jaxpr(route)(x, w))


# volume, inputs, outputs, window, strides, padding
VOLUMES = {
    "cube": ((2, 5, 6, 7), 3, 4, (3, 3, 3), (1, 1, 1), [(1, 1)] * 3),
    "strided": ((2, 7, 8, 9), 3, 4, (3, 3, 3), (2, 2, 2), [(1, 1)] * 3),
    "projection": ((2, 6, 6, 6), 5, 4, (1, 1, 1), (2, 2, 2), [(0, 0)] * 3),
    "SAME": ((1, 6, 9, 12), 3, 4, (3, 3, 3), (2, 1, 1), "SAME"),
    "uneven": ((1, 9, 12, 12), 2, 3, (3, 5, 2), (1, 2, 3), [(2, 0), (-1, 1), (0, 3)]),
    "tiles": ((2, 4, 8, 8), 64, 64, (3, 3, 3), (1, 1, 1), [(1, 1)] * 3),
}


@pytest.mark.parametrize("case", long_unless(("cube", "uneven"), VOLUMES))
def test_volumes_have_the_native_value_and_gradients(case):
    volume, inputs, outputs, window, strides, padding = VOLUMES[case]
    x_key, w_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_key, (*volume, inputs))
    w = jax.random.normal(w_key, (*window, inputs, outputs))
    options = {"dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")}
    options |= {"window_strides": strides, "padding": padding}
    route, native = (
        partial(f, **options) for f in (conv_general_dilated, lax.conv_general_dilated)
    )
    actual = jax.jit(partial(value_and_gradients, route))(x, w)
    expected = jax.jit(partial(value_and_gradients, native))(x, w)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 3e-5
    for platform in ("cpu", "cuda", "tpu"):
        over_volumes = "[b, 0, 1, 2, f]" in lowered_text(route, x, w, platform)
        assert over_volumes == (platform != "cpu")


MAPPED = long_unless(
    lambda case: case == "odd tiles", ["two pixels", "several blocks of rows", "odd tiles"]
)


@pytest.mark.parametrize("case", MAPPED)
def test_vmap_over_images_and_over_weights(case):
    *sizes, stride, padding = SHAPES[case]
    with jax.enable_x64(True):  # How float32 rounds differs from one processor to the next.
        x, w = draw(*sizes, jnp.float64)
        xs, ws = jnp.stack([x, -2 * x]), jnp.stack([w, w[::-1]])
        route, native = route_and_native(stride, padding)
        both = partial(value_and_gradients, route)
        actual = jax.jit(jax.vmap(both))(xs, ws)
        for i in range(2):
            for a, e in zip(actual, value_and_gradients(native, xs[i], ws[i]), strict=True):
                assert relative_error(a[i], e) < 1e-12


@pytest.mark.parametrize("case", MAPPED)
def test_remat_and_pmap(case):
    *sizes, stride, padding = SHAPES[case]
    x, w = draw(*sizes)
    route, native = route_and_native(stride, padding)

    def step(x, w):
        return lax.psum(value_and_gradients(jax.checkpoint(route), x, w)[2], "d")

    halves = x.reshape(2, -1, *x.shape[1:])
    actual = jax.pmap(step, axis_name="d", in_axes=(0, None), devices=jax.devices()[:2])(halves, w)
    expected = value_and_gradients(native, x, w)[2]
    assert relative_error(actual[0], expected) < TOLERANCE[case]
