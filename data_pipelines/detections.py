"""Detections of any program, as tables: a score and a place for each."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import pathlib

import numpy as np

_SCORES = ("score", "prob", "probability", "confidence")  # names by which the column of scores goes


class DetectionsError(ValueError):
    """A table of detections that cannot be read; the message names the file, the line and the cure."""


@dataclasses.dataclass(frozen=True)
class Detections:
    """score, x, y float64 [D]; x and y in level-0 pixels."""

    score: np.ndarray
    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.score)


def read_detections(path: str | os.PathLike) -> Detections:
    """A CSV of one slide: columns score (or prob, probability, confidence), x, y; without a header in this order, as in Camelyon16."""
    path = pathlib.Path(path)
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = [(number, row) for number, row in enumerate(csv.reader(file), start=1) if row]
    columns = (0, 1, 2)
    if lines and not _is_number(lines[0][1][0]):
        columns = _header(path, [name.strip().lower() for name in lines.pop(0)[1]])
    values = np.asarray([[_number(path, line, row, column) for column in columns] for line, row in lines])
    score, x, y = values.reshape(-1, 3).T
    return Detections(score, x, y)


def _header(path: pathlib.Path, names: list[str]) -> tuple[int, int, int]:
    score = [name for name in _SCORES if name in names]
    missing = [name for name in ("x", "y") if name not in names] + ["score"] * (not score)
    if missing:
        raise DetectionsError(f"{path}: no column {', '.join(missing)} among {', '.join(names)}: name them score, x, y")
    return names.index(score[0]), names.index("x"), names.index("y")


def _number(path: pathlib.Path, line: int, row: list[str], column: int) -> float:
    text = row[column].strip() if column < len(row) else ""
    if not _is_number(text):
        raise DetectionsError(
            f"{path}, line {line}: {text!r} is no number: each line needs score, x, y in level-0 pixels"
        )
    return float(text)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
