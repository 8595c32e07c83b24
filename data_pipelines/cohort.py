"""The cohort table: which slides there are, what they are, whose they are, and which split each belongs to."""

import csv
import dataclasses
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from data_pipelines import cohort_rows
from data_pipelines.cohort_rows import COLUMNS, SPLIT_NAMES, SPLITS, CohortError, SlideRecord
from data_pipelines.files import atomic_write

__all__ = [
    "SPLITS",
    "Cohort",
    "CohortError",
    "SlideRecord",
    "assign_splits",
    "check_two_classes",
    "read_cohort",
    "write_cohort",
]


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Slides in the order of their table. notes: what was assumed while reading, for the run's log."""

    records: tuple[SlideRecord, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[SlideRecord]:
        return iter(self.records)

    @property
    def has_splits(self) -> bool:
        """Whether every slide has a split (read_cohort lets none or all have one)."""
        return bool(self.records) and all(record.split for record in self.records)

    def split(self, name: str) -> "Cohort":
        """The slides of "train", "validation" (or "val") or "test"."""
        if name.lower() not in SPLIT_NAMES:
            raise CohortError(f"split {name!r} is unknown: give one of {', '.join(SPLITS)}")
        wanted = SPLIT_NAMES[name.lower()]
        return dataclasses.replace(self, records=tuple(record for record in self if record.split == wanted))

    def labels(self, positive: str | Collection[str]) -> np.ndarray:
        """int32 [S]: 1 where the label is (one of) `positive`, else 0. Every slide needs a label."""
        unlabelled = [record.slide_id for record in self if record.label is None]
        if unlabelled:
            raise CohortError(f"{cohort_rows.listed(unlabelled)} have no label: fill the column `label`")
        wanted = {positive} if isinstance(positive, str) else set(positive)
        return np.array([record.label in wanted for record in self], np.int32)


def check_two_classes(cohort: Cohort, positive: str | Collection[str], *, where: str = "the cohort") -> None:
    """Refuses a cohort without a positive or without a negative slide. where: what it is, for the message."""
    labels = cohort.labels(positive)
    if not len(labels) or labels.min() == labels.max():
        found = (
            ", ".join(f"{label} ({count})" for label, count in Counter(r.label for r in cohort).items()) or "no slide"
        )
        missing = "positive" if not labels.any() else "negative"
        raise CohortError(
            f"{where} has no {missing} slide: its labels are {found}, and {positive!r} counts as positive. Name another "
            "positive label, or give slides of both classes"
        )


def read_cohort(
    path: str | os.PathLike[str],
    *,
    slides_folder: str | os.PathLike[str] | None = None,
    labels: Collection[str] | None = None,
    require_files: bool = True,
    require_labels: bool = True,
) -> Cohort:
    """The slides of a CSV file with the columns slide_id, path, label and, where wanted, patient_id, split, mpp, annotation.

    Paths are relative to the CSV's folder.  CLAM's tables (case_id, slide_id, label) are read with `slides_folder`: there the
    slide with the name slide_id, with or without a suffix, is looked for in all sub-folders.  Other columns are left alone.
    labels: the allowed ones (None: any).  require_labels False: a table for prediction, labels where known.  Splits are train,
    validation (or val) and test, given for all slides or for none.  Without patient_id each slide is its own patient, which
    the cohort's notes say.

    Raises CohortError with all problems of the file at once, row by row (the header is row 1), each with its cure.
    """
    path = Path(path)
    rows = cohort_rows.read_rows(path)
    reader = cohort_rows.RowReader(
        path.parent,
        labels=labels,
        slides=None if slides_folder is None else cohort_rows.slides_by_name(slides_folder),
        require_files=require_files,
        require_labels=require_labels,
    )
    records = reader.records(path, rows)
    own = sum(not row.cells.get("patient_id") for row in rows)
    note = f"{path}: {own} of {len(records)} slides name no patient: each counts as a patient of its own"
    return Cohort(tuple(records), (note,) if own else ())


def read_columns(path: str | os.PathLike[str], names: Collection[str]) -> dict[str, dict[str, str]]:
    """slide_id -> column -> cell, of those columns (in lower case) that a cohort table has besides its own; empty cells are "".

    Raises CohortError for a file that is no table."""
    return {
        row.cells.get("slide_id", ""): {name: row.cells[name] for name in names if name in row.cells}
        for row in cohort_rows.read_rows(Path(path))
    }


def write_cohort(path: str | os.PathLike[str], cohort: Iterable[SlideRecord]) -> None:
    """Writes the table that read_cohort reads; paths below the file's folder are written relative to it."""
    path = Path(path)
    with atomic_write(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for record in cohort:
            values = dataclasses.asdict(record) | {
                "path": _relative(record.path, path.parent),
                "annotation": record.annotation and _relative(record.annotation, path.parent),
            }
            writer.writerow("" if values[name] is None else values[name] for name in COLUMNS)


def assign_splits(cohort: Cohort, *, seed: int, validation: float = 0.15, test: float = 0.2) -> Cohort:
    """The cohort with a split for every slide: patients are never divided, and each label is spread over the splits.

    validation, test: fractions of the patients; 0 leaves a split out.  Patients are ordered by a hash of seed and patient_id,
    apart for each label (a patient's is the rarest among its slides), so that neither the order of the table nor the number
    of processes matters.  Splits that are given stay as they are.

    Raises CohortError where a label cannot be in every split.
    """
    if cohort.has_splits:
        return cohort
    wanted = {"test": test, "validation": validation, "train": 1 - validation - test}
    if min(validation, test) < 0 or wanted["train"] <= 0:
        raise CohortError(f"validation={validation:g} and test={test:g} leave nothing to train on")
    wanted = {name: share for name, share in wanted.items() if share > 0}
    split: dict[str, str] = {}
    for members in _patients_by_label(cohort).values():
        members.sort(key=lambda patient: hashlib.sha256(f"{seed}:{patient}".encode()).digest())
        split |= dict(zip(members, _spread(len(members), wanted), strict=True))
    divided = Cohort(
        tuple(dataclasses.replace(record, split=split[record.patient_id]) for record in cohort),
        (*cohort.notes, f"splits by seed {seed}: " + _sizes(split.values(), wanted)),
    )
    _check_spread(divided, wanted)
    return divided


def _patients_by_label(cohort: Cohort) -> dict[str | None, list[str]]:
    """Each patient once, under the rarest label among its slides: rare labels are then spread for certain."""
    counts = Counter(record.label for record in cohort)
    rarest: dict[str, str | None] = {}
    for record in sorted(cohort, key=lambda record: (counts[record.label], str(record.label))):
        rarest.setdefault(record.patient_id, record.label)
    strata: dict[str | None, list[str]] = defaultdict(list)
    for patient, label in rarest.items():
        strata[label].append(patient)
    return strata


def _spread(count: int, shares: Mapping[str, float]) -> list[str]:
    """A split for each of `count` patients: the rounded shares, at least one each where there are enough, train the rest."""
    names: list[str] = []
    for name, share in shares.items():
        if name != "train":
            room = count - len(names) - 1
            names += [name] * min(max(round(share * count), 1), max(room, 0))
    return names + ["train"] * (count - len(names))


def _sizes(given: Iterable[str], wanted: Iterable[str]) -> str:
    counts = Counter(given)
    return ", ".join(f"{name} {counts[name]} patients" for name in SPLITS if name in wanted)


def _check_spread(cohort: Cohort, wanted: Iterable[str]) -> None:
    wanted = set(wanted)
    splits, patients = defaultdict(set), defaultdict(set)
    for record in cohort:
        splits[record.label].add(record.split)
        patients[record.label].add(record.patient_id)
    lacking = [
        f"label {label!r} ({len(patients[label])} patients) would be missing from {cohort_rows.listed(sorted(wanted - found))}"
        for label, found in splits.items()
        if found != wanted
    ]
    if lacking:
        raise CohortError(
            f"the cohort cannot be divided into {', '.join(n for n in SPLITS if n in wanted)}: {'; '.join(lacking)}. "
            "Give more patients, fill the column `split` by hand, or leave a split out (fraction 0)"
        )


def _relative(path: Path, folder: Path) -> str:
    absolute, base = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return absolute.relative_to(base).as_posix() if absolute.is_relative_to(base) else str(absolute)
