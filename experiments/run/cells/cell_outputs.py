"""A slide under cell detection: probabilities of its windows become cells, their density, and files."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data_pipelines import cell_exports
from data_pipelines.cell_exports import CellTable
from data_pipelines.cohort import SlideRecord
from data_pipelines.prepare import PreparedSlide
from data_pipelines.scan import ScanShape
from experiments.run.cells.prediction_windows import CellProgress, Cores, FindCells, tissue_mm2, with_tissue_in_core
from experiments.run.journal import Journal
from experiments.run.slide_formats import FORMATS, FinishedSlide, MapStyle, Writer
from experiments.run.slide_outputs import ValueCollector
from experiments.run.slide_quality import write_slide_page
from experiments.run.slide_result import SlideResult
from experiments.run.slide_state import Place, TileSettings
from experiments.run.task import Begun
from srcc_jax.cell_windows import WindowCells, found_once
from srcc_jax.kernels.density import density_map

COLUMN = "cells_per_mm2"
MEASURES = ("cells", COLUMN)
DENSITY_MAP = MapStyle("cells per mm²", "density")
CELLS_MAP = MapStyle("cells", "cells")
_AHEAD = 2  # windows that wait for their cells, for each thread


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellSettings(TileSettings):
    """What detected cells rest on. threshold, min_area, beta, spread: of `find_instances`. min_score: cells below are left out;
    square_um: of the density map; mask_measures: of the cells, whether they are told; label: what the cells are; thresholds: cells per
    mm² from which on regions are outlined."""

    files_alone = ("min score", "square µm", "mask measures", "label", "formats", "thresholds")

    threshold: float
    min_area: int
    beta: float
    spread: float
    min_score: float
    square_um: float
    mask_measures: bool
    label: str
    formats: tuple[str, ...]
    thresholds: tuple[float, ...]

    @property
    def shape(self) -> ScanShape:
        """Few windows: they are large, and so are their maps."""
        return ScanShape.of(self.grid, block=2, regions=1)

    def prepare(self, record: SlideRecord) -> PreparedSlide:
        """The windows in whose core there is tissue."""
        prepared = super().prepare(record)
        return dataclasses.replace(prepared, tiles=with_tissue_in_core(prepared))

    def basis(self, record: SlideRecord) -> dict[str, Any]:
        return super().basis(record) | {
            "threshold": self.threshold,
            "min area": self.min_area,
            "beta": self.beta,
            "spread": self.spread,
            "min score": self.min_score,
            "square µm": self.square_um,
            "mask measures": self.mask_measures,
            "label": self.label,
            "formats": ",".join(self.formats),
            "thresholds": ",".join(map(str, self.thresholds)),
        }


@dataclasses.dataclass(frozen=True)
class CellSlide(FinishedSlide):
    """cells: that count, in level-0 px; cut: how many of them a window's border cuts; tissue_mm2: that was read."""

    cells: CellTable = dataclasses.field(kw_only=True)
    cut: int = 0
    tissue_mm2: float = 0.0


def _write_objects(folder: pathlib.Path, slide: CellSlide) -> None:
    prepared = slide.prepared
    cell_exports.write_cell_objects(
        folder / "cells.geojson", slide.cells, slide_id=prepared.record.slide_id, offset=prepared.slide.bounds[:2]
    )


def _write_box_objects(folder: pathlib.Path, slide: CellSlide) -> None:
    prepared = slide.prepared
    cell_exports.write_box_objects(
        folder / "boxes.geojson", slide.cells, slide_id=prepared.record.slide_id, offset=prepared.slide.bounds[:2]
    )


def _write_table(folder: pathlib.Path, slide: CellSlide) -> None:
    cell_exports.write_cell_table(folder / "cells.csv", slide.cells)


def _write_boxes(folder: pathlib.Path, slide: CellSlide) -> None:
    opened, slide_id = slide.prepared.slide, slide.prepared.record.slide_id
    path = folder / "detections" / f"{slide_id}.xml"
    cell_exports.write_cell_boxes(path, slide.cells, slide_id=slide_id, width=opened.width, height=opened.height)


def _write_picture(folder: pathlib.Path, slide: CellSlide) -> None:
    path = folder / CELLS_MAP.picture
    cell_exports.write_cell_picture(path, slide.thumbnail, slide.cells, downsample=slide.downsample)


def _write_page(folder: pathlib.Path, slide: CellSlide) -> None:
    pictures = {style.unit: style.picture for style in (CELLS_MAP, DENSITY_MAP)}
    write_slide_page(
        folder, slide.prepared, slide.values, pictures=pictures, unit=DENSITY_MAP.unit, headline=slide.headline
    )


