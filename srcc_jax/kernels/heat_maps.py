"""From values of tiles to a map of the slide: arrays are [row, column], NaN is where nothing is known, never 0.

Positions are (x, y) level-0 px of a tile's top-left corner; `tile` and `stride` are px at `mpp` µm per px, the model's
scale, and `slide_mpp` is µm per level-0 px. The map covers the bounding box of the tiles and carries scale and origin.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage


@dataclass(frozen=True)
class HeatMap:
    """values [H, W] float32 with NaN; cell (r, c) is the level-0 square from origin + downsample * (c, r), as (x, y)."""

    values: np.ndarray
    missing: np.ndarray  # [H, W] bool: a tile lies here but has no value, because its pixels could not be read
    downsample: float  # level-0 px per cell
    origin: tuple[float, float]  # (x, y) level-0 px of the top-left corner of cell (0, 0)
    mpp: float  # µm per cell


def paint_tiles(
    values: np.ndarray, x: np.ndarray, y: np.ndarray, *, tile: int, stride: int, mpp: float, slide_mpp: float
) -> HeatMap:
    """Each tile's value [N] (NaN: unreadable) as one stride x stride cell in the middle of the tile.

    After Kanavati et al. 2021, section 2.6; they leave the place of the square open, and its centre is where the tile
    looks. Where two tiles round to one cell (the flush last tile), the higher shows: the map's maximum is the slide's.
    """
    placed = _Placed.at(x, y, cell=stride, side=1, mpp=mpp, slide_mpp=slide_mpp)
    painted = np.full(placed.shape, np.nan, np.float32)
    np.fmax.at(painted, (placed.row, placed.column), np.asarray(values, np.float32))
    return placed.heat_map(painted, inset=(tile - stride) / 2 * mpp / slide_mpp)


def smoothed(heat_map: HeatMap, *, sigma: float) -> HeatMap:
    """The map under a Gaussian of `sigma` cells, cut off at four sigmas: of each cell with a value the weighted mean of the cells
    around it that have one, so that glass and what could not be read pull nothing down. Cells without a value stay so."""
    known = np.isfinite(heat_map.values)
    weight = ndimage.gaussian_filter(known.astype(np.float64), sigma, mode="constant")
    total = ndimage.gaussian_filter(np.where(known, heat_map.values, 0).astype(np.float64), sigma, mode="constant")
    values = np.divide(total, weight, out=np.full(known.shape, np.nan), where=known)
    return replace(heat_map, values=values.astype(np.float32))


class TileMapAverage:
    """Mean of overlapping tile maps (Grad-CAM), gathered batch by batch; memory is that of the map.

    x, y [N]: all tiles of the slide; rows refer to them. size: side of the square maps that will come (7 for
    EfficientNet on 224 px). They are resampled bilinearly to tile / cell cells, `cell` px each: unless given, the largest
    common divisor of tile and stride that is not coarser than the maps. Tiles off that grid (the flush last one) are put
    on the nearest cell.
    """

    def __init__(
        self,
        x: np.ndarray,
        y: np.ndarray,
        *,
        size: int,
        tile: int,
        stride: int,
        mpp: float,
        slide_mpp: float,
        cell: int | None = None,
    ):
        cell = cell or max(d for d in range(1, tile // size + 1) if tile % d == stride % d == 0)
        if tile % cell:
            raise ValueError(f"a cell of {cell} px does not divide a tile of {tile} px")
        self._placed = _Placed.at(x, y, cell=cell, side=tile // cell, mpp=mpp, slide_mpp=slide_mpp)
        self._upsample = _bilinear(size, tile // cell)
        self._sum = np.zeros(self._placed.shape, np.float32)
        self._times = np.zeros(len(self._placed.row), np.int32)

    def add(self, rows: np.ndarray, maps: np.ndarray) -> None:
        """rows [B] of tiles (no padding among them), maps [B, size, size]; a map with a NaN in it counts as unreadable."""
        rows, maps = np.asarray(rows), np.asarray(maps, np.float32)
        readable = np.isfinite(maps).all((1, 2))
        rows, maps = rows[readable], self._upsample @ maps[readable] @ self._upsample.T
        side = self._placed.side
        for row, column, tile_map in zip(self._placed.row[rows], self._placed.column[rows], maps):
            self._sum[row : row + side, column : column + side] += tile_map
        np.add.at(self._times, rows, 1)

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """What was gathered so far, as copies that `restore` takes: sums of the cells [H, W], times that each tile came [N]."""
        return self._sum.copy(), self._times.copy()

    def restore(self, total: np.ndarray, times: np.ndarray) -> None:
        """Goes on from the `sums` of a map of the same tiles; what follows gives the same result to the bit. ValueError if not."""
        if total.shape != self._sum.shape or times.shape != self._times.shape:
            raise ValueError(f"sums of a map {total.shape} of {times.shape} tiles do not fit one {self._sum.shape}")
        self._sum, self._times = total.astype(np.float32), times.astype(np.int32)

    def result(self) -> HeatMap:
        count = self._placed.coverage(self._times)
        values = np.divide(self._sum, count, out=np.full_like(self._sum, np.nan), where=count > 0)
        return self._placed.heat_map(values)


@dataclass(frozen=True)
class _Placed:
    """Tiles on a grid of cells: their top-left cells [N] and how many cells a side each takes."""

    row: np.ndarray
    column: np.ndarray
    side: int
    downsample: float
    corner: tuple[float, float]
    mpp: float

    @classmethod
    def at(cls, x: np.ndarray, y: np.ndarray, *, cell: int, side: int, mpp: float, slide_mpp: float) -> "_Placed":
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if not x.size:
            raise ValueError("a slide without tiles has no heat map")
        downsample = cell * mpp / slide_mpp
        row, column = (np.rint((v - v.min()) / downsample).astype(np.int64) for v in (y, x))
        return cls(row, column, side, downsample, (float(x.min()), float(y.min())), cell * mpp)

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.row.max()) + self.side, int(self.column.max()) + self.side

    def coverage(self, times: np.ndarray) -> np.ndarray:
        """[H, W] int32: in how many tiles each cell lies, tile n counted times[n] times. Linear in tiles and cells."""
        steps = np.zeros((self.shape[0] + 1, self.shape[1] + 1), np.int32)
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
            sign = 1 if down == right else -1
            np.add.at(steps, (self.row + down * self.side, self.column + right * self.side), sign * times)
        return steps.cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)[:-1, :-1]

    def heat_map(self, values: np.ndarray, *, inset: float = 0.0) -> HeatMap:
        """`inset`: level-0 px from a tile's corner to the corner of its first cell."""
        missing = (self.coverage(np.ones_like(self.row)) > 0) & np.isnan(values)
        origin = (self.corner[0] + inset, self.corner[1] + inset)
        return HeatMap(values, missing, self.downsample, origin, self.mpp)


def _bilinear(size: int, wanted: int) -> np.ndarray:
    """[wanted, size] float32 weights of linear interpolation between cell centres, constant beyond the outer ones."""
    at = np.clip((np.arange(wanted) + 0.5) * size / wanted - 0.5, 0, size - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(size)), 0).astype(np.float32)
