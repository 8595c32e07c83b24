"""Where a student's maps differ from its teacher's, and the smoothing of such maps."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from srcc_jax.kernels.convolution import depthwise_conv
from srcc_jax.kernels.resize import resize_bilinear

_SMALLEST_NORM = 1e-8  # shorter vectors count as this long, so that a zero vector is like nothing (torch)


def cosine_similarity(a: jax.Array, b: jax.Array, *, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """Cosine of the angle between a and b [...], float32, over the vectors along `axis`. With a zero vector: 0, gradient 0."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    inverse_norms = (lax.rsqrt(jnp.maximum(jnp.square(vectors).sum(axis), _SMALLEST_NORM**2)) for vectors in (a, b))
    return (a * b).sum(axis) * next(inverse_norms) * next(inverse_norms)


def anomaly_map(
    teacher: Sequence[jax.Array], student: Sequence[jax.Array], size: tuple[int, int], *, align_corners: bool = True
) -> jax.Array:
    """Sum over the levels of 1 - cosine of teacher and student, [B, *size] float32 (Deng & Li 2022, eq. 3).

    teacher, student: maps [B, h, w, C] of each level, in the same order; the map of each is brought to `size` bilinearly
    before the sum. 0 where they agree; at most the number of levels where no channel is negative, as after a ReLU.
    """
    total = jnp.zeros((teacher[0].shape[0], *size, 1), jnp.float32)
    for ours, theirs in zip(student, teacher, strict=True):
        distance = 1 - cosine_similarity(theirs, ours)
        total = total + resize_bilinear(distance[..., None], size, align_corners=align_corners)
    return total[..., 0]


def dihedral_mean(score: Callable[[jax.Array], jax.Array], image: jax.Array) -> jax.Array:
    """score: images [B, H, H, 3] -> [B, ...] float32; its mean over the eight ways in which a square image [B, H, H, 3] can be turned
    and mirrored. One orientation is computed at a time, so that memory is that of one."""
    turned = [jnp.rot90(image, quarter, axes=(1, 2)) for quarter in range(4)]
    orientations = jnp.stack([*turned, *(jnp.flip(picture, axis=2) for picture in turned)])
    return lax.map(score, orientations).mean(0)


def gaussian_filter(maps: jax.Array, *, sigma: float, truncate: float = 4.0) -> jax.Array:
    """Each of the maps [B, H, W] smoothed with a Gaussian of `sigma` pixels, as scipy.ndimage.gaussian_filter does.

    The kernel is sampled at whole pixels, cut off at `truncate` sigmas and made to sum to 1; at its border a map goes on as
    its mirror image, the outermost pixels twice.
    """
    radius = int(truncate * sigma + 0.5)
    weights = np.exp(-0.5 * np.square(np.arange(-radius, radius + 1) / sigma))
    kernel = jnp.asarray(weights / weights.sum(), maps.dtype)
    for shape, around in (((-1, 1, 1, 1), ((radius, radius), (0, 0))), ((1, -1, 1, 1), ((0, 0), (radius, radius)))):
        padded = jnp.pad(maps, ((0, 0), *around), mode="symmetric")[..., None]
        maps = depthwise_conv(padded, kernel.reshape(shape), stride=1, padding=((0, 0), (0, 0)))[..., 0]
    return maps
