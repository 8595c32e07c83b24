"""The libraries that decode slides, behind one small protocol. Every pixel is copied out of a reader's buffer at once.

A reader serves one thread at a time and is thrown away after an error (OpenSlide's error state never clears).
"""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL.Image
import tifffile

from data_pipelines.slide_scale import FileScale, openslide_scale, resolution_scale
from data_pipelines.slide_tiff import APERIO_RGB, APERIO_YCBCR, JPEG, JPEG2000, LZW, RAW, WEBP, ZSTD, TiffLayout

try:
    import openslide
except ImportError:  # the package or the C library is missing
    openslide = None  # type: ignore[assignment]
try:
    from cucim.clara import CuImage
except ImportError:  # no build for macOS and Windows
    CuImage = None

_OPENSLIDE_CACHE = 4 << 20  # bytes of each reader: many slides are open at once, and regions overlap little
# cuCIM loads its plugin with the first slide: two first slides at once crashed 3 of 94 processes.
_CUCIM_OPENS = threading.Lock()
_PLAIN_FORMATS = ("PNG", "JPEG", "BMP")
# Codecs that OpenSlide refuses or does not check; tifffile raises on a damaged LZW tile and is as fast as cuCIM there.
_TIFFFILE_FIRST = {RAW, LZW, *JPEG2000, *ZSTD, *WEBP} - {APERIO_YCBCR, APERIO_RGB}


class SlideError(ValueError):
    """A slide that cannot be opened or is refused. The message names the file, the problem and the cure."""


class RegionError(OSError):
    """One region of a slide that cannot be decoded; the rest of the slide may be sound."""


@dataclass(frozen=True)
class Level:
    """One level of a pyramid: its size in its own pixels, and how many level-0 px one of them spans."""

    width: int
    height: int
    downsample: float


class Reader(Protocol):
    """One open handle on a slide."""

    levels: tuple[Level, ...]
    scale: FileScale
    bounds: tuple[int, int, int, int]  # the scanned part: x, y, width, height in level-0 px

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """uint8 [height, width, 3] at (x, y), all in px of `level` and inside it. Raises RegionError."""
        ...

    def close(self) -> None: ...


def make_levels(sizes: list[tuple[int, int]]) -> tuple[Level, ...]:
    """sizes: (width, height) px of each level, largest first. Downsample as OpenSlide has it: the mean of both axes."""
    width0, height0 = sizes[0]
    return tuple(Level(w, h, (width0 / w + height0 / h) / 2) for w, h in sizes)


