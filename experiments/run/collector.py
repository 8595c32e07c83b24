"""One slide on its way through a network: what is known of its tiles is gathered as it comes, whatever is made of it at the end."""

from __future__ import annotations

import abc
import contextlib
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from data_pipelines.prepare import PreparedSlide
from data_pipelines.scan import ScanJob
from data_pipelines.slides import RegionError, Slide, SlideError
from experiments.run.journal import Journal, SlideProgress
from experiments.run.scoring import Scored
from experiments.run.slide_result import STAGES, SlideResult
from experiments.run.slide_state import Place
from experiments.run.slides import UNEXPECTED


class TileCollector(abc.ABC):
    """Gathers the scored tiles of one slide as they come; what is written when the last has come is up to its kind.

    progress: what is known of its tiles. Their rows in the table that prediction knows begin at first_row. Goes on from `journal`,
    where there is one.
    """

    def __init__(self, prepared: PreparedSlide, progress: SlideProgress, *, first_row: int, journal: Journal | None):
        self.prepared, self.progress = prepared, progress
        self.seconds = {**dict.fromkeys(STAGES, 0.0), **prepared.seconds}
        if journal is not None:
            progress.resume(journal)
            self.seconds |= {stage: journal.seconds[stage] for stage in ("read", "model")}
        self._first_row = first_row
        self._remaining = np.flatnonzero(~progress.seen)
        self.rows = first_row + self._remaining
        self._reading = threading.Lock()
        self.traceback = ""  # of the first error that no reader announces

    @abc.abstractmethod
    def finish(self, place: Place) -> SlideResult:
        """Writes what is made of the slide, closes it and returns its row, without the seconds of writing. A kill at any moment
        leaves files that are whole, or none, and never an old state beside new files."""

    @property
    def complete(self) -> bool:
        return self.progress.complete

    def job(self) -> ScanJob:
        """The scan of the tiles that remain."""
        return ScanJob(self._lend, self.prepared.tiles.take(self._remaining), self.rows)

    def add(self, scored: Scored, between_blocks: Callable[[], object] = lambda: None) -> int:
        """Takes what belongs to this slide out of a batch and returns how many tiles that were. between_blocks: called whenever
        no block is half done."""
        end = self._first_row + len(self.progress.seen)
        failed = {row - self._first_row: why for row, why in scored.failed if self._first_row <= row < end}
        if failed:
            self.progress.fail(failed)
        mine, rows = self._mine(scored)
        self.seconds["model"] += scored.seconds * len(mine) / max(1, len(scored.row))
        for block in self.progress.blocks_of(rows):
            outputs = {name: values[mine[block]] for name, values in scored.outputs.items()}
            self.progress.add(rows[block], outputs)
            if self.progress.between_blocks:
                between_blocks()
        return len(failed) + len(mine)

    def journal(self, basis: Mapping[str, Any]) -> Journal:
        """What is known so far, between blocks."""
        return self.progress.journal(basis, self.seconds)

    def save(self, journal: Journal, place: Place) -> None:
        """Writes a journal, in any thread."""
        journal.save(place.scores)

    def _mine(self, scored: Scored) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the batch of what belongs to this slide, and the rows of these tiles on it."""
        row = scored.row - self._first_row
        mine = np.flatnonzero((row >= 0) & (row < len(self.progress.seen)))
        return mine, row[mine]

    def result(
        self,
        *,
        done: bool,
        probability: float | None = None,
        measures: Mapping[str, float | None] | None = None,
        problem: str = "",
    ) -> SlideResult:
        """The slide's row. measures: what else was found on it, of the task's `measures`; problem: what its files lack."""
        record, slide, reasons = self.prepared.record, self.prepared.slide, self.progress.reasons
        tiles = len(self.progress.seen)
        parts = [problem] if problem else []
        if reasons:
            parts.append(f"{len(reasons)} of {tiles} tiles could not be read: {reasons[min(reasons)]}")
        return SlideResult(
            slide_id=record.slide_id,
            path=str(record.path),
            status="done" if done else "failed",
            reason="; ".join(parts),
            probability=probability,
            mpp=slide.mpp,
            mpp_source=slide.mpp_source,
            backend=slide.backend,
            tiles=tiles,
            unreadable=len(reasons),
            measures=measures or {},
        )

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
