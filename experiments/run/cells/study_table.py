"""Rows of the study of cell detection: each model after each round, against the boxes it was shown and those it was not."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.boxes import Boxes, read_box_folder
from experiments.run.cells.evaluation import FALSE_POSITIVES, FROC, INSTANCE_RECALL, Scoring
from experiments.run.cells.held_out import HELD_OUT, numbers_file
from experiments.run.cells.study_data import Material
from srcc_jax.report import markdown_table

ABSENT = None
COLLECTIVE = "collective recall"
PRECISION, RECALL = "held-out precision", "held-out recall"
FOUND, RIGHT = "withheld boxes recovered", "precision on training images"
CRITERIA = (COLLECTIVE, INSTANCE_RECALL, FALSE_POSITIVES, FROC)
_KEYS = ("part", "model", "round")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished run. folder: its work directory."""

    part: str
    seed: int
    fold: str
    training: str
    folder: pathlib.Path
    material: Material


def read_rounds(outcome: Outcome) -> list[dict[str, Any]]:
    """A row for each model and round of a run: the criteria on held-out images; where the truth is whole, precision there, and what the
    masks of the round hold of the withheld boxes, and of boxes at all, on the training images."""
    rows = []
    for listing in sorted((outcome.folder / "rounds").glob("*/*.json")):
        round_name, model = listing.parent.name, listing.stem
        if model.endswith(HELD_OUT):
            continue
        row: dict[str, Any] = {
            "part": outcome.part, "model": f"{outcome.training}, {model}", "round": round_name,
            "seed": outcome.seed, "fold": outcome.fold, "IoU with the round before": json.loads(listing.read_text())["iou"],
        }  # fmt: skip
        row |= _held_out(listing.with_name(model + HELD_OUT), outcome.material)
        if outcome.material.withheld:
            row |= _recovered(listing.with_name(model), outcome.material)
        rows.append(row)
    return rows


def score_boxes(root: pathlib.Path, normal: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of another program's detections in predicted_*/ on DigestPath's crops, all at once."""
    truth, scoring, rows = read_box_folder(root / "gt"), Scoring(), []
    for folder in sorted(root.glob("predicted_*")):
        found = read_box_folder(folder)
        others = [boxes.score for name, boxes in found.items() if name.startswith(tuple(normal))]
        matches = list(scoring.matches(truth, found).values())
        values = {name: metric(matches, others) for name, metric in scoring.metrics(normal=bool(others)).items()}
        row: dict[str, Any] = {"part": "digestpath", "model": folder.name, "round": "", "seed": 0, "fold": "all"}
        rows.append(row | _criteria(values))
    return rows


def summarise(path: pathlib.Path) -> tuple[str, list[dict[str, Any]]]:
    """Of rounds.csv: for each part, model and round the mean over folds, then mean and range over seeds, as Markdown and as rows."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in (*CRITERIA, RECALL, PRECISION, FOUND, RIGHT) if any(row.get(name) for row in rows)]
    summary = []
    for key in dict.fromkeys(tuple(row[name] for name in _KEYS) for row in rows):
        mine = [row for row in rows if tuple(row[name] for name in _KEYS) == key]
        seeds = sorted({row["seed"] for row in mine})
        found: dict[str, Any] = dict(zip(_KEYS, key)) | {"runs": len(mine)}
        for name in names:
            values = [
                float(np.mean(v)) for s in seeds if (v := [float(r[name]) for r in mine if r["seed"] == s and r[name]])
            ]
            found[name] = (float(np.mean(values)), min(values), max(values)) if values else None
        summary.append(found)
    cells = [
        [*(str(row[name]) for name in _KEYS), row["runs"], *(_text(row[name]) for name in names)] for row in summary
    ]
    return markdown_table(cells, [*_KEYS, "runs", *names]), summary


def _text(value: tuple[float, float, float] | None) -> str | None:
    return None if value is None else f"{value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})"


def _criteria(values: Mapping[str, float]) -> dict[str, float | None]:
    named = {COLLECTIVE if name.startswith(COLLECTIVE) else name: value for name, value in values.items()}
    return {name: named.get(name) for name in CRITERIA}


def _held_out(folder: pathlib.Path, material: Material) -> dict[str, float | None]:
    """The criteria as the run wrote them and, where the truth is whole, recall and precision of all detections."""
    if not numbers_file(folder).exists():
        return {}
    written = json.loads(numbers_file(folder).read_text())
    row = _criteria({name: value["value"] for name, value in written.items() if isinstance(value, dict)})
    if material.withheld:
        recall, precision = _recall_and_precision(material.truth, read_box_folder(folder))
        row |= {RECALL: recall, PRECISION: precision}
    return row


def _recovered(folder: pathlib.Path, material: Material) -> dict[str, float | None]:
    """What the detections behind a round's masks, less those of shown boxes, hold of the withheld ones, and which share of all is right.

    Rounds with unlabelled regions have masks of those alone; the first round has detections of none."""
    found = {name: boxes for name, boxes in read_box_folder(folder).items() if name in material.withheld}
    if not found:
        return {}
    scoring, hidden = Scoring(), {name: material.withheld[name] for name in found}
    shown = scoring.matches({name: _without(material.truth[name], boxes) for name, boxes in hidden.items()}, found)
    rest = {name: Boxes(b.box[~shown[name].hit], b.score[~shown[name].hit]) for name, b in found.items()}
    recovered = sum(int(match.hit.sum()) for match in scoring.matches(hidden, rest).values())
    withheld = sum(map(len, hidden.values()))
    _, precision = _recall_and_precision(material.truth, found)
    return {FOUND: recovered / withheld if withheld else None, RIGHT: precision}


def _without(boxes: np.ndarray, some: np.ndarray) -> np.ndarray:
    return boxes[~(boxes[:, None] == some[None]).all(axis=2).any(axis=1)]


def _recall_and_precision(
    truth: Mapping[str, np.ndarray], found: Mapping[str, Boxes]
) -> tuple[float | None, float | None]:
    """Matched share of all boxes of the images found, and of their detections."""
    matches = Scoring().matches({name: truth[name] for name in found}, found).values()
    hits = sum(int(match.hit.sum()) for match in matches)
    boxes, detections = sum(match.truths for match in matches), sum(len(match.hit) for match in matches)
    return hits / boxes if boxes else None, hits / detections if detections else None
