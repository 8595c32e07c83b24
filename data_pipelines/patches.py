"""Labelled patches, each an image file of its own: from folders or lists to a table, and from its rows to batches.

A batch is a function of the seed and the step, like those cut from slides (see `stream`), but read without TensorFlow.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from data_pipelines.cohort import Cohort, SlideRecord, assign_splits
from data_pipelines.cohort_rows import SPLIT_NAMES, listed
from data_pipelines.exports import write_table
from data_pipelines.mosaics import class_folders
from data_pipelines.scan import work_ahead
from data_pipelines.slides import RegionError, SlideError
from data_pipelines.tile_sets import SUFFIX, TileSetError, is_tile, is_tile_set, read_tile, read_tile_set

_ROWS, _DRAWS = 0, 1  # purposes that a run's seed is folded with
_OPTIONAL = ("slide_id", "patient_id", "split")


class PatchesError(ValueError):
    """Patches that cannot be used. Names the file, the lines concerned and the cure."""


@dataclasses.dataclass(frozen=True, eq=False)
class Patches:
    """N patches. path: their files; label, slide_id, patient_id, split: str [N], "" where not known."""

    path: tuple[Path, ...]
    label: np.ndarray
    slide_id: np.ndarray
    patient_id: np.ndarray
    split: np.ndarray

    def __len__(self) -> int:
        return len(self.path)

    @property
    def unit(self) -> np.ndarray:
        """Whose each patch is, str [N]: its patient, or its slide, or itself where neither is known."""
        own = np.array([f"patch {row}" for row in range(len(self))])
        return np.select([self.patient_id != "", self.slide_id != ""], [self.patient_id, self.slide_id], own)

    def is_one_of(self, labels: Collection[str]) -> np.ndarray:
        """bool [N]: whether the label is one of these."""
        return np.isin(self.label, list(labels))

    def rows(self, split: str) -> np.ndarray:
        """int [n]: the rows of a split."""
        return np.flatnonzero(self.split == split)

    def take(self, rows: np.ndarray) -> Patches:
        """The patches of these rows int [n], in this order."""
        columns = (getattr(self, name)[rows] for name in ("label", "slide_id", "patient_id", "split"))
        return Patches(tuple(self.path[row] for row in rows), *columns)

    def digest(self) -> str:
        """16 digits that change with any name, label or split; not with what is in the files."""
        fields = ([path.name for path in self.path], self.label, self.unit, self.split)
        return hashlib.sha256("\n".join("\t".join(row) for row in zip(*fields)).encode()).hexdigest()[:16]


def read_patches(path: str | os.PathLike[str]) -> Patches:
    """A folder <class>/<image>, with or without <split>/ above it (train, val or validation, test); a CSV list; or a set of tiles, by
    its folder or, a public one, by its name (see `tile_sets`).

    The list has the columns path (relative to it) and label, and may have slide_id, patient_id and split; PatchCamelyon's, with
    the columns id and label, stands beside images/<id>.tif. Raises PatchesError that tells all problems.
    """
    path = Path(path)
    if is_tile_set(path):
        return _from_tile_set(path)
    if not path.exists():
        raise PatchesError(f"{path}: there is no such folder or list of patches")
    return _from_folder(path) if path.is_dir() else _from_list(path)


def split_patches(patches: Patches, *, seed: int, validation: float = 0.15, test: float = 0.2) -> Patches:
    """The same with a split for every patch: those of a patient (or a slide) stay together, labels are spread over the splits.

    validation, test: fractions of the patients. Splits that are given stay as they are. Raises CohortError where a label cannot be in
    every split.
    """
    records = (
        SlideRecord(str(row), path, str(label), str(unit), str(split) or None)
        for row, (path, label, unit, split) in enumerate(
            zip(patches.path, patches.label, patches.unit, patches.split, strict=True)
        )
    )
    divided = assign_splits(Cohort(tuple(records)), seed=seed, validation=validation, test=test)
    return dataclasses.replace(patches, split=np.array([record.split for record in divided]))


def write_patches(path: str | os.PathLike[str], patches: Patches) -> None:
    """Writes the list that `read_patches` reads, with paths relative to its folder."""
    folder = Path(path).absolute().parent
    columns: dict[str, Sequence | np.ndarray] = {
        "path": [os.path.relpath(file.absolute(), folder) for file in patches.path],
        "label": patches.label,
    }
    write_table(path, columns | {name: getattr(patches, name) for name in _OPTIONAL})


def patch_table(files: Sequence[Path], label: Sequence[str], **known: Sequence[str]) -> Patches:
    """The table of these files and their labels. known: slide_id, patient_id, split, as far as they are."""
    unknown = np.full(len(files), "")
    columns = {name: np.array(known[name], np.str_) if name in known else unknown for name in _OPTIONAL}
    return Patches(tuple(files), np.array(label, np.str_), **columns)


def _from_folder(folder: Path) -> Patches:
    names = sorted(place.name for place in folder.iterdir() if place.is_dir())
    splits = {name: SPLIT_NAMES[name] for name in names if name in SPLIT_NAMES}
    found: list[tuple[Path, str, str]] = []
    try:
        for place, split in splits.items() or [("", "")]:
            classes = class_folders(folder / place)
            found += [(file, name, split) for name, files in classes.items() for file in files]
    except ValueError as error:
        raise PatchesError(str(error)) from error
    if splits and len(splits) < len(names):
        others = listed([name for name in names if name not in splits])
        raise PatchesError(
            f"{folder}: {others} beside {listed(list(splits))}: folders are splits, or classes, not both"
        )
    if not found:
        raise PatchesError(f"{folder}: its folders of classes hold no images")
    files, label, split_of = zip(*found)
    return patch_table(files, label, split=split_of)


def _from_tile_set(path: Path) -> Patches:
    try:
        columns = read_tile_set(path)
    except TileSetError as error:
        raise PatchesError(str(error)) from error
    return patch_table(columns.pop("path"), columns.pop("label"), **columns)


def _from_list(path: Path) -> Patches:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            names = [name.strip().lower() for name in reader.fieldnames or ()]
    except (UnicodeDecodeError, csv.Error) as error:
        raise PatchesError(f"{path}: not a CSV list in UTF-8 ({error}): write it again") from error
    cells = [dict(zip(names, ((value or "").strip() for value in row.values()))) for row in rows]
    if "label" not in names or not {"path", "id"} & set(names) or not cells:
        raise PatchesError(
            f"{path}: needs the columns path and label, and a line for each patch; it has {listed(names)}"
        )
    files = [path.parent / (row["path"] if "path" in names else f"images/{row['id']}.tif") for row in cells]
    problems = []
    for line, (row, image) in enumerate(zip(cells, files), start=2):
        if not row["label"]:
            problems.append(f"line {line}: no label")
        if not image.is_file() and not is_tile(image):
            problems.append(f"line {line}: there is no file {image}")
        if row.get("split", "").lower() not in ("", *SPLIT_NAMES):
            problems.append(f"line {line}: split {row['split']!r} is none of {', '.join(SPLIT_NAMES)}")
    if len({bool(row.get("split")) for row in cells}) > 1:
        problems.append("some patches have a split and others none: give all one, or none")
    if problems:
        raise PatchesError(f"{path}: {listed(problems)}")
    known = {name: [row[name] for row in cells] for name in _OPTIONAL if name in names}
    if "split" in known:
        known["split"] = [SPLIT_NAMES[name.lower()] if name else "" for name in known["split"]]
    return patch_table(files, [row["label"] for row in cells], **known)


@dataclasses.dataclass(frozen=True)
class PatchBatch:
    """arrays: image uint8 [B, side, side, 3], label float32 [B], weight float32 [B] (0 for padding and for files that cannot be
    read), row int32 [B] (-1 for padding). failed: row -> why it could not be read."""

    arrays: dict[str, np.ndarray]
    failed: dict[int, str]


@dataclasses.dataclass(frozen=True, eq=False)
class PatchReader:
    """Pixels for rows of a table. target float [N]: what becomes `label`. side: all patches are resized to it (bilinear, as the
    published pipelines do), in pixels."""

    patches: Patches
    target: np.ndarray
    side: int

    def read(self, rows: np.ndarray, *, size: int) -> PatchBatch:
        """The batch of these rows, filled up with padding to `size`."""
        return fill_batch(rows, self._pixels, self.target, size=size, side=self.side)

    def _pixels(self, row: int) -> np.ndarray:
        path = self.patches.path[row]
        try:
            with read_tile(path) if path.suffix == SUFFIX else Image.open(path) as image:
                pixels = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise PatchesError(f"{path}: no image can be read from it ({error})") from error
        if pixels.size != (self.side, self.side):
            pixels = pixels.resize((self.side, self.side), Image.Resampling.BILINEAR)
        return np.asarray(pixels)


def fill_batch(
    rows: np.ndarray, pixels: Callable[[int], np.ndarray], target: np.ndarray, *, size: int, side: int
) -> PatchBatch:
    """The batch of `size` patches of `side` pixels whose first are those of rows int [n] of a table; the rest is padding.

    pixels: row to uint8 [side, side, 3]; where it raises PatchesError, RegionError or SlideError the patch counts as failed. target
    float [N]: of the table.
    """
    arrays: dict[str, np.ndarray] = {
        "image": np.zeros((size, side, side, 3), np.uint8),
        "label": np.zeros(size, np.float32),
        "weight": np.zeros(size, np.float32),
        "row": np.full(size, -1, np.int32),
    }
    failed: dict[int, str] = {}
    for place, row in enumerate(rows):
        arrays["row"][place], arrays["label"][place] = row, target[row]
        try:
            arrays["image"][place] = pixels(int(row))
        except (PatchesError, RegionError, SlideError) as error:
            failed[int(row)] = str(error)
        else:
            arrays["weight"][place] = 1
    return PatchBatch(arrays, failed)


@dataclasses.dataclass(frozen=True, eq=False)
class ShuffledRows:
    """The rows of each step, a function of the seed and the step: passes over `rows` int [n], each in a new order; a batch that
    an epoch does not fill is filled from the next."""

    rows: np.ndarray
    batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> float:
        """Need not be whole."""
        return len(self.rows) / self.batch

    def __call__(self, step: int) -> np.ndarray:
        """int [batch]."""
        epochs, within = np.divmod(np.arange(step * self.batch, (step + 1) * self.batch), len(self.rows))
        orders = {
            epoch: np.random.default_rng([self.seed, _ROWS, epoch]).permutation(self.rows)
            for epoch in np.unique(epochs)
        }
        return np.array([orders[epoch][place] for epoch, place in zip(epochs, within)])


@dataclasses.dataclass(frozen=True, eq=False)
class WeightedRows:
    """The rows of each step, a function of the seed and the step: drawn with replacement from `rows` int [n], each with a chance in
    proportion to its `weight` float [n]."""

    rows: np.ndarray
    weight: np.ndarray
    batch: int
    seed: int

    def __call__(self, step: int) -> np.ndarray:
        """int [batch]."""
        reach = np.cumsum(self.weight, dtype=np.float64)
        drawn = np.random.default_rng([self.seed, _DRAWS, step]).random(self.batch) * reach[-1]
        place = np.searchsorted(reach, drawn, side="right")
        return self.rows[np.minimum(place, len(self.rows) - 1)]  # a draw may be rounded up to the end


def class_weights(label: np.ndarray) -> np.ndarray:
    """float64 [n]: one over how many of label [n] are of the same class, so that each class has the same sum."""
    _, place, count = np.unique(label, return_inverse=True, return_counts=True)
    return 1 / count[place]


class BatchReader(Protocol):
    """Gives examples by their rows in some table, filled up with padding to `size`."""

    def read(self, rows: np.ndarray, *, size: int) -> PatchBatch: ...


def patch_batches(
    reader: BatchReader,
    rows: Callable[[int], np.ndarray],
    *,
    size: int,
    begin: int,
    end: int,
    threads: int = 2,
) -> Iterator[PatchBatch]:
    """The batches of the steps begin..end-1, in order, read ahead in threads. rows(step): at most `size` rows of the table."""
    yield from work_ahead(
        range(begin, end),
        lambda step: reader.read(rows(step), size=size),
        threads=threads,
        ahead=threads + 1,
        name="patches",
    )
