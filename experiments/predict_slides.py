"""Scores, maps and regions of slides, with a finished model of any kind.

    python -m experiments.predict_slides --workdir=runs/ws --slides=<file, folder or CSV> --out=out

Leaves out/slides.csv (a row for every slide given), a folder for each slide, out/summary.json and out/report.html. Slide classifiers
give probabilities, heat maps and Grad-CAM, reverse distillation anomaly maps, slide scores and lesion candidates, cell detection
outlines, boxes and scores of cells, and how densely they lie, gastric screening verdicts, lesion maps and contours (a slide that is
out of focus is reported as blurred, and not judged).

The same command goes on with a run that was stopped or killed, inside a slide too; slides that are finished are not done again,
unless what they rest on is another now (the model, the slide's file, stride, formats, ...), and those that failed are tried
again. Several processes share --out: with --shard=i/n each does its part of the list; with --claim any number, started at any
time, take slides as they come, and take over those of processes that died. No process waits for another at the start and
none needs an address of another. The exit status is 0 only when every slide is done, with all its tiles (see --on_error).
"""

from __future__ import annotations

import time

from experiments.run import cohort_program, cohort_summary, predictors
from experiments.run.cells.prediction import CellKind
from experiments.run.cohort_program import CohortOutcome
from experiments.run.cohort_report import write_report
from experiments.run.distillation.prediction import DistillationKind
from experiments.run.grids.prediction import GridKind
from experiments.run.predictors import Predictor
from experiments.run.program import run, start_devices
from experiments.run.screening.prediction import ScreeningKind
from experiments.run.slide_classifier import ClassifierKind

_COHORT = cohort_program.define_cohort_flags()
_GIVEN = predictors.define_prediction_flags(_COHORT)
_KINDS = (ClassifierKind(), DistillationKind(), GridKind(), CellKind(), ScreeningKind())


def main() -> int:
    """Predicts, reports, and returns the exit status."""
    began = time.perf_counter()
    start_devices()
    predictor = predictors.kind_of(_KINDS, _GIVEN.workdir.value).load(_GIVEN)
    task, scorer = predictor.task, predictor.scorer
    outcome = cohort_program.run_cohort(_COHORT, task, scorer, predictor.variables, began=began)
    if outcome.whole:
        _report(predictor, outcome)
    return cohort_program.end(_COHORT, outcome)


def _report(predictor: Predictor, outcome: CohortOutcome) -> None:
    out, measures = outcome.out, predictor.task.measures
    cohort_summary.write_slides(out, outcome.results, measures)
    merit = predictor.judge(outcome.records, outcome.results)
    write_report(predictor.subject, merit, outcome, measures)
    if not merit.summary:
        print(merit.remarks[0])
    for warning in merit.warnings:
        print(warning)
    print(f"{out / 'slides.csv'}, {out / 'report.html'}")


if __name__ == "__main__":
    run(main)
