"""Small TIFF slides for the tests of reading: a picture with detail everywhere, written in any layout."""

from pathlib import Path

import numpy as np
import tifffile


def picture(width: int, height: int, *, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: coloured cells of 8 px, so that JPEG keeps them nearly and a shift by one px shows."""
    cells = np.random.default_rng(seed).integers(30, 226, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return cells.repeat(8, 0).repeat(8, 1)[:height, :width].copy()


def halved(image: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 px."""
    height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
    cut = image[:height, :width].reshape(height // 2, 2, width // 2, 2, 3)
    return np.round(cut.mean((1, 3))).astype(np.uint8)


def write_tiff(
    path: Path, image: np.ndarray, *, mpp: float | tuple[float, float] | None = 0.5, levels: int = 1, **options: object
) -> Path:
    """A tiled TIFF of `levels` levels, with its resolution tag unless mpp is None; options go to tifffile."""
    settings: dict = {"photometric": "rgb", "tile": (64, 64), "metadata": None, **options}
    if mpp is not None:
        x, y = (mpp, mpp) if isinstance(mpp, float) else mpp
        settings |= {"resolution": (10_000 / x, 10_000 / y), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as tif:
        for level in range(levels):
            if level:
                image = halved(image)
            tif.write(image, subfiletype=int(level > 0), **settings)
    return path


def tile_bytes(path: Path, *, level: int = 0) -> list[tuple[int, int]]:
    """(position, length) of the compressed tiles of a level, row by row."""
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[level]
        return list(zip(page.dataoffsets, page.databytecounts))


def overwrite(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


def empty_tile(path: Path, index: int) -> None:
    """Makes a tile sparse: no offset, no bytes."""
    with tifffile.TiffFile(path, mode="r+") as tif:
        for name in ("TileOffsets", "TileByteCounts"):
            tag = tif.pages[0].tags[name]
            values = list(tag.value)
            values[index] = 0
            tag.overwrite(values)
