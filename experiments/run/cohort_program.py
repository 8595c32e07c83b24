"""What programs over a cohort of slides share: their flags, the run, its table and its exit status."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from data_pipelines.cohort import SlideRecord
from data_pipelines.files import check_writable
from experiments.run import cohort_summary
from experiments.run.claims import Claims
from experiments.run.prediction import Operation, Prediction
from experiments.run.scoring import TileScorer
from experiments.run.slide_result import SlideResult
from experiments.run.slides import slide_records
from experiments.run.task import Task

flags.disclaim_key_flags()  # the flags are those of the program that asks for them, for --help too


@dataclasses.dataclass(frozen=True)
class CohortFlags:
    """The flags of a program over a cohort."""

    slides: flags.FlagHolder[str]
    out: flags.FlagHolder[str]
    split: flags.FlagHolder[str | None]
    mpp_override: flags.FlagHolder[float | None]
    on_error: flags.FlagHolder[str]
    threads: flags.FlagHolder[int]
    save_seconds: flags.FlagHolder[float]
    shard: flags.FlagHolder[str | None]
    claim: flags.FlagHolder[bool]
    lease_seconds: flags.FlagHolder[float]
    summary_only: flags.FlagHolder[bool]


def define_cohort_flags() -> CohortFlags:
    """Defines them, in the calling program."""
    return CohortFlags(
        slides=flags.DEFINE_string(
            "slides", None, "a slide, a folder (searched with its sub-folders) or a cohort CSV", required=True
        ),
        out=flags.DEFINE_string("out", None, "folder for the results", required=True),
        split=flags.DEFINE_string("split", None, "of a cohort CSV, take this split only (train, validation or test)"),
        mpp_override=flags.DEFINE_float(
            "mpp_override", None, "µm per pixel of level 0 for slides that do not say it themselves"
        ),
        on_error=flags.DEFINE_enum(
            "on_error",
            "skip",
            ["skip", "stop", "mask"],
            "skip: a slide that cannot be opened is a row with its reason, and the others go on; tiles that cannot be decoded "
            "are missing in its files, left out of the score and counted; either makes the exit status 1. mask: the same, but a "
            "slide without some tiles counts as done. stop: the run ends at the first of either, with exit status 2, and can be "
            "gone on with",
        ),
        threads=flags.DEFINE_integer(
            "threads", 2, "threads that read tiles; as many open slides, and as many write files", lower_bound=1
        ),
        save_seconds=flags.DEFINE_float(
            "save_seconds",
            30.0,
            "how often the tiles of an unfinished slide are saved; 0: after each region",
            lower_bound=0,
        ),
        shard=flags.DEFINE_string("shard", None, "i/n: of n processes that share --out this is the i-th, from 1"),
        claim=flags.DEFINE_bool(
            "claim", False, "share --out with any number of processes that are started with --claim"
        ),
        lease_seconds=flags.DEFINE_float(
            "lease_seconds",
            120.0,
            "--claim: a process that gives no sign for so long is taken for dead, and its slides are taken over",
            lower_bound=1,
        ),
        summary_only=flags.DEFINE_bool(
            "summary_only", False, "touch no slide: make the table, and the report, of what is there"
        ),
    )


@dataclasses.dataclass(frozen=True)
class CohortOutcome:
    """results: the rows, of the whole cohort where `whole`, else of this shard; speed: how fast this run was."""

    out: pathlib.Path
    records: Sequence[SlideRecord]
    results: Sequence[SlideResult]
    speed: dict[str, Any]

    @property
    def whole(self) -> bool:
        return len(self.results) == len(self.records)


def run_cohort(
    given: CohortFlags, task: Task, scorer: TileScorer, variables: Mapping[str, Any], *, began: float
) -> CohortOutcome:
    """Does the task on the slides that the flags give to this process, and prints how it went. began: its perf_counter time."""
    records = slide_records(given.slides.value, given.split.value)
    mine = cohort_summary.shard_of(records, given.shard.value) if given.shard.value else records
    out = pathlib.Path(given.out.value).absolute()
    check_writable(out)
    worked: list[SlideResult] = []
    if given.summary_only.value:
        results = cohort_summary.stored_results(out, records, task)
    else:
        results, worked = _work(given, task, mine, out, scorer, variables)
    speed = cohort_summary.speed_of(scorer, worked, time.perf_counter() - began)
    for line in cohort_summary.closing_lines(results, len(worked), scorer.tiles, speed):
        print(line)
    if given.shard.value:
        results = _with_other_shards(results, out, records, task)
    return CohortOutcome(out, records, results, speed)


def end(given: CohortFlags, outcome: CohortOutcome) -> int:
    """Prints what is missing and why, and returns the exit status."""
    for line in cohort_summary.problem_lines(outcome.results):
        print(line, file=sys.stderr)
    return cohort_summary.exit_status(outcome.results, masked=given.on_error.value == "mask")


def _work(
    given: CohortFlags,
    task: Task,
    records: Sequence[SlideRecord],
    out: pathlib.Path,
    scorer: TileScorer,
    variables: Mapping[str, Any],
) -> tuple[list[SlideResult], list[SlideResult]]:
    """The rows of these slides, and of those among them that this run finished."""
    alone = not (given.shard.value or given.claim.value)
    with contextlib.ExitStack() as stack:
        claims = stack.enter_context(Claims(lease_seconds=given.lease_seconds.value)) if given.claim.value else None
        operation = Operation(
            threads=given.threads.value,
            save_seconds=given.save_seconds.value,
            stop_on_error=given.on_error.value == "stop",
            claims=claims,
        )
        table = cohort_summary.ProgressTable(out, records if alone else (), task.measures)
        told = functools.partial(print, flush=True)  # at once: who reads the log of a killed run wants to know
        prediction = Prediction(records, task, operation, out, told=told, noted=table)
        return prediction.run(scorer, variables), prediction.worked


def _with_other_shards(
    results: list[SlideResult], out: pathlib.Path, records: Sequence[SlideRecord], task: Task
) -> list[SlideResult]:
    """The rows of the whole cohort, if this shard is the last to end; else its own."""
    everyone = cohort_summary.stored_results(out, records, task)
    open_slides = sum(row.status == "unfinished" for row in everyone)
    if not open_slides:
        return everyone
    print(
        f"{open_slides} slides of other shards are not finished: the last shard to end makes the table of the whole cohort, "
        "or this command with --summary_only"
    )
    return results
