"""Convolutions in two formulations: `lax` convolutions on GPU and TPU, sums and matrix products on CPU.

XLA:CPU runs a grouped convolution 50 to 126 times slower than oneDNN does, and its dense convolution of an image of
three channels 7 times slower. Written as shifted multiply-adds and as matrix products, the same sums are fast there.
The platform is chosen when a computation is lowered, inside each function: callers never ask where they run.
All arrays are NHWC. Padding is ((top, bottom), (left, right)) in pixels and may be asymmetric.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

Padding = tuple[tuple[int, int], tuple[int, int]]
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def depthwise_conv(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    """Depthwise convolution: x [B, H, W, C], kernel [k, k, 1, C] -> [B, H', W', C], H' = (H + pad - k) // s + 1."""
    return _depthwise(x, kernel, stride, padding)


def pointwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """1×1 convolution as a matrix product: x [B, H, W, C], kernel [1, 1, C, F] -> [B, H, W, F]."""
    return lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))


def conv(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    """Dense convolution: x [B, H, W, C], kernel [k, k, C, F] -> [B, H', W', F]."""
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_columns_product, stride=stride, padding=padding),
        default=functools.partial(_lax_conv, stride=stride, padding=padding, groups=1),
    )


def silu(x: jax.Array) -> jax.Array:
    """x · sigmoid(x), written with tanh: XLA:CPU has a vector form of tanh, and calls exp and divides for the other."""
    half = 0.5 * x
    return half + half * jnp.tanh(half)


def _lax_conv(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding, groups: int) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=DIMENSIONS, feature_group_count=groups
    )


def _taps(x: jax.Array, size: tuple[int, int], stride: int, padding: Padding) -> list[jax.Array]:
    """What each tap of a k×k kernel sees: k² arrays [B, H', W', C], in the order of the kernel's rows."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    b, h, w, c = x.shape
    rows, columns = h - size[0], w - size[1]
    return [
        lax.slice(x, (0, i, j, 0), (b, i + rows + 1, j + columns + 1, c), (1, stride, stride, 1))
        for i, j in itertools.product(range(size[0]), range(size[1]))
    ]


def _columns_product(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    """The dense convolution as one matrix product of the taps side by side (im2col)."""
    columns = jnp.concatenate(_taps(x, kernel.shape[:2], stride, padding), axis=-1)
    return lax.dot_general(columns, kernel.reshape(-1, kernel.shape[3]), (((3,), (0,)), ((), ())))


def _shifted_sum(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    """The depthwise convolution as k² shifted multiply-adds, which XLA fuses into one loop."""
    weights = kernel.reshape(-1, 1, 1, 1, kernel.shape[3])
    return functools.reduce(
        jnp.add, (tap * weight for tap, weight in zip(_taps(x, kernel.shape[:2], stride, padding), weights))
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_shifted_sum, stride=stride, padding=padding),
        default=functools.partial(_lax_conv, stride=stride, padding=padding, groups=x.shape[3]),
    )


def _depthwise_forward(x, kernel, stride, padding):
    return _depthwise(x, kernel, stride, padding), (x, kernel)


def _depthwise_backward(stride, padding, residuals, dy):
    x, kernel = residuals
    direct = functools.partial(_lax_conv, stride=stride, padding=padding, groups=x.shape[3])
    return lax.platform_dependent(
        x,
        kernel,
        dy,
        cpu=functools.partial(_scanned_gradients, stride=stride, padding=padding),
        default=lambda x, kernel, dy: jax.vjp(direct, x, kernel)[1](dy),
    )


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _scanned_gradients(x, kernel, dy, *, stride: int, padding: Padding) -> tuple[jax.Array, jax.Array]:
    """Gradients of x and kernel, image by image: the shifts and the sums of one image stay in the cache."""

    def image_gradients(pair):
        x, dy = (image[None] for image in pair)
        rows = jnp.stack([(tap * dy).sum((0, 1)) for tap in _taps(x, kernel.shape[:2], stride, padding)])
        return _input_gradient(dy, kernel, x.shape[1:3], stride, padding)[0], rows.sum(1)

    dx, dkernel = lax.map(image_gradients, (x, dy))
    return dx, dkernel.sum(0).reshape(kernel.shape)


def _input_gradient(dy, kernel, size: tuple[int, int], stride: int, padding: Padding) -> jax.Array:
    """dx [B, *size, C]: stride² phases, each a sum of unit-stride shifts of dy, interleaved."""
    (top, _), (left, _) = padding
    phases = [-(-length // stride) for length in size]
    b, _, _, c = dy.shape
    dx = jnp.stack(
        [
            jnp.stack([_phase(dy, kernel, phases, stride, (top + a, left + e)) for e in range(stride)], axis=3)
            for a in range(stride)
        ],
        axis=2,
    )
    return dx.reshape(b, stride * phases[0], stride * phases[1], c)[:, : size[0], : size[1]]


def _phase(dy, kernel, size, stride: int, offset: tuple[int, int]) -> jax.Array:
    """One phase [B, *size, C] of dx: the rows u with u = stride·m + phase, where offset = phase + padding on each axis.

    Tap i reaches them from output row m + (offset - i) / stride, where that division is exact.
    """
    rows, columns = (
        [(tap, (start - tap) // stride) for tap in range(length) if (start - tap) % stride == 0]
        for start, length in zip(offset, kernel.shape[:2])
    )
    shifts = (-min((s for _, s in rows + columns), default=0), max((s for _, s in rows + columns), default=0))
    before = max(shifts[0], 0)
    after = [max(length + shifts[1] - have, 0) for length, have in zip(size, dy.shape[1:3])]
    padded = jnp.pad(dy, ((0, 0), (before, after[0]), (before, after[1]), (0, 0)))
    total = jnp.zeros((dy.shape[0], *size, dy.shape[3]), dy.dtype)
    for (i, down), (j, right) in itertools.product(rows, columns):
        corner = padded[:, before + down : before + down + size[0], before + right : before + right + size[1]]
        total = total + corner * kernel[i, j]
    return total
