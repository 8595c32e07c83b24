"""The table of a cohort and the lines at the end of a run: how many slides are done, how fast, and what is missing and why."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.cohort import SlideRecord
from data_pipelines.exports import write_table
from experiments.run.program import UsageError
from experiments.run.scoring import TileScorer
from experiments.run.slide_result import PROBABILITY, STAGES, SlideResult
from experiments.run.slide_state import Place, SlideState
from experiments.run.task import Task

_EVERY_SECONDS = 5.0


def shard_of(records: Sequence[SlideRecord], shard: str) -> Sequence[SlideRecord]:
    """The part "i/n", i from 1 to n, of the slides: every n-th, so that parts are equally long and together whole."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= parts:
        raise UsageError(f"--shard={shard}: give <i>/<n> with i from 1 to n, such as 1/4, 2/4, 3/4 and 4/4")
    return records[part - 1 :: parts]


def write_slides(out: pathlib.Path, results: Sequence[SlideResult], measures: Sequence[str]) -> None:
    """slides.csv: a row a slide. measures: those of the task, whose columns stand where that of the probability stands."""
    columns: dict[str, list[Any]] = {}
    for field in dataclasses.fields(SlideResult):
        if field.name == PROBABILITY:
            columns |= {name: [row.measure(name) for row in results] for name in measures}
        elif field.name != "measures":
            columns[field.name] = [getattr(row, field.name) for row in results]
    write_table(out / "slides.csv", columns)


def stored_results(out: pathlib.Path, records: Sequence[SlideRecord], task: Task) -> list[SlideResult]:
    """The row of each slide by its state, whichever process made it; "unfinished" where none holds for this task."""
    rows = []
    for record in records:
        state = SlideState.load(Place(out, record.slide_id))
        changes = [] if state is None else state.changes(record, task.settings)
        if state is not None and not changes:
            rows.append(state.result)
        else:
            reason = f"not {task.done} yet" if state is None else f"to be done again: another {', '.join(changes)}"
            rows.append(SlideResult(record.slide_id, str(record.path), "unfinished", reason))
    return rows


class ProgressTable:
    """slides.csv while the cohort is under way: written every few seconds, with those of `records` that have come so far."""

    def __init__(self, out: pathlib.Path, records: Sequence[SlideRecord], measures: Sequence[str]):
        self._out, self._records, self._measures = out, records, measures
        self._written = 0.0

    def __call__(self, results: Mapping[str, SlideResult]) -> None:
        if self._records and time.monotonic() - self._written >= _EVERY_SECONDS:
            known = [results[record.slide_id] for record in self._records if record.slide_id in results]
            write_slides(self._out, known, self._measures)
            self._written = time.monotonic()


def speed_of(scorer: TileScorer, worked: Sequence[SlideResult], seconds: float) -> dict[str, Any]:
    """How fast this run was, over the slides that it finished."""
    stages = {stage: round(sum(getattr(row, f"seconds_{stage}") or 0.0 for row in worked), 3) for stage in STAGES}
    return {
        "tiles_per_second": scorer.tiles / scorer.seconds if scorer.seconds else 0.0,
        "device_waiting_share": scorer.waiting_share,
        "seconds": {"prediction": seconds, **stages},
    }


def closing_lines(results: Sequence[SlideResult], worked: int, tiles: int, speed: Mapping[str, Any]) -> list[str]:
    """What is said at the end. worked: slides that this run finished, of which it scored so many tiles."""
    done = sum(row.status == "done" for row in results)
    seconds = dict(speed["seconds"])
    total = seconds.pop("prediction")
    stages = ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())
    return [
        f"{done} of {len(results)} slides done ({worked} of them now), {tiles} tiles in {total:.1f} s "
        f"({speed['tiles_per_second']:.0f} tiles/s; the device waited {speed['device_waiting_share']:.1%} of the time)",
        f"seconds by stage, which overlap: {stages}",
    ]


def problem_lines(results: Sequence[SlideResult]) -> list[str]:
    """One line for each slide that has no result or lacks something."""
    lines = []
    for row in results:
        word = row.status if row.status != "done" else "incomplete"
        if row.reason:
            where = f" (traceback: {row.traceback})" if row.traceback else ""
            lines.append(f"{word}: {row.slide_id}: {row.reason}{where}")
    return lines


def exit_status(results: Sequence[SlideResult], *, masked: bool) -> int:
    """0 where every slide is done and, unless regions that cannot be read are accepted (`masked`), every tile of it."""
    return int(any(row.status != "done" or (row.unreadable and not masked) for row in results))