WRITERS: dict[str, Writer] = {
    **{name: writer for name, writer in FORMATS.items() if name != "html"},
    "cells": _write_objects,
    "boxes": _write_box_objects,
    "table": _write_table,
    "xml": _write_boxes,
    "picture": _write_picture,
    "html": _write_page,  # after "png" and "picture", which it shows
}
CELL_FORMATS = ("png", "npz", "csv", "ome_tiff", "cells", "table", "xml", "picture", "html")


class CellCollector(ValueCollector):
    """Gathers the cells of windows."""

    def __init__(
        self,
        settings: CellSettings,
        begun: Begun,
        first_row: int,
        *,
        find: FindCells,
        pool: ThreadPoolExecutor,
        ahead: int,
    ):
        prepared, self._settings = begun.prepared, settings
        self._cores = Cores.of(prepared)
        self._progress = CellProgress(
            prepared.tiles, self._cores, block=settings.shape.block, find=find, pool=pool, ahead=ahead
        )
        self._cut = 0
        super().__init__(
            prepared,
            self._progress,
            first_row=first_row,
            journal=begun.journal,
            formats=settings.formats,
            writers=WRITERS,
        )

    def finished(self, thumbnail: np.ndarray, downsample: float) -> CellSlide:
        prepared, settings = self.prepared, self._settings
        tiles, slide = prepared.tiles, prepared.slide
        found = self._progress.cells()
        found = found.where(found_once(found, tiles.i, tiles.j) & (found.score >= settings.min_score))
        cells, cores = self._table(found), self._cores.level0(tiles)
        lost = np.isin(np.arange(len(tiles)), list(self.progress.reasons))
        density = density_map(
            *cells.middle.T,
            read=cores[~lost],
            unread=cores[lost],
            square_um=settings.square_um,
            slide_mpp=slide.mpp,
            size=(slide.width, slide.height),
        )
        area_mm2 = (cores[:, 2] - cores[:, 0]) * (cores[:, 3] - cores[:, 1]) * slide.mpp**2 / 1e6
        values = np.where(lost, np.nan, np.bincount(found.window, minlength=len(tiles)) / area_mm2)
        made = CellSlide(
            prepared,
            values,
            COLUMN,
            {DENSITY_MAP: density},
            thumbnail,
            downsample,
            settings.thresholds,
            cells=cells,
            cut=int(found.cut.sum()),
            tissue_mm2=tissue_mm2(prepared, cores[~lost]),
        )
        self._cut = made.cut
        return dataclasses.replace(made, headline=_headline(self.found(made)))

    def found(self, slide: FinishedSlide) -> dict[str, float | None]:
        assert isinstance(slide, CellSlide)
        if not np.isfinite(slide.values).any():
            return dict.fromkeys(MEASURES)
        return dict(
            zip(MEASURES, (len(slide.cells), len(slide.cells) / slide.tissue_mm2 if slide.tissue_mm2 else None))
        )

    def about(self, result: SlideResult) -> dict[str, Any]:
        """Also how many cells a window's border cuts, which are wider than the overlap and may count twice."""
        return super().about(result) | {"cut_cells": self._cut}

    def _table(self, found: WindowCells) -> CellTable:
        """Of the cells that count, in level-0 px; boxes end with the slide."""
        slide, scale = self.prepared.slide, self._cores.scale
        pixel_um2 = self.prepared.tiles.grid.mpp**2
        measured = {"inner area µm^2": found.inner * pixel_um2, "inner share": found.inner / np.maximum(found.area, 1)}
        return CellTable(
            box=np.minimum(found.box * scale, np.tile([slide.width, slide.height], 2)),
            score=found.score,
            area_um2=found.area * pixel_um2,
            masks=found.masks,
            scale=scale,
            label=self._settings.label,
            more=measured if self._settings.mask_measures else {},
        )


def _headline(found: Mapping[str, float | None]) -> str:
    """Empty where no window could be read."""
    if found["cells"] is None:
        return ""
    density = "" if found[COLUMN] is None else f", {found[COLUMN]:.1f} per mm² of tissue"
    return f"{found['cells']} cells{density}"


@dataclasses.dataclass(frozen=True)
class CellTask:
    """Cells of each slide. find: cells on a part of a slide; pool, threads: where that is done."""

    settings: CellSettings
    find: FindCells
    pool: ThreadPoolExecutor
    threads: int
    doing, done = "predicting", "predicted"
    measures = MEASURES

    def prepare(self, record: SlideRecord) -> PreparedSlide:
        return self.settings.prepare(record)

    def fits(self, journal: Journal, place: Place, basis: Mapping[str, Any], tiles: int) -> bool:
        return journal.fits(basis, tiles)

    def collector(self, begun: Begun, first_row: int) -> CellCollector:
        return CellCollector(
            self.settings, begun, first_row, find=self.find, pool=self.pool, ahead=_AHEAD * self.threads
        )
