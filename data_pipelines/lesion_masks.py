"""Refined lesion masks (Yu et al. 2019, §3.2): what a pathologist outlined, without the bare glass inside the outline.

A mask is kept as a 1-bit TIFF of the whole slide, which viewers open and `tumour_masks` reads as an annotation.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from data_pipelines.annotations import AnnotationError
from data_pipelines.cohort import SlideRecord
from data_pipelines.files import atomic_write
from data_pipelines.prepare import TISSUE_MPP
from data_pipelines.slides import Slide, open_slide
from data_pipelines.tiles import Tiles
from data_pipelines.tissue import stain_density, stain_threshold
from data_pipelines.tumour_masks import TumourMask, open_mask, tumour_mask

_BLOCK_PX = 1024  # side of what is read of a slide at a time


@dataclasses.dataclass(frozen=True)
class Refinement:
    """mask: lesion bool [H, W] with its scale. outlined_mm2, kept_mm2: area before and after."""

    mask: TumourMask
    outlined_mm2: float
    kept_mm2: float

    @property
    def dice(self) -> float:
        """Of what was outlined with what was kept, which is a part of it; 1 where nothing was outlined."""
        total = self.outlined_mm2 + self.kept_mm2
        return 2 * self.kept_mm2 / total if total else 1.0


def refine(record: SlideRecord, *, mpp: float, mpp_override: float | None = None) -> Refinement:
    """Stained foreground within the annotation of a slide, as near to `mpp` µm per pixel as a mask image allows.

    Foreground: hematoxylin and eosin density above Otsu's threshold, which is that of the whole slide at 16 µm per pixel, so that it
    stands between tissue and glass also where an outline holds tissue alone. Raises AnnotationError or SlideError, and RegionError
    where the slide cannot be read inside the outline.
    """
    outlined = tumour_mask(record, mpp=mpp, mpp_override=mpp_override)
    if outlined is None:
        raise AnnotationError(f"{record.slide_id}: has no annotation to refine: fill the column `annotation`")
    with open_slide(record.path, mpp_cohort=record.mpp, mpp_override=mpp_override) as slide:
        kept = _stained(slide, outlined)
    cell_mm2 = (outlined.mpp / 1000) ** 2
    mask = dataclasses.replace(outlined, mask=kept)
    return Refinement(mask, float(outlined.mask.sum()) * cell_mm2, float(kept.sum()) * cell_mm2)


def _stained(slide: Slide, outlined: TumourMask) -> np.ndarray:
    """The stained cells of a mask. Only blocks in which something is outlined are read."""
    kept = np.zeros_like(outlined.mask)
    threshold = stain_threshold(slide.thumbnail(TISSUE_MPP))
    if threshold is None:
        return kept
    for top in range(0, outlined.mask.shape[0], _BLOCK_PX):
        for left in range(0, outlined.mask.shape[1], _BLOCK_PX):
            part = outlined.mask[top : top + _BLOCK_PX, left : left + _BLOCK_PX]
            if part.any():
                x, y = left * outlined.downsample, top * outlined.downsample
                pixels = slide.read(x, y, part.shape[1], part.shape[0], outlined.mpp)
                stained = part & (stain_density(pixels) > threshold)
                kept[top : top + _BLOCK_PX, left : left + _BLOCK_PX] = stained
    return kept


def write_mask(path: str | os.PathLike[str], mask: np.ndarray) -> None:
    """bool [H, W] as a 1-bit image: TIFF by its name (.tiff, .tif; of any size), else PNG."""
    with atomic_write(path) as temporary:
        if _is_tiff(path):
            tifffile.imwrite(temporary, np.asarray(mask, bool), compression="deflate", photometric="minisblack")
        else:
            Image.fromarray(mask).save(temporary, format="PNG")


def read_mask(path: str | os.PathLike[str]) -> np.ndarray:
    """bool [H, W]: where an image of one channel, or any colour of it, is not 0. Raises AnnotationError where it is none."""
    try:
        if _is_tiff(path):
            values = tifffile.imread(path)
        else:
            with open_mask(path) as image:
                values = np.asarray(image)
    except (OSError, SyntaxError, ValueError, tifffile.TiffFileError) as error:
        raise AnnotationError(f"{path}: no mask image can be read from it ({error}): write it again") from error
    if values.ndim == 3:
        values = values[..., : 3 if values.shape[-1] > 2 else 1].max(-1)  # a second or fourth channel is transparency
    return values > 0


def _is_tiff(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix.lower() in (".tif", ".tiff")


@dataclasses.dataclass(frozen=True, eq=False)
class TileMasks:
    """Lesion on tiles. place int [N]: of each tile of a table its row in `packed`, -1 where it holds none; packed uint8 [M, side,
    ceil(side / 8)]: a bit for each cell; side: cells along a tile. share float [N]: the part of each tile that is lesion."""

    place: np.ndarray
    packed: np.ndarray
    side: int
    share: np.ndarray

    def mask(self, row: int, size: int) -> np.ndarray:
        """uint8 [size, size] of 0 and 1: the lesion on a tile, each pixel with the value of its cell."""
        place = self.place[row]
        if place < 0:
            return np.zeros((size, size), np.uint8)
        cells = np.unpackbits(self.packed[place], axis=-1, count=self.side)
        nearest = (np.arange(size) + 0.5) * self.side // size
        return cells[np.ix_(nearest.astype(int), nearest.astype(int))]

    @staticmethod
    def concatenate(parts: Sequence[TileMasks]) -> TileMasks:
        """Of the tables of several slides, one after the other, with cells of one size."""
        begins = np.cumsum([0, *(len(part.packed) for part in parts)])
        place = [np.where(part.place < 0, -1, part.place + begin) for part, begin in zip(parts, begins)]
        packed, share = (np.concatenate([getattr(part, name) for part in parts]) for name in ("packed", "share"))
        return TileMasks(np.concatenate(place), packed, parts[0].side, share)


def cut_masks(tiles: Tiles, mask: np.ndarray | None, *, downsample: float, side: int) -> TileMasks:
    """The windows of a slide's mask under its tiles, `side` cells each, the nearest cell counting. mask bool [H, W], of `downsample`
    level-0 pixels a cell; None: there is no lesion. Outside the mask there is none."""
    place, share = np.full(len(tiles), -1), np.zeros(len(tiles))
    packed: list[np.ndarray] = []
    for row in range(len(tiles) if mask is not None else 0):
        assert mask is not None
        window = _window(mask, tiles, row, downsample, side)
        share[row] = window.mean()
        if window.any():
            place[row] = len(packed)
            packed.append(np.packbits(window, axis=-1))
    empty = np.zeros((0, side, -(-side // 8)), np.uint8)
    return TileMasks(place, np.stack(packed) if packed else empty, side, share)


def _window(mask: np.ndarray, tiles: Tiles, row: int, downsample: float, side: int) -> np.ndarray:
    step = tiles.side[row] * (np.arange(side) + 0.5) / side
    rows, columns = (np.floor((start + step) / downsample).astype(int) for start in (tiles.y[row], tiles.x[row]))
    inside = ((rows >= 0) & (rows < mask.shape[0]))[:, None] & ((columns >= 0) & (columns < mask.shape[1]))[None]
    found = mask[np.ix_(np.clip(rows, 0, mask.shape[0] - 1), np.clip(columns, 0, mask.shape[1] - 1))]
    return found & inside
