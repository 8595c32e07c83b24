"""The tumour of a slide as a mask at a wanted scale, from its annotation: any format of shapes, or a mask image."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import threading
from collections.abc import Collection, Iterator

import numpy as np
import tifffile
from PIL import Image

from data_pipelines.annotations import AnnotationError, rasterize
from data_pipelines.cohort import SlideRecord
from data_pipelines.prepare import read_shapes
from data_pipelines.slides import Slide, open_slide

IMAGES = frozenset({".tif", ".tiff", ".png"})
_UNREADABLE = (OSError, SyntaxError, ValueError, IndexError, tifffile.TiffFileError)
_CURE = "write it again"
_LIMIT = threading.Lock()
_PADDED = 0.01  # part of a side by which a mask may be longer or shorter than the slide: some are padded to whole tiles
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
            _check_shape(path, levels[0], slide)
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


def coarser(found: TumourMask, mpp: float) -> TumourMask:
    """Every k-th pixel of a mask that is finer, so that it is as near to `mpp` as that allows; as it is where it is not."""
    step = max(1, round(mpp / found.mpp))
    return TumourMask(found.mask[step // 2 :: step, step // 2 :: step], found.mpp * step, found.downsample * step)


def _check_shape(path: pathlib.Path, size: tuple[int, int], slide: Slide) -> None:
    """AnnotationError where width and height of a mask are not those of the slide at one scale, but for rounding."""
    width, height = size
    wanted = width * slide.height / slide.width
    if abs(height - wanted) > max(1 + wanted / width, _PADDED * wanted):
        raise AnnotationError(
            f"{path}: has {width} × {height} pixels, the slide {slide.width} × {slide.height}: it is the mask of another slide"
        )


@contextlib.contextmanager
def open_mask(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """A mask of any size: it may have as many pixels as its slide, where PIL refuses strangers' pictures of more than 179 million."""
    with _LIMIT:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        yield image


def _levels(path: pathlib.Path) -> list[tuple[int, int]]:
    """(width, height) of each level of a mask image."""
    try:
        if path.suffix.lower() == ".png":
            with open_mask(path) as image:
                return [image.size]
        with tifffile.TiffFile(path) as tif:
            return [(level.shape[1], level.shape[0]) for level in tif.series[0].levels]
    except _UNREADABLE as error:
        raise AnnotationError(f"{path}: no mask image can be read from it ({error}): {_CURE}") from error


def _read_level(path: pathlib.Path, level: int) -> np.ndarray:
    """[H, W] of a level of a mask image, in grey or in any one colour."""
    try:
        if path.suffix.lower() == ".png":
            with open_mask(path) as image:
                values = np.asarray(image)
        else:
            values = tifffile.imread(path, level=level)
    except _UNREADABLE as error:
        raise AnnotationError(f"{path}: level {level} of the mask cannot be read ({error}): {_CURE}") from error
    return _one_colour(values, path) if values.ndim == 3 else values


def _one_colour(values: np.ndarray, path: pathlib.Path) -> np.ndarray:
    """[H, W, C] -> [H, W]: the channels that hold something, of which a fourth is transparency. AnnotationError where they hold
    different things: which colour is tumour?"""
    found = values[..., 0]
    channels = [values[..., n] for n in range(min(values.shape[-1], 3) if values.shape[-1] > 2 else 1)]
    for channel in channels:
        found = np.maximum(found, channel)
    if any(channel.any() and ((channel > 0) != (found > 0)).any() for channel in channels):
        raise AnnotationError(f"{path}: is a mask of several colours: write the tumour alone, as 255 on 0")
    return found
