"""The report of a predicted cohort: report.html and summary.json.

Up to EMBEDDED_BYTES of small pictures (some 150 slides) are part of report.html, so that this one file can be mailed. In a larger
cohort they are links into slides/, all of them: 5,000 slides make a page of 4 MB in 2.4 s, and no picture is held in memory.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.cohort import SlideRecord
from data_pipelines.exports import write_json, write_text
from data_pipelines.tiles import Grid
from experiments.run.cohort_program import CohortOutcome
from experiments.run.evaluation import Merit
from experiments.run.slide_formats import GRAD_CAM_MAP, PROBABILITY_MAP, MapStyle
from experiments.run.slide_quality import PAGE, SHEET, preview_of
from experiments.run.slide_result import PROBABILITY, SlideResult
from experiments.run.workdir import Workdir, versions
from srcc_jax.report import Report, SlideRow, render

EMBEDDED_BYTES = 12_000_000  # ours: 16 MB in base64, which mail servers still take


def training_curves(workdir: Workdir) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Training and validation loss of each stage over its steps, as far as the work directory has a log of them."""
    curves = {}
    for stage in ("fs", "ws"):
        rows = workdir.history(stage)
        for key, name in (("loss", "training"), ("validation_loss", "validation")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                steps, values = zip(*points)
                curves[f"{stage.upper()} {name}"] = (np.asarray(steps), np.asarray(values))
    return curves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What the report of a cohort says of the model. title: what is looked for; grid: how slides were tiled; maps: the styles of the
    pictures that slides may have; settings: of its training, and its curves: name -> (step [T], value [T])."""

    title: str
    name: str
    grid: Grid
    maps: Sequence[MapStyle]
    settings: Mapping[str, Any]
    training: Mapping[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)


def write_report(subject: Subject, merit: Merit, outcome: CohortOutcome, measures: Sequence[str]) -> None:
    """summary.json and report.html in the outcome's folder. measures: those of the task."""
    results, grid = outcome.results, subject.grid
    speed = {"tiles": sum(row.tiles - row.unreadable for row in results), **outcome.speed}
    report = Report(
        title=f"{subject.title} in {len(results)} slides",
        subtitle=f"{subject.name}, {grid.mpp:g} µm per pixel, tiles of {grid.tile} px at stride {grid.stride}",
        summary=merit.summary,
        notes=merit.remarks,
        warnings=[*merit.warnings, *(f"{row.slide_id}: {row.reason}" for row in results if row.reason)],
        roc=merit.curves,
        slides=slide_rows(outcome.records, results, outcome.out, maps=subject.maps, measures=measures),
        training=subject.training,
        configuration={**subject.settings, **speed},
        versions=versions(),
    )
    write_text(outcome.out / "report.html", render(report))
    failed = {row.slide_id: row.reason for row in results if row.status not in ("done", "unfinished")}
    auc = merit.summary["ROC AUC"]["slide"] if merit.summary else None
    numbers = {
        "slide_auc": auc,
        "metrics": merit.summary,
        "warnings": merit.warnings,
        "slides": len(results),
        "failed": failed,
        **speed,
        "versions": versions(),
    }
    write_json(outcome.out / "summary.json", numbers)


def slide_rows(
    records: Sequence[SlideRecord],
    results: Sequence[SlideResult],
    out: pathlib.Path,
    *,
    maps: Sequence[MapStyle] = (PROBABILITY_MAP, GRAD_CAM_MAP),
    measures: Sequence[str] = (PROBABILITY,),
    embedded: int = EMBEDDED_BYTES,
) -> list[SlideRow]:
    """Rows of the page, with what each slide's folder in `out` holds. Pictures are embedded where all of them together have at
    most `embedded` bytes."""
    found = [_previews(out, row.slide_id, maps) for row in results]
    total = sum((out / path).stat().st_size for pictures in found for path in pictures.values())
    return [
        _slide_row(record, row, out, pictures, measures, embed=total <= embedded)
        for record, row, pictures in zip(records, results, found)
    ]


def _slide_row(
    record: SlideRecord,
    row: SlideResult,
    out: pathlib.Path,
    pictures: Mapping[str, str],
    measures: Sequence[str],
    *,
    embed: bool,
) -> SlideRow:
    about, page = _about(out, row.slide_id), f"slides/{row.slide_id}/{PAGE}"
    return SlideRow(
        slide_id=row.slide_id,
        label=record.label or "",
        patient_id=record.patient_id,
        probability=row.probability,
        status=row.status,
        reason=row.reason,
        tiles=row.tiles,
        tissue=about.get("tissue_share"),
        flags=about.get("flags", ()),
        page=page if (out / page).exists() else "",
        images={name: (out / path).read_bytes() if embed else path for name, path in pictures.items()},
        measures={name: row.measure(name) for name in measures if name != PROBABILITY},
    )


def _about(out: pathlib.Path, slide_id: str) -> dict[str, Any]:
    """What slide.json says; nothing for a slide that left none."""
    file = out / "slides" / slide_id / "slide.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _previews(out: pathlib.Path, slide_id: str, maps: Sequence[MapStyle]) -> dict[str, str]:
    files = {**{style.unit: style.picture for style in maps}, "highest tiles": SHEET}
    found = {name: f"slides/{slide_id}/{preview_of(file)}" for name, file in files.items()}
    return {name: path for name, path in found.items() if (out / path).exists()}
