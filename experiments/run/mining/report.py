"""What a run of hard negative mining leaves: metrics.json, report.html, test.csv and a contact sheet of what was mined."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.cohort_rows import listed
from data_pipelines.exports import write_json, write_table, write_text
from data_pipelines.tiles import Grid
from experiments.run.evaluation import ITERATIONS
from experiments.run.mining.pictures import draw_pictures
from experiments.run.mining.stages import Arm, MiningRun
from experiments.run.model import Model
from experiments.run.patch_training import METRIC, TrainedPatches
from experiments.run.workdir import versions
from srcc_jax.methods.negative_mining import METRICS
from srcc_jax.methods.negative_mining_paper import COLUMNS, HEADINGS, TABLES
from srcc_jax.metrics import Interval, bootstrap, roc_curve
from srcc_jax.report import Report, render
from srcc_jax.report_page import Cell, Table


@dataclasses.dataclass(frozen=True)
class Judged:
    """The readable test patches: row, label int [n]; model -> probability [n]; model -> metric -> interval by patient, slide or patch."""

    row: np.ndarray
    label: np.ndarray
    probability: Mapping[str, np.ndarray]
    merit: Mapping[str, Mapping[str, Interval]]


def judge(run: MiningRun, arm: Arm) -> Judged:
    """Weak and strong model on the test patches, which are looked at once."""
    found = {
        "weak": run.test("weak", lambda: run.weak),
        "strong": run.test(f"strong_{arm.name}", lambda: run.strong(arm)),
    }
    known = np.isfinite(found["weak"])
    rows = run.rows["test"][known]
    label, unit = run.label[rows], run.patches.unit[rows]
    merit = {
        model: {
            name: bootstrap(metric, label, scores[known], units=unit, iterations=ITERATIONS, seed=run.config.seed)
            for name, metric in METRICS.items()
        }
        for model, scores in found.items()
    }
    return Judged(rows, label, {model: scores[known] for model, scores in found.items()}, merit)


def slide_classifier(run: MiningRun, trained: TrainedPatches, settings: Mapping[str, Any]) -> Model:
    """A model of patches as predict_slides takes it: with one logit, the difference of the two, whose sigmoid is their softmax."""
    params = dict(trained.variables["params"])
    params["classifier"] = {name: array[..., 1:] - array[..., :1] for name, array in params["classifier"].items()}
    config = run.config
    return Model(
        architecture=dataclasses.replace(run.trainer.architecture, classes=1),  # type: ignore[call-arg]
        variables={**trained.variables, "params": params},
        grid=Grid(tile=config.tile, stride=config.tile, mpp=config.mpp),
        min_tissue=config.min_tissue,
        positive=config.positives[0],
        about={"name": "negative mining", "step": trained.step, "settings": dict(settings), "versions": versions()},
    )


def write_results(run: MiningRun, arm: Arm, judged: Judged, *, settings: Mapping[str, Any]) -> None:
    """The files of a run, metrics.json last."""
    folder = run.workdir.path
    columns: dict[str, Any] = {
        "path": [str(run.patches.path[row]) for row in judged.row],
        "slide_id": run.patches.slide_id[judged.row],
        "label": run.patches.label[judged.row],
        **judged.probability,
    }
    write_table(folder / "test.csv", columns)
    pictures = draw_pictures(run, arm, judged.row, judged.probability["weak"], judged.probability["strong"])
    write_text(folder / "report.html", render(_report(run, arm, judged, settings, pictures)))
    models = {"weak": run.weak, "strong": run.strong(arm)}
    slide_classifier(run, models["strong"], settings).save(folder)
    write_json(
        folder / "metrics.json",
        {
            **judged.merit,
            "fits": {name: {"step": model.step, **model.metrics} for name, model in models.items()},
            "false_positives": len(run.false_positives.row),
            "mined": int(run.mined(arm).new.sum()),
            "searched": len(run.candidates.rows),
            "patches": counts(run),
            "unreadable": {"weak": len(run.unreadable), "test": len(run.rows["test"]) - len(judged.row)},
            "settings": dict(settings),
            "versions": versions(),
        },
    )


def counts(run: MiningRun) -> dict[str, dict[str, int]]:
    """Split -> class -> patches."""
    return {
        split: {"negative": int((run.label[rows] == 0).sum()), "positive": int(run.label[rows].sum())}
        for split, rows in run.rows.items()
    }


def paper_table(ours: Mapping[str, Mapping[str, Interval]], query: str, alpha: int) -> Table:
    """Our weak and strong model beside the paper's of the same setting; a dash where it has none."""
    tables = [row for rows in TABLES.values() for row in rows if (row.query, row.alpha) == (query, alpha)]
    paper = next((row for row in tables if row.positive == row.negative == 1), None)
    rows: list[Sequence[Cell]] = []
    for model in ("weak", "strong"):
        theirs: Sequence[Cell] = [None] * len(COLUMNS) if paper is None else list(getattr(paper, model))
        rows.append([model, *(ours[model][name] for name in COLUMNS), *theirs])
    groups = [("", 1), ("this run", len(COLUMNS)), ("Lee et al. 2023, other data", len(COLUMNS))]
    return Table(
        ["model", *HEADINGS, *HEADINGS], rows, groups, "95 % intervals in brackets; of the paper means of three runs"
    )


