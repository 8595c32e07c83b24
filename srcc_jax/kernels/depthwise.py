"""Depthwise convolution and its transpose: `lax` on GPU and TPU, shifted multiply-adds on CPU.

XLA:CPU runs a grouped convolution 50 to 126 times slower than oneDNN does; as shifted multiply-adds, which it fuses
into one loop, the same sums are fast. The gradients are written out: derived ones are slow, because XLA transposes the
wider factor of a product and recomputes a convolution inside every sum that reads it. `lax.optimization_barrier` is
what tells it not to.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from srcc_jax.kernels.shifts import Padding, lax_conv, lax_conv_transpose, pad_image, taps, transposed_taps


def depthwise_conv(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    """Depthwise convolution: x [B, H, W, C], kernel [k, k, 1, C] -> [B, H', W', C].

    H' = (H + top + bottom - k) // stride + 1, W' likewise.
    """
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _shifted_conv(x, kernel, stride, padding),
        default=functools.partial(lax_conv, stride=stride, padding=padding, groups=x.shape[3]),
    )


def depthwise_conv_transpose(
    x: jax.Array, kernel: jax.Array, *, stride: int, padding: int, output_padding: int = 0
) -> jax.Array:
    """Transposed depthwise convolution: x [B, H, W, C], kernel [k, k, C, 1] -> [B, H', W', C], as of `conv_transpose`."""
    kernel = kernel.swapaxes(2, 3)
    settings = {"stride": stride, "padding": padding, "output_padding": output_padding}
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_shifted_conv_transpose, **settings),
        default=functools.partial(lax_conv_transpose, groups=x.shape[3], **settings),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _shifted_conv(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """The depthwise convolution as shifted multiply-adds, which XLA fuses into one loop."""
    return _shifted_conv_forward(x, kernel, stride, padding)[0]


def _shifted_conv_forward(x, kernel, stride, padding):
    """Keeps the padded image, which both passes read, so that the unpadded one need not be in memory."""
    padded = lax.optimization_barrier(pad_image(x, padding))
    seen = taps(padded, kernel.shape[:2], stride)
    weights = kernel.reshape(len(seen), 1, 1, 1, -1)
    return functools.reduce(jnp.add, (tap * weight for tap, weight in zip(seen, weights))), (padded, kernel)


def _shifted_conv_backward(stride, padding, residuals, dy):
    padded, kernel = residuals
    size = padded.shape[1] - sum(padding[0]), padded.shape[2] - sum(padding[1])
    dx = lax.optimization_barrier(_input_gradient(dy, kernel, size, stride, padding))
    return dx, _kernel_gradient(padded, dy, kernel.shape, stride)


_shifted_conv.defvjp(_shifted_conv_forward, _shifted_conv_backward)


def _input_gradient(dy, kernel, size: tuple[int, int], stride: int, padding: Padding) -> jax.Array:
    """dx [B, *size, C]."""

    def weighted(row: int, column: int, dy: jax.Array) -> jax.Array:
        return dy * kernel[None, row, None, column]

    return transposed_taps((dy,), size, kernel.shape[:2], stride, padding, weighted)


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


def _shifted_conv_transpose(x, kernel, *, stride: int, padding: int, output_padding: int) -> jax.Array:
    """The transpose of `_shifted_conv`, on the image whose convolution would give x."""
    size = tuple((n - 1) * stride - 2 * padding + k + output_padding for n, k in zip(x.shape[1:3], kernel.shape[:2]))
    around = (padding, padding - output_padding)
    return _spread(x, kernel, size, stride, (around, around))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _spread(x: jax.Array, kernel: jax.Array, size: tuple[int, int], stride: int, padding: Padding) -> jax.Array:
    return _input_gradient(x, kernel, size, stride, padding)


def _spread_forward(x, kernel, size, stride, padding):
    return _spread(x, kernel, size, stride, padding), (x, kernel)


def _spread_backward(size, stride, padding, residuals, dy):
    """padding may be negative at the bottom and right: pixels that only `output_padding` brought have no part."""
    x, kernel = residuals
    cut = dy[:, : size[0] + min(padding[0][1], 0), : size[1] + min(padding[1][1], 0)]
    dx, (padded, _) = _shifted_conv_forward(
        cut, kernel, stride, tuple((before, max(after, 0)) for before, after in padding)
    )
    return lax.optimization_barrier(dx), _kernel_gradient(padded, x, kernel.shape, stride)


_spread.defvjp(_spread_forward, _spread_backward)
