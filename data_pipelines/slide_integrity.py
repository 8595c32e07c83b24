"""Is what was decoded what was stored? cuCIM and tifffile decode damaged tiles to wrong pixels without a word.

JPEG carries no checksum, so no reader can find all damage. Three cheap looks find what OpenSlide finds and more:
- the compressed bytes of a tile, once, before it is first decoded (`TileScreen`): its frame, markers that cannot occur
  inside coded data, and long runs of one byte (a disk's zeroed sectors);
- a decoded JPEG tile that ends in a flat coloured block, as a decoder leaves it that ran out of data: OpenSlide, which is
  strict about this but slower, then decodes the region too and decides (`ScreenedReader`);
- a few whole tiles compared with OpenSlide when a slide is opened (`disagreement`), against wrong colours and geometry.
"""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipelines.readers import Reader, RegionError
from data_pipelines.slide_tiff import JPEG, JPEG2000, WEBP, TiffLayout, TiffLevel

# The start of the luminance AC table of JPEG's Annex K. Under these tables the codes of flat blocks repeat every
# 3, 4, 5 or 7 bytes, never every byte; under tables optimised for an image they may.
_STANDARD_HUFFMAN = bytes((0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 0x7D, 1, 2, 3, 0))
_BASELINE_SCAN = bytes((0, 63, 0))  # the end of the scan header: all coefficients at once, in full
_FRAMES, _SCAN = (0xC0, 0xC1, 0xC2), 0xDA  # JPEG markers
_RUN = b"\xff" * 6  # 48 equal neighbours in a row, as packed bits: runs of 56 bytes and more contain it
_BLOCK = 8  # px: the side of a JPEG block
_BACKGROUND = 200  # a flat block at least this bright in every channel is ordinary background
TOLERANCE = 3.0  # grey values, mean over a tile of its 8 x 8 means: decoders and sub-pixel origins stay below 1


class DamagedTile(RegionError):
    """A tile whose bytes were found damaged before they were decoded."""


def jpeg_damage(data: bytes, tables: bytes, size: tuple[int, int]) -> str | None:
    """What is wrong with the bytes of a JPEG tile, in words; None where nothing is seen.

    tables: those shared by the slide's tiles, may be empty. size: (width, height) px that the tile must have; cuCIM
    trusts it, and would write past its buffer.
    """
    frame, start = _jpeg_header(data)
    if not (frame and start):
        return "has no JPEG header"
    height, width = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
    if (width, height) != size:
        return f"is an image of {width} x {height} px in place of {size[0]} x {size[1]}"
    end = data.rfind(b"\xff\xd9")
    coded = np.frombuffer(data[start : end if end > start else len(data)], np.uint8)
    if data[start - 3 : start] == _BASELINE_SCAN:  # a progressive JPEG has tables and further scans in between
        after = coded[1:][coded[:-1] == 0xFF]
        if ((after != 0) & ((after < 0xD0) | (after > 0xD7))).any():  # only a stuffed zero or a restart may follow
            return "holds a marker inside its coded data"
    if _STANDARD_HUFFMAN in (data[:start] + tables) and _has_run(coded):
        return "holds a long run of one byte"
    return None


def _jpeg_header(data: bytes) -> tuple[bytes, int]:
    """The payload of the frame header (precision, height, width, ...), and where the coded data starts; empty, 0: none."""
    frame, at = b"", 2
    while data[:2] == b"\xff\xd8" and data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker, after = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker in _FRAMES:
            frame = data[at + 4 : after]
        if marker == _SCAN:
            return frame, after
        at = after
    return b"", 0


