"""Images of side × side neighbouring patches, each with a label of its own: from lists to a table, and back."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np

from data_pipelines.exports import write_table
from data_pipelines.patches import Patches, PatchesError, read_patches

CELLS = "cells"


def read_grids(path: str | os.PathLike[str], *, side: int) -> tuple[Patches, np.ndarray]:
    """The images, and bool [N, side²], row by row: which of their patches are tumour.

    The list is one of `read_patches` with the column `cells`: side² characters 0 or 1, as 000010000. Its label is that of the middle
    patch. Raises PatchesError.
    """
    path = Path(path)
    if path.is_dir():
        raise PatchesError(f"{path}: grids need a list (CSV) with the column {CELLS}, as {'0' * side**2}")
    patches = read_patches(path)
    with open(path, newline="", encoding="utf-8-sig") as file:
        given = [(row.get(CELLS) or "").strip() for row in csv.DictReader(file)]
    wrong = [line for line, cells in enumerate(given, start=2) if len(cells) != side**2 or set(cells) - {"0", "1"}]
    if wrong:
        raise PatchesError(
            f"{path}, line {wrong[0]}: the column {CELLS} must hold {side**2} digits 0 or 1, row by row ({len(wrong)} lines do not)"
        )
    return patches, np.array([[cell == "1" for cell in cells] for cells in given])


def write_grids(path: str | os.PathLike[str], patches: Patches, cells: np.ndarray) -> None:
    """The list that `read_grids` reads. cells bool [N, side²]."""
    folder = Path(path).absolute().parent
    write_table(
        path,
        {
            "path": [os.path.relpath(file.absolute(), folder) for file in patches.path],
            "label": patches.label,
            "slide_id": patches.slide_id,
            "patient_id": patches.patient_id,
            "split": patches.split,
            CELLS: ["".join("01"[int(cell)] for cell in row) for row in cells],
        },
    )
