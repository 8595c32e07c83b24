"""Slide probabilities, heat maps and Grad-CAM of slides, with a finished model.

    python -m experiments.predict_slides --workdir=runs/ws --slides=<file, folder or CSV> --out=out

Leaves out/slides.csv (a row for every slide given), a folder for each slide, out/summary.json and out/report.html.

The same command goes on with a run that was stopped or killed, inside a slide too; slides that are finished are not done again,
unless what they rest on is another now (the model, the slide's file, stride, formats, ...), and those that failed are tried
again. Several processes share --out: with --shard=i/n each does its part of the list; with --claim any number, started at any
time, take slides as they come, and take over those of processes that died. No process waits for another at the start and
none needs an address of another. The exit status is 0 only when every slide is done, with all its tiles (see --on_error).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from data_pipelines.cohort import SlideRecord
from data_pipelines.files import check_writable
from experiments.run import cohort_summary
from experiments.run.claims import Claims
from experiments.run.cohort_report import write_report
from experiments.run.evaluation import measure
from experiments.run.model import Model
from experiments.run.prediction import Operation, Prediction
from experiments.run.program import UsageError, run, start_devices
from experiments.run.scoring import TileScorer
from experiments.run.slide_formats import DEFAULT_FORMATS, FORMATS
from experiments.run.slide_outputs import SlideResult
from experiments.run.slide_state import Settings, model_hash
from experiments.run.slides import slide_records
from experiments.run.workdir import Workdir
from srcc_jax.parallel import make_mesh

_WORKDIR = flags.DEFINE_string("workdir", None, "work directory of a finished model", required=True)
_SLIDES = flags.DEFINE_string(
    "slides", None, "a slide, a folder (searched with its sub-folders) or a cohort CSV", required=True
)
_OUT = flags.DEFINE_string("out", None, "folder for the results", required=True)
_SPLIT = flags.DEFINE_string("split", None, "of a cohort CSV, predict this split only (train, validation or test)")
_STRIDE = flags.DEFINE_integer(
    "stride",
    None,
    "stride in pixels, where it should not be the model's; 32 is the paper's for Grad-CAM",
    lower_bound=1,
)
_GRADCAM = flags.DEFINE_bool("gradcam", True, "make Grad-CAM maps")
_FORMATS = flags.DEFINE_list("formats", list(DEFAULT_FORMATS), f"files of each slide, out of: {', '.join(FORMATS)}")
_THRESHOLDS = flags.DEFINE_list(
    "thresholds", ["0.5", "0.9"], "probabilities from which on regions are outlined (geojson, asap)"
)
_MPP_OVERRIDE = flags.DEFINE_float(
    "mpp_override", None, "µm per pixel of level 0 for slides that do not say it themselves"
)
_ON_ERROR = flags.DEFINE_enum(
    "on_error",
    "skip",
    ["skip", "stop", "mask"],
    "skip: a slide that cannot be opened is a row with its reason, and the others go on; tiles that cannot be decoded are missing "
    "in the maps, left out of the score and counted; either makes the exit status 1. mask: the same, but a slide without some "
    "tiles counts as done. stop: the run ends at the first of either, with exit status 2, and can be gone on with",
)
_THREADS = flags.DEFINE_integer(
    "threads", 2, "threads that read tiles; as many open slides, and as many write files", lower_bound=1
)
_SAVE_SECONDS = flags.DEFINE_float(
    "save_seconds", 30.0, "how often the tiles of an unfinished slide are saved; 0: after each region", lower_bound=0
)
_SHARD = flags.DEFINE_string("shard", None, "i/n: of n processes that share --out this is the i-th, from 1")
_CLAIM = flags.DEFINE_bool("claim", False, "share --out with any number of processes that are started with --claim")
_LEASE_SECONDS = flags.DEFINE_float(
    "lease_seconds",
    120.0,
    "--claim: a process that gives no sign for so long is taken for dead, and its slides are taken over",
    lower_bound=1,
)
_SUMMARY_ONLY = flags.DEFINE_bool(
    "summary_only", False, "predict nothing: make the table and the report of what is there"
)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the bootstrap", lower_bound=0)


def main() -> int:
    """Predicts, reports, and returns the exit status."""
    began = time.perf_counter()
    start_devices()
    model = Model.load(_WORKDIR.value)
    records = slide_records(_SLIDES.value, _SPLIT.value)
    mine = cohort_summary.shard_of(records, _SHARD.value) if _SHARD.value else records
    out = pathlib.Path(_OUT.value).absolute()
    check_writable(out)
    settings = _settings(model)
    scorer = TileScorer(model.architecture, tile=settings.grid.tile, mesh=make_mesh(), cam=settings.cam)
    worked: list[SlideResult] = []
    if _SUMMARY_ONLY.value:
        results = cohort_summary.stored_results(out, records, settings)
    else:
        results, worked = _predict(mine, settings, out, scorer, model)
    speed = cohort_summary.speed_of(scorer, worked, time.perf_counter() - began)
    for line in cohort_summary.closing_lines(results, len(worked), scorer.tiles, speed):
        print(line)
    if _SHARD.value:
        results = _with_other_shards(results, out, records, settings)
    if len(results) == len(records):
        _report(model, settings, records, results, out, speed)
    for line in cohort_summary.problem_lines(results):
        print(line, file=sys.stderr)
    return cohort_summary.exit_status(results, masked=_ON_ERROR.value == "mask")


def _settings(model: Model) -> Settings:
    grid = dataclasses.replace(model.grid, stride=_STRIDE.value or model.grid.stride)
    if grid.stride > grid.tile:
        raise UsageError(
            f"--stride={grid.stride} is larger than the model's tile of {grid.tile} px: tissue between tiles is not seen"
        )
    unknown = [name for name in _FORMATS.value if name not in FORMATS]
    if unknown:
        raise UsageError(f"--formats={','.join(_FORMATS.value)}: {unknown[0]!r} is none of {', '.join(FORMATS)}")
    return Settings(
        grid=grid,
        min_tissue=model.min_tissue,
        mpp_override=_MPP_OVERRIDE.value,
        model=model_hash(model.architecture, model.variables),
        cam=_GRADCAM.value,
        formats=tuple(name for name in FORMATS if name in _FORMATS.value),
        thresholds=_thresholds(_THRESHOLDS.value),
    )


def _thresholds(given: Sequence[str]) -> tuple[float, ...]:
    try:
        values = tuple(sorted({float(value) for value in given}))
    except ValueError:
        values = ()
    if not values or not all(0 <= value <= 1 for value in values):
        raise UsageError(f"--thresholds={','.join(given)}: give probabilities between 0 and 1, such as 0.5,0.9")
    return values


def _predict(
    records: Sequence[SlideRecord], settings: Settings, out: pathlib.Path, scorer: TileScorer, model: Model
) -> tuple[list[SlideResult], list[SlideResult]]:
    """The rows of these slides, and of those among them that this run finished."""
    alone = not (_SHARD.value or _CLAIM.value)
    with contextlib.ExitStack() as stack:
        claims = stack.enter_context(Claims(lease_seconds=_LEASE_SECONDS.value)) if _CLAIM.value else None
        operation = Operation(
            threads=_THREADS.value,
            save_seconds=_SAVE_SECONDS.value,
            stop_on_error=_ON_ERROR.value == "stop",
            claims=claims,
        )
        table = cohort_summary.ProgressTable(out, records if alone else ())
        told = functools.partial(print, flush=True)  # at once: who reads the log of a killed run wants to know
        prediction = Prediction(records, settings, operation, out, told=told, noted=table)
        return prediction.run(scorer, model), prediction.worked


def _with_other_shards(
    results: list[SlideResult], out: pathlib.Path, records: Sequence[SlideRecord], settings: Settings
) -> list[SlideResult]:
    """The rows of the whole cohort, if this shard is the last to end; else its own."""
    everyone = cohort_summary.stored_results(out, records, settings)
    open_slides = sum(row.status == "unfinished" for row in everyone)
    if not open_slides:
        return everyone
    print(
        f"{open_slides} slides of other shards are not finished: the last shard to end makes slides.csv and the report, "
        "or this command with --summary_only"
    )
    return results


def _report(
    model: Model,
    settings: Settings,
    records: Sequence[SlideRecord],
    results: Sequence[SlideResult],
    out: pathlib.Path,
    speed: dict[str, Any],
) -> None:
    cohort_summary.write_slides(out, results)
    merit = measure(
        records,
        [row.probability for row in results],
        positive=model.positive,
        name=model.about["name"],
        seed=_SEED.value,
    )
    speed = {"tiles": sum(row.tiles - row.unreadable for row in results), **speed}
    workdir = Workdir(pathlib.Path(_WORKDIR.value))
    write_report(model, settings.grid, merit, records, results, out, speed, workdir=workdir)
    if not merit.summary:
        print(merit.remarks[0])
    print(f"{out / 'slides.csv'}, {out / 'report.html'}")


if __name__ == "__main__":
    run(main)
