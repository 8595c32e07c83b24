"""Maximum and average over square windows: `lax` on GPU and TPU, shifted images on CPU.

XLA:CPU takes 30 times as long as torch for the gradient of its own maximum over 3×3 windows, and 3 times for their mean.
Arrays are NHWC; padding is ((top, bottom), (left, right)) in pixels.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from srcc_jax.kernels.shifts import Padding, pad_image, taps, transposed_taps


def max_pool(x: jax.Array, *, size: int, stride: int, padding: Padding) -> jax.Array:
    """The largest value of each size×size window: x [B, H, W, C] -> [B, H', W', C], H' = (H + top + bottom - size) // stride + 1.

    Padding never wins: it is -inf. The gradient goes to the first of equal values, in the order of the window's rows.
    """
    return lax.platform_dependent(
        x,
        cpu=lambda x: _largest_tap(x, x.shape[1:3], size, stride, padding),
        default=lambda x: _reduce_window(x, -jnp.inf, lax.max, size, stride, padding),
    )


def avg_pool(x: jax.Array, *, size: int, stride: int, padding: Padding, count_include_pad: bool = True) -> jax.Array:
    """The mean of each size×size window: x [B, H, W, C] -> [B, H', W', C], sizes as of `max_pool`.

    count_include_pad: padding counts as zeros; else the mean is over the pixels of the image alone.
    """
    total = lax.platform_dependent(
        x,
        cpu=lambda x: functools.reduce(jnp.add, taps(pad_image(x, padding), (size, size), stride)),
        default=lambda x: _reduce_window(x, 0.0, lax.add, size, stride, padding),
    )
    if count_include_pad:
        return total / (size * size)
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    return total / _reduce_window(ones, 0.0, lax.add, size, stride, padding)


def _reduce_window(x, initial, operation, size: int, stride: int, padding: Padding) -> jax.Array:
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, x.dtype.type(initial), operation, window, strides, ((0, 0), *padding, (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _largest_tap(x: jax.Array, shape: tuple[int, int], size: int, stride: int, padding: Padding) -> jax.Array:
    """The maximum over the taps of a window, of an image of `shape` (height, width)."""
    return functools.reduce(jnp.maximum, taps(pad_image(x, padding, -jnp.inf), (size, size), stride))


def _largest_tap_forward(x, shape, size, stride, padding):
    """Keeps which tap was the largest, and nothing else: a byte a pixel."""
    largest, *others = taps(pad_image(x, padding, -jnp.inf), (size, size), stride)
    winner = jnp.zeros(largest.shape, jnp.int8 if size * size <= 128 else jnp.int32)
    for number, tap in enumerate(others, 1):
        winner = jnp.where(tap > largest, winner.dtype.type(number), winner)
        largest = jnp.maximum(largest, tap)
    return largest, lax.optimization_barrier(winner)


def _largest_tap_backward(shape, size, stride, padding, winner, dy):
    def given(row: int, column: int, dy: jax.Array, winner: jax.Array) -> jax.Array:
        return jnp.where(winner == row * size + column, dy, 0)

    return (transposed_taps((dy, winner), shape, (size, size), stride, padding, given),)


_largest_tap.defvjp(_largest_tap_forward, _largest_tap_backward)
