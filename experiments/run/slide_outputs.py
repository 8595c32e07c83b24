"""What prediction leaves for one slide: maps as arrays and pictures, a table of tiles, and a row for the cohort."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.exports import write_json, write_map, write_overlay, write_table
from data_pipelines.prepare import PreparedSlide
from data_pipelines.slides import RegionError, SlideError
from experiments.run.scoring import Scored, probability
from srcc_jax.kernels.heat_maps import TileMapAverage, paint_probabilities

PICTURE_PX = 1200  # longer side of the overlays
PICTURES = {"probability": "probability.png", "Grad-CAM": "gradcam.png"}


@dataclasses.dataclass(frozen=True)
class SlideResult:
    """A row of slides.csv. status is "done" or "failed"; reason says why, or what is missing from a finished slide."""

    slide_id: str
    path: str
    status: str
    reason: str = ""
    probability: float | None = None
    mpp: float | None = None
    mpp_source: str = ""
    tiles: int = 0
    tiles_per_second: float | None = None


class SlideCollector:
    """Gathers the scored tiles of one slide as they come, and writes its files when the last has come."""

    def __init__(self, prepared: PreparedSlide, *, first_row: int):
        tiles, slide = prepared.tiles, prepared.slide
        self.prepared = prepared
        self.rows = np.arange(first_row, first_row + len(tiles))
        self._first_row = first_row
        self._logit = np.full(len(tiles), np.nan, np.float32)
        self._reasons: dict[int, str] = {}
        self._no_picture = ""
        self._seen = 0
        self._began = time.perf_counter()
        self._cam: TileMapAverage | None = None
        self._scale: dict[str, Any] = {
            "tile": tiles.grid.tile,
            "stride": tiles.grid.stride,
            "mpp": tiles.grid.mpp,
            "slide_mpp": slide.mpp,
        }

    @property
    def complete(self) -> bool:
        return self._seen == len(self.rows)

    def add(self, scored: Scored) -> int:
        """Takes what belongs to this slide out of a batch; returns how many tiles that were."""
        before, tiles = self._seen, self.prepared.tiles
        mine = (scored.row >= self._first_row) & (scored.row <= self.rows[-1])
        rows = scored.row[mine] - self._first_row
        self._logit[rows] = scored.logit[mine]
        if scored.cam is not None and len(rows):
            self._cam = self._cam or TileMapAverage(tiles.x, tiles.y, size=scored.cam.shape[-1], **self._scale)
            self._cam.add(rows, scored.cam[mine])
        missing = {row - self._first_row: why for row, why in scored.failed if self._first_row <= row <= self.rows[-1]}
        self._reasons |= missing
        self._seen += len(rows) + len(missing)
        return self._seen - before

    def write(self, folder: pathlib.Path) -> SlideResult:
        """Writes maps, pictures and tables into `folder` and closes the slide."""
        record, slide, tiles = self.prepared.record, self.prepared.slide, self.prepared.tiles
        values = probability(self._logit)
        seconds = time.perf_counter() - self._began
        known = np.isfinite(values)
        self._write_maps(folder, values)
        result = SlideResult(
            slide_id=record.slide_id,
            path=str(record.path),
            status="done" if known.any() else "failed",
            reason=self._reason(),
            probability=float(values[known].max()) if known.any() else None,
            mpp=slide.mpp,
            mpp_source=slide.mpp_source,
            tiles=len(tiles),
            tiles_per_second=round(len(tiles) / seconds, 1),
        )
        columns = {"x": tiles.x, "y": tiles.y, "probability": values, "tissue": tiles.tissue}
        write_table(folder / "tiles.csv", columns)
        about = {
            "levels": slide.levels,
            "backend": slide.backend,
            "width": slide.width,
            "height": slide.height,
            "grid": tiles.grid,
            "tile_level0": tiles.grid.tile * tiles.grid.mpp / slide.mpp,
            "tissue_share": float(self.prepared.tissue.mean()),
            "sparse_tiles": slide.sparse_tiles,
            "unreadable": {str(row): reason for row, reason in self._reasons.items()},
        }
        write_json(folder / "slide.json", {**dataclasses.asdict(result), **about})
        slide.close()
        return result

    def _reason(self) -> str:
        """What is missing, in words."""
        parts = [self._no_picture] if self._no_picture else []
        if self._reasons:
            first = next(iter(self._reasons.values()))
            parts.append(f"{len(self._reasons)} of {len(self.rows)} tiles could not be read: {first}")
        return "; ".join(parts)

    def _write_maps(self, folder: pathlib.Path, values: np.ndarray) -> None:
        tiles, slide = self.prepared.tiles, self.prepared.slide
        downsample = max(1.0, max(slide.width, slide.height) / PICTURE_PX)
        thumbnail = self._thumbnail(downsample)
        painted = paint_probabilities(values, tiles.x, tiles.y, **self._scale)
        write_map(folder / "probability.npz", painted, unit="probability")
        picture = folder / PICTURES["probability"]
        write_overlay(picture, thumbnail, painted, thumbnail_downsample=downsample, label="probability")
        if self._cam is not None:
            averaged = self._cam.result()
            write_map(folder / "gradcam.npz", averaged, unit="Grad-CAM")
            top = max(float(np.nanmax(averaged.values)), 1e-6) if np.isfinite(averaged.values).any() else 1.0
            picture = folder / PICTURES["Grad-CAM"]
            limits = (0.0, top)
            write_overlay(
                picture, thumbnail, averaged, thumbnail_downsample=downsample, limits=limits, label="Grad-CAM"
            )

    def _thumbnail(self, downsample: float) -> np.ndarray:
        """The slide as a picture; its tissue in gray where a level cannot be read that no tile needed."""
        slide, tissue = self.prepared.slide, self.prepared.tissue
        try:
            return slide.thumbnail(downsample * slide.mpp)
        except (RegionError, SlideError) as error:
            self._no_picture = f"no picture of the slide: {error}"
        gray = Image.fromarray(np.where(tissue, 200, 255).astype(np.uint8))
        size = (math.ceil(slide.width / downsample), math.ceil(slide.height / downsample))
        return np.array(gray.resize(size, Image.Resampling.NEAREST).convert("RGB"))