def jpeg2000_damage(data: bytes, size: tuple[int, int]) -> str | None:
    """What is wrong with the bytes of a JPEG 2000 tile of `size` (width, height) px, in words; None: nothing is seen."""
    image, coding, start = (data.find(marker) for marker in (b"\xff\x4f\xff\x51", b"\xff\x52", b"\xff\x93"))
    if min(image, coding, start) < 0:
        return "has no JPEG 2000 header"
    x1, y1, x0, y0 = (int.from_bytes(data[at : at + 4]) for at in range(image + 8, image + 24, 4))
    if (x1 - x0, y1 - y0) != size:
        return f"is an image of {x1 - x0} x {y1 - y0} px in place of {size[0]} x {size[1]}"
    coded = np.frombuffer(data[start + 2 : -2], np.uint8)
    if (coded[1:][coded[:-1] == 0xFF] > 0x93).any():  # up to 0x8F coded data, then tile part, packet marks, data start
        return "holds a marker inside its coded data"
    layers = int.from_bytes(data[coding + 6 : coding + 8])
    if layers == 1 and _has_run(coded):  # empty packets are zero bytes; with many layers there can be long runs
        return "holds a long run of one byte"
    return None


def webp_damage(data: bytes) -> str | None:
    """What is wrong with the bytes of a WebP tile, in words; None where nothing is seen."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return "does not start as a WebP"
    if b"VP8 " in data[:64] and _has_run(np.frombuffer(data[64:], np.uint8)):  # lossy: arithmetic coding has no runs
        return "holds a long run of one byte"
    return None


def _has_run(coded: np.ndarray) -> bool:
    return _RUN in np.packbits(coded[1:] == coded[:-1]).tobytes()


def _damage(codec: int, data: bytes, level: TiffLevel) -> str | None:
    if codec in WEBP:
        return webp_damage(data)
    size = level.tile_width, level.tile_height
    return jpeg2000_damage(data, size) if codec in JPEG2000 else jpeg_damage(data, level.tables, size)


class TileScreen:
    """Which tiles of a slide have been looked at and found sound; shared by all readers of the slide."""

    def __init__(self, layout: TiffLayout):
        self._levels, self._codec = layout.levels, layout.compression
        self._sound = [level.counts == 0 for level in layout.levels]  # a tile without data has nothing to damage
        self._flat_is_right = [np.zeros(level.counts.shape, bool) for level in layout.levels]

    def check(self, file: BinaryIO, level: int, x: int, y: int, width: int, height: int) -> None:
        """Raises RegionError where a tile under the region (px of `level`) is visibly damaged."""
        tiff, sound = self._levels[level], self._sound[level]
        rows, columns = tiff.tiles_under(x, y, width, height)
        for row, column in np.argwhere(~sound[rows, columns]) + np.array((rows.start, columns.start)):
            file.seek(tiff.offsets[row, column])
            data = file.read(tiff.counts[row, column])
            if problem := _damage(self._codec, data, tiff):
                raise DamagedTile(f"tile at row {row}, column {column} of level {level} {problem}")
            sound[row, column] = True

    def flat_ends(self, region: np.ndarray, level: int, x: int, y: int) -> np.ndarray:
        """int [n, 2] rows and columns of tiles whose last block, if inside the region, is flat and not background."""
        tiff = self._levels[level]
        height, width = region.shape[:2]
        rows = np.arange((y + _BLOCK - 1) // tiff.tile_height + 1, (y + height) // tiff.tile_height + 1) - 1
        columns = np.arange((x + _BLOCK - 1) // tiff.tile_width + 1, (x + width) // tiff.tile_width + 1) - 1
        block = np.arange(-_BLOCK, 0)
        in_y = (((rows + 1) * tiff.tile_height - y)[:, None] + block).ravel()
        in_x = (((columns + 1) * tiff.tile_width - x)[:, None] + block).ravel()
        blocks = region[np.ix_(in_y, in_x)].reshape(len(rows), _BLOCK, len(columns), _BLOCK, 3)
        brightest, darkest = blocks.max((1, 3)), blocks.min((1, 3))
        flat = (brightest == darkest).all(-1) & (darkest.min(-1) < _BACKGROUND)
        flat &= ~self._flat_is_right[level][np.ix_(rows, columns)]
        found = np.argwhere(flat)
        return np.stack([rows[found[:, 0]], columns[found[:, 1]]], axis=1)

    def accept_flat(self, level: int, tiles: np.ndarray) -> None:
        """tiles int [n, 2]: their flat last blocks were confirmed."""
        self._flat_is_right[level][tiles[:, 0], tiles[:, 1]] = True


def screenable(layout: TiffLayout) -> bool:
    """Whether the bytes of this slide's tiles tell anything."""
    return layout.compression in (JPEG, *JPEG2000, *WEBP) and layout.tiled and not layout.planar