def on_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 4], alpha not premultiplied -> uint8 [H, W, 3] laid on white."""
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    if alpha.min(initial=255) == 255:
        return rgb.copy()
    return ((rgb.astype(np.uint16) * alpha + 255 * (255 - alpha.astype(np.uint16)) + 127) // 255).astype(np.uint8)


class CucimReader:
    """cuCIM on JPEG and JPEG 2000 tiles, region by region (its batch mode recycles buffers that are still in use)."""

    def __init__(self, path: Path, layout: TiffLayout):
        if CuImage is None:
            raise SlideError(f"{path}: cuCIM is not installed")
        if not cucim_reads(layout):
            raise SlideError(f"{path}: cuCIM is not safe with this kind of TIFF")
        try:
            with _CUCIM_OPENS:
                self._image, self._tiff = CuImage(str(path)), layout.levels
        except (RuntimeError, ValueError) as error:
            raise SlideError(f"{path}: cuCIM: {error}") from error
        seen = [tuple(size) for size in self._image.resolutions["level_dimensions"]]
        if seen != layout.sizes:
            self._image.close()
            raise SlideError(f"{path}: cuCIM sees levels of {seen}, the file holds {layout.sizes}")
        self._sparse = [bool((level.counts == 0).any()) for level in layout.levels]
        self.levels, self.scale = make_levels(layout.sizes), layout.scale
        self.bounds = (0, 0, *layout.sizes[0])

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        # cuCIM takes level-0 px and floors to the level's grid: the middle of the level's pixel is safe from rounding.
        step = self.levels[level].downsample
        corner = (int((x + 0.5) * step), int((y + 0.5) * step))
        try:
            region = np.array(self._image.read_region(corner, (width, height), level))
        except (RuntimeError, ValueError) as error:
            raise RegionError(f"cuCIM: {error}") from error
        if region.shape != (height, width, 3):
            raise RegionError(f"cuCIM returned an array of shape {region.shape}")
        if self._sparse[level]:
            self._whiten_tiles_without_data(region, level, x, y)
        return region

    def _whiten_tiles_without_data(self, region: np.ndarray, level: int, x: int, y: int) -> None:
        tiff = self._tiff[level]  # cuCIM leaves them black
        rows, columns = tiff.tiles_under(x, y, region.shape[1], region.shape[0])
        for row, column in np.argwhere(tiff.counts[rows, columns] == 0):
            top, left = (rows.start + row) * tiff.tile_height - y, (columns.start + column) * tiff.tile_width - x
            region[max(top, 0) : top + tiff.tile_height, max(left, 0) : left + tiff.tile_width] = 255

    def close(self) -> None:
        self._image.close()


def cucim_reads(layout: TiffLayout) -> bool:
    """Whether cuCIM is installed, fast and right on this layout (the measured hazards are in the conditions)."""
    return (
        CuImage is not None
        and layout.compression in (JPEG, APERIO_YCBCR, APERIO_RGB)
        and layout.predictor == 1
        and layout.channels == 3
        and layout.tiled
        and not layout.planar
        and not layout.nested
    )


def tifffile_first(layout: TiffLayout) -> bool:
    """Whether tifffile's tiles are the better way than OpenSlide: codecs of its own, pyramids in sub-IFDs."""
    return (layout.compression in _TIFFFILE_FIRST or layout.nested) and not layout.planar


class TifffileReader:
    """Tiles or strips decoded one by one with tifffile's codecs."""

    def __init__(self, path: Path, layout: TiffLayout):
        if layout.planar or layout.compression == APERIO_YCBCR:  # it leaves YCbCr as it is
            raise SlideError(f"{path}: tifffile does not decode this kind of TIFF to RGB")
        if layout.compression not in tifffile.TIFF.DECOMPRESSORS:
            raise SlideError(f"{path}: no codec for TIFF compression {layout.compression}")
        self._tif, self._tiff = tifffile.TiffFile(path), layout.levels
        self._pages = [level.keyframe for level in self._tif.series[layout.series].levels]
        self.levels, self.scale = make_levels(layout.sizes), layout.scale
        self.bounds = (0, 0, *layout.sizes[0])

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        tiff = self._tiff[level]
        region = np.full((height, width, 3), 255, np.uint8)  # tiles without data stay background
        rows, columns = tiff.tiles_under(x, y, width, height)
        for row in range(rows.start, rows.stop):
            for column in range(columns.start, columns.stop):
                if tiff.counts[row, column]:
                    top, left = row * tiff.tile_height - y, column * tiff.tile_width - x
                    tile = self._decode(level, row, column)[max(-top, 0) :, max(-left, 0) :]
                    target = region[max(top, 0) : top + tiff.tile_height, max(left, 0) : left + tiff.tile_width]
                    tile = tile[: target.shape[0], : target.shape[1]]
                    if tile.shape != target.shape:
                        raise RegionError(f"tile ({row}, {column}) of level {level} decodes to a smaller image")
                    target[:] = tile
        return region

    def _decode(self, level: int, row: int, column: int) -> np.ndarray:
        """uint8 [tile height, tile width, 3]."""
        tiff, page = self._tiff[level], self._pages[level]
        self._tif.filehandle.seek(int(tiff.offsets[row, column]))
        data = self._tif.filehandle.read(int(tiff.counts[row, column]))
        index = row * tiff.counts.shape[1] + column
        try:
            segment = page.decode(data, index, jpegtables=tiff.tables or None)[0]
        except (RuntimeError, ValueError, TypeError, LookupError) as error:  # imagecodecs' errors are RuntimeErrors
            raise RegionError(f"tile {index} of level {level}: {error}") from error
        if segment is None:
            raise RegionError(f"tile {index} of level {level} holds no data")
        tile: np.ndarray = segment.reshape(segment.shape[-3:])
        return on_white(tile) if tile.shape[-1] == 4 else tile

    def close(self) -> None:
        self._tif.close()


