"""What predict_slides left of slides, as far as proposals need it."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

from data_pipelines.exports import StoredMap, read_map
from experiments.run.program import UsageError

SLIDE_THRESHOLD = 0.5  # of slides whose model does not say one


@dataclasses.dataclass(frozen=True)
class PredictedSlide:
    """path: of the slide's file; score: None where its model gives it no probability; about: its slide.json; found: its map."""

    slide_id: str
    path: str
    score: float | None
    about: dict[str, Any]
    found: StoredMap

    @property
    def threshold(self) -> float:
        """Above which its model calls it positive."""
        return float(self.about.get("verdict_thresholds", {}).get("verdict", SLIDE_THRESHOLD))

    @property
    def offset(self) -> tuple[float, float]:
        """(x, y) of its bounds, level-0 px, from which QuPath counts."""
        x, y = self.about.get("bounds", (0, 0))[:2]
        return float(x), float(y)


def read_predictions(
    folder: pathlib.Path, maps: Sequence[str], *, wanted: Collection[str] | None = None
) -> list[PredictedSlide]:
    """The slides that are done, out of `wanted` (None: all), each with the first of these maps that it has. Those that are not done are
    told. UsageError where there is no such slide, or a slide has no map of probabilities."""
    table = folder / "slides.csv"
    if not table.is_file():
        raise UsageError(f"{table} is missing: --predictions is a folder that predict_slides wrote")
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    slides = []
    for row in rows if wanted is None else [row for row in rows if row["slide_id"] in wanted]:
        if row["status"] != "done":
            print(f"no proposal: {row['slide_id']}: {row['status']}: {row['reason']}")
            continue
        own = folder / "slides" / row["slide_id"]
        about = json.loads((own / "slide.json").read_text(encoding="utf-8"))
        score = float(row["probability"]) if row.get("probability") else None
        slides.append(PredictedSlide(row["slide_id"], row["path"], score, about, _map_of(own, maps)))
    if not slides:
        raise UsageError(f"{folder} holds no slide that is predicted and has no annotation: predict further slides")
    return slides


def _map_of(folder: pathlib.Path, maps: Sequence[str]) -> StoredMap:
    files = [file for name in maps if (file := folder / f"{name}.npz").exists()]
    if not files:
        raise UsageError(f"{folder} holds no {' and no '.join(f'{n}.npz' for n in maps)}: predict with --formats=npz")
    found = read_map(files[0])
    if "probability" not in found.unit:
        raise UsageError(f"{files[0]} is a map of {found.unit}: outlines are proposed from maps of probabilities alone")
    return found
