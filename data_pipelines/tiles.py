"""From a slide's tissue mask and annotations to its rows of the Tiles table."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.polygons import EXCLUSION_GROUPS, Shape, bounding_box, rasterize
from data_pipelines.tile_table import Grid, Tiles, TilesError

__all__ = ["Grid", "Tiles", "TilesError", "tile_slide"]

CELLS_PER_TILE = 16  # ours: annotations are measured on a raster of 1/16 of a tile's side


def tile_slide(
    slide_id: str,
    *,
    width: int,
    height: int,
    slide_mpp: float,
    grid: Grid,
    tissue: np.ndarray,
    mask_downsample: float,
    min_tissue: float = 0.5,
    shapes: Sequence[Shape] | None = None,
    groups: Collection[str] | None = None,
    exclude: Collection[str] = EXCLUSION_GROUPS,
) -> Tiles:
    """The tiles of one slide whose part of tissue is at least min_tissue, row by row (Kanavati 2021, section a).

    width, height: of the slide in level-0 pixels, of slide_mpp µm each.  tissue bool [h, w]: cells of mask_downsample level-0
    pixels from the slide's corner.  Fractions are of that part of a tile that lies on the slide (for tissue, on its mask, which
    may end a little before the slide), with cells that a tile cuts counted by their part.

    annotated: the fraction inside the shapes of `groups` (None: all) and outside those of `exclude`, on a raster of 1/16
    tile.  A tile that a shape only grazes, or that holds a shape or a point too small for the raster, gets the share of half
    a cell: any overlap is > 0 (off that raster, as with flush tiles, one of less than 1/16 tile's distance too).  Without
    shapes it is 0.
    """
    scale = grid.mpp / slide_mpp  # level-0 pixels per model pixel
    _check_mask(slide_id, tissue, mask_downsample, width, height)
    u, v = grid.positions(width / scale), grid.positions(height / scale)
    side = grid.tile * scale
    places = _Footprints(_Spans(v * scale, v * scale + side), _Spans(u * scale, u * scale + side)).within(width, height)
    h, w = tissue.shape
    masked = places.within(w * mask_downsample, h * mask_downsample)
    fraction = masked.fractions(tissue, mask_downsample, (0.0, 0.0)).astype(np.float32)
    annotated = _annotated(shapes or (), places, side / CELLS_PER_TILE, groups, exclude).astype(np.float32)
    i, j = (index.astype(np.int32) for index in np.nonzero(fraction >= min_tissue))
    return Tiles(
        grid=grid,
        slides=np.array([slide_id]),
        slide=np.zeros(len(i), np.int32),
        i=i,
        j=j,
        u=u[j],
        v=v[i],
        x=u[j] * scale,
        y=v[i] * scale,
        side=np.full(len(i), side),
        tissue=fraction[i, j],
        annotated=annotated[i, j],
    )


class _Spans(NamedTuple):
    """Tiles along one axis: where they start and end, level-0 pixels [k]."""

    start: np.ndarray
    end: np.ndarray


class _Footprints(NamedTuple):
    """All places of a grid on a slide: rows of tiles times columns of tiles."""

    rows: _Spans
    columns: _Spans

    def within(self, width: float, height: float) -> "_Footprints":
        """The parts that lie left of `width` and above `height`."""
        (top, bottom), (left, right) = self.rows, self.columns
        return _Footprints(_Spans(top, np.minimum(bottom, height)), _Spans(left, np.minimum(right, width)))

    def fractions(self, mask: np.ndarray, cell: float, origin: tuple[float, float]) -> np.ndarray:
        """The part of each tile [rows, columns] that true cells cover; the mask's first cell has its corner at origin."""
        x, y = origin
        sums = interval_sums(mask, (self.rows.start - y) / cell, (self.rows.end - y) / cell)
        sums = interval_sums(sums.T, (self.columns.start - x) / cell, (self.columns.end - x) / cell).T
        heights, widths = (np.maximum(span.end - span.start, 0) for span in self)
        areas = np.outer(heights, widths)
        return np.divide(sums * cell**2, areas, out=np.zeros_like(sums), where=areas > 0)


def interval_sums(values: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Sums of rows over intervals with fractional ends, a row that is cut counting by its part.

    values [n, m], n >= 1; start, end [k] in rows, cut to 0..n.  Returns float64 [k, m].
    """
    n = len(values)
    total = np.zeros((n + 1, values.shape[1]), np.int32 if values.dtype == bool else np.float64)
    np.cumsum(values, axis=0, out=total[1:])

    def up_to(position: np.ndarray) -> np.ndarray:
        position = np.clip(np.round(position, 6), 0, n)  # rounded: an end on a cell's border cuts nothing off the next
        row = np.minimum(position.astype(np.int64), n - 1)
        return total[row] + (position - row)[:, None] * (total[row + 1] - total[row])

    return up_to(end) - up_to(start)


def _annotated(
    shapes: Sequence[Shape], places: _Footprints, cell: float, groups: Collection[str] | None, exclude: Collection[str]
) -> np.ndarray:
    """The part of each tile inside the shapes; half a cell's share where they only touch it. [rows, columns]"""
    wanted = [shape for shape in shapes if shape.group not in exclude and (groups is None or shape.group in groups)]
    if not wanted:
        return np.zeros((len(places.rows.start), len(places.columns.start)))
    x0, y0, x1, y1 = bounding_box(wanted)
    slide = places.columns.end.max(), places.rows.end.max()
    first = [max(math.floor(low / cell), 0) for low in (x0, y0)]
    last = [math.floor(min(high, limit) / cell) + 1 for high, limit in zip((x1, y1), slide)]
    width, height = (max(end - begin, 1) for begin, end in zip(first, last))
    origin = first[0] * cell, first[1] * cell
    frame = {"width": width, "height": height, "downsample": cell, "origin": origin}
    inside = rasterize(shapes, **frame, groups=groups, exclude=exclude)
    touched = rasterize(shapes, **frame, groups=groups, exclude=exclude, touched=True)
    grazed = places.fractions(touched, cell, origin) > 0
    return np.maximum(places.fractions(inside, cell, origin), grazed * (0.5 / CELLS_PER_TILE**2))


def _check_mask(slide_id: str, tissue: np.ndarray, downsample: float, width: int, height: int) -> None:
    """Refuses a mask that does not cover its slide to within two cells: it is another slide's, or the scale is wrong."""
    h, w = tissue.shape
    if tissue.dtype != bool or abs(w - width / downsample) > 2 or abs(h - height / downsample) > 2 or not tissue.size:
        raise ValueError(
            f"{slide_id}: a tissue mask {tissue.dtype} [{h}, {w}] at downsample {downsample:g} does not fit a slide of "
            f"{width} x {height} pixels"
        )
