"""What remains to be done of a slide: nothing, its files, some of its tiles, or all; and the slide opened for it."""

from __future__ import annotations

import dataclasses
import pathlib
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from data_pipelines.cohort import SlideRecord
from data_pipelines.exports import write_text
from data_pipelines.prepare import PreparedSlide
from data_pipelines.slides import RegionError, SlideError
from experiments.run.claims import Claims
from experiments.run.journal import Journal
from experiments.run.slide_result import SlideResult
from experiments.run.slide_state import Place, SlideState
from experiments.run.slides import NO_TISSUE, UNEXPECTED
from experiments.run.task import Begun, Task


class Preparation:
    """Opens slides, in any thread. `told` hears in one line what is done again and why, or where a slide goes on."""

    def __init__(self, task: Task, out: pathlib.Path, *, claims: Claims | None = None, told: Callable[[str], object]):
        self._task, self._settings = task, task.settings
        self._out, self._claims, self._told = out, claims, told
        self._began = time.time()
        self._said: set[tuple[str, ...]] = set()
        self._saying = threading.Lock()

    def begin(self, record: SlideRecord) -> Begun | SlideResult | None:
        """The slide with work left on it, or its row where there is none; None: another process is at work on it."""
        place = Place(self._out, record.slide_id)
        state = SlideState.load(place)
        if self._settled(state, record):
            return state.result  # type: ignore[union-attr]
        if self._claims is not None:
            if not self._claims.take(place.folder):
                return None
            state = SlideState.load(place)  # again: its owner may have ended since it was looked at
            if self._settled(state, record):
                self._claims.release(place.folder)
                return state.result  # type: ignore[union-attr]
        if state is not None and state.result.status == "done":
            self._say(record, state.changes(record, self._settings))
        return self._open(record, place)

    def record(self, place: Place, result: SlideResult, basis: Mapping[str, Any], *, trace: str = "") -> SlideResult:
        """Ends the slide: keeps its row, gives its claim back, and returns the row as it was kept."""
        name = ""
        if trace:
            write_text(place.traceback, trace)
            name = place.traceback.relative_to(self._out).as_posix()
        else:
            place.traceback.unlink(missing_ok=True)
        result = dataclasses.replace(
            result, traceback=name, model=self._settings.model, configuration=self._settings.digest
        )
        SlideState.now(result, basis).save(place)
        if self._claims is not None:
            self._claims.release(place.folder)
        return result

    def _settled(self, state: SlideState | None, record: SlideRecord) -> bool:
        """A slide that failed is tried again by each start, once."""
        if state is None or (state.result.status == "failed" and state.time < self._began):
            return False
        return not state.changes(record, self._settings)

    def _open(self, record: SlideRecord, place: Place) -> Begun | SlideResult:
        basis = self._settings.basis(record)
        failed = SlideResult(record.slide_id, str(record.path), "failed")
        try:
            prepared = self._task.prepare(record)
        except (SlideError, RegionError) as error:
            return self.record(place, dataclasses.replace(failed, reason=str(error)), basis)
        except UNEXPECTED as error:
            reason = f"{record.path}: {type(error).__name__}: {error}"
            return self.record(place, dataclasses.replace(failed, reason=reason), basis, trace=traceback.format_exc())
        if not len(prepared.tiles):
            slide = prepared.slide
            slide.close()
            failed = dataclasses.replace(
                failed, reason=NO_TISSUE, mpp=slide.mpp, mpp_source=slide.mpp_source, backend=slide.backend
            )
            return self.record(place, failed, basis)
        return Begun(place, basis, prepared, self._journal(record, place, basis, prepared))

    def _journal(
        self, record: SlideRecord, place: Place, basis: Mapping[str, Any], prepared: PreparedSlide
    ) -> Journal | None:
        journal = Journal.load(place.scores)
        wanted = self._settings.scores_basis(basis, prepared.slide.mpp)
        if journal is None or not self._task.fits(journal, place, wanted, len(prepared.tiles)):
            return None
        if not journal.seen.all():
            self._told(f"{record.slide_id} goes on after {journal.seen.sum()} of {len(journal.seen)} tiles")
        return journal

    def _say(self, record: SlideRecord, changes: list[str]) -> None:
        with self._saying:
            if tuple(changes) not in self._said:
                self._said.add(tuple(changes))
                self._told(
                    f"{record.slide_id}, and every slide of which this is true, is done again, because of another "
                    + ", ".join(changes)
                )
