"""Which reader is given which slide: the fastest that is right for it and agrees with OpenSlide.

JPEG and JPEG 2000 tiles go to cuCIM, codecs of their own (raw, LZW, zstd, WebP, 34712) and pyramids in sub-IFDs to
tifffile, everything else OpenSlide knows to OpenSlide, plain images to Pillow. Where the first choice is missing or
refuses, the next that can read the file takes it.
"""

import contextlib
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.readers import (
    CucimReader,
    OpenSlideReader,
    PlainImageReader,
    Reader,
    SlideError,
    TifffileReader,
    cucim_reads,
    openslide_vendor,
    tifffile_first,
)
from data_pipelines.slide_integrity import ScreenedReader, TileScreen, disagreement, screenable
from data_pipelines.slide_series import is_reduced
from data_pipelines.slide_tiff import JPEG, TiffLayout, probe, starts_like_tiff

PLAIN_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp")
_SIMPLE_TIFF = (None, "aperio", "generic-tiff")  # what OpenSlide calls a TIFF whose pages simply are the pyramid

_Candidate = tuple[str, Callable[[], Reader]]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Route:
    """How one slide is read: the reader's name, how to open another one, one that is open already."""

    backend: str  # "cucim", "openslide", "tifffile" or "pillow"
    make: Callable[[], Reader]
    first: Reader
    checked: bool  # compared with OpenSlide on a few tiles
    sparse_tiles: int  # tiles of level 0 without data


def find_route(path: Path, *, check: bool) -> Route:
    """Opens the file with the first suited reader; with `check` only with one that agrees with OpenSlide.

    Raises SlideError with every reader's reason.
    """
    layout = probe(path)
    if layout is not None and layout.refusal:
        raise SlideError(f"{path}: {layout.refusal}")
    if layout is None and starts_like_tiff(path) and openslide_vendor(path) in _SIMPLE_TIFF:
        raise SlideError(f"{path}: its TIFF header cannot be read: truncated or damaged, copy it again")
    reasons = []
    for backend, make in _candidates(path, layout):
        try:
            return _try(path, layout, backend, make, check=check)
        except SlideError as error:
            reasons.append(str(error).removeprefix(f"{path}: "))
    raise SlideError(f"{path}: cannot be read as a slide: {'; '.join(reasons)}")


def second_reader(path: Path, backend: str) -> tuple[str, Reader] | None:
    """Another reader, by name, that reads the same levels of this slide as `backend` does; None where there is none."""
    layout = probe(path)
    if layout is None or layout.refusal:
        return None
    for name, make in _candidates(path, layout):
        if name == backend:
            continue
        try:
            reader = make()
        except SlideError:
            continue
        if _has_levels(reader, layout):
            return name, reader
        reader.close()
    return None


def _candidates(path: Path, layout: TiffLayout | None) -> list[_Candidate]:
    """The readers to try, best first."""
    openslide: _Candidate = ("openslide", functools.partial(OpenSlideReader, path))
    if layout is None:
        is_plain = path.suffix.lower() in PLAIN_ENDINGS
        return [("pillow", functools.partial(PlainImageReader, path))] if is_plain else [openslide]
    if openslide_vendor(path) not in _SIMPLE_TIFF:
        return [openslide]
    tifffile: _Candidate = ("tifffile", functools.partial(TifffileReader, path, layout))
    if layout.series:  # the others take the first image of a file for the slide
        return [tifffile]
    order = [tifffile, openslide] if tifffile_first(layout) else [openslide, tifffile]
    return [("cucim", functools.partial(CucimReader, path, layout)), *order] if cucim_reads(layout) else order


def _try(path: Path, layout: TiffLayout | None, backend: str, make: Callable[[], Reader], *, check: bool) -> Route:
    """The route by this reader. Raises SlideError where it does not open the slide, or not as OpenSlide does."""
    first = make()
    if layout is None:
        return Route(backend, (lambda: first) if backend == "pillow" else make, first, checked=False, sparse_tiles=0)
    if openslide_vendor(path) in _SIMPLE_TIFF and not _shows_the_slide(first, layout):
        first.close()
        raise SlideError(f"{backend} takes another of its images for the slide")
    reference = None if backend == "openslide" else _reference(path, layout)
    if screenable(layout) and _has_levels(first, layout):
        strict = layout.compression == JPEG and reference is not None
        second = functools.partial(OpenSlideReader, path) if strict else None
        screened = functools.partial(ScreenedReader, path, TileScreen(layout), second)
        first, make = screened(first), _chained(make, screened)
    if reference is not None:
        with contextlib.closing(reference):
            problem = disagreement(first, reference, layout) if check else None
        if problem:
            first.close()
            _logger.warning("%s: %s %s; trying the next reader", path, backend, problem)
            raise SlideError(f"{backend} {problem}")
    sparse_tiles = int((layout.levels[0].counts == 0).sum())
    return Route(backend, make, first, check and reference is not None, sparse_tiles)


def _chained(make: Callable[[], Reader], wrap: Callable[[Reader], Reader]) -> Callable[[], Reader]:
    return lambda: wrap(make())


def _reference(path: Path, layout: TiffLayout) -> OpenSlideReader | None:
    """OpenSlide on the same levels; None where it cannot be had."""
    if layout.series:
        return None
    try:
        reader = OpenSlideReader(path)
    except SlideError:
        return None
    if _has_levels(reader, layout):
        return reader
    reader.close()
    return None


def _shows_the_slide(reader: Reader, layout: TiffLayout) -> bool:
    """Whether level 0 is the slide's image and the others are reduced copies of it: OpenSlide takes a tiled label for a level."""
    full, *reduced = [(level.width, level.height) for level in reader.levels]
    return full == layout.sizes[0] and all(is_reduced(size, full) for size in reduced)


def _has_levels(reader: Reader, layout: TiffLayout) -> bool:
    return [(level.width, level.height) for level in reader.levels] == layout.sizes
