"""A slide that is predicted: its tiles are gathered, its maps and other files written, its row for the cohort made."""

from __future__ import annotations

import abc
import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.cohort import SlideRecord
from data_pipelines.exports import write_json
from data_pipelines.files import replace_folder
from data_pipelines.prepare import PreparedSlide
from data_pipelines.scan import ScanShape
from experiments.run.collector import TileCollector
from experiments.run.journal import Journal, SlideProgress, SlideScores
from experiments.run.scoring import probability
from experiments.run.slide_formats import (
    DEFAULT_FORMATS,
    FORMATS,
    GRAD_CAM_MAP,
    PROBABILITY_MAP,
    FinishedSlide,
    MapStyle,
    Writer,
    picture_of,
    write_formats,
)
from experiments.run.slide_quality import slide_flags, top_tiles
from experiments.run.slide_result import PROBABILITY, TIMES, SlideResult
from experiments.run.slide_state import UNFINISHED, Place, Settings
from experiments.run.task import Begun
from srcc_jax.kernels.heat_maps import HeatMap, paint_tiles


class FolderCollector(TileCollector):
    """One whose slide gets a folder of files, which appears at once and whole."""

    @abc.abstractmethod
    def write(self, folder: pathlib.Path) -> SlideResult:
        """Writes the slide's files into `folder`, closes the slide and returns its row, without the seconds of writing."""

    def finish(self, place: Place) -> SlideResult:
        with tempfile.TemporaryDirectory(dir=place.folder, prefix=UNFINISHED) as folder:
            whole = pathlib.Path(folder) / place.slide_id
            result = self.write(whole)
            place.state.unlink(missing_ok=True)
            replace_folder(whole, place.outputs)
        if result.status == "failed":
            place.scores.unlink()  # or the next start could not try again
        return result

    def about(self, result: SlideResult) -> dict[str, Any]:
        """slide.json: the row, but for what differs from run to run, and the slide."""
        slide, tiles = self.prepared.slide, self.prepared.tiles
        own = ("traceback", "unreadable", "model", "configuration", "measures", *TIMES)
        row: dict[str, Any] = {}
        for name, value in dataclasses.asdict(result).items():
            if name == PROBABILITY:
                row |= {name: value} if value is not None or not result.measures else {}
                row |= result.measures
            elif name not in own:
                row[name] = value
        return row | {
            "levels": slide.levels,
            "width": slide.width,
            "height": slide.height,
            "bounds": slide.bounds,
            "grid": tiles.grid,
            "tile_level0": tiles.grid.tile * tiles.grid.mpp / slide.mpp,
            "tissue_share": float(self.prepared.tissue.mean()),
            "quality": self.prepared.quality,
        }

    def lost(self) -> dict[str, Any]:
        """The end of slide.json: what could not be read."""
        reasons = self.progress.reasons
        return {
            "sparse_tiles": self.prepared.slide.sparse_tiles,
            "unreadable": {str(row): reasons[row] for row in sorted(reasons)},
        }


class ValueCollector(FolderCollector):
    """One for a network that gives each tile a value: the files are those of `slide_formats`. scores: where values are gathered;
    formats: the files wanted; writers: of all formats that there are, if not FORMATS."""

    def __init__(
        self,
        prepared: PreparedSlide,
        scores: SlideProgress,
        *,
        first_row: int,
        journal: Journal | None,
        formats: tuple[str, ...],
        writers: Mapping[str, Writer] = FORMATS,
    ):
        super().__init__(prepared, scores, first_row=first_row, journal=journal)
        self._formats, self._writers = formats, writers

    @abc.abstractmethod
    def finished(self, thumbnail: np.ndarray, downsample: float) -> FinishedSlide:
        """What the files are made of. thumbnail uint8 [h, w, 3] of `downsample` level-0 px per pixel."""

    @abc.abstractmethod
    def found(self, slide: FinishedSlide) -> dict[str, float | None]:
        """The task's measures; None where no tile could be read, and the slide counts as failed."""

    def write(self, folder: pathlib.Path) -> SlideResult:
        thumbnail, downsample, problem = picture_of(self.prepared)
        slide = self.finished(thumbnail, downsample)
        write_formats(folder, slide, self._formats, self._writers)
        found = self.found(slide)
        probability = found.pop(PROBABILITY, None)
        done = bool(np.isfinite(slide.values).any())
        result = self.result(done=done, probability=probability, measures=found, problem=problem)
        write_json(folder / "slide.json", self.about(result) | _to_look_at(slide) | self.lost())
        self.prepared.slide.close()
        return result


def _to_look_at(slide: FinishedSlide) -> dict[str, Any]:
    top = top_tiles(slide.prepared, slide.values)
    return {
        "flags": slide_flags(slide.prepared, slide.values),
        "top_tiles": [{"file": tile.file, "x": tile.x, "y": tile.y, slide.column: tile.value} for tile in top],
    }


class SlideCollector(ValueCollector):
    """Gathers logits and Grad-CAM. thresholds: the probabilities from which on regions are outlined."""

    def __init__(
        self,
        prepared: PreparedSlide,
        *,
        first_row: int,
        journal: Journal | None = None,
        cam: bool = True,
        formats: tuple[str, ...] = DEFAULT_FORMATS,
        thresholds: tuple[float, ...] = (0.5,),
    ):
        block = ScanShape.of(prepared.tiles.grid).block
        self._scores = SlideScores(
            prepared.tiles, slide_mpp=prepared.slide.mpp, block=block, maps="cam" if cam else None
        )
        super().__init__(prepared, self._scores, first_row=first_row, journal=journal, formats=formats)
        self._thresholds = thresholds

    def finished(self, thumbnail: np.ndarray, downsample: float) -> FinishedSlide:
        tiles, values = self.prepared.tiles, probability(self._scores.values)
        painted = paint_tiles(values, tiles.x, tiles.y, **self._scores.scale)
        maps: dict[MapStyle, HeatMap] = {PROBABILITY_MAP: painted}
        averaged = self._scores.mean_map()
        if averaged is not None:
            maps[GRAD_CAM_MAP] = averaged
        return FinishedSlide(self.prepared, values, PROBABILITY, maps, thumbnail, downsample, self._thresholds)

    def found(self, slide: FinishedSlide) -> dict[str, float | None]:
        known = slide.values[np.isfinite(slide.values)]
        return {PROBABILITY: float(known.max()) if len(known) else None}


@dataclasses.dataclass(frozen=True)
class PredictionTask:
    """Probabilities and maps of each slide."""

    settings: Settings
    doing, done = "predicting", "predicted"
    measures = (PROBABILITY,)

    def prepare(self, record: SlideRecord) -> PreparedSlide:
        return self.settings.prepare(record)

    def fits(self, journal: Journal, place: Place, basis: Mapping[str, Any], tiles: int) -> bool:
        return journal.fits(basis, tiles) and (not self.settings.cam or SlideScores.has_maps(journal))

    def collector(self, begun: Begun, first_row: int) -> SlideCollector:
        settings = self.settings
        return SlideCollector(
            begun.prepared,
            first_row=first_row,
            journal=begun.journal,
            cam=settings.cam,
            formats=settings.formats,
            thresholds=settings.thresholds,
        )
