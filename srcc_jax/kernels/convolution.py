"""Convolutions in two formulations: `lax` convolutions on GPU and TPU, sums and matrix products on CPU.

XLA:CPU runs a grouped convolution 50 to 126 times slower than oneDNN does, and its dense convolution of an image of
three channels 7 times slower. Written as shifted multiply-adds and as matrix products, the same sums are fast there.
The platform is chosen when a computation is lowered, inside each function: callers never ask where they run.
All arrays are NHWC. Padding is ((top, bottom), (left, right)) in pixels and may be asymmetric.

The gradients are written out, because derived ones are slow on CPU for three reasons, each worth up to a factor of two:
XLA transposes the wider factor of a product, recomputes a convolution inside every sum that reads it, and keeps the
intermediate values of an activation. `lax.optimization_barrier` is what tells it not to.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax

Padding = tuple[tuple[int, int], tuple[int, int]]


def depthwise_conv(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    """Depthwise convolution: x [B, H, W, C], kernel [k, k, 1, C] -> [B, H', W', C].

    H' = (H + top + bottom - k) // stride + 1, W' likewise.
    """
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _shifted_conv(x, kernel, stride, padding),
        default=functools.partial(_lax_conv, stride=stride, padding=padding, groups=x.shape[3]),
    )


def pointwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """1×1 convolution as a matrix product: x [B, H, W, C], kernel [1, 1, C, F] -> [B, H, W, F]."""
    return _product(x, kernel[0, 0])


def conv(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    """Dense convolution: x [B, H, W, C], kernel [k, k, C, F] -> [B, H', W', F]."""
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_columns_product, stride=stride, padding=padding),
        default=functools.partial(_lax_conv, stride=stride, padding=padding, groups=1),
    )


@jax.custom_vjp
def silu(x: jax.Array) -> jax.Array:
    """x · sigmoid(x), of any shape. Written with tanh, of which XLA:CPU has a fast vector form.

    The gradient keeps x alone and computes the rest again.
    """
    half = 0.5 * x
    return half + half * jnp.tanh(half)


def _silu_forward(x):
    return silu(x), x


def _silu_backward(x, dy):
    half = 0.5 * lax.optimization_barrier(x)  # else XLA finds the tanh of the forward pass, and keeps it
    tanh = jnp.tanh(half)
    return (dy * (0.5 + 0.5 * tanh + 0.5 * half * (1 - tanh * tanh)),)


silu.defvjp(_silu_forward, _silu_backward)


@jax.custom_vjp
def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x [B, H, W, C], matrix [C, F] -> [B, H, W, F]."""
    return lax.dot_general(x, matrix, (((3,), (0,)), ((), ())))


def _product_forward(x, matrix):
    return _product(x, matrix), (x, matrix)


def _product_backward(residuals, dy):
    """The matrix's gradient xᵀ·dy is formed so that the narrower of x and dy is the one transposed."""
    x, matrix = residuals
    over_pixels = (((0, 1, 2), (0, 1, 2)), ((), ()))
    dx = lax.dot_general(dy, matrix, (((3,), (1,)), ((), ())))
    if x.shape[3] <= dy.shape[3]:
        return dx, lax.dot_general(x, dy, over_pixels)
    return dx, lax.optimization_barrier(lax.dot_general(dy, x, over_pixels)).T


_product.defvjp(_product_forward, _product_backward)


def _lax_conv(x, kernel, *, stride: int, padding: Padding, groups: int) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def _taps(padded: jax.Array, size: tuple[int, int], stride: int) -> list[jax.Array]:
    """What each tap of a kernel of `size` sees of the padded image: arrays [B, H', W', C], in the order of its rows."""
    b, h, w, c = padded.shape
    return [
        lax.slice(padded, (0, i, j, 0), (b, h - size[0] + i + 1, w - size[1] + j + 1, c), (1, stride, stride, 1))
        for i, j in itertools.product(range(size[0]), range(size[1]))
    ]