class ScreenedReader:
    """A reader that refuses damaged tiles. second: opens the reader that is asked about JPEG tiles with a flat end."""

    def __init__(self, path: Path, screen: TileScreen, second: Callable[[], Reader] | None, inner: Reader):
        self._inner, self._screen, self._open_second = inner, screen, second
        self._second: Reader | None = None
        self._file = path.open("rb")
        self.levels, self.scale, self.bounds = inner.levels, inner.scale, inner.bounds

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        self._screen.check(self._file, level, x, y, width, height)
        region = self._inner.read(level, x, y, width, height)
        if self._open_second is not None:
            suspects = self._screen.flat_ends(region, level, x, y)
            if len(suspects):
                self._second = self._second or self._open_second()
                self._second.read(level, x, y, width, height)  # raises where it finds the data at an end
                self._screen.accept_flat(level, suspects)
        return region

    def close(self) -> None:
        self._inner.close()
        self._file.close()
        if self._second is not None:
            self._second.close()


def disagreement(reader: Reader, reference: Reader, layout: TiffLayout) -> str | None:
    """How `reader` and `reference` differ on a few tiles, in words; None where they agree.

    Two tiles of level 0 and one of each of three further levels: those with the most bytes, which hold the most detail.
    Damaged tiles decide nothing: those that `reader` screens out, and one that the reference cannot decode.
    """
    for level, row, column in _telling_tiles(layout):
        tiff = layout.levels[level]
        x, y = int(column) * tiff.tile_width, int(row) * tiff.tile_height
        region = (level, x, y, min(tiff.tile_width, tiff.width - x), min(tiff.tile_height, tiff.height - y))
        where = f"the tile at row {row}, column {column} of level {level}"
        problem = None
        try:
            found = reader.read(*region)
        except DamagedTile:
            continue
        except RegionError as error:
            problem = f"cannot read {where}: {error}"
        try:
            expected = reference.read(*region)
        except RegionError:
            return None  # OpenSlide's error state is sticky: nothing more can be learnt from it
        if problem:
            return problem
        by = difference(found, expected)
        if by > TOLERANCE:
            return f"differs by {by:.1f} grey values on {where}"
    return None


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """How far two decodings of a region are apart, uint8 [H, W, 3] each: grey values, the mean over means of 8 x 8 px."""
    return float(np.abs(_block_means(found) - _block_means(expected)).mean())


def _telling_tiles(layout: TiffLayout) -> list[tuple[int, int, int]]:
    """(level, row, column) of the tiles with the most bytes: two of level 0, as far as it has them, one of the next three."""
    tiles = []
    for index, level in enumerate(layout.levels[:4]):
        fullest = np.argsort(level.counts, axis=None)[::-1][: 2 if index == 0 else 1]
        tiles += [(index, *np.unravel_index(tile, level.counts.shape)) for tile in fullest]
    return tiles


def _block_means(region: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> float64 [H', W', 3]: means of 8 x 8 px, so that a shift below a pixel counts little."""
    height, width = (max(side // _BLOCK, 1) for side in region.shape[:2])
    rows, columns = min(_BLOCK, region.shape[0]), min(_BLOCK, region.shape[1])
    cut = region[: height * rows, : width * columns].astype(float)
    return cut.reshape(height, rows, width, columns, 3).mean((1, 3))
