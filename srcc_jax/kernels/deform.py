"""Deformable convolution (Dai et al. 2017; with a mask: Zhu et al. 2019): each tap looks where its offset sends it.

The samples of all taps side by side would be as large as k² images, and a gather's own gradient is slow. So one tap is
sampled, multiplied and forgotten before the next, on CPU also one piece of the output after the other, and the gradient
samples again. All arrays are NHWC.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from srcc_jax.kernels.convolution import Padding

_PIECE = 2**18  # values that a tap samples at a time on CPU, where they then stay in the cache


def deform_conv(
    x: jax.Array,
    offsets: jax.Array,
    kernel: jax.Array,
    *,
    padding: Padding,
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    offset_groups: int = 1,
    groups: int = 1,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Deformable convolution, torchvision's deform_conv2d: x [B, H, W, C], kernel [k, l, C / groups, F] -> [B, H', W', F].

    offsets [B, H', W', 2 · G · k · l] in pixels: for each of G = offset_groups groups of channels and each tap, row by row,
    how far down and to the right of its place in the grid it looks. Between pixels it sees their bilinear mean; what lies
    outside of the image is 0. mask [B, H', W', G · k · l] weighs the taps. stride and dilation: of rows and columns, or one
    number for both. ValueError where shapes disagree.
    """
    axes = list(zip(x.shape[1:3], kernel.shape[:2], padding, _pair(stride), _pair(dilation)))
    size = tuple((length + sum(around) - gap * (taps - 1) - 1) // step + 1 for length, taps, around, step, gap in axes)
    _check(x, offsets, kernel, mask, size, offset_groups, groups)
    batch, pixels, taps = x.shape[0], math.prod(size), math.prod(kernel.shape[:2])
    rows, columns = (
        step * jnp.arange(count)[:, None] - before + gap * jnp.arange(taps)[None]
        for count, (_, taps, (before, _), step, gap) in zip(size, axes)
    )
    grid = jnp.stack(jnp.broadcast_arrays(rows[:, None, :, None], columns[None, :, None, :]), axis=-1)
    shape = batch, pixels, offset_groups, taps
    places = offsets.astype(jnp.float32).reshape(*shape, 2) + grid.reshape(1, pixels, 1, taps, 2)
    if mask is not None:
        places = jnp.concatenate([places, mask.astype(jnp.float32).reshape(*shape, 1)], axis=-1)
    piece = min(pixels, max(1, _PIECE // (batch * x.shape[3])))
    out = lax.platform_dependent(
        x,
        places,
        _ungrouped(kernel, groups).reshape(taps, x.shape[3], -1),
        cpu=lambda *arrays: _deformed(*arrays, piece),
        default=lambda *arrays: _deformed(*arrays, pixels),
    )
    return out.reshape(batch, *size, kernel.shape[3])


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _check(x, offsets, kernel, mask, size: Sequence[int], offset_groups: int, groups: int) -> None:
    height, width, inputs, features = kernel.shape
    if inputs * groups != x.shape[3] or features % groups:
        raise ValueError(f"a kernel {kernel.shape} in {groups} groups does not fit an image of {x.shape[3]} channels")
    if x.shape[3] % offset_groups:
        raise ValueError(f"{x.shape[3]} channels cannot be split into {offset_groups} groups of offsets")
    for name, array, numbers in (("offsets", offsets, 2), ("mask", mask, 1)):
        wanted = (x.shape[0], *size, numbers * offset_groups * height * width)
        if array is not None and array.shape != wanted:
            raise ValueError(f"{name} has the shape {array.shape}: this convolution needs {wanted}")


def _ungrouped(kernel: jax.Array, groups: int) -> jax.Array:
    """[k, l, C / groups, F] -> the dense kernel [k, l, C, F] with zeros between the groups."""
    height, width, inputs, features = kernel.shape
    blocks = kernel.reshape(height, width, 1, inputs, groups, features // groups)
    same = jnp.eye(groups, dtype=kernel.dtype).reshape(1, 1, groups, 1, groups, 1)
    return (blocks * same).reshape(height, width, groups * inputs, features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _deformed(x: jax.Array, places: jax.Array, kernel: jax.Array, piece: int) -> jax.Array:
    """x [B, H, W, C], kernel [K, C, F] -> [B, P, F], `piece` of the P output pixels at a time.

    places [B, P, G, K, 2 or 3], float32: row and column of x where each tap looks and, if taps are weighed, its weight.
    """
    return _deformed_forward(x, places, kernel, piece)[0]


def _deformed_forward(x, places, kernel, piece):
    (batch, pixels, groups), channels, features = places.shape[:3], x.shape[3], kernel.shape[2]
    image = _bordered(x, groups)

    def tap(total, inputs):
        (row, column, *weight), matrix = inputs
        indices, shares, _ = _neighbours(row, column, x.shape[1:3], groups)
        seen = _weigh(_mix([_take(image, index) for index in indices], shares), weight)
        seen = seen.astype(x.dtype).reshape(batch, piece, channels)
        return total + _product(seen, matrix), None

    def one_piece(taps):
        return lax.scan(tap, jnp.zeros((batch, piece, features), jnp.float32), (taps, kernel))[0]

    out = _joined(lax.map(one_piece, _taps(places, piece)), pixels)
    return out.astype(x.dtype), (x, places, kernel)


def _deformed_backward(piece, residuals, dy):
    """The batch is cut into as many groups as there are devices, so that one that is sharded stays where it is."""
    x, places, kernel = residuals
    devices = math.gcd(x.shape[0], jax.device_count())
    parts = [a.reshape(devices, -1, *a.shape[1:]) for a in (x, places, dy)]
    dx, dplaces, dkernel = jax.vmap(functools.partial(_gradients, kernel=kernel, piece=piece))(*parts)
    return dx.reshape(x.shape).astype(x.dtype), dplaces.reshape(places.shape), dkernel.sum(0).astype(kernel.dtype)


_deformed.defvjp(_deformed_forward, _deformed_backward)


def _gradients(x, places, dy, kernel, piece):
    """Gradients of x, places and kernel, float32. dy is transposed once a piece, and nothing that a tap makes ever is."""
    (batch, pixels, groups), channels, features = places.shape[:3], x.shape[3], kernel.shape[2]
    image, backwards = _bordered(x, groups), kernel.swapaxes(1, 2)

    def tap(dy, dy_transposed, dimage, inputs):
        (row, column, *weight), matrix = inputs
        indices, shares, slopes = _neighbours(row, column, x.shape[1:3], groups)
        corners = [_take(image, index) for index in indices]
        seen, dseen = _mix(corners, shares), _product(dy, matrix).reshape(batch, piece * groups, -1)
        dweight = [_sum_channels(seen * dseen) for _ in weight]
        seen, dseen = _weigh(seen, weight), _weigh(dseen, weight)
        dplace = [_sum_channels(_mix(corners, slope) * dseen) for slope in slopes]
        for index, share in zip(indices, shares):
            dimage = _add_rows(dimage, index, dseen * share[..., None])
        dkernel = _product(dy_transposed, seen.astype(x.dtype).reshape(-1, channels))
        return dimage, (jnp.stack(dplace + dweight), dkernel)

    def one_piece(totals, inputs):
        (dimage, dbackwards), (taps, dy) = totals, inputs
        both = dy, dy.reshape(-1, features).T
        dimage, (dplaces, more) = lax.scan(functools.partial(tap, *both), dimage, (taps, backwards))
        return (dimage, dbackwards + more), dplaces

    start = jnp.zeros(image.shape, jnp.float32), jnp.zeros(backwards.shape, jnp.float32)
    (dimage, dbackwards), dplaces = lax.scan(one_piece, start, (_taps(places, piece), _pieces(dy, piece)))
    dplaces = dplaces.reshape(*dplaces.shape[:4], piece, groups).transpose(0, 3, 4, 5, 1, 2)
    return _without_border(dimage, x.shape), _joined(dplaces, pixels), dbackwards.swapaxes(1, 2)


def _pieces(array: jax.Array, piece: int) -> jax.Array:
    """[B, P, ...] -> [pieces, B, piece, ...], zeros after the last pixel."""
    batch, pixels, *rest = array.shape
    count = -(-pixels // piece)
    array = jnp.pad(array, ((0, 0), (0, count * piece - pixels), *((0, 0) for _ in rest)))
    return jnp.moveaxis(array.reshape(batch, count, piece, *rest), 1, 0)


def _joined(pieces: jax.Array, pixels: int) -> jax.Array:
    """[pieces, B, piece, ...] -> [B, P, ...], the inverse of `_pieces`."""
    batch, _, *rest = pieces.shape[1:]
    return jnp.moveaxis(pieces, 0, 1).reshape(batch, -1, *rest)[:, :pixels]


def _taps(places: jax.Array, piece: int) -> jax.Array:
    """[B, P, G, K, R] -> [pieces, K, R, B, piece · G]: what one tap after the other needs of one piece after the other."""
    pieces = _pieces(places, piece)
    taps = pieces.transpose(0, 4, 5, 1, 2, 3)
    return taps.reshape(*taps.shape[:4], -1)


def _bordered(x: jax.Array, groups: int) -> jax.Array:
    """[B, H, W, C] -> rows of channels [B, (H + 3) · (W + 3) · G, C / G] of the image inside zeros.

    With one row and column before and two after it, places can be clipped to -1 .. H and -1 .. W and need no other check.
    """
    around = jnp.pad(x, ((0, 0), (1, 2), (1, 2), (0, 0)))
    return around.reshape(x.shape[0], -1, x.shape[3] // groups)


def _without_border(image: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    batch, height, width, channels = shape
    return image.reshape(batch, height + 3, width + 3, channels)[:, 1:-2, 1:-2]


def _neighbours(row: jax.Array, column: jax.Array, size: Sequence[int], groups: int):
    """Of places [B, N], N = pixels · G: the rows in `_bordered` of the four pixels around each, and their parts in it.

    Three lists of arrays [B, N]: 4 indices; 4 shares in the bilinear mean; and for its slope downwards and to the right 4
    shares each, 0 where a place was clipped.
    """
    (height, width), number = size, row.shape[1]
    y, x = jnp.clip(row, -1, height), jnp.clip(column, -1, width)
    top, left = jnp.floor(y), jnp.floor(x)
    down, right = y - top, x - left
    pixel = (top.astype(jnp.int32) + 1) * (width + 3) + left.astype(jnp.int32) + 1
    first = pixel * groups + (jnp.arange(number) % groups).reshape(1, number)
    indices = [first + step * groups for step in (0, 1, width + 3, width + 4)]
    up, over = 1 - down, 1 - right
    inside_y, inside_x = (y == row).astype(row.dtype), (x == column).astype(row.dtype)
    slope_y = [inside_y * part for part in (-over, -right, over, right)]
    slope_x = [inside_x * part for part in (-up, up, -down, down)]
    return indices, [up * over, up * right, down * over, down * right], [slope_y, slope_x]


def _take(image: jax.Array, index: jax.Array) -> jax.Array:
    """image [B, L, c], index [B, N] -> [B, N, c]."""
    return jax.vmap(lambda rows, i: rows.at[i].get(mode="clip", wrap_negative_indices=False))(image, index)


def _add_rows(image: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
    """image [B, L, c] with rows [B, N, c] added at index [B, N]."""
    return jax.vmap(lambda image, i, r: image.at[i].add(r, mode="drop", wrap_negative_indices=False))(
        image, index, rows
    )


def _mix(corners: Sequence[jax.Array], shares: Sequence[jax.Array]) -> jax.Array:
    """Sum of the corners [B, N, c], each times its share [B, N]."""
    return functools.reduce(jnp.add, (corner * share[..., None] for corner, share in zip(corners, shares)))


def _weigh(values: jax.Array, weight: Sequence[jax.Array]) -> jax.Array:
    """values [B, N, c] times weight [B, N], of which there is one or none."""
    return values * weight[0][..., None] if weight else values


def _sum_channels(values: jax.Array) -> jax.Array:
    """[B, N, c] -> [B, N], as a product with ones: XLA:CPU sums along the last axis slowly."""
    return _product(values, jnp.ones((values.shape[2], 1), values.dtype))[..., 0]


def _product(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """[..., C], [C, F] -> [..., F], float32."""
    over_last = (((rows.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(rows, matrix, over_last, preferred_element_type=jnp.float32)
