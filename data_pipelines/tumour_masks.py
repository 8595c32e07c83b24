"""The tumour of a slide as a mask at a wanted scale, from its annotation: any format of shapes, or a mask image."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Collection

import numpy as np
import tifffile
from PIL import Image

from data_pipelines.annotations import AnnotationError, rasterize
from data_pipelines.cohort import SlideRecord
from data_pipelines.prepare import read_shapes
from data_pipelines.slides import open_slide

IMAGES = frozenset({".tif", ".tiff", ".png"})
_TUMOUR_VALUES = (1, 255)  # of masks; 2 is normal tissue in masks of Camelyon17's kind


@dataclasses.dataclass(frozen=True)
class TumourMask:
    """mask bool [H, W]; mpp: µm per pixel of the mask; downsample: level-0 pixels of the slide per pixel of the mask."""

    mask: np.ndarray
    mpp: float
    downsample: float


def tumour_mask(
    record: SlideRecord, *, mpp: float, groups: Collection[str] | None = None, mpp_override: float | None = None
) -> TumourMask | None:
    """The tumour of a slide as near to `mpp` µm per pixel as its annotation allows; None where it has no annotation.

    Shapes are drawn at `mpp` exactly: groups: those that are tumour (None: all but exclusions, which are cut out); the slide
    itself is opened for its size and scale. Of a mask image (TIFF with levels, or PNG) the level nearest to `mpp` is taken; 1 and 255 are
    tumour. Where the slide is not there, the mask's level 0 counts as the slide's, and the table's mpp as its scale.
    Raises AnnotationError or SlideError.
    """
    if record.annotation is None:
        return None
    if record.annotation.suffix.lower() in IMAGES:
        return _from_image(record, mpp, mpp_override)
    with open_slide(record.path, mpp_cohort=record.mpp, mpp_override=mpp_override) as slide:
        width, height, slide_mpp = slide.width, slide.height, slide.mpp
        shapes = read_shapes(record, slide)
    downsample = mpp / slide_mpp
    columns, rows = math.ceil(width / downsample), math.ceil(height / downsample)
    mask = rasterize(shapes, width=columns, height=rows, downsample=downsample, groups=groups)
    return TumourMask(mask, mpp, downsample)


def _from_image(record: SlideRecord, mpp: float, mpp_override: float | None) -> TumourMask:
    path = record.annotation
    assert path is not None
    levels = _levels(path)
    width, slide_mpp = levels[0][0], record.mpp or mpp_override
    if record.path.exists():
        with open_slide(record.path, mpp_cohort=record.mpp, mpp_override=mpp_override) as slide:
            width, slide_mpp = slide.width, slide.mpp
    if slide_mpp is None:
        raise AnnotationError(
            f"{path}: the slide {record.path} is not there and its scale is not known: fill the column `mpp` of the cohort table"
        )
    scale = [slide_mpp * width / w for w, _ in levels]
    nearest = int(np.abs(np.log(np.asarray(scale) / mpp)).argmin())
    values = _read_level(path, nearest)
    wrong = sorted(set(np.unique(values).tolist()) - {0, 1, 2, 255})
    if wrong:
        raise AnnotationError(
            f"{path}: values {wrong[:5]} in a mask, where 0 (none), 1 or 255 (tumour) and 2 (normal) are known"
        )
    return TumourMask(np.isin(values, _TUMOUR_VALUES), scale[nearest], width / levels[nearest][0])


def _levels(path: pathlib.Path) -> list[tuple[int, int]]:
    """(width, height) of each level of a mask image."""
    try:
        if path.suffix.lower() == ".png":
            with Image.open(path) as image:
                return [image.size]
        with tifffile.TiffFile(path) as tif:
            return [(level.shape[1], level.shape[0]) for level in tif.series[0].levels]
    except (OSError, tifffile.TiffFileError, IndexError) as error:
        raise AnnotationError(f"{path}: no mask image can be read from it ({error}): write it again") from error


def _read_level(path: pathlib.Path, level: int) -> np.ndarray:
    """[H, W], the first channel of a mask image."""
    try:
        if path.suffix.lower() == ".png":
            with Image.open(path) as image:
                values = np.asarray(image)
        else:
            values = tifffile.imread(path, level=level)
    except (OSError, ValueError, tifffile.TiffFileError) as error:
        raise AnnotationError(f"{path}: level {level} of the mask cannot be read ({error}): write it again") from error
    return values[..., 0] if values.ndim == 3 else values
