"""A slide whose tiles become features: they wait in a file of rows in the order of the tile table, which becomes its HDF5 file."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from data_pipelines.cohort import SlideRecord
from data_pipelines.feature_files import (
    CHUNK_ROWS,
    TiledSlide,
    TileRows,
    clam_files,
    trident_files,
    write_clam,
    write_trident,
)
from data_pipelines.files import remove_unfinished
from data_pipelines.prepare import PreparedSlide
from data_pipelines.row_files import RowFile
from experiments.run.collector import TileCollector
from experiments.run.journal import Journal, SlideScores
from experiments.run.program import UsageError
from experiments.run.scoring import Scored, probability
from experiments.run.slide_result import PROBABILITY, SlideResult
from experiments.run.slide_state import Place, TileSettings
from experiments.run.task import Begun

LAYOUTS = ("trident", "clam")
DTYPES = ("float32", "float16")
SCORE = "probability"  # the dataset of --scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureSettings(TileSettings):
    """What features rest on. pooling: of `srcc_jax.models.features`; encoder: what the files call the network; scores: whether
    the probability goes with them."""

    files_alone = ("layout", "encoder")
    pooling: str
    dtype: str
    layout: str
    encoder: str
    scores: bool

    def basis(self, record: SlideRecord) -> dict[str, Any]:
        own = ("pooling", "dtype", "layout", "encoder", "scores")
        return super().basis(record) | {name: getattr(self, name) for name in own}


@dataclasses.dataclass(frozen=True)
class FeatureTask:
    """Features of each slide, in files below `out`. network: its name; width: numbers of a tile."""

    settings: FeatureSettings
    out: pathlib.Path
    network: str
    width: int
    doing, done = "extracting", "extracted"
    measures = (PROBABILITY,)

    def prepare(self, record: SlideRecord) -> PreparedSlide:
        return self.settings.prepare(record)

    def fits(self, journal: Journal, place: Place, basis: Mapping[str, Any], tiles: int) -> bool:
        return journal.fits(basis, tiles) and self.rows(place, tiles).exists

    def collector(self, begun: Begun, first_row: int) -> FeatureCollector:
        return FeatureCollector(self, begun, first_row)

    def rows(self, place: Place, tiles: int) -> RowFile:
        """The features of a slide of so many tiles while it is not finished."""
        return RowFile(place.folder / "features.rows", tiles, self.width, self.settings.dtype)

    def about(self, prepared: PreparedSlide) -> TiledSlide:
        """What the slide's files tell about it."""
        slide, grid = prepared.slide, prepared.tiles.grid
        return TiledSlide(
            slide_id=prepared.record.slide_id,
            grid=grid,
            slide_mpp=slide.mpp,
            mpp_source=slide.mpp_source,
            width=slide.width,
            height=slide.height,
            about={
                "network": self.network,
                "model": self.settings.model,
                "pooling": self.settings.pooling,
                "tile": grid.tile,
                "stride": grid.stride,
            },
        )

    def files(self, slide: TiledSlide) -> tuple[pathlib.Path, pathlib.Path]:
        """The slide's two files: places, features."""
        if self.settings.layout == "clam":
            return clam_files(self.out, slide)
        return trident_files(self.out, slide, self.settings.encoder)

    def writer(self, slide: TiledSlide) -> contextlib.AbstractContextManager[TileRows]:
        """A block that appends rows to the two files."""
        settings = self.settings
        options: dict[str, Any] = {"features": self.width, "dtype": settings.dtype}
        options["scores"] = [SCORE] if settings.scores else []
        if settings.layout == "clam":
            return write_clam(self.out, slide, **options)
        return write_trident(self.out, slide, encoder=settings.encoder, **options)


class FeatureCollector(TileCollector):
    """Puts features into the file of rows as they come. A journal follows them to the disk, so that a run that was killed goes
    on from it. The file is gone only where another process took the slide over (--claim) and finished it: whose turn it is,
    is asked before `finish`."""

    def __init__(self, task: FeatureTask, begun: Begun, first_row: int):
        prepared, block = begun.prepared, task.settings.shape.block
        self._scores = SlideScores(prepared.tiles, slide_mpp=prepared.slide.mpp, block=block, maps=None)
        super().__init__(prepared, self._scores, first_row=first_row, journal=begun.journal)
        self._task = task
        self._rows = task.rows(begun.place, len(begun.prepared.tiles))
        if begun.journal is None:
            begun.place.scores.unlink(missing_ok=True)  # before its rows are overwritten
        self._rows.create()

    def add(self, scored: Scored, between_blocks: Callable[[], object] = lambda: None) -> int:
        mine, rows = self._mine(scored)
        if len(mine):
            with contextlib.suppress(FileNotFoundError):
                self._rows.write(rows, self._stored(scored.outputs["features"][mine]))
        return super().add(scored, between_blocks)

    def save(self, journal: Journal, place: Place) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._rows.sync()
            super().save(journal, place)

    def finish(self, place: Place) -> SlideResult:
        """What was kept for going on is removed: the features are in the files, and fresh ones need the network."""
        slide = self._task.about(self.prepared)
        readable = np.ones(self._rows.rows, bool)
        readable[list(self._scores.reasons)] = False
        files = self._task.files(slide)
        for file in files:
            remove_unfinished(file)
        place.state.unlink(missing_ok=True)
        if readable.any():
            with self._task.writer(slide) as table:
                for columns in self._chunks(readable):
                    table.append(**columns)
        else:
            for file in files:
                file.unlink(missing_ok=True)
        self.prepared.slide.close()
        place.scores.unlink(missing_ok=True)
        self._rows.remove()
        highest = float(probability(self._scores.values[readable]).max()) if self._task.settings.scores else None
        return self.result(done=bool(readable.any()), probability=highest if readable.any() else None)

    def _stored(self, features: np.ndarray) -> np.ndarray:
        """float32 [n, D] -> the type of the files. Raises UsageError where that cannot hold them."""
        with np.errstate(over="ignore"):
            stored = features.astype(self._task.settings.dtype)
        if not np.isfinite(stored).all():
            largest = np.abs(features).max()
            cure = "give --dtype=float32" if np.isfinite(largest) else "the network is broken: train or import it again"
            raise UsageError(
                f"{self.prepared.record.path}: features up to {largest:.3g} cannot be stored as {stored.dtype}: {cure}"
            )
        return stored

    def _chunks(self, readable: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """The columns of the readable tiles, a chunk at a time, in the order of the tile table."""
        tiles = self.prepared.tiles
        for first in range(0, len(tiles), CHUNK_ROWS):
            chosen = np.flatnonzero(readable[first : first + CHUNK_ROWS])
            rows = first + chosen
            columns = {
                "coords": np.stack([tiles.x[rows], tiles.y[rows]], axis=1),
                "features": self._rows.read(first, min(first + CHUNK_ROWS, len(tiles)))[chosen],
            }
            if self._task.settings.scores:
                columns[SCORE] = probability(self._scores.values[rows])
            yield columns
