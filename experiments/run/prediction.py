"""A cohort on its way through the model: slides are opened ahead, their tiles share batches, files are written behind.

Every slide has its journal and, at its end, its state (`slide_state`). So a run may be killed anywhere: what is finished is not done
again, and a slide that was begun goes on from its last saved block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import tqdm

from data_pipelines.cohort import SlideRecord
from data_pipelines.scan import ScanJob, ScanShape, prefetch, scan, work_ahead
from data_pipelines.slides import SlideError
from experiments.run.claims import Claims
from experiments.run.collector import TileCollector
from experiments.run.journal import Journal
from experiments.run.preparation import Preparation
from experiments.run.progress import progress
from experiments.run.scoring import Scored, TileScorer
from experiments.run.slide_result import SlideResult, stage_columns
from experiments.run.slide_state import UNFINISHED
from experiments.run.task import Begun, Task

_AHEAD = 4  # slides that are opened before their tiles are asked for
_BEHIND = 8  # slides that wait for their files to be written, before the device has to wait for them
_POLL_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """How the work is done, which no result depends on. claims: those of this process, where slides are shared with others."""

    threads: int = 2
    save_seconds: float = 30.0
    stop_on_error: bool = False
    claims: Claims | None = None


class _Work:
    """A slide whose tiles are being scored, and the saving of its journal."""

    def __init__(self, begun: Begun, collector: TileCollector):
        self.begun, self.collector = begun, collector
        self.saved = time.monotonic()
        self.saving: Future[None] | None = None


class Prediction:
    """A cohort, or the part of it that this process does. task: what is made of the slides; noted: hears of each that has its row."""

    def __init__(
        self,
        records: Sequence[SlideRecord],
        task: Task,
        operation: Operation,
        out: pathlib.Path,
        *,
        told: Callable[[str], object],
        noted: Callable[[Mapping[str, SlideResult]], object] = lambda results: None,
    ):
        self._records, self._task, self._operation = records, task, operation
        self._preparation = Preparation(task, out, claims=operation.claims, told=told)
        self._noted = noted
        self._noting = threading.Lock()
        self._works: dict[int, _Work] = {}  # by the first row of the slide's tiles
        self._busy: list[SlideRecord] = []
        self._results: dict[str, SlideResult] = {}
        self._next_row = 0
        self._prepared = 0
        self.worked: list[SlideResult] = []  # those that this run finished

    def run(self, scorer: TileScorer, variables: Mapping[str, Any]) -> list[SlideResult]:
        """Rows in the order of the records. With claims it ends when every slide has one, whoever made it.

        variables: of the scorer's network, as it was trained.
        Raises SlideError at the first problem where errors are to stop it.
        """
        waiting = self._records
        compiling = _Compiling(scorer, variables, self._task.settings.shape)
        with progress(None, self._task.doing) as bar:
            while waiting:
                self._busy = []
                self._pass(compiling, waiting, bar)
                waiting = self._busy
                if waiting:
                    time.sleep(_POLL_SECONDS)
        return [self._results[record.slide_id] for record in self._records]

    def _pass(self, compiling: _Compiling, records: Sequence[SlideRecord], bar: tqdm.tqdm) -> None:
        """All slides that nobody else is at work on. It never waits for others: they might be waiting for ours."""
        threads, scorer = self._operation.threads, compiling.scorer
        batches = prefetch(scan(self._jobs(records, compiling), compiling.shape, threads=threads), depth=2)
        with ThreadPoolExecutor(threads, thread_name_prefix="write") as pool, contextlib.closing(batches):
            writing: list[Future[None]] = []
            first = next(batches, None)
            if first is None:
                return
            for scored in scorer.score(compiling.folded(), itertools.chain([first], batches)):
                bar.total = self._estimated_tiles(len(records))
                bar.update(self._add(scored, pool))
                writing += [pool.submit(self._finish, work) for work in self._take_complete()]
                while len(writing) > _BEHIND or (writing and writing[0].done()):
                    writing.pop(0).result()
            for future in writing:
                future.result()

    def _jobs(self, records: Sequence[SlideRecord], compiling: _Compiling) -> Iterator[ScanJob]:
        """Runs in the thread that fills the batches."""
        begin, threads = self._preparation.begin, self._operation.threads
        with contextlib.closing(work_ahead(records, begin, threads=threads, ahead=_AHEAD, name="prepare")) as begun:
            for record, slide in zip(records, begun):
                self._prepared += 1
                if slide is None:
                    self._busy.append(record)
                elif isinstance(slide, SlideResult):
                    self._note(slide)
                else:
                    work = self._work(slide)
                    if work.collector.complete:  # only its files are to be written
                        self._finish(work)
                        continue
                    compiling.start()
                    self._works[int(work.collector.rows[0])] = work
                    yield work.collector.job()

    def _work(self, begun: Begun) -> _Work:
        collector = self._task.collector(begun, self._next_row)
        self._next_row += len(begun.prepared.tiles)
        return _Work(begun, collector)

    def _estimated_tiles(self, slides: int) -> int:
        """Tiles of the cohort, as far as it is known: the slides still to be opened are taken to be like those before them."""
        return round(self._next_row / max(1, self._prepared) * slides)

    def _add(self, scored: Scored, pool: ThreadPoolExecutor) -> int:
        """Hands a batch to the slides that it is of, saves the journals that are due, and returns how many tiles it held."""
        if scored.failed and self._operation.stop_on_error:
            raise SlideError(f"{scored.failed[0][1]} (--on_error=stop)")
        return sum(
            work.collector.add(scored, functools.partial(self._save_if_due, work, pool))
            for work in list(self._works.values())
        )

    def _save_if_due(self, work: _Work, pool: ThreadPoolExecutor) -> None:
        if time.monotonic() - work.saved < self._operation.save_seconds or work.collector.complete:
            return
        if work.saving is not None:
            if not work.saving.done():
                return
            work.saving.result()
        work.saving = pool.submit(work.collector.save, self._journal(work), work.begun.place)
        work.saved = time.monotonic()

    def _journal(self, work: _Work) -> Journal:
        basis = self._task.settings.scores_basis(work.begun.basis, work.begun.prepared.slide.mpp)
        return work.collector.journal(basis)

    def _take_complete(self) -> list[_Work]:
        complete = [row for row, work in list(self._works.items()) if work.collector.complete]
        return [self._works.pop(row) for row in complete]

    def _finish(self, work: _Work) -> None:
        """Writes the slide's files and its row. Until the row stands, another start would write the files again."""
        place, claims = work.begun.place, self._operation.claims
        if work.saving is not None:
            work.saving.result()
        if claims is not None and not claims.holds(place.folder):  # this process slept, and another took the slide over
            work.begun.prepared.slide.close()
            self._busy.append(work.begun.prepared.record)
            return
        _clear_leftovers(place.folder)
        if not (work.begun.journal and work.begun.journal.seen.all()):  # else it may hold more than this run asks for
            work.collector.save(self._journal(work), place)
        began = time.perf_counter()
        result = work.collector.finish(place)
        work.collector.seconds["write"] = time.perf_counter() - began
        result = dataclasses.replace(result, **stage_columns(work.collector.seconds, result.tiles))
        result = self._preparation.record(place, result, work.begun.basis, trace=work.collector.traceback)
        self.worked.append(result)
        self._note(result)

    def _note(self, result: SlideResult) -> None:
        """Two threads come here, and each may be the one that has an error to stop at."""
        with self._noting:
            self._results[result.slide_id] = result
            self._noted(self._results)
        if result.status == "failed" and self._operation.stop_on_error:
            raise SlideError(f"{result.slide_id}: {result.reason} (--on_error=stop)")


class _Compiling:
    """The model is folded and compiled while the first slides are opened, and only if there are tiles to score."""

    def __init__(self, scorer: TileScorer, variables: Mapping[str, Any], shape: ScanShape):
        self.scorer, self.shape = scorer, shape
        self._variables = variables
        self._folded: Future[Mapping[str, Any]] | None = None

    def start(self) -> Future[Mapping[str, Any]]:
        """Begins in a thread of its own, once."""
        if self._folded is None:
            pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
            self._folded = pool.submit(self._compile)
            pool.shutdown(wait=False)
        return self._folded

    def folded(self) -> Mapping[str, Any]:
        """The model's weights for inference, once the program that takes them is compiled."""
        return self.start().result()

    def _compile(self) -> Mapping[str, Any]:
        folded = self.scorer.fold(self._variables)
        self.scorer.compile(folded, self.shape)
        return folded


def _clear_leftovers(folder: pathlib.Path) -> None:
    """Removes what a process was writing into a slide's state folder when it was killed."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path)
    for name in ("scores.npz", "state.json"):
        for path in folder.glob(f".*.{name}"):
            path.unlink(missing_ok=True)
