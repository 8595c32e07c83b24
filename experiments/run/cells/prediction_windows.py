"""The windows of a slide under cell detection: their cores, and the cells found in each while the device is at the next."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from data_pipelines.prepare import TISSUE_MPP, PreparedSlide
from data_pipelines.tile_table import SLACK_PX
from data_pipelines.tiles import Tiles
from experiments.run.journal import SlideProgress
from srcc_jax.cell_windows import Rectangle, WindowCells, cells_of_window, core_borders
from srcc_jax.instances import Instances

OUTPUT = "probability"
GUESTS = 0.25  # of the overlap: how far outside a window's core the middle of a guest may lie

FindCells = Callable[[np.ndarray], Instances]
"""Probabilities [H, W, 3] of a part of a slide -> its cells."""


@dataclasses.dataclass(frozen=True, eq=False)
class Cores:
    """Of the windows of a slide of width x height model pixels, of which each is `scale` level-0 pixels wide: float64 borders of their
    columns and rows."""

    width: int
    height: int
    scale: float
    columns: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, prepared: PreparedSlide) -> Cores:
        slide, grid = prepared.slide, prepared.tiles.grid
        scale = grid.mpp / slide.mpp
        width, height = (max(1, int(length / scale + SLACK_PX)) for length in (slide.width, slide.height))
        columns, rows = (
            core_borders(grid.positions(length / scale), tile=grid.tile, length=pixels)
            for length, pixels in ((slide.width, width), (slide.height, height))
        )
        return cls(width, height, scale, columns, rows)

    def core(self, row: int, column: int) -> Rectangle:
        """In model pixels, of the window at this place of the grid."""
        return self.columns[column], self.rows[row], self.columns[column + 1], self.rows[row + 1]

    def level0(self, tiles: Tiles) -> np.ndarray:
        """float64 [N, 4] of the tiles, in level-0 pixels."""
        return np.asarray([self.core(i, j) for i, j in zip(tiles.i, tiles.j)]).reshape(-1, 4) * self.scale


class CellProgress(SlideProgress):
    """The cells of each window, found in the threads of `pool` while the device is at the next windows."""

    def __init__(
        self, tiles: Tiles, cores: Cores, *, block: int, find: FindCells, pool: ThreadPoolExecutor, ahead: int
    ):
        super().__init__(tiles, block=block)
        self._cores, self._find, self._pool, self._ahead = cores, find, pool, ahead
        self._found: dict[int, WindowCells] = {}
        self._waiting: collections.deque[tuple[int, Future[WindowCells]]] = collections.deque()

    def keep(self, rows: np.ndarray, outputs: Mapping[str, np.ndarray]) -> None:
        for row, maps in zip(rows.tolist(), outputs[OUTPUT]):
            self._waiting.append((row, self._pool.submit(self._cells_of, row, maps)))
            self._take(self._ahead)

    def kept(self, whole: np.ndarray) -> dict[str, np.ndarray]:
        cells = self.cells()
        return {field.name: getattr(cells, field.name).copy() for field in dataclasses.fields(cells)}

    def restore(self, kept: Mapping[str, np.ndarray]) -> None:
        self._found = WindowCells(**kept).by_window()

    def cells(self) -> WindowCells:
        """Of all windows so far, in the order of their rows: own cells and guests."""
        self._take(0)
        return WindowCells.concatenate([self._found[row] for row in sorted(self._found)])

    def _take(self, most: int) -> None:
        """Waits until no more than so many windows are without their cells."""
        while len(self._waiting) > most:
            row, future = self._waiting.popleft()
            self._found[row] = future.result()

    def _cells_of(self, row: int, maps: np.ndarray) -> WindowCells:
        """Of a window; what of it lies beyond the slide is left out."""
        tiles, cores = self.tiles, self._cores
        corner = (int(tiles.u[row]), int(tiles.v[row]))
        part = maps[: cores.height - corner[1], : cores.width - corner[0]].astype(np.float32)
        return cells_of_window(
            self._find(part),
            window=row,
            corner=corner,
            core=cores.core(int(tiles.i[row]), int(tiles.j[row])),
            margin=GUESTS * (tiles.tile - tiles.stride),
            slide=(cores.width, cores.height),
        )


def _mask_span(rectangle: np.ndarray, cell: float) -> tuple[slice, slice]:
    """Rows and columns of a mask, of cells of so many level-0 pixels, whose middles a rectangle in level-0 pixels holds."""
    x1, y1, x2, y2 = np.ceil(rectangle / cell - 0.5).astype(int)
    return slice(max(y1, 0), max(y2, 0)), slice(max(x1, 0), max(x2, 0))


def with_tissue_in_core(prepared: PreparedSlide) -> Tiles:
    """The windows in whose core there is tissue."""
    cell, mask = TISSUE_MPP / prepared.slide.mpp, prepared.tissue
    cores = Cores.of(prepared).level0(prepared.tiles)
    return prepared.tiles.where(np.asarray([mask[_mask_span(core, cell)].any() for core in cores], bool))


def tissue_mm2(prepared: PreparedSlide, cores: np.ndarray) -> float:
    """Area of tissue in these cores, float64 [N, 4] in level-0 pixels."""
    cell = TISSUE_MPP / prepared.slide.mpp
    return sum(int(prepared.tissue[_mask_span(core, cell)].sum()) for core in cores) * (TISSUE_MPP / 1000) ** 2
