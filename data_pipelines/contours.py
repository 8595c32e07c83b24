"""Outlines of the regions of a map: polygons along the edges of its cells, which rasterise to exactly the same cells."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import ndimage

from data_pipelines.overlays import SlideMap, map_colours
from data_pipelines.polygons import Shape

# What the four cells around a lattice point add to its code, by (row, column) of the cell.
_NORTH_WEST, _NORTH_EAST, _SOUTH_WEST, _SOUTH_EAST = 1, 2, 4, 8
_FALLING, _RISING = _NORTH_WEST | _SOUTH_EAST, _NORTH_EAST | _SOUTH_WEST  # cells that meet at a corner only
_CORNERS = np.zeros(16, np.int8)  # by code: how many rings turn at a point
_CORNERS[[1, 2, 4, 8, 7, 11, 13, 14]] = 1
_CORNERS[[_FALLING, _RISING]] = 2


@dataclasses.dataclass(frozen=True)
class Region:
    """Connected cells at or above a threshold. measurements: threshold, maximum, mean, cells and "area µm^2"."""

    shape: Shape
    measurements: Mapping[str, float]


def find_regions(
    slide_map: SlideMap, *, thresholds: Sequence[float], label: str = "probability", least_cells: int = 1
) -> Iterator[Region]:
    """The 4-connected regions with values >= each threshold (a cell without a value never is), in level-0 pixels.

    Threshold by threshold, and in each the region with the highest maximum first; the group of their shapes is
    `region_group(label, threshold)`, their score the maximum. Regions of fewer than least_cells cells are left out.
    """
    for threshold in thresholds:
        mask = slide_map.values >= threshold
        shapes = trace_contours(
            mask, downsample=slide_map.downsample, origin=slide_map.origin, group=region_group(label, threshold)
        )
        labels, count = ndimage.label(mask)
        index = np.arange(1, count + 1)
        cells = ndimage.sum_labels(mask, labels, index)
        mean = ndimage.mean(slide_map.values, labels, index)
        maximum = ndimage.maximum(slide_map.values, labels, index)
        for i in np.argsort(-np.asarray(maximum), kind="stable"):
            if cells[i] >= least_cells:
                measured = {"threshold": float(threshold), "maximum": float(maximum[i]), "mean": float(mean[i])}
                measured |= {"cells": int(cells[i]), "area µm^2": float(cells[i]) * slide_map.mpp**2}
                shape = dataclasses.replace(shapes[i], name=f"maximum {maximum[i]:.3f}", score=float(maximum[i]))
                yield Region(shape, measured)


def region_group(label: str, threshold: float) -> str:
    """The class of regions at or above a threshold: "probability ≥ 0.5"."""
    return f"{label} ≥ {threshold:g}"


def group_colours(
    thresholds: Sequence[float],
    *,
    label: str = "probability",
    colormap: str = "turbo",
    limits: tuple[float, float] = (0.0, 1.0),
) -> dict[str, tuple[int, int, int]]:
    """For each group of find_regions the (red, green, blue) that the threshold has in the heat map's picture."""
    colours = np.rint(map_colours(np.asarray(thresholds, np.float64), colormap, limits)).astype(int).tolist()
    return {region_group(label, threshold): (r, g, b) for threshold, (r, g, b) in zip(thresholds, colours)}


def trace_contours(
    mask: np.ndarray, *, downsample: float = 1.0, origin: tuple[float, float] = (0.0, 0.0), group: str = ""
) -> list[Shape]:
    """bool [H, W] -> one polygon with its holes per 4-connected set of cells, in level-0 px; linear in cells and corners.

    Shape i encloses the cells of label i + 1 of scipy.ndimage.label(mask). Vertices are only where an outline turns.
    Every ring is simple (it passes no point twice) and rings of a polygon touch in single points at most, as OGC asks: a
    pocket that its region closes off but for a corner is a hole. Exteriors run so that their area, with y as it is in
    the file, is positive; holes the other way round (RFC 7946).
    """
    mask = np.asarray(mask, bool)
    labels, count = ndimage.label(mask)
    exteriors: list[np.ndarray] = [np.empty((0, 2))] * count
    holes: list[list[np.ndarray]] = [[] for _ in range(count)]
    padded = np.pad(labels, 1)
    for ring in _rings(padded):
        row, column = ring[0]  # of its highest corners the leftmost: the ring leaves it to the right and downwards
        below, above = padded[row + 1, column + 1], padded[row, column + 1]
        vertices = ring[:, ::-1] * float(downsample) + origin
        if below:
            exteriors[below - 1] = vertices
        else:
            holes[above - 1].append(vertices[::-1])
    return [Shape("polygon", exterior, tuple(inner), group=group) for exterior, inner in zip(exteriors, holes)]


def _rings(labels: np.ndarray) -> Iterator[np.ndarray]:
    """labels [H + 2, W + 2] with a frame of 0 -> the rings around its regions, each int64 [n, 2] (row, column) of corners.

    Along a row of the lattice the outlines' corners pair off: between the first and the second runs a horizontal piece
    of outline, between the third and the fourth the next; so they do along each column. A ring alternates between both
    pairings. At a point where two cells touch by their corners two rings turn, which are two entries here.
    """
    row, column, down = _corners(labels)
    by_column = np.lexsort([down, row, column])
    place = np.empty_like(by_column)
    place[by_column] = np.arange(len(by_column))
    across = (np.arange(len(row)) ^ 1).tolist()  # the entries are in the order of the rows
    along = by_column[place ^ 1].tolist()
    corners = np.stack([row, column], axis=1)
    seen = bytearray(len(row))
    for first in range(len(row)):
        if seen[first]:
            continue
        ring, at = [], first
        while not seen[at]:
            other = across[at]
            seen[at] = seen[other] = 1
            ring += [at, other]
            at = along[other]
        yield corners[ring]


def _corners(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and which vertical piece (0 above, 1 below) of each turn of an outline, row by row, left before right.

    Where two cells meet at a corner, the ring with the piece to the left goes on above around the north-western cell and
    below around the south-western one; whether the cells or the gaps between them are rounded is free to choose. Cells of
    different regions are (they stay apart), and the gaps of one region (its ring does not pass a point twice).
    """
    inside = labels > 0
    code = inside[:-1, :-1] * _NORTH_WEST + inside[:-1, 1:] * _NORTH_EAST
    code += inside[1:, :-1] * _SOUTH_WEST + inside[1:, 1:] * _SOUTH_EAST
    row, column = np.nonzero(_CORNERS[code])
    code = code[row, column]
    turns = _CORNERS[code]
    row, column, code = (np.repeat(values, turns) for values in (row, column, code))
    second = np.zeros(len(code), bool)
    second[1:] = (row[1:] == row[:-1]) & (column[1:] == column[:-1])
    falling = code == _FALLING
    one_region = np.where(
        falling,
        labels[row, column] == labels[row + 1, column + 1],
        labels[row, column + 1] == labels[row + 1, column],
    )
    return row, column, second ^ (falling == one_region)
