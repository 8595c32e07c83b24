"""Square regions of slides to cut: around annotated boxes, and drawn from tissue."""

from __future__ import annotations

import numpy as np

from data_pipelines.spots import keep_apart

_DRAWS = 50  # places tried for each region wanted


def regions_around(boxes: np.ndarray, side: float) -> np.ndarray:
    """Top-left corners (x, y) float64 [R, 2] of the squares of a lattice that hold the middle of a box [N, 4], row by row.

    The lattice has squares of `side`, and is centred on all boxes together: boxes that one square can hold are not cut. Squares do not
    overlap, so that no box is in two of them.
    """
    if not len(boxes):
        return np.zeros((0, 2))
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    squares = np.maximum(1, np.ceil((high - low) / side))
    origin = (low + high - squares * side) / 2
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    row_column = np.unique(np.floor((middle - origin) / side)[:, ::-1], axis=0)
    return origin + row_column[:, ::-1] * side


def draw_regions(
    tissue: np.ndarray, *, downsample: float, side: float, count: int, avoid: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Top-left corners (x, y) float64 [n, 2], n <= count, of squares of `side` level-0 pixels that lie on tissue and apart.

    tissue bool [H, W], `downsample` level-0 pixels a cell. A square has its middle on tissue, is at least half tissue, and meets neither
    another nor the squares of the same side at the corners `avoid` [R, 2].
    """
    row, column = np.nonzero(tissue)
    order = random.permutation(len(row))[: _DRAWS * count]
    corners = (np.stack([column[order], row[order]], axis=1) + 0.5) * downsample - side / 2
    cells = max(1, round(side / downsample))
    kept = []
    for x, y in corners:
        u, v = (max(0, round(value / downsample)) for value in (x, y))
        part = tissue[v : v + cells, u : u + cells]
        inside = x >= 0 and y >= 0 and part.shape == (cells, cells)
        if inside and part.mean() >= 0.5 and not (np.abs(avoid - (x, y)) < side).all(axis=1).any():
            kept.append((x, y))
    return keep_apart(np.asarray(kept, np.float64).reshape(-1, 2), side)[:count]
