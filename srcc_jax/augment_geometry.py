"""Where the pixels of a view come from: places in the view are taken back, map by map, to places in the image, which is read once.

All functions are of one image. Places are (y, x), float32 [H, W] each, in pixels; the centre of the top-left pixel is (0, 0). Beyond its
border an image goes on as its mirror image, the border's own pixels not repeated.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Places = tuple[jax.Array, jax.Array]

# What a linear map about the centre takes (y, x) to. Each is its own inverse.
TRANSPOSITION = np.array([[0, 1], [1, 0]], np.float32)
LEFT_RIGHT = np.array([[1, 0], [0, -1]], np.float32)
TOP_BOTTOM = np.array([[-1, 0], [0, 1]], np.float32)

_REACH = 4.0  # standard deviations at which the filter of an elastic field ends, as in SciPy


def pixel_places(height: int, width: int) -> Places:
    """The centres of all pixels."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return jnp.asarray(y), jnp.asarray(x)


def about_centre(places: Places, linear: jax.Array) -> Places:
    """The places after a linear map [2, 2] of (y, x) that leaves the middle of the image where it is."""
    height, width = places[0].shape
    y, x = places[0] - (height - 1) / 2, places[1] - (width - 1) / 2
    return (
        linear[0, 0] * y + linear[0, 1] * x + (height - 1) / 2,
        linear[1, 0] * y + linear[1, 1] * x + (width - 1) / 2,
    )


def rotation(degrees: jax.Array) -> jax.Array:
    """The linear map [2, 2] from a view turned anticlockwise by these degrees to its image."""
    angle = jnp.deg2rad(degrees)
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([cosine, sine, -sine, cosine]).reshape(2, 2)


def triangle_map(places: Places, shift: jax.Array) -> Places:
    """Taken back by the affine map that moves three points of the image by `shift` [3, 2], (y, x) in pixels each.

    The points are corners of the square of side 2/3 of the image about its middle: bottom right, bottom left, top left. Where
    the shifts lay all three on a line, there is no way back: every place becomes the first corner.
    """
    height, width = places[0].shape
    middle, reach = np.array([height // 2, width // 2], np.float32), np.float32(min(height, width) // 3)
    corners = middle + reach * np.array([[1, 1], [1, -1], [-1, -1]], np.float32)
    moved = corners + shift
    edges, one, other = (corners[1:] - corners[:1]).T, moved[1] - moved[0], moved[2] - moved[0]
    area = one[0] * other[1] - one[1] * other[0]
    inverse = jnp.stack([other[1], -other[0], -one[1], one[0]]).reshape(2, 2) / jnp.where(area == 0, jnp.inf, area)
    linear = (jnp.asarray(edges)[:, :, None] * inverse[None]).sum(1)
    y, x = places[0] - moved[0, 0], places[1] - moved[0, 1]
    return (
        linear[0, 0] * y + linear[0, 1] * x + corners[0, 0],
        linear[1, 0] * y + linear[1, 1] * x + corners[0, 1],
    )


def elastic_field(noise: jax.Array, *, alpha: float, sigma: float) -> jax.Array:
    """alpha times noise [..., H, W] smoothed by a Gaussian of `sigma` pixels (Simard et al. 2003): shifts in pixels.

    The filter is SciPy's, mirrored at the border; as a matrix on either side, whatever sigma is.
    """
    rows, columns = (jnp.asarray(_gaussian_matrix(size, sigma)) for size in noise.shape[-2:])
    return alpha * jnp.matmul(jnp.matmul(rows, noise, precision="highest"), columns.T, precision="highest")


def _gaussian_matrix(size: int, sigma: float) -> np.ndarray:
    """float32 [size, size]: the Gaussian filter of a signal that goes on as its mirror image, its ends repeated."""
    reach = int(_REACH * sigma + 0.5)
    offset = np.arange(-reach, reach + 1)
    weight = np.exp(-0.5 * (offset / sigma) ** 2)
    source = (np.arange(size)[:, None] + offset) % (2 * size)
    source = np.minimum(source, 2 * size - 1 - source)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], source), weight / weight.sum())
    return matrix.astype(np.float32)


def mirrored(places: Places) -> Places:
    """Places anywhere, brought back into the image, as its mirror images say."""
    height, width = places[0].shape
    return _mirrored(places[0], height), _mirrored(places[1], width)


def _mirrored(at: jax.Array, size: int) -> jax.Array:
    last = size - 1
    return last - jnp.abs(jnp.mod(at, max(1, 2 * last)) - last)


def read_at(image: jax.Array, places: Places) -> jax.Array:
    """Bilinear values of image [H, W, C] at places inside it: float32 [H, W, C]."""
    height, width, channels = image.shape
    y, x = places
    top, left = jnp.clip(jnp.floor(y), 0, max(0, height - 2)), jnp.clip(jnp.floor(x), 0, max(0, width - 2))
    first = top.astype(jnp.int32) * width + left.astype(jnp.int32)
    down, right = width * (height > 1), int(width > 1)
    below, beside = (y - top)[..., None], (x - left)[..., None]
    pixels = image.reshape(-1, channels)

    def tap(offset: int) -> jax.Array:
        return pixels.at[first + offset].get(mode="promise_in_bounds").astype(jnp.float32)

    upper = tap(0) * (1 - beside) + tap(right) * beside
    lower = tap(down) * (1 - beside) + tap(down + right) * beside
    return upper * (1 - below) + lower * below
