"""How densely objects lie on a slide, in squares, with regard to what could be read of each."""

from __future__ import annotations

import numpy as np

from srcc_jax.kernels.heat_maps import HeatMap

_LEAST_READ = 0.5  # of the looked-at part of a square: with less its density says nothing


def density_map(
    x: np.ndarray,
    y: np.ndarray,
    *,
    read: np.ndarray,
    unread: np.ndarray,
    square_um: float,
    slide_mpp: float,
    size: tuple[float, float],
) -> HeatMap:
    """Objects per mm² in squares of `square_um` from the slide's corner, float32 with NaN where nothing was looked at.

    x, y [N]: of the objects. read, unread [R, 4]: rectangles (x1, y1, x2, y2) that do not overlap, where objects were looked for, and where
    they would have been. All of these, and size, the slide's (width, height), are in level-0 pixels. A square's area is that of its part
    that was read; where that is less than half of what was to be read, it has no density and counts as missing.
    """
    side = square_um / slide_mpp
    columns, rows = (max(1, int(np.ceil(length / side))) for length in size)
    seen, lost = (_areas(rectangles / side, rows, columns) for rectangles in (read, unread))
    count = np.zeros((rows, columns))
    place = (np.clip((v / side).astype(int), 0, n - 1) for v, n in ((np.asarray(y), rows), (np.asarray(x), columns)))
    np.add.at(count, tuple(place), 1)
    known = (seen > 0) & (seen >= _LEAST_READ * (seen + lost))
    values = np.full((rows, columns), np.nan)
    values[known] = count[known] / (seen[known] * (square_um / 1000) ** 2)
    return HeatMap(values.astype(np.float32), ~known & (lost > 0), side, (0.0, 0.0), square_um)


def _areas(rectangles: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """float64 [rows, columns]: the part of each unit square that rectangles [R, 4] in squares cover."""
    areas = np.zeros((rows, columns))
    for x1, y1, x2, y2 in rectangles.tolist():
        (top, heights), (left, widths) = _lengths(y1, y2, rows), _lengths(x1, x2, columns)
        areas[top : top + len(heights), left : left + len(widths)] += np.outer(heights, widths)
    return areas


def _lengths(begin: float, end: float, count: int) -> tuple[int, np.ndarray]:
    """The first of the unit intervals that begin to end covers a part of, and how much of each from there on."""
    first, last = min(max(int(begin), 0), count), min(int(np.ceil(end)), count)
    at = np.arange(first, last)
    return first, np.minimum(at + 1, end) - np.maximum(at, begin)
