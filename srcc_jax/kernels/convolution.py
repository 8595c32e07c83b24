"""Convolutions in the formulation that is fastest where they run: `lax` on GPU and TPU, chosen by shape on CPU.

XLA:CPU multiplies matrices fast, faster than torch does; its own convolutions lose on images of few channels and where
the sums can be had with fewer multiplications. The platform is chosen when a computation is lowered, inside each
function: callers never ask where they run. All arrays are NHWC. Padding is ((top, bottom), (left, right)) in pixels and
may be asymmetric.

Some gradients are written out, because derived ones are slow on CPU for three reasons, each worth up to a factor of two:
XLA transposes the wider factor of a product, recomputes a convolution inside every sum that reads it, and keeps the
intermediate values of an activation. `lax.optimization_barrier` is what tells it not to.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from srcc_jax.kernels.depthwise import depthwise_conv, depthwise_conv_transpose
from srcc_jax.kernels.shifts import Padding, lax_conv, lax_conv_transpose, pad_image, taps
from srcc_jax.kernels.winograd import winograd_conv

__all__ = ["Padding", "conv", "conv_transpose", "depthwise_conv", "pointwise_conv", "silu"]

# Where the formulations meet on CPU, measured on AVX-512 with one or two images at a time on a core
_SMALL_MAP = 12 * 12  # output pixels up to which the weights, not the pixels, are most of what is moved
_FEW_INPUTS, _FEW_OUTPUTS = 4, 32  # channels
_WINOGRAD_CHANNELS = 32  # fewer, and transforming the pixels costs more than the products
_CACHED_VALUES = 2**21  # of an image that stays in cache when transformed, which makes it four times as large;
_WINOGRAD_UNCACHED_CHANNELS = 128  # a larger one needs as many as this
_WINOGRAD_PIXELS = 256 * 256  # and is never larger than this, for memory


def pointwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """1×1 convolution as a matrix product: x [B, H, W, C], kernel [1, 1, C, F] -> [B, H, W, F]."""
    return _product(x, kernel[0, 0])


def conv(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding, dilation: int = 1) -> jax.Array:
    """Dense convolution: x [B, H, W, C], kernel [k, k, C, F] -> [B, H', W', F].

    H' = (H + top + bottom - dilation · (k - 1) - 1) // stride + 1, W' likewise.
    """
    settings: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    return lax.platform_dependent(
        x, kernel, cpu=functools.partial(_cpu_conv, **settings), default=functools.partial(lax_conv, **settings)
    )


def conv_transpose(
    x: jax.Array, kernel: jax.Array, *, stride: int, padding: int, output_padding: int = 0, depthwise: bool = False
) -> jax.Array:
    """Transposed convolution, torch's conv_transpose2d: x [B, H, W, C], kernel [k, k, C, F] -> [B, H', W', F].

    Each pixel lays the kernel, weighted, on the output: out[stride · i + a - padding] += x[i] @ kernel[a], along both
    axes. H' = (H - 1) · stride - 2 · padding + k + output_padding. depthwise: kernel [k, k, C, 1], each channel by itself.
    """
    settings: dict[str, Any] = {"stride": stride, "padding": padding, "output_padding": output_padding}
    if depthwise:
        return depthwise_conv_transpose(x, kernel, **settings)
    if kernel.shape[:2] == (stride, stride) and padding == output_padding == 0:
        return _blocks_product(x, kernel)
    return lax_conv_transpose(x, kernel, **settings)


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


def _cpu_conv(x, kernel, *, stride: int, padding: Padding, dilation: int) -> jax.Array:
    """The formulation that is fastest for this shape. The choice does not depend on the batch: results neither do."""
    k, _, inputs, outputs = kernel.shape
    settings: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    rows, columns = ((n + sum(sides) - dilation * (k - 1) - 1) // stride + 1 for n, sides in zip(x.shape[1:3], padding))
    if inputs <= _FEW_INPUTS and outputs <= _FEW_OUTPUTS and dilation == 1:
        return _blocked_conv(x, kernel, stride=stride, padding=padding)
    if k == 1 or rows * columns <= _SMALL_MAP:
        return _columns_product(x, kernel, **settings)
    if (k, stride, dilation) == (3, 1, 1) and x.dtype.itemsize >= 4 and rows * columns <= _WINOGRAD_PIXELS:
        cached = rows * columns * max(inputs, outputs) <= _CACHED_VALUES
        if min(inputs, outputs) >= (_WINOGRAD_CHANNELS if cached else _WINOGRAD_UNCACHED_CHANNELS):
            return winograd_conv(x, kernel, padding)
    return lax_conv(x, kernel, **settings)


def _columns_product(x, kernel, *, stride: int, padding: Padding, dilation: int) -> jax.Array:
    """The dense convolution as one matrix product of the taps side by side (im2col)."""
    seen = taps(pad_image(x, padding), kernel.shape[:2], stride, dilation)
    return _product(jnp.concatenate(seen, axis=-1), kernel.reshape(-1, kernel.shape[3]))


def _blocked_conv(x, kernel, *, stride: int, padding: Padding) -> jax.Array:
    """The dense convolution with neighbouring columns as channels: XLA:CPU is slow where channels do not fill a vector.

    `block` output columns become channels of one, made of stride · block input columns each. The kernel repeats itself
    for each output of a block, shifted by `stride`, among zeros.
    """
    (k, _, inputs, outputs), (b, _, width, _) = kernel.shape, x.shape
    columns = (width + sum(padding[1]) - k) // stride + 1
    block = min(_FEW_OUTPUTS // outputs, k, columns)
    step, blocks = stride * block, -(-columns // block)
    seen = -(-((block - 1) * stride + k) // step)  # input blocks that one output block sees
    missing = step * (blocks + seen - 1) - width - padding[1][0]
    image = pad_image(x, (padding[0], (padding[1][0], missing)))
    image = image.reshape(b, -1, blocks + seen - 1, step * inputs)
    shifted = [
        jnp.pad(kernel, ((0, 0), (stride * j, step * seen - k - stride * j), (0, 0), (0, 0))) for j in range(block)
    ]
    wide = jnp.stack(shifted, axis=3).reshape(k, seen, step * inputs, block * outputs)
    out = lax.conv_general_dilated(image, wide, (stride, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return out.reshape(b, -1, blocks * block, outputs)[:, :, :columns]


def _blocks_product(x, kernel) -> jax.Array:
    """The transposed convolution whose kernels lie side by side: one product, whose columns are the pixels of a block."""
    (b, h, w, _), (k, _, _, outputs) = x.shape, kernel.shape
    matrix = kernel.transpose(2, 0, 1, 3).reshape(-1, k * k * outputs)
    blocks = _product(x, matrix).reshape(b, h, w, k, k, outputs)
    return blocks.swapaxes(2, 3).reshape(b, h * k, w * k, outputs)
