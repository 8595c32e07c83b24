"""Bilinear interpolation of NHWC arrays: to any size, and by transposed convolution with the bilinear kernel."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from srcc_jax.kernels.convolution import conv_transpose


def resize_bilinear(x: jax.Array, size: Sequence[int], *, align_corners: bool) -> jax.Array:
    """x [B, H, W, C], size (H', W') -> [B, H', W', C], torch's `interpolate(mode="bilinear")` without antialiasing.

    align_corners: the centres of the corner pixels stay corners; else the edges of the image stay edges, and samples beyond
    the outermost centres take the outermost pixel. Either way each axis is one product with a matrix of two weights a row.
    """
    rows, columns = (
        jnp.asarray(interpolation_matrix(old, new, align_corners=align_corners), x.dtype)
        for old, new in zip(x.shape[1:3], size, strict=True)
    )
    x = jnp.einsum("ih,bhwc->biwc", rows, x, precision=lax.Precision.HIGHEST)
    return jnp.einsum("jw,biwc->bijc", columns, x, precision=lax.Precision.HIGHEST)


def interpolation_matrix(old: int, new: int, *, align_corners: bool) -> np.ndarray:
    """[new, old]: the weights of `old` samples in each of `new` interpolated ones; each row sums to 1."""
    if align_corners:
        position = np.arange(new) * ((old - 1) / max(new - 1, 1))
    else:
        position = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    return np.maximum(1 - np.abs(position[:, None] - np.arange(old)), 0)


def bilinear_kernel(factor: int, channels: int) -> np.ndarray:
    """[2f, 2f, channels, 1] float32: the transposed convolution of stride f that interpolates each channel. factor f: even."""
    if factor % 2:
        raise ValueError(f"factor is {factor}: a bilinear kernel centred on pixels of both sizes needs an even one")
    taps = 1 - np.abs(np.arange(2 * factor) - (factor - 0.5)) / factor
    kernel = np.outer(taps, taps).astype(np.float32)[:, :, None, None]
    return np.repeat(kernel, channels, axis=2)


def upsample_transposed(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, H, W, C], kernel [2f, 2f, C, 1] -> [B, f·H, f·W, C], torch's grouped conv_transpose2d(stride=f, padding=f // 2).

    With `bilinear_kernel` this is `resize_bilinear` without align_corners inside the image; at its border the samples beyond
    the outermost centres fade, because what lies outside is 0.
    """
    factor = kernel.shape[0] // 2
    return conv_transpose(x, kernel, stride=factor, padding=factor // 2, depthwise=True)


def upsample_nearest(x: jax.Array, factor: int) -> jax.Array:
    """Each pixel becomes factor × factor of the same value: [B, H, W, C] -> [B, f·H, f·W, C]."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, factor, w, factor, c))
    return x.reshape(b, factor * h, factor * w, c)
