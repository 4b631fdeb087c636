"""Convolution with its own route on CPU, where parts of XLA's are many times too slow.

What was measured against XLA's CPU convolution decides which way a shape goes:

- 3x3 kernels of stride 1 with 64 channels or more on both sides, in float32: Winograd's, with fewer
  than half the products, unless there are few tiles to share its transforms of the weight, or so
  many that they leave the processor's cache. (With 32 channels, DenseNet-121's, a step is no faster
  for it and takes twice as long to compile.)
- Of the others, output maps of at most 8x8 pixels, and 1x1 kernels: patches times weights. On the
  smallest maps the native operation loses an order of magnitude.
- Of the rest, 3x3 kernels: the native operation forward and for the gradient of the images,
  and a sum over blocks of rows for the gradient of the weight. There the native one treats the
  whole map as a kernel and takes two to four times as long.
- Volumes: a 2-D convolution of all slices, whose channels are those of the slices that a kernel
  spans.
- Everything else, and every other platform: the native operation.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from inmerge_jax.models.winograd import Pads, winograd

_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
_NDHWC = lax.ConvDimensionNumbers((0, 4, 1, 2, 3), (4, 3, 0, 1, 2), (0, 4, 1, 2, 3))
_SMALL_MAP = 8 * 8
_ROWS_PER_PRODUCT, _VALUES_AT_ONCE = 1024, 2**21
_WINOGRAD_CHANNELS, _WINOGRAD_MAP, _WINOGRAD_TILES = 64, range(2 * 2, 128 * 128), 128


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """`lax.conv_general_dilated`, fast on CPU too: for `flax.linen.Conv(conv_general_dilated=...)`.

    Takes the same arguments and returns the same to rounding. The platform that counts is the one
    compiled for, not the one that traces, and the other route costs nothing. Forward-mode
    differentiation is not available where CPU goes its own way with a 3x3 kernel.

    Plain convolutions take the CPU's route: images (batch, height, width, inputs), weights (height,
    width, inputs, outputs), or volumes with a depth before the height; no groups, no dilation.
    """

    def native(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
        )

    dilation = (*(lhs_dilation or ()), *(rhs_dilation or ()))
    layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    plain = feature_group_count == 1 and all(step == 1 for step in dilation)
    if layout not in (_NHWC, _NDHWC) or not plain:
        return native(lhs, rhs)

    window, strides = rhs.shape[:-2], tuple(window_strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:-1], window, strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    if layout == _NDHWC:

        def slices(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
            return _by_slices(lhs, rhs, strides, pads, precision)

        return lax.platform_dependent(lhs, rhs, cpu=slices, default=native)
    height, width = output = _output_size(lhs.shape, window, strides, pads)

    def product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        patches = _patches(lhs, window, strides, pads, output)
        return jnp.matmul(patches, rhs.reshape(-1, rhs.shape[-1]), precision=precision)

    def rows(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return _with_weight_gradient_by_rows(native, strides, pads, precision)(lhs, rhs)

    if window == (3, 3) and strides == (1, 1) and _suits_winograd(lhs, rhs, height, width):
        tiled = winograd(pads, precision)
        return lax.platform_dependent(lhs, rhs, cpu=tiled, default=native)
    if height * width <= _SMALL_MAP or window == (1, 1):
        return lax.platform_dependent(lhs, rhs, cpu=product, default=native)
    if window == (3, 3):
        return lax.platform_dependent(lhs, rhs, cpu=rows, default=native)
    return native(lhs, rhs)


def _by_slices(
    lhs: jax.Array,
    rhs: jax.Array,
    strides: Sequence[int],
    pads: Pads,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """A convolution of volumes as one of their slices, (batch * depth, height, width, inputs)."""
    taps, stride = rhs.shape[0], strides[0]
    zero = jnp.zeros((), lhs.dtype)
    padded = lax.pad(lhs, zero, ((0, 0, 0), (*pads[0], 0), *((0, 0, 0),) * 3))
    depth = (padded.shape[1] - taps) // stride + 1
    spanned = [padded[:, i : i + stride * (depth - 1) + 1 : stride] for i in range(taps)]
    images = jnp.concatenate(spanned, axis=-1).reshape(-1, *lhs.shape[2:4], taps * lhs.shape[-1])
    weight = jnp.moveaxis(rhs, 0, 2).reshape(*rhs.shape[1:3], -1, rhs.shape[-1])
    result = conv_general_dilated(
        images, weight, strides[1:], pads[1:], dimension_numbers=_NHWC, precision=precision
    )
    return result.reshape(len(lhs), depth, *result.shape[1:])


def _output_size(
    lhs_shape: Sequence[int], window: Sequence[int], strides: Sequence[int], pads: Pads
) -> tuple[int, int]:
    """Height and width of the output."""
    height, width = (
        (size + low + high - taps) // stride + 1
        for size, taps, stride, (low, high) in zip(
            lhs_shape[1:3], window, strides, pads, strict=True
        )
    )
    return height, width


def _suits_winograd(lhs: jax.Array, rhs: jax.Array, height: int, width: int) -> bool:
    tiles = lhs.shape[0] * -(-height // 2) * -(-width // 2)
    return (
        min(rhs.shape[2:]) >= _WINOGRAD_CHANNELS
        and height * width in _WINOGRAD_MAP
        and tiles >= _WINOGRAD_TILES
        and min(jnp.finfo(x.dtype).bits for x in (lhs, rhs)) >= 32
    )


def _patches(
    lhs: jax.Array,
    window: Sequence[int],
    strides: Sequence[int],
    pads: Pads,
    output: tuple[int, int],
) -> jax.Array:
    """What each output pixel sees: (batch, height, width, taps * inputs), taps row by row."""
    (down, across), (height, width) = strides, output
    zero = jnp.zeros((), lhs.dtype)
    padded = lax.pad(lhs, zero, ((0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)))
    taps = [
        padded[:, i : i + down * (height - 1) + 1 : down, j : j + across * (width - 1) + 1 : across]
        for i in range(window[0])
        for j in range(window[1])
    ]
    return jnp.concatenate(taps, axis=-1)


def _with_weight_gradient_by_rows(
    native: Callable[[jax.Array, jax.Array], jax.Array],
    strides: Sequence[int],
    pads: Pads,
    precision: lax.PrecisionLike,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`native` with a faster gradient of its weight."""

    @jax.custom_vjp
    def convolve(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return native(lhs, rhs)

    def forward(lhs: jax.Array, rhs: jax.Array):
        return native(lhs, rhs), (lhs, rhs)

    def backward(residuals, gradient: jax.Array):
        lhs, rhs = residuals
        (lhs_gradient,) = jax.linear_transpose(lambda x: native(x, rhs), lhs)(gradient)
        rhs_gradient = _weight_gradient(lhs, gradient, rhs.shape, strides, pads, precision)
        return lhs_gradient, rhs_gradient

    convolve.defvjp(forward, backward)
    return convolve


def _weight_gradient(
    lhs: jax.Array,
    gradient: jax.Array,
    shape: Sequence[int],
    strides: Sequence[int],
    pads: Pads,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Gradient of a convolution's weight of this `shape`, from that of its output.

    Shifting the images across and the gradient down gives one product, (shifts * inputs) by
    (shifts * outputs), for all taps. It goes over a block of rows at a time, so that the shifted
    copies stay in the processor's cache.
    """
    (down, across, inputs, outputs), (batch, height) = shape, lhs.shape[:2]
    (top, _), (left, right) = pads
    width, sums = gradient.shape[2], jnp.promote_types(lhs.dtype, jnp.float32)
    zero = jnp.zeros((), lhs.dtype)
    # Spread so that row r of the images meets row r + down - 1 - i of the gradient in tap i.
    above = down - 1 - top
    below = height - above - strides[0] * (gradient.shape[1] - 1) - 1 + down - 1
    spread = ((0, 0, 0), (above, below, strides[0] - 1), (0, 0, 0), (0, 0, 0))
    gradient = lax.pad(gradient, zero, spread)
    block = _block(height, batch * width)
    if batch * height * width * (inputs + outputs) <= _VALUES_AT_ONCE:
        block = height  # All of it stays in the cache, and XLA's products are slower in a loop.

    def add_block(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        x = lax.dynamic_slice_in_dim(lhs, start, block, axis=1)
        x = lax.pad(x, zero, ((0, 0, 0), (0, 0, 0), (left, right, 0), (0, 0, 0)))
        ends = [j + strides[1] * (width - 1) + 1 for j in range(across)]
        x = jnp.concatenate([x[:, :, j : ends[j] : strides[1]] for j in range(across)], axis=-1)
        g = lax.dynamic_slice_in_dim(gradient, start, block + down - 1, axis=1)
        g = jnp.concatenate([g[:, down - 1 - i :][:, :block] for i in range(down)], axis=-1)
        product = lax.dot_general(
            x.reshape(-1, across * inputs),
            g.reshape(-1, down * outputs),
            (((0,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=sums,
        )
        return total + product, None

    total = jnp.zeros((across * inputs, down * outputs), sums)
    total, _ = lax.scan(add_block, total, jnp.arange(0, height, block))
    return total.reshape(across, inputs, down, outputs).transpose(2, 0, 1, 3).astype(lhs.dtype)


def _block(height: int, row: int) -> int:
    """Fewest image rows that divide `height` and give a product enough rows to be efficient."""
    divisors = [n for n in range(1, height + 1) if height % n == 0]
    return next((n for n in divisors if n * row >= _ROWS_PER_PRODUCT), height)