def _columns_product(x, kernel, *, stride: int, padding: Padding) -> jax.Array:
    """The dense convolution as one matrix product of the taps side by side (im2col)."""
    taps = _taps(jnp.pad(x, ((0, 0), *padding, (0, 0))), kernel.shape[:2], stride)
    return _product(jnp.concatenate(taps, axis=-1), kernel.reshape(-1, kernel.shape[3]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _shifted_conv(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """The depthwise convolution as shifted multiply-adds, which XLA fuses into one loop."""
    return _shifted_conv_forward(x, kernel, stride, padding)[0]


def _shifted_conv_forward(x, kernel, stride, padding):
    """Keeps the padded image, which both passes read, so that the unpadded one need not be in memory."""
    padded = lax.optimization_barrier(jnp.pad(x, ((0, 0), *padding, (0, 0))))
    taps = _taps(padded, kernel.shape[:2], stride)
    weights = kernel.reshape(len(taps), 1, 1, 1, -1)
    return functools.reduce(jnp.add, (tap * weight for tap, weight in zip(taps, weights))), (padded, kernel)


def _shifted_conv_backward(stride, padding, residuals, dy):
    padded, kernel = residuals
    size = padded.shape[1] - sum(padding[0]), padded.shape[2] - sum(padding[1])
    dx = lax.optimization_barrier(_input_gradient(dy, kernel, size, stride, padding))
    return dx, _kernel_gradient(padded, dy, kernel.shape, stride)


_shifted_conv.defvjp(_shifted_conv_forward, _shifted_conv_backward)


def _input_gradient(dy, kernel, size: tuple[int, int], stride: int, padding: Padding) -> jax.Array:
    """dx [B, *size, C]: stride² phases, each a sum of unit-stride shifts of dy, interleaved."""
    (top, _), (left, _) = padding
    b, _, _, c = dy.shape
    phases = -(-size[0] // stride), -(-size[1] // stride)
    rows = [
        jnp.stack([_phase(dy, kernel, phases, stride, (top + a, left + e)) for e in range(stride)], axis=3)
        for a in range(stride)
    ]
    dx = jnp.stack(rows, axis=2).reshape(b, stride * phases[0], stride * phases[1], c)
    return dx[:, : size[0], : size[1]]


def _phase(dy, kernel, size: tuple[int, int], stride: int, offset: tuple[int, int]) -> jax.Array:
    """One phase [B, *size, C] of dx: its rows stride·m + offset - padding, m = 0, 1, ..., and its columns likewise.

    Tap i of the kernel brings to row m what dy holds in row m + (offset - i) / stride, where that division is exact.
    """
    rows, columns = (
        [(tap, (start - tap) // stride) for tap in range(length) if (start - tap) % stride == 0]
        for start, length in zip(offset, kernel.shape[:2])
    )
    shifts = [shift for _, shift in rows + columns]
    before, furthest = max(0, -min(shifts, default=0)), max(0, max(shifts, default=0))
    below, right_of = (max(0, furthest + length - have) for length, have in zip(size, dy.shape[1:3]))
    around = jnp.pad(dy, ((0, 0), (before, below), (before, right_of), (0, 0)))
    total = jnp.zeros((dy.shape[0], *size, dy.shape[3]), dy.dtype)
    for (i, down), (j, right) in itertools.product(rows, columns):
        top, left = before + down, before + right
        total = total + around[:, top : top + size[0], left : left + size[1]] * kernel[None, i, None, j]
    return total


def _kernel_gradient(padded, dy, shape: tuple[int, ...], stride: int) -> jax.Array:
    """The kernel's gradient, of `shape`, image by image and tap by tap: what one product reads stays in the cache.

    The batch is cut into as many groups as there are devices, which go side by side. Sharded over the devices it then
    stays where it is; one loop over the whole batch would bring every image to every device.
    """
    groups = math.gcd(padded.shape[0], jax.device_count())
    padded, dy = (a.reshape(groups, -1, *a.shape[1:]) for a in (padded, dy))
    total = jax.vmap(functools.partial(_group_kernel_gradient, shape=shape, stride=stride))(padded, dy)
    return total.sum(0).reshape(shape)


def _group_kernel_gradient(padded, dy, *, shape: tuple[int, ...], stride: int) -> jax.Array:
    """[k·k, C] of one group. A product with ones sums the pixels: XLA:CPU has no fast sum of products over them."""
    height, width, _, channels = shape
    images, rows, columns = dy.shape[:3]
    seen = (stride * (rows - 1) + 1, stride * (columns - 1) + 1, channels)
    ones = jnp.ones((1, rows * columns), dy.dtype)

    def image_gradient(b, total):
        image, dy_image = padded[b], dy[b]

        def tap_gradient(tap):
            window = lax.dynamic_slice(image, (tap // width, tap % width, 0), seen)[::stride, ::stride]
            return (ones @ (window * dy_image).reshape(-1, channels))[0]

        return total + lax.map(tap_gradient, jnp.arange(height * width))

    return lax.fori_loop(0, images, image_gradient, jnp.zeros((height * width, channels), dy.dtype))
