"""Open a whole-slide image of any format and read regions of it at a wanted scale, in µm per pixel.

`open_slide` probes the file, picks the fastest reader that is right for it, and compares that reader with OpenSlide on a
few tiles. `Slide.read` returns RGB with white outside the slide; what cannot be decoded raises `RegionError` and never
comes back as pixels.
"""

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import PIL.Image

from data_pipelines.readers import Level, Reader, RegionError, SlideError
from data_pipelines.slide_files import dicom_file, find_slides
from data_pipelines.slide_routes import Route, find_route
from data_pipelines.slide_scale import PLAUSIBLE_MPP, FileScale

__all__ = ["Level", "RegionError", "Slide", "SlideError", "find_slides", "open_slide"]

SCALE_TOLERANCE = 0.01  # scales this close, as a ratio, are the same: no level or resampling is chosen for less
_SQUARE_TOLERANCE = 1.05  # longer over shorter side of a pixel
_CONTRADICTION = 0.05  # file and cohort table further apart than this: a warning
_BLOCK_PX = 4096  # level px: larger regions are read in blocks of this side, about 50 MB each

_logger = logging.getLogger(__name__)


class Slide:
    """An open slide. Reading is thread-safe: each read has a reader to itself."""

    def __init__(self, path: Path, route: Route, *, mpp: float, mpp_source: str):
        self.path = path
        self.backend = route.backend  # "cucim", "openslide", "tifffile" or "pillow"
        self.checked = route.checked  # the reader was compared with OpenSlide on a few tiles
        self.levels = route.first.levels
        self.width, self.height = self.levels[0].width, self.levels[0].height  # px of level 0
        self.bounds = route.first.bounds  # the scanned part: x, y, width, height in level-0 px
        self.sparse_tiles = route.sparse_tiles  # tiles of level 0 without data: background, read as white
        self.mpp = mpp  # µm per px of level 0
        self.mpp_source = mpp_source  # "file", "cohort" or "flag"
        self._handles = _Handles(route.make, route.first)

    def read(self, x: float, y: float, width: int, height: int, mpp: float) -> np.ndarray:
        """uint8 [height, width, 3] at `mpp` µm per px. (x, y): level-0 px of the top-left corner, anywhere.

        The pyramid level with the largest µm per px not above `mpp` (within 1 %) is read and, where needed, reduced by
        area and bilinear filtering. Ratios within 1 % of a whole number are taken as that number, so that a slide of
        0.499 µm per px is not blurred for 0.5: inside one region, positions then drift by at most 1 % of its size.
        White outside the slide; finer than the slide holds: enlarged. Raises RegionError.
        """
        level, ratio = self._level_for(mpp)
        whole = max(1, round(ratio))
        if abs(ratio / whole - 1) <= SCALE_TOLERANCE:
            ratio = float(whole)
        return self._read(level, ratio, x, y, width, height)

    def thumbnail(self, mpp: float) -> np.ndarray:
        """The whole slide at exactly `mpp` µm per px: uint8 [ceil(height · slide mpp / mpp), ceil(width · ...), 3].

        Pixel (row i, column j) covers the level-0 square at (j, i) · mpp / slide mpp; white past the slide's edge.
        """
        level, ratio = self._level_for(mpp)
        height, width = (math.ceil(side * self.mpp / mpp - 1e-6) for side in (self.height, self.width))
        return self._read(level, ratio, 0, 0, max(width, 1), max(height, 1))

    def close(self) -> None:
        self._handles.close()

    def __enter__(self) -> "Slide":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        size = f"{self.width} x {self.height} px, {len(self.levels)} levels"
        return f"Slide({str(self.path)!r}, {size}, {self.mpp:.4g} µm/px from {self.mpp_source}, {self.backend})"

    def _level_for(self, mpp: float) -> tuple[int, float]:
        """The level to read for `mpp`, and how many px of it go into one px of the result (below 1: enlarged)."""
        if not (mpp > 0 and math.isfinite(mpp)):
            raise ValueError(f"mpp must be a positive number of µm per pixel, got {mpp}")
        wanted = mpp / self.mpp
        fits = [i for i, level in enumerate(self.levels) if level.downsample <= wanted * (1 + SCALE_TOLERANCE)]
        level = max(fits, key=lambda i: self.levels[i].downsample, default=0)
        return level, wanted / self.levels[level].downsample

    def _read(self, level: int, ratio: float, x: float, y: float, width: int, height: int) -> np.ndarray:
        if width < 1 or height < 1:
            raise ValueError(f"a region must have at least one pixel, got {width} x {height}")
        block = max(1, int(_BLOCK_PX / ratio))
        if width <= block and height <= block:
            return self._read_block(level, ratio, x, y, width, height)
        region = np.empty((height, width, 3), np.uint8)
        step = ratio * self.levels[level].downsample  # level-0 px per px of the region
        for top in range(0, height, block):
            for left in range(0, width, block):
                part = region[top : top + block, left : left + block]
                part[:] = self._read_block(level, ratio, x + left * step, y + top * step, part.shape[1], part.shape[0])
        return region

    def _read_block(self, level: int, ratio: float, x: float, y: float, width: int, height: int) -> np.ndarray:
        downsample = self.levels[level].downsample
        left, top = math.floor(x / downsample + 0.5), math.floor(y / downsample + 0.5)
        pixels = self._read_level(level, left, top, max(1, round(width * ratio)), max(1, round(height * ratio)))
        if pixels.shape[:2] == (height, width):
            return pixels
        # reducing_gap=1: whole factors by exact area means (fast), what remains by an antialiased triangle filter.
        image = PIL.Image.fromarray(pixels)
        return np.array(image.resize((width, height), PIL.Image.Resampling.BILINEAR, reducing_gap=1.0))

    def _read_level(self, level: int, left: int, top: int, width: int, height: int) -> np.ndarray:
        """uint8 [height, width, 3], all in px of `level`; white outside it."""
        size = self.levels[level]
        x0, x1 = max(left, 0), min(left + width, size.width)
        y0, y1 = max(top, 0), min(top + height, size.height)
        if x0 >= x1 or y0 >= y1:
            return np.full((height, width, 3), 255, np.uint8)
        try:
            with self._handles.lend() as reader:
                inside = reader.read(level, x0, y0, x1 - x0, y1 - y0)
        except RegionError as error:
            where = f"region at ({x0}, {y0}) of {x1 - x0} x {y1 - y0} px, level {level}"
            raise RegionError(f"{self.path}: {where}: {error}") from error
        if inside.shape[:2] == (height, width):
            return inside
        region = np.full((height, width, 3), 255, np.uint8)
        region[y0 - top : y1 - top, x0 - left : x1 - left] = inside
        return region


