"""Pyramidal tiled TIFF files that cuCIM and OpenSlide open alike, written block by block.

Reduced levels are further pages of the file, not sub-IFDs: cuCIM sees only the first level of those. They are halved from
the blocks of the level above while these pass by, so that a slide is drawn once and never held as a whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import imagecodecs
import numpy as np
import tifffile

Block = Callable[[int, int, int, int], np.ndarray | None]
"""(x, y, width, height) in level-0 px -> uint8 [height, width, 3], or None where there is only background."""

Compression = Literal["jpeg", "lzw"]
BACKGROUND = (243, 243, 243)  # ours: the white of a scanned slide, a little under the white of a file

_MICROMETRES_PER_CM = 10_000
_CLASSIC_TIFF_LIMIT = 2**32


def write_pyramid(
    path: Path | str,
    source: np.ndarray | Block,
    *,
    mpp: float,
    shape: tuple[int, int] | None = None,
    tile: int = 256,
    levels: int | None = None,
    quality: int = 80,
    compression: Compression = "jpeg",
    subsampling: Literal["420", "444"] = "420",
    background: tuple[int, int, int] = BACKGROUND,
) -> Path:
    """Write a slide and its reduced levels, each half of the one before; returns the path.

    source: uint8 [H, W, 3], or a `Block` called once for every tile of level 0, row by row, with `shape` = (H, W).
    mpp: µm per pixel of level 0, written as resolution in centimetres.  tile: side in px, a multiple of 16.
    levels: how many in all; None halves until a level fits into one tile.  quality, subsampling: of JPEG alone;
    "lzw" keeps every value.  background: RGB of the tiles for which the source returned None.
    Memory: a row of tiles per level without its background, and the compressed reduced levels.
    Raises ValueError for a source, mpp or tile that cannot make a slide, OSError if the file cannot be written.
    """
    path = Path(path)
    block, (height, width) = _as_block(source, shape)
    if not 0 < mpp < float("inf"):
        raise ValueError(f"{path}: mpp is {mpp}; give the µm per pixel of level 0, a positive number")
    if tile <= 0 or tile % 16:
        raise ValueError(f"{path}: tile is {tile} px; TIFF asks for a multiple of 16, 256 for one")
    blank = np.full((tile, tile, 3), background, np.uint8)
    pyramid = Pyramid(
        block, _level_sizes(height, width, tile, levels), _encoder(quality, compression, subsampling), blank, _halve
    )
    write_levels(
        path,
        pyramid,
        mpp=mpp,
        samples=3,
        dtype=np.uint8,
        photometric="ycbcr" if compression == "jpeg" else "rgb",
        compression=compression,
        subsampling=((2, 2) if subsampling == "420" else (1, 1)) if compression == "jpeg" else None,
    )
    return path


def write_levels(
    path: Path,
    pyramid: Pyramid,
    *,
    mpp: float,
    samples: int,
    dtype: Any,
    description: bytes | None = None,
    subifds: bool = False,
    **page: Any,
) -> None:
    """Write a pyramid to `path`; `samples` per pixel of `dtype` are what it encodes, `page` goes to tifffile.

    description: for the first page.  subifds: the reduced levels as SubIFDs of the first page, as OME-TIFF has them, not as
    further pages.
    """
    height, width = pyramid.sizes[0]
    size = height * width * samples * np.dtype(dtype).itemsize
    with tifffile.TiffWriter(path, bigtiff=size >= _CLASSIC_TIFF_LIMIT, ome=False) as writer:
        for level, (rows, columns) in enumerate(pyramid.sizes):
            pixels_per_cm = _MICROMETRES_PER_CM / mpp * columns / width
            writer.write(
                pyramid.level(level),
                shape=(rows, columns, samples) if samples > 1 else (rows, columns),
                dtype=dtype,
                tile=(pyramid.tile, pyramid.tile),
                subfiletype=int(level > 0),
                subifds=len(pyramid.sizes) - 1 if subifds and not level else None,
                description=description if not level else None,
                resolution=(pixels_per_cm, pixels_per_cm),
                resolutionunit="CENTIMETER",
                metadata=None,
                **page,
            )


def _as_block(source: np.ndarray | Block, shape: tuple[int, int] | None) -> tuple[Block, tuple[int, int]]:
    if callable(source):
        if shape is None or min(shape) < 1:
            raise ValueError(f"a slide drawn by blocks needs its shape (height, width) in px, got {shape}")
        return source, shape
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
        raise ValueError(f"a slide is uint8 [height, width, 3], got {source.dtype} {list(source.shape)}")
    return lambda x, y, width, height: source[y : y + height, x : x + width], source.shape[:2]


def _level_sizes(height: int, width: int, tile: int, levels: int | None) -> list[tuple[int, int]]:
    sizes = [(height, width)]
    while len(sizes) != levels and (levels is not None or max(sizes[-1]) > tile):
        if min(sizes[-1]) < 2:
            break
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    return sizes


def _encoder(quality: int, compression: Compression, subsampling: str) -> Callable[[np.ndarray], bytes]:
    """tile -> its bytes in the file."""

    def compress(pixels: np.ndarray) -> bytes:
        pixels = np.ascontiguousarray(pixels)
        if compression == "lzw":
            return bytes(imagecodecs.lzw_encode(pixels.tobytes()))
        jpeg = imagecodecs.jpeg8_encode(
            pixels, quality, colorspace="RGB", outcolorspace="YCBCR", subsampling=subsampling, optimize=True
        )
        return bytes(jpeg)

    return compress


class Pyramid:
    """Compressed tiles level by level. Level 0 is streamed; the reduced levels grow beside it, compressed.

    block: as `Block`, of the dtype and channels of `blank`.  sizes: (height, width) of each level, halves of the one before
    rounded up or down.  encode: a tile -> its bytes in the file.  blank: the tile [tile, tile, ...] where there is only
    background.  halve: [2n, 2m, ...] -> [n, m, ...].
    """

    def __init__(
        self,
        block: Block,
        sizes: Sequence[tuple[int, int]],
        encode: Callable[[np.ndarray], bytes],
        blank: np.ndarray,
        halve: Callable[[np.ndarray], np.ndarray],
    ):
        self.block, self.sizes, self.encode, self.blank, self.halve = block, sizes, encode, blank, halve
        self.tile = len(blank)
        self.grids = [(-(-height // self.tile), -(-width // self.tile)) for height, width in sizes]
        self.row: list[dict[int, np.ndarray]] = [{} for _ in sizes]  # the row of tiles being filled, without background
        self.reduced: list[list[bytes]] = [[] for _ in sizes]

    @cached_property
    def encoded_blank(self) -> bytes:
        return self.encode(self.blank)

    def level(self, level: int) -> Iterator[bytes]:
        """Tiles of one level, row by row. The last tile of level 0 has to be taken before another level is asked for."""
        return iter(self.reduced[level]) if level else self._first_level()

    def _first_level(self) -> Iterator[bytes]:
        rows, columns = self.grids[0]
        for row, column in itertools.product(range(rows), range(columns)):
            pixels = self._draw(row, column)
            if pixels is not None:
                self._reduce(0, row, column, pixels)
            if column == columns - 1:
                self._close_row(0, row)
            yield self._encoded(pixels)  # last: nothing runs after the last tile has been taken

    def _encoded(self, pixels: np.ndarray | None) -> bytes:
        return self.encoded_blank if pixels is None else self.encode(pixels)

    def _draw(self, row: int, column: int) -> np.ndarray | None:
        height, width = self.sizes[0]
        x, y = column * self.tile, row * self.tile
        w, h = min(self.tile, width - x), min(self.tile, height - y)
        pixels = self.block(x, y, w, h)
        if pixels is None:
            return None
        shape, dtype = (h, w, *self.blank.shape[2:]), self.blank.dtype
        if pixels.shape != shape or pixels.dtype != dtype:
            raise ValueError(
                f"the block at ({x}, {y}) is {pixels.dtype} {list(pixels.shape)}, not {dtype} {list(shape)}"
            )
        return np.pad(pixels, [(0, self.tile - h), (0, self.tile - w)] + [(0, 0)] * (pixels.ndim - 2), mode="edge")

    def _reduce(self, level: int, row: int, column: int, pixels: np.ndarray) -> None:
        """Put half of a tile into its quarter of the tile above."""
        if level + 1 == len(self.sizes):
            return
        half = self.tile // 2
        parent = self.row[level + 1].get(column // 2)
        if parent is None:
            parent = self.row[level + 1][column // 2] = self.blank.copy()
        y, x = row % 2 * half, column % 2 * half
        parent[y : y + half, x : x + half] = self.halve(pixels)

    def _close_row(self, level: int, row: int) -> None:
        """After a row of tiles: the row above it is complete if this was its second or the last."""
        above = level + 1
        if (
            above == len(self.sizes)
            or (row % 2 == 0 and row + 1 < self.grids[level][0])
            or row // 2 >= self.grids[above][0]
        ):
            return
        tiles, self.row[above] = self.row[above], {}
        for column in range(self.grids[above][1]):
            pixels = tiles.get(column)
            self.reduced[above].append(self._encoded(pixels))
            if pixels is not None:
                self._reduce(above, row // 2, column, pixels)
        self._close_row(above, row // 2)


def _halve(pixels: np.ndarray) -> np.ndarray:
    """Mean of each 2 x 2 pixels, rounded: uint8 [2n, 2m, 3] -> uint8 [n, m, 3]."""
    total = pixels[0::2, 0::2].astype(np.uint16)
    for y, x in ((0, 1), (1, 0), (1, 1)):
        total += pixels[y::2, x::2]
    return ((total + 2) >> 2).astype(np.uint8)
