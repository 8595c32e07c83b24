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

import dataclasses
import pathlib
import time
from collections.abc import Sequence

from absl import flags

from experiments.run import cohort_program, cohort_summary
from experiments.run.cohort_program import CohortOutcome
from experiments.run.cohort_report import write_report
from experiments.run.evaluation import measure
from experiments.run.model import Model
from experiments.run.program import UsageError, run, start_devices
from experiments.run.scoring import TileScorer
from experiments.run.slide_formats import DEFAULT_FORMATS, FORMATS
from experiments.run.slide_outputs import PredictionTask
from experiments.run.slide_state import Settings, model_hash
from experiments.run.workdir import Workdir
from srcc_jax.parallel import make_mesh

_COHORT = cohort_program.define_cohort_flags()
_WORKDIR = flags.DEFINE_string("workdir", None, "work directory of a finished model", required=True)
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
_SEED = flags.DEFINE_integer("seed", 0, "seed of the bootstrap", lower_bound=0)


def main() -> int:
    """Predicts, reports, and returns the exit status."""
    began = time.perf_counter()
    start_devices()
    model = Model.load(_WORKDIR.value)
    settings = _settings(model)
    scorer = TileScorer(model.architecture, tile=settings.grid.tile, mesh=make_mesh(), cam=settings.cam)
    outcome = cohort_program.run_cohort(_COHORT, PredictionTask(settings), scorer, model.variables, began=began)
    if outcome.whole:
        _report(model, settings, outcome)
    return cohort_program.end(_COHORT, outcome)


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
        mpp_override=_COHORT.mpp_override.value,
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


def _report(model: Model, settings: Settings, outcome: CohortOutcome) -> None:
    out, records, results = outcome.out, outcome.records, outcome.results
    cohort_summary.write_slides(out, results)
    merit = measure(
        records,
        [row.probability for row in results],
        positive=model.positive,
        name=model.about["name"],
        seed=_SEED.value,
    )
    speed = {"tiles": sum(row.tiles - row.unreadable for row in results), **outcome.speed}
    workdir = Workdir(pathlib.Path(_WORKDIR.value))
    write_report(model, settings.grid, merit, records, results, out, speed, workdir=workdir)
    if not merit.summary:
        print(merit.remarks[0])
    print(f"{out / 'slides.csv'}, {out / 'report.html'}")


if __name__ == "__main__":
    run(main)
