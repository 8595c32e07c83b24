"""A slide under reverse distillation: the scores of its patches become a map, a slide score, lesion candidates and files."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.cohort import SlideRecord
from data_pipelines.detections import Detections
from data_pipelines.exports import write_table
from data_pipelines.prepare import TISSUE_MPP, PreparedSlide, prepare_slide
from data_pipelines.tiles import Tiles
from data_pipelines.tissue import tissue_mask
from experiments.run.journal import Journal, SlideScores
from experiments.run.slide_formats import DEFAULT_FORMATS, FORMATS, FinishedSlide, MapStyle, Writer
from experiments.run.slide_outputs import ValueCollector
from experiments.run.slide_state import Place, TileSettings
from experiments.run.task import Begun
from srcc_jax.froc import candidates
from srcc_jax.kernels.heat_maps import HeatMap, paint_tiles, smoothed
from srcc_jax.methods.reverse_distillation import slide_score

UNIT, STEM, COLUMN = "anomaly score", "anomaly", "score"
LEVELS = 3.0  # the largest score: 1 - cosine of each of three maps (§3.3)
DETECTIONS = "detections.csv"
MEASURES = (COLUMN, "highest", "candidates")
ANY_TISSUE = 1e-6  # share of a patch; whether its middle is tissue decides


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnomalySettings(TileSettings):
    """What anomaly maps rest on. tissue: the rule by which it is found (`tissue.tissue_mask`); pooling, patch_sigma (px), dihedral:
    how a patch is scored; map_sigma (cells), slide_threshold, nms_radius_um, nms_stop: what is made of the scores; thresholds:
    from which on regions are outlined; limits: of the colours."""

    files_alone = ("map sigma", "slide threshold", "NMS radius µm", "NMS stop", "formats", "thresholds")

    tissue: str
    pooling: str
    patch_sigma: float
    dihedral: bool
    map_sigma: float
    slide_threshold: float
    nms_radius_um: float
    nms_stop: float
    formats: tuple[str, ...]
    thresholds: tuple[float, ...]
    limits: tuple[float, float]

    @property
    def style(self) -> MapStyle:
        return MapStyle(UNIT, STEM, self.limits)

    def prepare(self, record: SlideRecord) -> PreparedSlide:
        """The patches whose middle lies on tissue."""
        prepared = prepare_slide(
            record,
            self.grid,
            min_tissue=self.min_tissue,
            mpp_override=self.mpp_override,
            find_tissue=functools.partial(tissue_mask, method=self.tissue),
        )
        return dataclasses.replace(prepared, tiles=centred_on_tissue(prepared))

    def basis(self, record: SlideRecord) -> dict[str, Any]:
        return super().basis(record) | {
            "tissue": self.tissue,
            "pooling": self.pooling,
            "patch sigma": self.patch_sigma,
            "dihedral": self.dihedral,
            "map sigma": self.map_sigma,
            "slide threshold": self.slide_threshold,
            "NMS radius µm": self.nms_radius_um,
            "NMS stop": self.nms_stop,
            "formats": ",".join(self.formats),
            "thresholds": ",".join(map(str, self.thresholds)),
        }


def centred_on_tissue(prepared: PreparedSlide) -> Tiles:
    """Those tiles at whose middle the tissue mask is true, as FW-RD scores the cells of its mask and no others."""
    tiles, mask = prepared.tiles, prepared.tissue
    cell = TISSUE_MPP / prepared.slide.mpp
    row, column = (((start + tiles.side / 2) // cell).astype(int) for start in (tiles.y, tiles.x))
    inside = (row < mask.shape[0]) & (
        column < mask.shape[1]
    )  # of a slide smaller than a tile the middle may lie outside
    return tiles.where(inside & mask[np.where(inside, row, 0), np.where(inside, column, 0)])


@dataclasses.dataclass(frozen=True)
class AnomalySlide(FinishedSlide):
    """detections: lesion candidates, in level-0 px."""

    detections: Detections = dataclasses.field(default_factory=lambda: Detections(*np.zeros((3, 0))))


def find_candidates(heat_map: HeatMap, *, radius_um: float, stop: float) -> Detections:
    """Lesion candidates of a map by non-maximum suppression (`froc.candidates`). radius_um: half the side of the square that one
    clears, at least a cell."""
    radius = max(1, round(radius_um / heat_map.mpp))
    score, x, y = candidates(heat_map.values, downsample=heat_map.downsample, radius=radius, stop=stop)
    return Detections(score.astype(np.float64), x + heat_map.origin[0], y + heat_map.origin[1])


def _write_detections(folder: pathlib.Path, slide: AnomalySlide) -> None:
    found = slide.detections
    write_table(folder / DETECTIONS, {"score": found.score, "x": found.x, "y": found.y})


WRITERS: dict[str, Writer] = {**FORMATS, "detections": _write_detections}
ANOMALY_FORMATS = (*DEFAULT_FORMATS, "detections")


class AnomalyCollector(ValueCollector):
    """Gathers the scores of patches."""

    def __init__(self, settings: AnomalySettings, begun: Begun, first_row: int):
        prepared, self._settings = begun.prepared, settings
        self._scores = SlideScores(
            prepared.tiles, slide_mpp=prepared.slide.mpp, block=settings.shape.block, output=COLUMN, maps=None
        )
        super().__init__(
            prepared,
            self._scores,
            first_row=first_row,
            journal=begun.journal,
            formats=settings.formats,
            writers=WRITERS,
        )

    def finished(self, thumbnail: np.ndarray, downsample: float) -> AnomalySlide:
        settings, tiles, values = self._settings, self.prepared.tiles, self._scores.values.astype(np.float64)
        painted = paint_tiles(values, tiles.x, tiles.y, **self._scores.scale)
        if settings.map_sigma:
            painted = smoothed(painted, sigma=settings.map_sigma)
        found = find_candidates(painted, radius_um=settings.nms_radius_um, stop=settings.nms_stop)
        slide = AnomalySlide(
            self.prepared,
            values,
            COLUMN,
            {settings.style: painted},
            thumbnail,
            downsample,
            settings.thresholds,
            detections=found,
        )
        return dataclasses.replace(slide, headline=_headline(self.found(slide)))

    def found(self, slide: FinishedSlide) -> dict[str, float | None]:
        assert isinstance(slide, AnomalySlide)
        known = slide.values[np.isfinite(slide.values)]
        if not len(known):
            return dict.fromkeys(MEASURES)
        score = slide_score(known, threshold=self._settings.slide_threshold)
        return dict(zip(MEASURES, (score, float(known.max()), len(slide.detections))))


def _headline(found: Mapping[str, float | None]) -> str:
    """Empty where no patch could be read."""
    if found[COLUMN] is None:
        return ""
    return f"slide score {found[COLUMN]:.4f}, highest {UNIT} {found['highest']:.4f}, lesion candidates: {found['candidates']}"


@dataclasses.dataclass(frozen=True)
class AnomalyTask:
    """Anomaly map, slide score and lesion candidates of each slide."""

    settings: AnomalySettings
    doing, done = "predicting", "predicted"
    measures = MEASURES

    def prepare(self, record: SlideRecord) -> PreparedSlide:
        return self.settings.prepare(record)

    def fits(self, journal: Journal, place: Place, basis: Mapping[str, Any], tiles: int) -> bool:
        return journal.fits(basis, tiles)

    def collector(self, begun: Begun, first_row: int) -> AnomalyCollector:
        return AnomalyCollector(self.settings, begun, first_row)
