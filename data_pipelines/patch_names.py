"""Folders of patches without classes: images at any depth, and those whose names tell label, patient and slide (Lee et al. 2023)."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipelines.cohort_rows import listed
from data_pipelines.mosaics import IMAGES
from data_pipelines.patches import Patches, PatchesError, patch_table, read_patches
from data_pipelines.tile_sets import is_tile, is_tile_set

LABELLED = re.compile(r"(?P<label>pos|neg)_(?P<patient_id>[^_]+)_(?P<slide_id>[^_]+)_.+")
UNLABELLED = re.compile(r"(?P<patient_id>[^_]+)_[^_]+_(?P<slide_id>[^_]+)_.+")


def read_images(path: str | os.PathLike[str]) -> Patches:
    """Patches that need no label: a set of tiles; all images below a folder, in the order of their names; or those of a CSV list with
    the column `path` (relative to it) and, where known, label, slide_id and patient_id. Raises PatchesError.

    The label of an image in a sub-folder is that folder's name, so that a class that was not meant is seen.
    """
    if is_tile_set(path):
        return read_patches(path)
    path = Path(path)
    if path.is_dir():
        files = image_files(path)
        return patch_table(files, ["" if file.parent == path else file.parent.name for file in files])
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or "path" not in rows[0]:
        raise PatchesError(f"{path}: needs the column path, and a line for each patch")
    files = [path.parent / row["path"].strip() for row in rows]
    missing = [str(file) for file in files if not file.is_file() and not is_tile(file)]
    if missing:
        raise PatchesError(f"{path}: there is no file {listed(missing)}")
    known = {name: [row[name].strip() for row in rows] for name in ("slide_id", "patient_id") if name in rows[0]}
    return patch_table(files, [row.get("label", "").strip() for row in rows], **known)


def read_named(folder: str | os.PathLike[str], names: re.Pattern[str]) -> Patches:
    """All images below a folder whose names (without ending) are of this form: LABELLED, or UNLABELLED, whose label is "".

    A slide's identifier is that of its patient with its own. Raises PatchesError that lists the names of another form.
    """
    files = image_files(Path(folder))
    found = [names.fullmatch(file.stem) for file in files]
    others = [file.name for file, match in zip(files, found) if match is None]
    if others:
        raise PatchesError(f"{folder}: names of another form than {names.pattern}: {listed(others)}")
    fields = [match.groupdict() for match in found if match]
    return patch_table(
        files,
        [field.get("label", "") for field in fields],
        slide_id=[f"{field['patient_id']}_{field['slide_id']}" for field in fields],
        patient_id=[field["patient_id"] for field in fields],
    )


def image_files(folder: Path) -> list[Path]:
    """Images below a folder, sorted. Raises PatchesError where there is none."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES and file.is_file())
    if not files:
        raise PatchesError(f"{folder}: no image (.png, .jpg, .tif, .bmp) in it or below")
    return files


def join_patches(tables: Sequence[Patches]) -> Patches:
    """All patches of the tables, in order."""
    columns = (np.concatenate([getattr(table, name) for table in tables]) for name in _COLUMNS)
    return Patches(tuple(path for table in tables for path in table.path), *columns)


_COLUMNS = ("label", "slide_id", "patient_id", "split")
