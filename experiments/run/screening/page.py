"""The page of a finished run: numbers of merit with their intervals, curves, every test slide with its score, and its errors first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.run.evaluation import ITERATIONS
from experiments.run.screening.judging import JudgedSlides
from experiments.run.workdir import Workdir, versions
from srcc_jax.metrics import Interval, roc_curve
from srcc_jax.report import Report, SlideRow, render

_CURVES = ("loss", "validation_loss", "learning_rate")


def render_run(
    judged: JudgedSlides,
    merit: Mapping[str, Any],
    workdir: Workdir,
    settings: Mapping[str, Any],
    *,
    failed: Sequence[str],
) -> str:
    """HTML. merit: what `JudgedSlides.merit` gave; failed: slides without a verdict, each with its reason."""
    threshold = merit["fixed"]["threshold"]
    notes = [
        f"A slide is positive above {threshold:g} (§5.1); chosen on the validation slides: {merit['validation']['threshold']:.4f}.",
        "Intervals of sensitivity and specificity: Wilson's with continuity correction. Of areas: percentile bootstrap by patient, "
        f"{ITERATIONS} resamples, seed {settings['seed']}.",
        "Average precision is what the paper's Table 1 calls AUC.",
    ]
    two_classes = "ROC AUC" in merit
    report = Report(
        title="Gastric screening",
        subtitle=f"{settings['model']}, {merit['slides']} test slides, {merit['positive']} positive",
        summary=_summary(merit),
        notes=notes,
        warnings=failed,
        roc={settings["model"]: roc_curve(judged.label, judged.score)} if two_classes else {},
        slides=_slides(judged, threshold),
        training=_training(workdir),
        configuration=settings,
        versions=versions(),
    )
    return render(report)


def _summary(merit: Mapping[str, Any]) -> dict[str, dict[str, Interval]]:
    areas = {name: {"patient": merit[name]} for name in ("average precision", "ROC AUC") if name in merit}
    shares = {
        f"{share} at the {kind} threshold": {"slide": merit[kind][share]}
        for kind in ("fixed", "validation")
        for share in ("sensitivity", "specificity")
    }
    return {**shares, **areas}


def _slides(judged: JudgedSlides, threshold: float) -> list[SlideRow]:
    """Errors first, then by score."""
    wrong = (judged.score > threshold) != (judged.label > 0)
    order = np.lexsort([-judged.score, ~wrong])
    return [
        SlideRow(
            slide_id=judged.records[row].slide_id,
            label=judged.records[row].label or "",
            patient_id=judged.records[row].patient_id,
            probability=float(judged.score[row]),
            flags=[["falsely called", "missed"][int(judged.label[row])]] if wrong[row] else [],
        )
        for row in order
    ]


def _training(workdir: Workdir) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of the multi-task network, as far as the log has it."""
    history = workdir.history("multitask")
    return {
        name: (np.array([row["step"] for row in rows]), np.array([row[name] for row in rows]))
        for name in _CURVES
        if (rows := [row for row in history if name in row])
    }
