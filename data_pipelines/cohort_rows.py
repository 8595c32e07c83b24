"""From the rows of a cohort's CSV to checked records: every problem of a table is found and told at once."""

import csv
import dataclasses
import difflib
import io
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data_pipelines.slides import find_slides

COLUMNS = ("slide_id", "path", "label", "patient_id", "split", "mpp", "annotation")
SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {name: name for name in SPLITS} | {"val": "validation"}
MPP_RANGE = (0.05, 10.0)  # ours, µm per pixel of level 0: beyond, it is a magnification or another unit
SHOWN = 20  # things that one message lists


class CohortError(ValueError):
    """A cohort table that cannot be used. Names the file, every row concerned, and the cure."""


@dataclasses.dataclass(frozen=True)
class SlideRecord:
    """One slide. mpp: µm per pixel of level 0 as the table says; None: not given."""

    slide_id: str
    path: Path
    label: str | None
    patient_id: str
    split: str | None = None
    mpp: float | None = None
    annotation: Path | None = None


class Row(NamedTuple):
    """A line of the file (the header is 1) and its cells by column; cells that the line lacks are missing here."""

    line: int
    cells: dict[str, str]


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def raise_problems(path: Path, problems: Sequence[str]) -> None:
    """One CohortError for all problems, if there are any."""
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise CohortError(f"{path} has {count}:\n  " + "\n  ".join([*problems[:SHOWN], *more]))


def read_rows(path: Path) -> list[Row]:
    """The rows that hold anything. Names of columns in any case; case_id is CLAM's word for patient_id."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CohortError(f"{path}: not UTF-8 text ({error}): save the table as CSV in UTF-8") from error
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows, problems = [], []
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if "patient_id" not in header:
            header = ["patient_id" if name == "case_id" else name for name in header]
        _check_header(path, header)
        for values in reader:
            cells = [value.strip() for value in values]
            if any(cells[len(header) :]):
                cure = "put a value that holds the separator in quotes"
                problems.append(f"row {reader.line_num}: {len(cells)} cells for {len(header)} columns: {cure}")
            if any(cells):
                rows.append(Row(reader.line_num, dict(zip(header, cells))))
    except csv.Error as error:
        raise CohortError(f"{path}: row {reader.line_num} is broken CSV: {error}") from error
    raise_problems(path, problems if rows else ["it has no rows below its header"])
    return rows


def _check_header(path: Path, header: Sequence[str]) -> None:
    problems = [f"the column {name!r} comes twice: rename one" for name in COLUMNS if header.count(name) > 1]
    if "slide_id" not in header:
        problems.append(f"no column slide_id; it has {listed(header)}: the first line must name the columns")
    for name in header:
        meant = difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.8)
        if meant and name not in COLUMNS and meant[0] not in header:
            problems.append(f"the column {name!r} is not known, {meant[0]!r} is: rename it")
    raise_problems(path, problems)


def slides_by_name(folder: str | os.PathLike[str]) -> dict[str, list[Path]]:
    """The slides in a folder and its sub-folders, by their names with and without suffix."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in find_slides(Path(folder)):
        for name in {path.name, path.stem}:
            found[name].append(path)
    return found


