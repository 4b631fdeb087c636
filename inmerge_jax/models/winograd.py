"""3x3 convolution of stride 1 by Winograd's F(2x2, 3x3), for CPU.

Every 2x2 block of outputs comes from a 4x4 tile of inputs by 16 products per pair of channels in
place of 36 (Lavin and Gray 2016, arXiv 1509.09308, section 4.1):

    Y = A^T [(G K G^T) * (B^T D B)] A

The products are sixteen matrix products, one for each place in a tile. All the rest is additions,
which as array slices fuse. Values agree with the direct sum to float32 rounding; 16-bit floats
would lose bits in the transforms.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], ...]
Grid = list[list[jax.Array]]

_KERNEL, _TILE, _BLOCK = 3, 4, 2


def winograd(pads: Pads, precision: lax.PrecisionLike) -> Callable[..., jax.Array]:
    """The convolution padded by `pads`, as convolve(images, weight), with its gradients.

    images: (batch, height, width, inputs); weight: (3, 3, inputs, outputs). The gradient of the
    images is a convolution too; that of the weight is the exact adjoint, with as few products.
    """

    @jax.custom_vjp
    def convolve(images: jax.Array, weight: jax.Array) -> jax.Array:
        return _convolve(images, weight, pads, precision)

    def forward(images: jax.Array, weight: jax.Array):
        return convolve(images, weight), (images, weight)

    def backward(residuals, gradient: jax.Array):
        images, weight = residuals
        back = tuple((_KERNEL - 1 - low, _KERNEL - 1 - high) for low, high in pads)
        images_gradient = _convolve(gradient, weight[::-1, ::-1], back, precision, inputs=3)
        return images_gradient, _weight_gradient(images, gradient, pads, precision)

    convolve.defvjp(forward, backward)
    return convolve


def _convolve(
    images: jax.Array,
    weight: jax.Array,
    pads: Pads,
    precision: lax.PrecisionLike,
    inputs: int = 2,
) -> jax.Array:
    """The convolution whose input channels are this axis of the weight."""
    height, width = _output_size(images, pads)
    tiles, weights = _tiles(images, pads), _per_axis(_from_kernel, list(weight))
    products = [
        [_matmul(t, w, inputs - 2, precision) for t, w in zip(*rows, strict=True)]
        for rows in zip(tiles, weights, strict=True)
    ]
    blocks = _per_axis_of_grid(_to_block, products)
    pairs = [jnp.stack(row, axis=3) for row in blocks]
    spread = jnp.stack(pairs, axis=2)  # (batch, down, 2, across, 2, outputs)
    batch, down, _, across, _, outputs = spread.shape
    whole = spread.reshape(batch, _BLOCK * down, _BLOCK * across, outputs)
    return whole[:, :height, :width]


def _weight_gradient(
    images: jax.Array, gradient: jax.Array, pads: Pads, precision: lax.PrecisionLike
) -> jax.Array:
    """Gradient of the weight, from that of the output: the transposes of `_convolve`'s maps."""
    height, width = gradient.shape[1:3]
    even = ((0, 0), (0, height % _BLOCK), (0, width % _BLOCK), (0, 0))
    gradient = jnp.pad(gradient, even)
    blocks = [[gradient[:, i::_BLOCK, j::_BLOCK] for j in range(_BLOCK)] for i in range(_BLOCK)]
    spread = _per_axis_of_grid(_from_block, blocks)
    products = [
        [_contract(t, g, precision) for t, g in zip(*rows, strict=True)]
        for rows in zip(_tiles(images, pads), spread, strict=True)
    ]
    return jnp.stack([jnp.stack(row) for row in _per_axis_of_grid(_to_kernel, products)])


def _output_size(images: jax.Array, pads: Pads) -> tuple[int, int]:
    height, width = (
        size + low + high - _KERNEL + 1
        for size, (low, high) in zip(images.shape[1:3], pads, strict=True)
    )
    return height, width


def _tiles(images: jax.Array, pads: Pads) -> Grid:
    """B^T D B: for each place in a tile, the values of all tiles (batch, down, across, inputs)."""
    counts = [-(-size // _BLOCK) for size in _output_size(images, pads)]
    filled = [
        (low, _BLOCK * count + _KERNEL - 1 - low - size)
        for size, count, (low, _) in zip(images.shape[1:3], counts, pads, strict=True)
    ]
    # Not jnp.pad, which can't crop.
    edges = [(low, high, 0) for low, high in ((0, 0), *filled, (0, 0))]
    padded = lax.pad(images, jnp.zeros((), images.dtype), edges)
    (down, across) = (_BLOCK * count - 1 for count in counts)
    rows = _from_tile([padded[:, i : i + down : _BLOCK] for i in range(_TILE)])
    return [_from_tile([r[:, :, j : j + across : _BLOCK] for j in range(_TILE)]) for r in rows]


def _per_axis(transform: Callable, rows: Sequence[jax.Array]) -> Grid:
    """`transform` over the rows and then over the columns, which are each row's first axis."""
    return [transform(list(row)) for row in transform(rows)]


def _per_axis_of_grid(transform: Callable, grid: Grid) -> Grid:
    """`transform` over the rows of a grid and then over its columns."""
    columns = [transform(list(column)) for column in zip(*grid, strict=True)]
    return [transform(list(row)) for row in zip(*columns, strict=True)]


def _from_tile(d: Sequence[jax.Array]) -> list[jax.Array]:
    """B^T d."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _from_kernel(k: Sequence[jax.Array]) -> list[jax.Array]:
    """G k."""
    return [k[0], (k[0] + k[1] + k[2]) / 2, (k[0] - k[1] + k[2]) / 2, k[2]]


def _to_kernel(m: Sequence[jax.Array]) -> list[jax.Array]:
    """G^T m."""
    return [m[0] + (m[1] + m[2]) / 2, (m[1] - m[2]) / 2, (m[1] + m[2]) / 2 + m[3]]


def _to_block(m: Sequence[jax.Array]) -> list[jax.Array]:
    """A^T m."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _from_block(y: Sequence[jax.Array]) -> list[jax.Array]:
    """A y."""
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]


def _matmul(
    tiles: jax.Array, weight: jax.Array, axis: int, precision: lax.PrecisionLike
) -> jax.Array:
    flat = tiles.reshape(-1, tiles.shape[-1])
    flat = lax.dot_general(flat, weight, (((1,), (axis,)), ((), ())), precision=precision)
    return flat.reshape(*tiles.shape[:-1], -1)


def _contract(tiles: jax.Array, gradient: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    rows, columns = (x.reshape(-1, x.shape[-1]) for x in (tiles, gradient))
    return jnp.matmul(rows.T, columns, precision=precision)
