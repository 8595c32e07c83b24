"""Slide scores against labels: ROC AUC and log loss with bootstrap intervals by slide and by patient."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from data_pipelines.cohort import Cohort, CohortError, SlideRecord, check_two_classes
from srcc_jax.metrics import (
    LOG_LOSS_CLIP,
    Interval,
    Metric,
    RocCurve,
    bootstrap,
    log_loss,
    roc_auc,
    roc_curve,
    sensitivity,
    specificity,
)

ITERATIONS = 1000  # Kanavati 2021, §2.7
METRICS: dict[str, Metric] = {
    "ROC AUC": roc_auc,
    "log loss": log_loss,
    "sensitivity at 0.5": functools.partial(sensitivity, threshold=0.5),
    "specificity at 0.5": functools.partial(specificity, threshold=0.5),
}


def evaluate(
    label: np.ndarray, score: np.ndarray, patient: np.ndarray, *, seed: int, metrics: Mapping[str, Metric] = METRICS
) -> dict[str, dict[str, Interval]]:
    """metric -> {"slide", "patient"} -> interval. label int [S] 0 or 1, score float [S], for METRICS in [0, 1], patient str [S]."""
    units = {"slide": None, "patient": patient}
    return {
        name: {
            unit: bootstrap(metric, label, score, units=groups, iterations=ITERATIONS, seed=seed)
            for unit, groups in units.items()
        }
        for name, metric in metrics.items()
    }


def notes(seed: int, metrics: Collection[str] = tuple(METRICS)) -> list[str]:
    """How the numbers of `evaluate` were made, for the report."""
    intervals = f"Intervals: percentile bootstrap, {ITERATIONS} resamples with replacement, seed {seed}."
    clip = f"Log loss: natural logarithm, probabilities clipped at {LOG_LOSS_CLIP:.3g}."
    return [intervals, clip] if "log loss" in metrics else [intervals]


@dataclasses.dataclass(frozen=True)
class Merit:
    """How good scores are: metric -> "slide" or "patient" -> interval; model -> curve; remarks on both. Empty without labels.
    warnings: what is wrong with the scores themselves."""

    summary: dict[str, dict[str, Interval]]
    curves: dict[str, RocCurve]
    remarks: list[str]
    warnings: Sequence[str] = ()


def measure(
    records: Sequence[SlideRecord],
    scores: Sequence[float | None],
    *,
    positive: str,
    name: str,
    seed: int,
    metrics: Mapping[str, Metric] = METRICS,
) -> Merit:
    """Metrics of the model `name` over the slides that have a score; where labels or a class are missing, why there are none."""
    known = [(record, score) for record, score in zip(records, scores) if score is not None]
    cohort = Cohort(tuple(record for record, _ in known))
    try:
        if not any(record.label for record in records):
            raise CohortError("no slide has a label (they are in the column `label` of a cohort CSV)")
        check_two_classes(cohort, positive, where="what was predicted")
    except CohortError as error:
        return Merit({}, {}, [f"No metrics: {error}."])
    label, score = cohort.labels(positive), np.asarray([score for _, score in known])
    summary = evaluate(label, score, np.asarray([record.patient_id for record in cohort]), seed=seed, metrics=metrics)
    return Merit(summary, {name: roc_curve(label, score)}, notes(seed, metrics))
