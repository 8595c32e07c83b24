"""A slide tried out before a long run: does it open, do its pixels agree with a second reader's where there is tissue."""

import contextlib
import importlib.metadata
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.prepare import TISSUE_MPP
from data_pipelines.readers import CuImage, RegionError, openslide
from data_pipelines.slide_integrity import TOLERANCE, difference
from data_pipelines.slide_routes import second_reader
from data_pipelines.slides import Slide, open_slide
from data_pipelines.tissue import tissue_mask

_CUCIM_PACKAGES = ("cucim-cu13", "cucim-cu12", "cucim")
REGION_PX = 256  # level-0 px: side of a region that is compared


@dataclass(frozen=True)
class SlideCheck:
    """What was found of one slide. second: the other reader, "" where no other can read it.

    differences: grey values, of each region that both read. unreadable: what the slide's own reader could not decode, and why.
    read_ms: milliseconds a region, the median. tissue_megapixels: what has to be decoded to find its tissue.
    """

    path: str
    backend: str
    second: str
    width: int
    height: int
    levels: int
    mpp: float
    mpp_source: str
    differences: tuple[float, ...]
    unreadable: tuple[str, ...]
    read_ms: float
    tissue_megapixels: float

    @property
    def agrees(self) -> bool:
        """Whether both readers show the same."""
        return max(self.differences, default=0.0) <= TOLERANCE


def reader_versions() -> dict[str, str]:
    """Version of each library that reads slides; "" where it is not installed or does not load."""
    installed = {package.name.lower() for package in importlib.metadata.distributions()}
    cucim = next((name for name in _CUCIM_PACKAGES if name in installed), None)
    return {
        "OpenSlide": "" if openslide is None else f"{openslide.__library_version__} (Python {openslide.__version__})",
        "cuCIM": "" if CuImage is None or cucim is None else importlib.metadata.version(cucim),
        **{name: importlib.metadata.version(name) for name in ("tifffile", "imagecodecs", "pillow")},
    }


def check_slide(
    path: str | Path,
    *,
    mpp_cohort: float | None = None,
    mpp_override: float | None = None,
    regions: int = 4,
    seed: int = 0,
) -> SlideCheck:
    """Reads `regions` random regions with tissue twice. Raises SlideError, and RegionError where its tissue cannot be looked for."""
    with contextlib.ExitStack() as stack:
        slide = stack.enter_context(open_slide(path, mpp_cohort=mpp_cohort, mpp_override=mpp_override))
        second = second_reader(slide.path, slide.backend) if slide.path.is_file() else None
        if second is not None:
            stack.callback(second[1].close)
        differences, unreadable, seconds = [], [], []
        for x, y in _corners(slide, regions, np.random.default_rng(seed)):
            width, height = min(REGION_PX, slide.width), min(REGION_PX, slide.height)
            began = time.perf_counter()
            try:
                found = slide.read(x, y, width, height, slide.mpp)
            except RegionError as error:
                unreadable.append(str(error))
                continue
            seconds.append(time.perf_counter() - began)
            if second is not None:
                with contextlib.suppress(RegionError):  # then this region cannot be compared
                    differences.append(difference(found, second[1].read(0, x, y, width, height)))
        return SlideCheck(
            path=str(path),
            backend=slide.backend,
            second=second[0] if second else "",
            width=slide.width,
            height=slide.height,
            levels=len(slide.levels),
            mpp=slide.mpp,
            mpp_source=slide.mpp_source,
            differences=tuple(differences),
            unreadable=tuple(unreadable),
            read_ms=1000 * float(np.median(seconds)) if seconds else 0.0,
            tissue_megapixels=_tissue_megapixels(slide),
        )


def _corners(slide: Slide, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Level-0 px of regions inside the slide around random px of tissue; of any px where there is no tissue."""
    mask = tissue_mask(slide.thumbnail(TISSUE_MPP))
    rows, columns = np.nonzero(mask if mask.any() else np.ones_like(mask))
    scale = TISSUE_MPP / slide.mpp
    corners = []
    for pick in rng.integers(0, len(rows), count):
        centre = (columns[pick] + 0.5) * scale, (rows[pick] + 0.5) * scale
        limits = max(slide.width - REGION_PX, 0), max(slide.height - REGION_PX, 0)
        x, y = (int(np.clip(at - REGION_PX / 2, 0, limit)) for at, limit in zip(centre, limits))
        corners.append((x, y))
    return corners


def _tissue_megapixels(slide: Slide) -> float:
    fits = [level for level in slide.levels if level.downsample * slide.mpp <= TISSUE_MPP * 1.01]
    level = max(fits or slide.levels[:1], key=lambda level: level.downsample)
    return level.width * level.height / 1e6
