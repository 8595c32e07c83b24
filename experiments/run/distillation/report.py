"""What a trained reverse distillation is worth on its test patches: metrics.json, patches.csv and report.html."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.exports import write_json, write_table, write_text
from experiments.run.distillation.spot_patches import failed_slides
from experiments.run.distillation.training import AUC, METRIC, STAGE, DistillationStudy
from experiments.run.evaluation import ITERATIONS
from experiments.run.patch_feed import PatchFeed
from experiments.run.workdir import versions
from srcc_jax.methods.reverse_distillation import FIXED_THRESHOLD, Config
from srcc_jax.metrics import Interval, Metric, accuracy, bootstrap, roc_auc, roc_curve, sensitivity, specificity
from srcc_jax.report import Report, render
from srcc_jax.train import BestCheckpoint

RANDOM_TEACHER = "The teacher has random weights: this run shows that shapes fit, and nothing about tumour. Give --teacher for results."
PATCHES = "patches"  # folder of a work directory, with what was cut from slides


@dataclasses.dataclass(frozen=True)
class Judged:
    """The test patches: row, label (1: tumour) and score [n], and metric -> "patch", "patient" -> interval."""

    row: np.ndarray
    label: np.ndarray
    score: np.ndarray
    merit: Mapping[str, Mapping[str, Interval]]


def judge(study: DistillationStudy, trained: BestCheckpoint) -> Judged:
    """Scores the test patches: AUROC, and accuracy, sensitivity and specificity at both thresholds."""
    row, label, score = study.scored(trained.variables, "test")
    merit = measure(label, score, study.patches.unit[row], thresholds(trained), seed=study.config.seed)
    return Judged(row, label, score, merit)


def measure(
    label: np.ndarray, score: np.ndarray, unit: np.ndarray, thresholds: Mapping[str, float], *, seed: int
) -> dict[str, dict[str, Interval]]:
    """metric -> "patch", and "patient" where patches share one -> interval. label (1: tumour), score, unit (whose a patch is) [n];
    thresholds: name -> lowest score that is called tumour."""
    metrics: dict[str, Metric] = {"ROC AUC": roc_auc}
    for where, threshold in thresholds.items():
        for name, metric in (("accuracy", accuracy), ("sensitivity", sensitivity), ("specificity", specificity)):
            metrics[f"{name} at the {where} threshold"] = functools.partial(metric, threshold=threshold)
    units = {"patch": None, "patient": unit} if len(set(unit)) < len(unit) else {"patch": None}
    return {
        name: {
            kind: bootstrap(metric, label, score, units=groups, iterations=ITERATIONS, seed=seed)
            for kind, groups in units.items()
        }
        for name, metric in metrics.items()
    }


def thresholds(trained: BestCheckpoint) -> dict[str, float]:
    """Name -> lowest score of a patch that is called tumour."""
    return {"fixed": FIXED_THRESHOLD, "validation": trained.metrics["threshold"]}


def write_results(
    study: DistillationStudy, trained: BestCheckpoint, judged: Judged, *, settings: Mapping[str, Any], random: bool
) -> None:
    """The three files, metrics.json last: where it is, the test patches have been looked at."""
    folder, patches = study.workdir.path, study.patches
    columns: dict[str, Any] = {
        "path": [str(patches.path[row]) for row in judged.row],
        "slide_id": patches.slide_id[judged.row],
        "label": patches.label[judged.row],
        "score": judged.score,
    }
    write_table(folder / "patches.csv", columns)
    write_text(folder / "report.html", render(_report(study, trained, judged, settings, random)))
    write_json(
        folder / "metrics.json",
        {
            **judged.merit,
            "thresholds": thresholds(trained),
            "validation": dict(trained.metrics),
            "step": trained.step,
            "alpha": study.alpha,
            "patches": _counts(study),
            "unreadable": sorted(study.feed.unreadable.values()),
            "failed_slides": failed_slides(folder / PATCHES),
            "random_teacher": random,
            "settings": dict(settings),
            "versions": versions(),
        },
    )


def _counts(study: DistillationStudy) -> dict[str, dict[str, int]]:
    """Split -> kind -> patches used."""
    kinds = {split: study.tumour[rows] for split, rows in study.rows.items()}
    return {split: {"normal": int((~t).sum()), "tumour": int(t.sum())} for split, t in kinds.items()}


def lost(workdir: pathlib.Path, feed: PatchFeed) -> list[str]:
    """Slides from which no patch was cut, and patches that could not be read, with the reasons."""
    slides = [f"{slide_id}: {reason}" for slide_id, reason in failed_slides(workdir / PATCHES).items()]
    return slides + sorted(feed.unreadable.values())


def _report(
    study: DistillationStudy, trained: BestCheckpoint, judged: Judged, settings: Mapping[str, Any], random: bool
) -> Report:
    config, counts = study.config, _counts(study)
    history = study.workdir.history(STAGE)
    curves = {
        name: (np.array([row["step"] for row in found]), np.array([row[name] for row in found]))
        for name in ("loss", METRIC, AUC)
        if (found := [row for row in history if name in row])
    }
    notes = [
        f"Thresholds: {FIXED_THRESHOLD:g} (§4.1), and {trained.metrics['threshold']:.4f}, the best on the validation patches.",
        f"Selected by {_selected_by(config, trained)} on the validation patches: step {trained.step}. The test patches were scored "
        "once, after that.",
        f"Intervals: percentile bootstrap, {ITERATIONS} resamples, seed {config.seed}.",
        *(
            f"{split}: {kinds['normal']} normal and {kinds['tumour']} tumour patches."
            for split, kinds in counts.items()
        ),
    ]
    return Report(
        title="Reverse distillation",
        subtitle=f"{config.loss} loss, {config.similarity} similarity, α {study.alpha:g}, teacher {study.teacher.name}",
        summary=judged.merit,
        notes=notes,
        warnings=[RANDOM_TEACHER] * random + lost(study.workdir.path, study.feed),
        roc={study.teacher.name: roc_curve(judged.label, judged.score)},
        training=curves,
        configuration=settings,
        versions=versions(),
    )


def _selected_by(config: Config, trained: BestCheckpoint) -> str:
    if config.selection == "auc":
        return f"ROC AUC, {trained.metrics[AUC]:.4f},"
    return f"accuracy at the {config.selection} threshold, {trained.metrics[METRIC]:.4f},"
