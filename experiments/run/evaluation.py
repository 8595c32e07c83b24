"""Slide scores against labels: ROC AUC and log loss with bootstrap intervals by slide and by patient."""

from __future__ import annotations

import functools

import numpy as np

from srcc_jax.metrics import LOG_LOSS_CLIP, Interval, Metric, bootstrap, log_loss, roc_auc, sensitivity, specificity

ITERATIONS = 1000  # Kanavati 2021, §2.7
METRICS: dict[str, Metric] = {
    "ROC AUC": roc_auc,
    "log loss": log_loss,
    "sensitivity at 0.5": functools.partial(sensitivity, threshold=0.5),
    "specificity at 0.5": functools.partial(specificity, threshold=0.5),
}


def evaluate(label: np.ndarray, score: np.ndarray, patient: np.ndarray, *, seed: int) -> dict[str, dict[str, Interval]]:
    """metric -> {"slide", "patient"} -> interval. label int [S] 0 or 1, score float [S] in [0, 1], patient str [S]."""
    units = {"slide": None, "patient": patient}
    return {
        name: {
            unit: bootstrap(metric, label, score, units=groups, iterations=ITERATIONS, seed=seed)
            for unit, groups in units.items()
        }
        for name, metric in METRICS.items()
    }


def notes(seed: int) -> list[str]:
    """How the numbers of `evaluate` were made, for the report."""
    return [
        f"Intervals: percentile bootstrap, {ITERATIONS} resamples with replacement, seed {seed}.",
        f"Log loss: natural logarithm, probabilities clipped at {LOG_LOSS_CLIP:.3g}.",
    ]
