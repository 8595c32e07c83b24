"""What a TIFF slide says about itself, read by tifffile before any reader opens it, without decoding a pixel.

The probe exists because readers fail badly where they should refuse: cuCIM ends the process at a Deflate tile with a
predictor, and returns wrong pixels for planes stored apart. It costs about a millisecond a slide.
"""

import logging
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile

from data_pipelines.slide_scale import FileScale, aperio_scale, resolution_scale
from data_pipelines.slide_series import ome_series_scale, pixel_refusal, second_scan, slide_series

# TIFF compression tags.
JPEG = 7
APERIO_YCBCR, APERIO_RGB = 33003, 33005
JPEG2000 = (APERIO_YCBCR, APERIO_RGB, 34712)
WEBP = (34927, 50001)
ZSTD = (34926, 50000)
RAW, LZW = 1, 5

# Scanner formats in TIFF clothes whose pages are not simply a pyramid (overlaps, z planes, padding): OpenSlide's work.
_DIALECTS_OF_OPENSLIDE = {"ndpi", "scn", "bif", "philips"}
# What tifffile raises at a damaged header, found by feeding it some thousand damaged files.
_DAMAGE = (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, struct.error)

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs what is raised or returned here anyway


@dataclass(frozen=True, eq=False)
class TiffLevel:
    """One image of the pyramid: its size, its tiles' size (strips: as wide as the image), where their bytes are."""

    width: int  # px of this level
    height: int
    tile_width: int
    tile_height: int
    offsets: np.ndarray  # int64 [rows, columns] of tiles: position in the file, bytes
    counts: np.ndarray  # int64 [rows, columns]: compressed size, bytes; 0 is a tile without data, background
    tables: bytes  # JPEG tables shared by the tiles, empty where there are none

    def tiles_under(self, x: int, y: int, width: int, height: int) -> tuple[slice, slice]:
        """Rows and columns of the tiles that a region of level pixels touches."""
        return (
            slice(y // self.tile_height, -(-(y + height) // self.tile_height)),
            slice(x // self.tile_width, -(-(x + width) // self.tile_width)),
        )


@dataclass(frozen=True, eq=False)
class TiffLayout:
    """How the pixels of a TIFF slide are stored, and its scale."""

    levels: tuple[TiffLevel, ...]  # empty where `refusal` is given
    compression: int
    predictor: int
    channels: int
    tiled: bool
    planar: bool  # each channel stored apart
    nested: bool  # lower levels in sub-IFDs, which neither cuCIM nor OpenSlide looks into
    scale: FileScale
    series: int = 0  # which of the file's images this is, as tifffile counts them
    refusal: str | None = None  # why these pixels cannot be read as 8-bit RGB at all

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of each level, px."""
        return [(level.width, level.height) for level in self.levels]


def starts_like_tiff(path: Path) -> bool:
    """Whether the first four bytes are those of a TIFF or BigTIFF."""
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def probe(path: Path) -> TiffLayout | None:
    """The layout of a TIFF slide. None: not a TIFF, a damaged header, or a dialect only OpenSlide knows."""
    if not starts_like_tiff(path):
        return None
    try:
        with tifffile.TiffFile(path) as tif:
            return None if tif.flags & _DIALECTS_OF_OPENSLIDE else _layout(tif)
    except _DAMAGE:
        return None


def _layout(tif: tifffile.TiffFile) -> TiffLayout:
    if any(len(page.dataoffsets) != len(page.databytecounts) or not page.dataoffsets for page in tif.pages):
        raise ValueError("a page without its data: cuCIM ends the process at one")
    chosen = slide_series(tif.series)
    series, page = tif.series[chosen], tif.series[chosen].keyframe
    refusal = pixel_refusal(series) or second_scan(tif, chosen)
    levels = () if refusal else tuple(_level(level.keyframe) for level in series.levels)
    return TiffLayout(
        levels=levels,
        compression=int(page.compression),
        predictor=int(page.predictor),
        channels=page.samplesperpixel,
        tiled=page.is_tiled,
        planar=page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE,
        nested=bool(page.subifds),
        scale=_scale(tif, series),
        series=chosen,
        refusal=refusal or _truncation(levels, tif.filehandle.size),
    )


def _level(page: tifffile.TiffPage) -> TiffLevel:
    grid = page.chunked[-3:-1] if page.planarconfig == tifffile.PLANARCONFIG.CONTIG else (-1, page.chunked[-1])
    tile_height, tile_width = page.chunks[:2] if len(page.chunks) == 3 else page.chunks[-2:]
    return TiffLevel(
        width=page.imagewidth,
        height=page.imagelength,
        tile_width=tile_width,
        tile_height=tile_height,
        offsets=np.array(page.dataoffsets, np.int64).reshape(grid),
        counts=np.array(page.databytecounts, np.int64).reshape(grid),
        tables=page.jpegtables or b"",
    )


def _truncation(levels: tuple[TiffLevel, ...], size: int) -> str | None:
    ends = [int((level.offsets + level.counts).max()) for level in levels]
    if ends and max(ends) > size:
        return f"is truncated: its tiles reach to byte {max(ends)}, the file ends at {size}; copy it again"
    return None


def _scale(tif: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> FileScale:
    page = series.keyframe
    if tif.is_svs:
        return aperio_scale(page.description)
    if tif.is_ome:
        return ome_series_scale(tif, series)
    x, y = (_ratio(page.tags.valueof(name, (0, 1))) for name in ("XResolution", "YResolution"))
    return resolution_scale(x, y, int(page.tags.valueof("ResolutionUnit", 2)))  # 2, inch: the standard's


def _ratio(value: tuple[int, int]) -> float:
    return value[0] / value[1] if value[1] else 0.0
