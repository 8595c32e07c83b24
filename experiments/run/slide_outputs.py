"""A slide that is predicted: its tiles are gathered, its maps and other files written, its row for the cohort made."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.exports import write_json
from data_pipelines.files import replace_folder
from data_pipelines.prepare import PreparedSlide
from experiments.run.collector import TileCollector
from experiments.run.journal import Journal
from experiments.run.scoring import probability
from experiments.run.slide_formats import DEFAULT_FORMATS, FinishedSlide, picture_of, write_formats
from experiments.run.slide_quality import slide_flags, top_tiles
from experiments.run.slide_result import TIMES, SlideResult
from experiments.run.slide_state import UNFINISHED, Place, Settings
from experiments.run.task import Begun
from srcc_jax.kernels.heat_maps import paint_probabilities


@dataclasses.dataclass(frozen=True)
class PredictionTask:
    """Probabilities and maps of each slide."""

    settings: Settings
    doing, done = "predicting", "predicted"

    def fits(self, journal: Journal, place: Place, basis: Mapping[str, Any], tiles: int) -> bool:
        return journal.fits(basis, tiles, cam=self.settings.cam)

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


class SlideCollector(TileCollector):
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
        super().__init__(prepared, first_row=first_row, journal=journal, cam=cam)
        self._formats, self._thresholds = formats, thresholds

    def finish(self, place: Place) -> SlideResult:
        with tempfile.TemporaryDirectory(dir=place.folder, prefix=UNFINISHED) as folder:
            whole = pathlib.Path(folder) / place.slide_id
            result = self.write(whole)
            place.state.unlink(missing_ok=True)
            replace_folder(whole, place.outputs)
        if result.status == "failed":
            place.scores.unlink()  # or the next start could not try again
        return result

    def write(self, folder: pathlib.Path) -> SlideResult:
        """Writes the slide's files into `folder`, closes the slide and returns its row, without the seconds of writing."""
        prepared, tiles = self.prepared, self.prepared.tiles
        values = probability(self.scores.logit)
        thumbnail, downsample, problem = picture_of(prepared)
        maps = {"probability": paint_probabilities(values, tiles.x, tiles.y, **self.scores.scale)}
        averaged = self.scores.cam_map()
        if averaged is not None:
            maps["Grad-CAM"] = averaged
        write_formats(
            folder, FinishedSlide(prepared, values, maps, thumbnail, downsample, self._thresholds), self._formats
        )
        known = np.isfinite(values)
        highest = float(values[known].max()) if known.any() else None
        result = self._row(done=highest is not None, probability=highest, problem=problem)
        write_json(folder / "slide.json", self._about(result, values))
        prepared.slide.close()
        return result

    def _about(self, result: SlideResult, values: np.ndarray) -> dict[str, Any]:
        """slide.json: the row, but for what differs from run to run, the slide, and what to look at on it."""
        slide, tiles = self.prepared.slide, self.prepared.tiles
        own = ("traceback", "unreadable", "model", "configuration", *TIMES)
        row = {name: value for name, value in dataclasses.asdict(result).items() if name not in own}
        return row | {
            "levels": slide.levels,
            "width": slide.width,
            "height": slide.height,
            "grid": tiles.grid,
            "tile_level0": tiles.grid.tile * tiles.grid.mpp / slide.mpp,
            "tissue_share": float(self.prepared.tissue.mean()),
            "quality": self.prepared.quality,
            "flags": slide_flags(self.prepared, values),
            "top_tiles": top_tiles(self.prepared, values),
            "sparse_tiles": slide.sparse_tiles,
            "unreadable": {str(row): self.scores.reasons[row] for row in sorted(self.scores.reasons)},
        }
