"""From a row of the cohort table to the tiles of its slide: open, find tissue, lay the grid, read the annotation."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping

import numpy as np

from data_pipelines.annotations import Shape, check_inside, file_offset, read_annotation
from data_pipelines.cohort import SlideRecord
from data_pipelines.quality import SlideQuality, slide_quality
from data_pipelines.slides import Slide, open_slide
from data_pipelines.tiles import Grid, Tiles, tile_slide
from data_pipelines.tissue import tissue_mask

TISSUE_MPP = 16.0  # µm per pixel of the image that tissue is looked for on (about x0.6)

FindTissue = Callable[[np.ndarray], np.ndarray]
"""A picture of the slide at TISSUE_MPP, uint8 [h, w, 3] -> where its tissue is, bool [h, w]."""


@dataclasses.dataclass(frozen=True)
class PreparedSlide:
    """An open slide, its tissue (bool [h, w] at TISSUE_MPP) and its tiles on it. seconds: what "open" and "tissue" took.
    quality: what its thumbnail tells about it."""

    record: SlideRecord
    slide: Slide
    tissue: np.ndarray
    tiles: Tiles
    seconds: Mapping[str, float]
    quality: SlideQuality


def prepare_slide(
    record: SlideRecord,
    grid: Grid,
    *,
    min_tissue: float,
    mpp_override: float | None = None,
    annotated: bool = False,
    find_tissue: FindTissue = tissue_mask,
) -> PreparedSlide:
    """Opens and checks the slide, masks tissue (by Otsu's threshold unless told otherwise) and keeps the grid's tiles on it.

    With `annotated` the record's annotation is read and the tiles' `annotated` column filled. Raises SlideError or AnnotationError; a
    slide without tissue has no tiles, which is not an error here.
    """
    began = time.perf_counter()
    slide = open_slide(record.path, mpp_cohort=record.mpp, mpp_override=mpp_override)
    opened = time.perf_counter()
    try:
        thumbnail = slide.thumbnail(TISSUE_MPP)
        mask = find_tissue(thumbnail)
        shapes = read_shapes(record, slide) if annotated and record.annotation else None
        tiles = tile_slide(
            record.slide_id,
            width=slide.width,
            height=slide.height,
            slide_mpp=slide.mpp,
            grid=grid,
            tissue=mask,
            mask_downsample=TISSUE_MPP / slide.mpp,
            min_tissue=min_tissue,
            shapes=shapes,
        )
        quality = slide_quality(thumbnail, mask, mpp=TISSUE_MPP)
    except BaseException:
        slide.close()
        raise
    seconds = {"open": opened - began, "tissue": time.perf_counter() - opened}
    return PreparedSlide(record, slide, mask, tiles, seconds, quality)


def read_shapes(record: SlideRecord, slide: Slide) -> list[Shape]:
    """The record's annotation in level-0 pixels of its slide. Raises AnnotationError where nothing of it lies on the slide."""
    if record.annotation is None:
        return []
    shapes = read_annotation(record.annotation, offset=file_offset(record.annotation, slide.bounds))
    check_inside(shapes, slide.width, slide.height, path=record.annotation)
    return shapes
