"""Patches with masks of pixels as batches: from image files with mask files, and from tiles of slides with refined masks."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.annotations import AnnotationError
from data_pipelines.cohort_rows import listed
from data_pipelines.lesion_masks import TileMasks, read_mask
from data_pipelines.patches import PatchBatch, Patches, PatchesError, PatchReader, fill_batch
from data_pipelines.shelf import Shelf
from data_pipelines.tiles import Tiles


def read_masks(path: Path, patches: Patches) -> tuple[Path | None, ...]:
    """The column `mask` of a list of patches that `read_patches` read: files relative to it; None where the cell is empty, which
    means that nothing is marked. Raises PatchesError where there is no such column or file."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        cells = [{(name or "").strip().lower(): value for name, value in row.items()} for row in csv.DictReader(file)]
    if not cells or "mask" not in cells[0]:
        raise PatchesError(f"{path}: has no column mask: add it, with the mask's file or nothing for each patch")
    files = [path.parent / name if (name := (row["mask"] or "").strip()) else None for row in cells]
    absent = [
        f"line {line}: there is no file {file}" for line, file in enumerate(files, 2) if file and not file.is_file()
    ]
    if absent:
        raise PatchesError(f"{path}: {listed(absent)}")
    if len(files) != len(patches):
        raise PatchesError(f"{path}: holds {len(files)} lines for {len(patches)} patches: was it written just now?")
    return tuple(files)


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedPatchReader:
    """As PatchReader, with `mask` uint8 [B, side, side] of 0 and 1. masks: the mask's file of each patch, None where nothing is
    marked; whatever is not 0 in it is marked. A mask of another size than its image counts as an image that cannot be read."""

    reader: PatchReader
    masks: tuple[Path | None, ...]

    def read(self, rows: np.ndarray, *, size: int) -> PatchBatch:
        """The batch of these rows, filled up with padding to `size`."""
        batch = self.reader.read(rows, size=size)
        mask = np.zeros((size, self.reader.side, self.reader.side), np.uint8)
        failed = dict(batch.failed)
        for place, row in enumerate(rows):
            file = self.masks[row]
            if file is None or int(row) in failed:
                continue
            try:
                mask[place] = self._mask(file, self.reader.patches.path[row])
            except AnnotationError as error:
                failed[int(row)] = str(error)
                batch.arrays["weight"][place] = 0
        return PatchBatch({**batch.arrays, "mask": mask}, failed)

    def _mask(self, path: Path, image_path: Path) -> np.ndarray:
        found = read_mask(path)
        with Image.open(image_path) as image:
            wanted = image.size
        if found.shape[::-1] != wanted:
            size = " x ".join(map(str, found.shape[::-1]))
            raise AnnotationError(
                f"{path}: a mask of {size} pixels for an image of {wanted[0]} x {wanted[1]}: cut it anew"
            )
        side = self.reader.side
        return np.asarray(Image.fromarray(found).resize((side, side), Image.Resampling.NEAREST), np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedTileReader:
    """The same of tiles of slides, read from the slides on the shelf. target float [N]: what becomes `label`."""

    tiles: Tiles
    shelf: Shelf
    masks: TileMasks
    target: np.ndarray

    def read(self, rows: np.ndarray, *, size: int) -> PatchBatch:
        """The batch of these rows, filled up with padding to `size`."""
        side = self.tiles.tile
        batch = fill_batch(rows, self._pixels, self.target, size=size, side=side)
        mask = np.zeros((size, side, side), np.uint8)
        for place in np.flatnonzero(batch.arrays["weight"]):
            mask[place] = self.masks.mask(int(rows[place]), side)
        return PatchBatch({**batch.arrays, "mask": mask}, batch.failed)

    def _pixels(self, row: int) -> np.ndarray:
        tiles = self.tiles
        with self.shelf.lend(str(tiles.slides[tiles.slide[row]])) as slide:
            return slide.read(tiles.x[row], tiles.y[row], tiles.tile, tiles.tile, tiles.mpp)
