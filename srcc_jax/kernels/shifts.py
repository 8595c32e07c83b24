"""What the kernels of sliding windows share: padding, the image as each tap of a window sees it, `lax`'s convolution.

Arrays are NHWC. Padding is ((top, bottom), (left, right)) in pixels and may be asymmetric.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Padding = tuple[tuple[int, int], tuple[int, int]]


def pad_image(x: jax.Array, padding: Padding, value: float = 0.0) -> jax.Array:
    """x [B, H, W, C] with `value` around it; negative padding cuts."""
    return lax.pad(x, jnp.asarray(value, x.dtype), ((0, 0, 0), *((*sides, 0) for sides in padding), (0, 0, 0)))


def taps(padded: jax.Array, size: tuple[int, int], stride: int, dilation: int = 1) -> list[jax.Array]:
    """What each tap of a window of `size` sees of the padded image: arrays [B, H', W', C], in the order of its rows."""
    b, h, w, c = padded.shape
    last = h - dilation * (size[0] - 1), w - dilation * (size[1] - 1)
    return [
        lax.slice(padded, (0, i, j, 0), (b, i + last[0], j + last[1], c), (1, stride, stride, 1))
        for i, j in itertools.product(*(range(0, dilation * length, dilation) for length in size))
    ]


def transposed_taps(
    arrays: Sequence[jax.Array],
    size: tuple[int, int],
    window: tuple[int, int],
    stride: int,
    padding: Padding,
    term: Callable[..., jax.Array],
) -> jax.Array:
    """What windows give back to the image of `size` (height, width) that they saw, the transpose of `taps`: [B, *size, C].

    A pixel gets the sum of term(i, j, *arrays [B, ., ., C] shifted to it) over the windows that see it at their tap (i, j).
    arrays [B, H', W', C]: one value per window, the first of the output's type; where all are 0, so must the term be.
    Only the padding's top and left matter. Written as stride² phases, each a sum of unit-stride shifts, interleaved.
    """
    (top, _), (left, _) = padding
    phases = -(-size[0] // stride), -(-size[1] // stride)
    rows = [
        jnp.stack([_phase(arrays, phases, window, stride, (top + a, left + e), term) for e in range(stride)], axis=3)
        for a in range(stride)
    ]
    whole = jnp.stack(rows, axis=2)
    return whole.reshape(whole.shape[0], stride * phases[0], stride * phases[1], -1)[:, : size[0], : size[1]]


def _phase(
    arrays, size: tuple[int, int], window: tuple[int, int], stride: int, offset: tuple[int, int], term
) -> jax.Array:
    """One phase [B, *size, C] of an image: its rows stride·m + offset - padding, m = 0, 1, ..., and its columns likewise.

    Tap i of the window brings to row m what the arrays hold in row m + (offset - i) / stride, where that division is exact.
    """
    rows, columns = (
        [(tap, (start - tap) // stride) for tap in range(length) if (start - tap) % stride == 0]
        for start, length in zip(offset, window)
    )
    shifts = [shift for _, shift in rows + columns]
    before, furthest = max(0, -min(shifts, default=0)), max(0, max(shifts, default=0))
    first = arrays[0]
    below, right_of = (max(0, furthest + length - have) for length, have in zip(size, first.shape[1:3]))
    around = [pad_image(array, ((before, below), (before, right_of))) for array in arrays]
    total = jnp.zeros((first.shape[0], *size, first.shape[3]), first.dtype)
    for (i, down), (j, right) in itertools.product(rows, columns):
        top, left = before + down, before + right
        total = total + term(i, j, *(array[:, top : top + size[0], left : left + size[1]] for array in around))
    return total


def lax_conv(x, kernel, *, stride: int, padding: Padding, dilation: int = 1, groups: int = 1) -> jax.Array:
    """The convolution of x [B, H, W, C] with a kernel [k, k, C / groups, F] as `lax` has it."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def lax_conv_transpose(x, kernel, *, stride: int, padding: int, output_padding: int, groups: int = 1) -> jax.Array:
    """The transposed convolution of x [B, H, W, C] with a kernel [k, k, C / groups, F]: zeros between the pixels of x."""
    around = tuple((k - 1 - padding, k - 1 - padding + output_padding) for k in kernel.shape[:2])
    return lax.conv_general_dilated(
        x,
        kernel[::-1, ::-1],
        (1, 1),
        around,
        lhs_dilation=(stride, stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