class RowReader:
    """Makes records of rows, and gathers what is wrong with them.

    folder: what paths are relative to.  labels: the allowed ones, None: any.  slides: where rows without a path find theirs.
    """

    def __init__(
        self,
        folder: Path,
        *,
        labels: Collection[str] | None,
        slides: Mapping[str, list[Path]] | None,
        require_files: bool,
        require_labels: bool,
    ) -> None:
        self.folder, self.labels, self.slides = folder, labels, slides
        self.require_files, self.require_labels = require_files, require_labels
        self.problems: list[str] = []

    def records(self, path: Path, rows: Sequence[Row]) -> list[SlideRecord]:
        """One record per row, or one CohortError with all that is wrong."""
        header = set().union(*(row.cells for row in rows))
        if "path" not in header and self.slides is None:
            self.problems.append("no column path: add it, or for a table like CLAM's name the slides_folder")
        elif "label" not in header and self.require_labels:
            self.problems.append("no column label: add it")
        else:
            records = [self._record(row) for row in rows]
            self._check_table([row.line for row in rows], records)
        raise_problems(path, self.problems)
        return records

    def _record(self, row: Row) -> SlideRecord:
        slide_id = row.cells.get("slide_id", "")
        if not slide_id or slide_id in (".", "..") or set(slide_id) & set("/\\\0"):
            self._add(row.line, f"slide_id {slide_id!r} must be a name without slashes: it names the slide's results")
        return SlideRecord(
            slide_id=slide_id,
            path=self._path(row, slide_id),
            label=self._label(row),
            patient_id=row.cells.get("patient_id") or slide_id,
            split=self._split(row),
            mpp=self._mpp(row),
            annotation=self._annotation(row),
        )

    def _add(self, line: int, problem: str) -> None:
        self.problems.append(f"row {line}: {problem}")

    def _path(self, row: Row, slide_id: str) -> Path:
        given = row.cells.get("path")
        if given:
            path = self.folder / given
            if self.require_files and not path.exists():
                self._add(row.line, f"path {given!r}: there is no {path}; paths are relative to the table's folder")
            return path
        found = (self.slides or {}).get(slide_id, [])
        if self.slides is None:
            self._add(row.line, "path is empty: fill it")
        elif len(found) != 1:
            what = f"{len(found)} slides ({listed([str(p) for p in found])})" if found else "no slide"
            self._add(row.line, f"the slides_folder holds {what} named {slide_id!r}: add a column path")
        return found[0] if found else self.folder  # no slide is the folder: the row is refused

    def _label(self, row: Row) -> str | None:
        label = row.cells.get("label") or None
        if label is None and self.require_labels:
            self._add(row.line, "label is empty: fill it")
        elif label is not None and self.labels is not None and label not in self.labels:
            self._add(row.line, f"label {label!r} is unknown: give one of {listed(sorted(self.labels))}")
        return label

    def _split(self, row: Row) -> str | None:
        given = row.cells.get("split")
        if not given:
            return None
        if given.lower() not in SPLIT_NAMES:
            self._add(row.line, f"split {given!r} is unknown: give one of {', '.join(SPLITS)}")
        return SPLIT_NAMES.get(given.lower(), given)

    def _mpp(self, row: Row) -> float | None:
        given = row.cells.get("mpp")
        if not given:
            return None
        try:
            mpp = float(given)
        except ValueError:
            self._add(row.line, f"mpp {given!r} is no number: give µm per pixel with a decimal point, as 0.25")
            return None
        if not MPP_RANGE[0] <= mpp < MPP_RANGE[1] or not math.isfinite(mpp):
            self._add(row.line, f"mpp {given} is no µm per pixel of a slide: 20x is about 0.5, 40x about 0.25")
        return mpp

    def _annotation(self, row: Row) -> Path | None:
        given = row.cells.get("annotation")
        if not given:
            return None
        path = self.folder / given
        if self.require_files and not path.is_file():
            self._add(row.line, f"annotation {given!r}: there is no file {path}; empty the cell or correct it")
        return path

    def _check_table(self, lines: Sequence[int], records: Sequence[SlideRecord]) -> None:
        """What only shows between rows: repetitions, splits for some, patients in two splits."""
        for what, values in (
            ("slide_id {!r}", [record.slide_id for record in records]),
            ("the file {}", ["" if r.path == self.folder else os.path.abspath(r.path) for r in records]),
        ):
            for value, where in _repeated(values, lines).items():
                self.problems.append(f"rows {listed(where)}: {what.format(value)} comes {len(where)} times: keep one")
        without = [str(line) for line, record in zip(lines, records) if not record.split]
        if without and len(without) < len(records):
            self.problems.append(
                f"rows {listed(without)}: no split, though others have one: give all slides a split, or none"
            )
        splits: dict[str, set[str]] = defaultdict(set)
        for record in records:
            if record.split:
                splits[record.patient_id].add(record.split)
        leaks = [f"{patient} ({' and '.join(sorted(found))})" for patient, found in splits.items() if len(found) > 1]
        if leaks:
            self.problems.append(
                f"patients in more than one split: {listed(leaks)}: all slides of a patient need the same"
            )


def _repeated(values: Iterable[str], lines: Iterable[int]) -> dict[str, list[str]]:
    """The lines of each value that comes more than once; empty values are told elsewhere."""
    where: dict[str, list[str]] = defaultdict(list)
    for value, line in zip(values, lines):
        where[value].append(str(line))
    return {value: found for value, found in where.items() if value and len(found) > 1}
