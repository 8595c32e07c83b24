"""The Camelyon16 data as it is distributed, with its known exceptions: from its folders to the rows of a cohort table."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from data_pipelines.cohort_rows import CohortError, SlideRecord

# Of the test set: not scored by the official evaluation.
EXCLUDED = {"Test_049": "a duplicate", "Test_114": "not annotated exhaustively"}
RENAMED = {"Normal_086": "Tumor_111"}  # it holds tumour
TRAINING = (1, 11, 22, 34, 45, 57, 70, 82, 95, 108)  # He & Li 2023: of the tumour slides, those of the released lists
VALIDATION = ("Normal_001", "Tumor_002")  # ours: the paper has one of each and does not say which
_NAME = re.compile(r"(normal|tumou?r|test)_(\d{3})", re.IGNORECASE)
_MASK = re.compile(r"_(mask|evaluation_mask)$", re.IGNORECASE)
_LABELS = {"normal": "normal", "tumor": "tumour", "tumour": "tumour"}


@dataclasses.dataclass(frozen=True)
class Found:
    """records: the slides, in the order of their names; notes: what was left out or assumed."""

    records: tuple[SlideRecord, ...]
    notes: tuple[str, ...]


def find_camelyon16(folder: str | os.PathLike[str], *, reference: str | os.PathLike[str] | None = None) -> Found:
    """The slides at any depth below a folder: normal_001.tif, tumor_001.tif, test_001.tif, whatever the capitals.

    Annotations are the XML (or JSON) files of the same name, else the masks <name>_mask.tif; normal slides have none. reference: the CSV
    of the test slides with the name first and Tumor or Normal among the other cells; without it a test slide is tumour where it has an
    annotation. Raises CohortError where there is no slide, or the reference lacks one.
    """
    slides, shapes, masks = _files(Path(folder))
    if not slides:
        raise CohortError(f"{folder}: no slide named normal_001.tif, tumor_001.tif or test_001.tif in it or below")
    truth = _truth(Path(reference)) if reference else None
    annotation, notes = {**masks, **shapes}, []
    records = []
    for name, path in sorted(slides.items()):
        if name in EXCLUDED:
            notes.append(f"left out: {name} ({EXCLUDED[name]})")
            continue
        if name in RENAMED:
            other = RENAMED[name]
            if other in slides or other not in annotation:
                notes.append(f"left out: {name} (it holds tumour and was renamed {other})")
                continue
            notes.append(f"{name} is taken as {other}, as which it is annotated: it holds tumour")
            name = other
        record = SlideRecord(name, path, _label(name, truth, annotation), name, _split(name), annotation=None)
        if record.label == "tumour":
            record = dataclasses.replace(record, annotation=annotation.get(name))
            if record.annotation is None:
                notes.append(f"{name} has no annotation: training and lesions need one")
        records.append(record)
    if truth is None and any(record.split == "test" for record in records):
        notes.append("no reference: test slides with an annotation are tumour, the others normal")
    return Found(tuple(records), tuple(notes))


def few_shot(found: Found) -> Found:
    """He & Li's slides: ten with tumour to train on, one of each kind for validation, and all for the test; the rest is left out.
    Raises CohortError where one of the first twelve is missing."""
    splits = {f"Tumor_{number:03}": "train" for number in TRAINING} | dict.fromkeys(VALIDATION, "validation")
    missing = sorted(set(splits) - {record.slide_id for record in found.records})
    if missing:
        raise CohortError(f"{', '.join(missing)} missing: He & Li's selection needs them; or take all slides")
    kept = tuple(
        dataclasses.replace(record, split=splits.get(record.slide_id, "test"))
        for record in found.records
        if record.slide_id in splits or record.split == "test"
    )
    return Found(kept, found.notes)


def _files(folder: Path) -> tuple[dict[str, Path], dict[str, Path], dict[str, Path]]:
    """Slides, shapes and masks by the slide's name."""
    slides: dict[str, Path] = {}
    shapes: dict[str, Path] = {}
    masks: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        stem, suffix = path.stem, path.suffix.lower()
        is_mask = _MASK.search(stem) is not None
        match = _NAME.fullmatch(_MASK.sub("", stem))
        if match is None or not path.is_file():
            continue
        name = f"{'Tumor' if match[1].lower().startswith('tum') else match[1].capitalize()}_{match[2]}"
        if suffix in (".tif", ".tiff", ".png") and is_mask:
            masks[name] = path
        elif suffix in (".tif", ".tiff"):
            slides[name] = path
        elif suffix in (".xml", ".json"):
            shapes[name] = path
    return slides, shapes, masks


def _truth(reference: Path) -> dict[str, str]:
    """Test slide -> label."""
    found: dict[str, str] = {}
    with open(reference, newline="", encoding="utf-8-sig") as file:
        for row in csv.reader(file):
            match = _NAME.match(row[0].strip()) if row else None
            label = next((_LABELS[cell.strip().lower()] for cell in row[1:] if cell.strip().lower() in _LABELS), None)
            if match and label:
                found[f"Test_{match[2]}"] = label
    if not found:
        raise CohortError(f"{reference}: holds no line as Test_001,Tumor")
    return found


def _label(name: str, truth: Mapping[str, str] | None, annotation: Mapping[str, Path]) -> str:
    kind = name.partition("_")[0]
    if kind != "Test":
        return _LABELS[kind.lower()]
    if truth is None:
        return "tumour" if name in annotation else "normal"
    if name not in truth:
        raise CohortError(f"the reference has no line for {name}: give that of the whole test set")
    return truth[name]


def _split(name: str) -> str | None:
    return "test" if name.startswith("Test") else "train"