def open_slide(
    path: str | Path, *, mpp_cohort: float | None = None, mpp_override: float | None = None, check: bool = True
) -> Slide:
    """Opens a slide file, or a folder with one DICOM series. Raises SlideError.

    µm per px come from the file where they can be believed, else from the cohort table (`mpp_cohort`), else from the
    flag (`mpp_override`), else the slide is refused. check: compare the fast reader with OpenSlide on a few tiles.
    """
    path = Path(path)
    route = find_route(_existing_file(path), check=check)
    try:
        mpp, source = _resolve_mpp(path, route.first.scale, mpp_cohort, mpp_override)
    except SlideError:
        route.first.close()
        raise
    return Slide(path, route, mpp=mpp, mpp_source=source)


def _existing_file(path: Path) -> Path:
    try:
        if path.is_dir():
            return dicom_file(path)
        if not path.exists():
            raise SlideError(f"{path}: no such file")
        if path.stat().st_size == 0:
            raise SlideError(f"{path}: is empty (0 bytes); copy it again")
        with path.open("rb"):
            return path
    except OSError as error:
        raise SlideError(f"{path}: cannot be read: {error.strerror}") from error


def _resolve_mpp(path: Path, scale: FileScale, cohort: float | None, override: float | None) -> tuple[float, str]:
    """µm per px of level 0 and where it comes from: "file", "cohort" or "flag"."""
    low, high = PLAUSIBLE_MPP
    for given, name in ((cohort, "the cohort table's mpp"), (override, "--mpp_override")):
        if given is not None and not low <= given <= high:
            raise SlideError(f"{path}: {name} is {given:g} µm per pixel, which is outside {low:g} to {high:g}")
    distrust = scale.distrust()
    if scale.mpp is not None and distrust is None:
        if scale.squareness > _SQUARE_TOLERANCE:
            sides = f"{scale.x:.4g} x {scale.y:.4g} µm"
            raise SlideError(f"{path}: its pixels are not square ({sides}): resample it to square pixels")
        if cohort is not None and abs(cohort / scale.mpp - 1) > _CONTRADICTION:
            _logger.warning(
                "%s: %.4g µm per pixel by the file, %.4g by the cohort table; the file's is used",
                path,
                scale.mpp,
                cohort,
            )
        return scale.mpp, "file"
    if cohort is not None:
        return cohort, "cohort"
    if override is not None:
        return override, "flag"
    raise SlideError(
        f"{path}: its scale is not known: {distrust}. Give the µm per pixel of its level 0 in the column `mpp` of the "
        "cohort table, or for all such slides with --mpp_override"
    )


class _Handles:
    """Open readers of one slide, lent to one thread at a time; at most `limit` at once, others wait."""

    def __init__(self, make: Callable[[], Reader], first: Reader, limit: int = 8):
        self._make = make
        self._idle = [first]
        self._places = threading.BoundedSemaphore(limit)
        self._lock = threading.Lock()
        self._closed = False

    @contextlib.contextmanager
    def lend(self) -> Iterator[Reader]:
        """A reader for the time of a `with` block. One that failed is closed, and another opened for the next."""
        with self._places:
            with self._lock:
                if self._closed:
                    raise SlideError("the slide has been closed")
                reader = self._idle.pop() if self._idle else None
            reader = reader or self._make()
            sound = False
            try:
                yield reader
                sound = True
            finally:
                with self._lock:
                    keep = sound and not self._closed
                    if keep:
                        self._idle.append(reader)
                if not keep:
                    reader.close()

    def close(self) -> None:
        """Closes idle readers now, lent ones when they come back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for reader in idle:
            reader.close()