def openslide_vendor(path: Path) -> str | None:
    """The format OpenSlide recognises ('aperio', 'generic-tiff', 'mirax', ...); None: none, or it is not installed."""
    return None if openslide is None else openslide.OpenSlide.detect_format(str(path))


class OpenSlideReader:
    """Everything OpenSlide knows: MRXS, NDPI, SCN, BIF, DICOM and tiled TIFF; transparent pixels become white."""

    def __init__(self, path: Path):
        if openslide is None:
            raise SlideError(f"{path}: OpenSlide is not installed: pip install openslide-python openslide-bin")
        try:
            self._slide = openslide.OpenSlide(str(path))
        except openslide.OpenSlideError as error:
            raise SlideError(f"{path}: OpenSlide: {error}") from error
        self._slide.set_cache(openslide.OpenSlideCache(_OPENSLIDE_CACHE))
        properties = self._slide.properties
        sizes = zip(self._slide.level_dimensions, self._slide.level_downsamples)
        self.levels = tuple(Level(*size, downsample) for size, downsample in sizes)
        self.scale = openslide_scale(properties)
        names = ("bounds-x", "bounds-y", "bounds-width", "bounds-height")
        whole = dict(zip(names, (0, 0, *self._slide.dimensions)))
        x, y, width, height = (int(properties.get(f"openslide.{name}", whole[name])) for name in names)
        self.bounds = (x, y, width, height)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        # OpenSlide takes level-0 px and interpolates: exact where the downsample is a whole number, else within half
        # a level-0 px.
        step = self.levels[level].downsample
        try:
            region = self._slide.read_region((round(x * step), round(y * step)), level, (width, height))
        except openslide.OpenSlideError as error:
            raise RegionError(f"OpenSlide: {error}") from error
        return on_white(np.asarray(region))

    def close(self) -> None:
        self._slide.close()


class PlainImageReader:
    """A PNG, JPEG or BMP image, decoded whole when opened; one reader serves any number of threads."""

    def __init__(self, path: Path):
        try:
            with PIL.Image.open(path, formats=_PLAIN_FORMATS) as image:
                self.scale = _image_scale(image)
                self._pixels = _rgb(path, image)
        except PIL.Image.DecompressionBombError as error:
            raise SlideError(f"{path}: is too large for a plain image: convert it to a pyramidal TIFF") from error
        except (OSError, SyntaxError) as error:  # Pillow's own errors are OSErrors; broken PNG chunks SyntaxErrors
            raise SlideError(f"{path}: cannot be decoded as a plain image: {error}") from error
        height, width = self._pixels.shape[:2]
        self.levels, self.bounds = make_levels([(width, height)]), (0, 0, width, height)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        return self._pixels[y : y + height, x : x + width].copy()

    def close(self) -> None:
        pass


def _rgb(path: Path, image: PIL.Image.Image) -> np.ndarray:
    if image.mode not in ("RGB", "RGBA", "P"):
        raise SlideError(f"{path}: is a plain image of mode {image.mode}; 8-bit RGB is read: convert it")
    return on_white(np.asarray(image.convert("RGBA")))


def _image_scale(image: PIL.Image.Image) -> FileScale:
    x, y = image.info.get("dpi", (0, 0))
    return resolution_scale(float(x), float(y), unit=2)
