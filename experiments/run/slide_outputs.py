"""One slide on its way through prediction: its scored tiles are gathered, its files written, its row for the cohort made."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from data_pipelines.exports import write_json
from data_pipelines.prepare import PreparedSlide
from data_pipelines.scan import ScanJob
from data_pipelines.slides import RegionError, Slide, SlideError
from experiments.run.journal import Journal, SlideScores
from experiments.run.scoring import Scored, probability
from experiments.run.slide_formats import DEFAULT_FORMATS, PICTURES, FinishedSlide, picture_of, write_formats
from experiments.run.slide_quality import slide_flags, top_tiles
from experiments.run.slides import UNEXPECTED
from srcc_jax.kernels.heat_maps import paint_probabilities

__all__ = ["PICTURES", "STAGES", "TIMES", "SlideCollector", "SlideResult"]

BLOCK = 8  # windows along a super-tile's side, as ScanShape.of has it
STAGES = ("open", "tissue", "read", "model", "write")
TIMES = ("tiles_per_second", *(f"seconds_{stage}" for stage in STAGES))  # columns that differ from run to run


@dataclasses.dataclass(frozen=True)
class SlideResult:
    """A row of slides.csv. status is "done", "failed" or, in a table made before the end, "unfinished"; reason says why, or what
    is missing from a finished slide; traceback: a file below the results' folder; seconds are those of the device and of each
    thread, which work side by side."""

    slide_id: str
    path: str
    status: str
    reason: str = ""
    traceback: str = ""
    probability: float | None = None
    mpp: float | None = None
    mpp_source: str = ""
    backend: str = ""
    tiles: int = 0
    unreadable: int = 0
    tiles_per_second: float | None = None
    seconds_open: float | None = None
    seconds_tissue: float | None = None
    seconds_read: float | None = None
    seconds_model: float | None = None
    seconds_write: float | None = None
    model: str = ""
    configuration: str = ""


class SlideCollector:
    """Gathers the scored tiles of one slide as they come, and writes its files when the last has come.

    The rows of its tiles in the table that prediction knows begin at first_row. Goes on from `journal`, where there is one.
    """

    def __init__(self, prepared: PreparedSlide, *, first_row: int, journal: Journal | None = None, cam: bool = True):
        self.prepared = prepared
        self.scores = SlideScores(prepared.tiles, slide_mpp=prepared.slide.mpp, block=BLOCK)
        self.seconds = {**dict.fromkeys(STAGES, 0.0), **prepared.seconds}
        if journal is not None:
            self.scores.resume(journal, cam=cam)
            self.seconds |= {stage: journal.seconds[stage] for stage in ("read", "model")}
        self._first_row = first_row
        self._remaining = np.flatnonzero(~self.scores.seen)
        self.rows = first_row + self._remaining
        self._reading = threading.Lock()
        self.traceback = ""  # of the first error that no reader announces

    @property
    def complete(self) -> bool:
        return self.scores.complete

    def job(self) -> ScanJob:
        """The scan of the tiles that remain."""
        return ScanJob(self._lend, self.prepared.tiles.take(self._remaining), self.rows)

    def add(self, scored: Scored, between_blocks: Callable[[], object] = lambda: None) -> int:
        """Takes what belongs to this slide out of a batch and returns how many tiles that were. between_blocks: called whenever
        no block is half done."""
        end = self._first_row + len(self.scores.seen)
        failed = {row - self._first_row: why for row, why in scored.failed if self._first_row <= row < end}
        if failed:
            self.scores.fail(failed)
        mine = np.flatnonzero((scored.row >= self._first_row) & (scored.row < end))
        self.seconds["model"] += scored.seconds * len(mine) / max(1, len(scored.row))
        rows = scored.row[mine] - self._first_row
        for block in self.scores.blocks_of(rows):
            cam = None if scored.cam is None else scored.cam[mine[block]]
            self.scores.add(rows[block], scored.logit[mine[block]], cam)
            if self.scores.between_blocks:
                between_blocks()
        return len(failed) + len(mine)

    def write(
        self,
        folder: pathlib.Path,
        *,
        formats: tuple[str, ...] = DEFAULT_FORMATS,
        thresholds: tuple[float, ...] = (0.5,),
    ) -> SlideResult:
        """Writes the slide's files into `folder`, closes the slide and returns its row, without the seconds of writing."""
        prepared, tiles = self.prepared, self.prepared.tiles
        values = probability(self.scores.logit)
        thumbnail, downsample, problem = picture_of(prepared)
        maps = {"probability": paint_probabilities(values, tiles.x, tiles.y, **self.scores.scale)}
        averaged = self.scores.cam_map()
        if averaged is not None:
            maps["Grad-CAM"] = averaged
        write_formats(folder, FinishedSlide(prepared, values, maps, thumbnail, downsample, thresholds), formats)
        result = self._result(values, problem)
        write_json(folder / "slide.json", self._about(result, values))
        prepared.slide.close()
        return result

    def _result(self, values: np.ndarray, problem: str) -> SlideResult:
        record, slide, known = self.prepared.record, self.prepared.slide, np.isfinite(values)
        parts = [problem] if problem else []
        reasons = self.scores.reasons
        if reasons:
            parts.append(f"{len(reasons)} of {len(values)} tiles could not be read: {reasons[min(reasons)]}")
        return SlideResult(
            slide_id=record.slide_id,
            path=str(record.path),
            status="done" if known.any() else "failed",
            reason="; ".join(parts),
            probability=float(values[known].max()) if known.any() else None,
            mpp=slide.mpp,
            mpp_source=slide.mpp_source,
            backend=slide.backend,
            tiles=len(values),
            unreadable=len(reasons),
        )

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

    @contextlib.contextmanager
    def _lend(self) -> Iterator[Slide]:
        """The slide, for one read in any thread. What its reader did not announce becomes the loss of this region."""
        began = time.perf_counter()
        try:
            yield self.prepared.slide
        except (RegionError, SlideError):
            raise
        except UNEXPECTED as error:
            with self._reading:
                self.traceback = self.traceback or traceback.format_exc()
            raise RegionError(f"{self.prepared.record.path}: {type(error).__name__}: {error}") from error
        finally:
            with self._reading:
                self.seconds["read"] += time.perf_counter() - began


def stage_columns(seconds: Mapping[str, float], scored: int) -> dict[str, Any]:
    """The columns TIMES of a slide of which so many tiles were scored."""
    speed = scored / seconds["model"] if seconds["model"] else None
    columns: dict[str, Any] = {"tiles_per_second": speed and round(speed, 1)}
    return columns | {f"seconds_{stage}": round(seconds[stage], 3) for stage in STAGES}
