"""Random fields and outlines shared by drawn and mosaic slides. Every function is a function of its generator alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SPLINE_DEVIATION = 151 / 315  # ∫B₃² of the cubic B-spline: the deviation of a 2-D spline of standard normal knots


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], scale_px: float) -> np.ndarray:
    """float32 [H, W] of mean 0 and deviation 1 that changes over about `scale_px`: a cubic B-spline of normal knots."""
    rows, columns = (_spline_matrix(size, scale_px, rng.random()) for size in shape)
    knots = rng.standard_normal((rows.shape[1], columns.shape[1]), dtype=np.float32)
    knots /= np.float32(_SPLINE_DEVIATION)
    return rows @ (knots @ columns.T)


def _spline_matrix(size: int, scale_px: float, offset: float) -> np.ndarray:
    """float32 [size, knots]: weights of the knots, `scale_px` apart, at each pixel."""
    at = (np.arange(size) + 0.5) / scale_px + offset
    base, t = np.floor(at).astype(int), at % 1
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6
    matrix = np.zeros((size, base[-1] + 4), np.float32)
    matrix[np.arange(size)[:, None], base[:, None] + np.arange(4)] = weights
    return matrix


def periodic_texture(rng: np.random.Generator, side: int, *, along_px: float, across_px: float) -> np.ndarray:
    """float32 [side, side] of mean 0 and deviation 1 that repeats without a seam; streaks `along_px` by `across_px`."""
    down, right = 2 * np.pi * np.fft.fftfreq(side)[:, None], 2 * np.pi * np.fft.rfftfreq(side)[None, :]
    blur = np.exp(-0.5 * ((down * across_px) ** 2 + (right * along_px) ** 2))
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) * blur, s=(side, side))
    return ((field - field.mean()) / field.std()).astype(np.float32)


def repeated(texture: np.ndarray, shape: tuple[int, int], start: Sequence[int] | np.ndarray) -> np.ndarray:
    """A repeating texture laid out over [H, W], beginning at its row and column `start`."""
    rows, columns = ((np.arange(size) + first) % side for size, first, side in zip(shape, start, texture.shape))
    return texture[rows[:, None], columns]


@dataclass(frozen=True)
class Box:
    """A rectangle of the slide, in px."""

    x: int
    y: int
    width: int
    height: int


def scattered_boxes(rng: np.random.Generator, height: int, width: int, count: int) -> list[Box]:
    """Places for `count` fragments that do not overlap: a shuffled part of a loose lattice over the slide."""
    columns = max(1, round(np.sqrt(count * width / height)))
    rows = -(-count // columns)
    h, w = height // rows, width // columns
    places = rng.permutation(rows * columns)[:count]
    return [Box(int(place % columns) * w, int(place // columns) * h, w, h) for place in sorted(places)]


def fragment_field(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """float32 [height, width], positive within a bent, ragged fragment of tissue that stays clear of the border."""
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    angle = np.float32(rng.normal(0, 0.35) + (np.pi / 2) * (height > 1.3 * width))
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    v = v + np.float32(rng.normal(0, 0.35)) * (u * u - np.float32(0.3))
    long, short = np.float32(rng.uniform(0.72, 0.86)), np.float32(rng.uniform(0.5, 0.68))
    field = 1 - np.abs(u / long) ** 3 - np.abs(v / short) ** 3
    side = min(height, width)
    field += 0.22 * smooth_noise(rng, (height, width), side / 5) + 0.07 * smooth_noise(rng, (height, width), side / 25)
    margin = np.maximum(np.abs(x), np.abs(y))
    return field - np.clip((margin - 0.85) * 12, 0, None)
