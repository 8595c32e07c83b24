"""Places on slides where patches are cut: drawn from tissue and tumour masks by the rule of He & Li 2023, or read from lists."""

from __future__ import annotations

import csv
import dataclasses
import os
from pathlib import Path

import numpy as np

from data_pipelines.cohort import SlideRecord
from data_pipelines.slides import Slide, open_slide
from data_pipelines.tissue import tissue_mask
from data_pipelines.tumour_masks import tumour_mask

MASK_MPP = 0.243 * 2**6  # µm per pixel of the masks: level 6 of Camelyon16
REFILLS = 10  # how often places that were too close are drawn anew, as in the released code
_INSET = 2  # mask pixels: all four diagonal neighbours at this distance must be in the mask, too


class SpotsError(ValueError):
    """A list of coordinates that cannot be used; the message names the file, the line and the cure."""


@dataclasses.dataclass(frozen=True, eq=False)
class Spots:
    """slide_id str [N]; x, y float64 [N]: centres of patches in level-0 pixels."""

    slide_id: np.ndarray
    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def of(self, slide_id: str) -> Spots:
        """Those of one slide; capitals do not tell slides apart (the released lists have none)."""
        mine = np.char.lower(self.slide_id) == slide_id.lower()
        return Spots(self.slide_id[mine], self.x[mine], self.y[mine])


def read_spots(path: str | os.PathLike[str]) -> Spots:
    """A list with a line `<slide>,<x>,<y>` for each spot, without a header: centres in level-0 pixels. Raises SpotsError."""
    path = Path(path)
    slides, places = [], []
    with open(path, newline="", encoding="utf-8-sig") as file:
        for line, row in enumerate(csv.reader(file), start=1):
            if not row:
                continue
            try:
                name, x, y = row
                places.append((float(x), float(y)))
            except ValueError:
                raise SpotsError(
                    f"{path}, line {line}: {','.join(row)!r} is not <slide>,<x>,<y> with x and y in level-0 pixels"
                ) from None
            slides.append(name.strip())
    if not places:
        raise SpotsError(f"{path}: holds no line <slide>,<x>,<y>")
    x, y = np.array(places).T
    return Spots(np.array(slides), x, y)


@dataclasses.dataclass(frozen=True, eq=False)
class Regions:
    """tissue, tumour bool [H, W] of one slide; downsample: level-0 pixels per pixel of them. annotated: it has an annotation."""

    tissue: np.ndarray
    tumour: np.ndarray
    downsample: float
    annotated: bool

    @property
    def normal(self) -> np.ndarray:
        return self.tissue & ~self.tumour


def find_regions(record: SlideRecord, *, mpp_override: float | None = None) -> Regions:
    """Tissue by Camelyon's rule and tumour from the annotation, at MASK_MPP. Raises SlideError, RegionError, AnnotationError."""
    with open_slide(record.path, mpp_cohort=record.mpp, mpp_override=mpp_override) as slide:
        tissue = tissue_mask(slide.thumbnail(MASK_MPP), "saturation")
        downsample = MASK_MPP / slide.mpp
    found = tumour_mask(record, mpp=MASK_MPP, mpp_override=mpp_override)
    tumour = np.zeros_like(tissue)
    if found is not None:
        # A mask image has a scale of its own: each pixel here takes what lies there at its centre, nothing beyond its edge.
        row, column = (
            ((np.arange(length) + 0.5) * downsample / found.downsample).astype(int) for length in tissue.shape
        )
        inside = np.ix_(row < found.mask.shape[0], column < found.mask.shape[1])
        tumour[inside] = found.mask[np.ix_(row[row < found.mask.shape[0]], column[column < found.mask.shape[1]])]
    return Regions(tissue, tumour, downsample, found is not None)


def sample_spots(
    mask: np.ndarray, count: int, *, downsample: float, spacing: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """x, y float64 [n], n <= count: places of a mask bool [H, W] in level-0 pixels, index times `downsample` (no half added).

    Drawn from the pixels that lie a little inside. A place closer than `spacing` level-0 pixels to an earlier one along both axes
    is dropped, and what is missing drawn anew, up to ten times.
    """
    row, column = np.nonzero(mask & inner(mask))
    order = random.permutation(len(row))
    points = np.stack([column[order], row[order]], axis=1) * downsample
    kept, begin = points[:0], 0
    for _ in range(1 + REFILLS):
        drawn = points[begin : begin + count - len(kept)]
        begin += len(drawn)
        kept = keep_apart(np.concatenate([kept, drawn]), spacing)
    return kept[:, 0], kept[:, 1]


def inner(mask: np.ndarray) -> np.ndarray:
    """bool [H, W]: pixels of which all four diagonal neighbours at distance 2 are in the mask; beyond its edge none is."""
    height, width = mask.shape
    around = np.pad(mask, _INSET)
    corners = [around[y : y + height, x : x + width] for y in (0, 2 * _INSET) for x in (0, 2 * _INSET)]
    return np.logical_and.reduce(corners)


def keep_apart(points: np.ndarray, spacing: float) -> np.ndarray:
    """points [n, 2] without those that are closer than `spacing` along both axes to one before them that is kept."""
    kept: list[int] = []
    for number, point in enumerate(points):
        if not (np.abs(points[kept] - point) < spacing).all(axis=1).any():
            kept.append(number)
    return points[kept]


def cut_patch(slide: Slide, x: float, y: float, *, side: int, mpp: float) -> np.ndarray:
    """uint8 [side, side, 3] at `mpp` around the centre (x, y) in level-0 pixels. Raises RegionError."""
    half = side * mpp / slide.mpp / 2
    return slide.read(x - half, y - half, side, side, mpp)