def _unreadable(run: MiningRun, judged: Judged) -> list[str]:
    weak, test = run.weak_set.places(run.unreadable)["path"], np.setdiff1d(run.rows["test"], judged.row)
    named = {"weak tiles": weak, "test patches": [str(run.patches.path[row]) for row in test]}
    return [f"{len(paths)} {what} cannot be read: {listed(paths)}" for what, paths in named.items() if paths]


def _notes(run: MiningRun, arm: Arm) -> list[str]:
    config, mined, found = run.config, run.mined(arm), len(run.false_positives.row)
    where = "the validation patches" if config.false_positives == "validation" else "the training patches, out of fold"
    return [
        f"{found} false positives (negative patches of probability {config.threshold:g} or more) among {where}.",
        f"{len(mined.weak)} neighbours by {arm.query}, {int(mined.new.sum())} different tiles, of {len(run.candidates.rows)} searched; "
        "they are in the training patches of the strong model and nowhere else.",
        "Both models begin from the same weights and are selected by the least validation loss. The test patches were scored once.",
        f"Intervals: percentile bootstrap by patient, slide or patch, as far as known, {ITERATIONS} resamples, seed {config.seed}.",
        *(
            f"{split}: {of['negative']} negative and {of['positive']} positive patches."
            for split, of in counts(run).items()
        ),
    ]


def _curves(run: MiningRun, arm: Arm) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Loss and validation loss of both models by step."""
    found = {}
    for model in ("weak", f"strong_{arm.name}"):
        history = run.workdir.history(f"{run.folder.name}/{model}")
        for name in ("loss", METRIC):
            rows = [row for row in history if name in row]
            if rows:
                found[f"{model} {name}"] = (
                    np.array([row["step"] for row in rows]),
                    np.array([row[name] for row in rows]),
                )
    return found


def _report(
    run: MiningRun, arm: Arm, judged: Judged, settings: Mapping[str, Any], pictures: Mapping[str, str]
) -> Report:
    nothing = "No false positive was found: nothing was mined, and the strong model is the weak one."
    merit = [(name, model, intervals[name]) for name in METRICS for model, intervals in judged.merit.items()]
    return Report(
        title="Hard negative mining",
        subtitle=f"{run.config.backbone}, {arm.query}, α {arm.alpha}, seed {run.config.seed}",
        summary={f"{name}, {model}": {"patient, slide or patch": interval} for name, model, interval in merit},
        notes=_notes(run, arm),
        warnings=[nothing] * (not len(run.false_positives.row)) + _unreadable(run, judged),
        roc={model: roc_curve(judged.label, scores) for model, scores in judged.probability.items()},
        comparison=paper_table(judged.merit, arm.query, arm.alpha),
        pictures=pictures,
        training=_curves(run, arm),
        configuration=settings,
        versions=versions(),
    )
