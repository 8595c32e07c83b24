"""Filters of one image [H, W, C] with small windows, in 0..255: blurs, the median, noise.

Columns and channels are taken together as one axis, so that XLA:CPU has long rows to run along: a step of one pixel is C values.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WINDOWS = (3, 5, 7)  # sides, in pixels
_SIDE = WINDOWS[-1]


def _centred(weights: list[float]) -> list[float]:
    zeros = [0.0] * ((_SIDE - len(weights)) // 2)
    return [*zeros, *weights, *zeros]


# float32 [3, 7]: for each window the weights along one axis
MEAN = np.array([_centred([1 / side] * side) for side in WINDOWS], np.float32)
GAUSSIAN = np.array(  # OpenCV's for these sides
    [
        _centred([1 / 4, 1 / 2, 1 / 4]),
        _centred([1 / 16, 1 / 4, 3 / 8, 1 / 4, 1 / 16]),
        _centred([1 / 32, 7 / 64, 7 / 32, 9 / 32, 7 / 32, 7 / 64, 1 / 32]),
    ],
    np.float32,
)


def blur(image: jax.Array, weights: jax.Array) -> jax.Array:
    """float32 [H, W, C]: image smoothed along rows and columns by weights [7]; mirrored at the border, whose pixels are not repeated."""
    (height, width, channels), reach = image.shape, _SIDE // 2
    padded = jnp.pad(image.astype(jnp.float32), ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    padded = padded.reshape(height + 2 * reach, -1)
    along = width * channels
    rows, both = jnp.zeros((height, padded.shape[1])), jnp.zeros((height, along))
    for i in range(_SIDE):
        rows += weights[i] * padded[i : i + height]
    for i in range(_SIDE):
        both += weights[i] * rows[:, i * channels : i * channels + along]
    return both.reshape(height, width, channels)


def median(image: jax.Array, side: jax.Array | int) -> jax.Array:
    """uint8 [H, W, C]: of each channel the median over a window of `side` pixels; the border's pixels are repeated beyond it.

    The median is the largest value v such that no more values of the window are smaller than v than half of them, rounded down:
    it is found bit by bit, all pixels at once. The taps of the largest window are all looked at, and those outside not counted:
    written out like that, and only then, XLA:CPU compares 64 values at a time.
    """
    (height, width, channels), reach = image.shape, _SIDE // 2
    padded = jnp.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge").reshape(height + 2 * reach, -1)
    along = width * channels
    inside = jnp.abs(jnp.arange(_SIDE) - reach) <= side // 2

    def one_bit(turn: jax.Array, found: jax.Array) -> jax.Array:
        guess = found + (jnp.uint8(128) >> turn.astype(jnp.uint8))
        smaller = jnp.zeros_like(found)
        for i, j in itertools.product(range(_SIDE), repeat=2):
            tap = padded[i : i + height, j * channels : j * channels + along]
            smaller += (tap < guess) & inside[i] & inside[j]
        return jnp.where(smaller <= side * side // 2, guess, found)

    return lax.fori_loop(0, 8, one_bit, jnp.zeros((height, along), jnp.uint8)).reshape(image.shape)


def add_noise(image: jax.Array, variance: jax.Array, key: jax.Array) -> jax.Array:
    """float32 [H, W, C]: plus a normal number of its own for every value, cut to 0..255."""
    noise = jnp.sqrt(variance) * jax.random.normal(key, image.shape)
    return jnp.clip(image.astype(jnp.float32) + noise, 0, 255)
