"""The page of one finished slide: its maps, its highest tiles as pictures, its flags, and small pictures for the cohort's page."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_pipelines.exports import write_image, write_text
from data_pipelines.files import atomic_write
from data_pipelines.prepare import PreparedSlide
from data_pipelines.slides import RegionError
from experiments.run.slides import UNEXPECTED
from srcc_jax.report import SlidePage, TileRow, render_slide

PAGE, TOP_FOLDER = "report.html", "top_tiles"
SHEET = f"{TOP_FOLDER}.png"  # the name that the sheet of all top tiles goes by; only its preview is a file
TOP_TILES = 8  # ours: two rows of four
PREVIEW_BYTES = 25_000  # of one small picture: what a cohort's page embeds or links for each slide
_PREVIEWS = ((640, 75), (480, 70), (480, 55), (320, 55), (240, 45), (160, 35))  # longer side in px, JPEG quality
_QUALITY = 85  # JPEG quality of the pictures on the slide's page
_SHEET_COLUMNS, _SHEET_TILE_PX, _SHEET_GAP_PX = 4, 112, 4


@dataclass(frozen=True)
class TopTile:
    """A tile with a high value: its picture's file, its corner in level-0 px."""

    file: str
    x: float
    y: float
    value: float


def slide_flags(prepared: PreparedSlide, values: np.ndarray) -> list[str]:
    """What somebody should look at, one line each. values float [N]: those of the slide's tiles, NaN: not read."""
    unread = int(np.isnan(values).sum())
    missing = [f"not readable: {unread} of {len(values)} tiles"] if unread else []
    return [*prepared.quality.flags(), *missing]


def top_tiles(prepared: PreparedSlide, values: np.ndarray, *, count: int = TOP_TILES) -> list[TopTile]:
    """The highest tiles that do not overlap a higher one, best first. values float [N], NaN never counts."""
    tiles = prepared.tiles
    rows = highest_apart(values, tiles.x, tiles.y, side=_side(prepared), count=count)
    return [
        TopTile(f"{TOP_FOLDER}/{rank}.png", float(tiles.x[row]), float(tiles.y[row]), float(values[row]))
        for rank, row in enumerate(rows, 1)
    ]


def write_top_tiles(folder: pathlib.Path, prepared: PreparedSlide, values: np.ndarray) -> dict[TopTile, Image.Image]:
    """The pictures of `top_tiles`, read from the open slide, as PNG files; returns those that were written.

    A tile that cannot be read any more is left out (it was read when it was scored). Raises OutputError.
    """
    size, mpp = prepared.tiles.tile, prepared.tiles.mpp
    written: dict[TopTile, Image.Image] = {}
    for tile in top_tiles(prepared, values):
        try:
            picture = prepared.slide.read(tile.x, tile.y, size, size, mpp)
        except (RegionError, *UNEXPECTED):
            continue
        write_image(folder / tile.file, picture)
        written[tile] = Image.fromarray(picture)
    return written


def write_slide_page(
    folder: pathlib.Path,
    prepared: PreparedSlide,
    values: np.ndarray,
    *,
    pictures: Mapping[str, str],
    unit: str = "probability",
    headline: str = "",
) -> None:
    """Writes top_tiles/, preview/ and report.html into the finished slide's folder. The slide has to be open still.

    values float [N]: those of the slide's tiles, NaN where unknown, which are of this unit. pictures: caption -> overlay
    (PNG); those that are in the folder are shown. headline: what the page says first; empty: the highest value. Raises
    OutputError.
    """
    files = {caption: file for caption, file in pictures.items() if (folder / file).exists()}
    overlays = {caption: _opened(folder / file) for caption, file in files.items()}
    top = write_top_tiles(folder, prepared, values)
    for caption, image in overlays.items():
        _write_bytes(folder / preview_of(files[caption]), preview(image))
    if top:
        _write_bytes(folder / preview_of(SHEET), preview(_sheet(list(top.values()))))
    page = SlidePage(
        slide_id=prepared.record.slide_id,
        subtitle=headline or _subtitle(values, unit),
        flags=slide_flags(prepared, values),
        images={caption: _as_jpeg(image, _QUALITY) for caption, image in overlays.items()},
        tiles=[TileRow(picture=_as_jpeg(top[t], _QUALITY), x=t.x, y=t.y, value=t.value) for t in top],
        unit=unit,
        tile_level0=_side(prepared),
        facts=_facts(prepared),
    )
    write_text(folder / PAGE, render_slide(page))


def _subtitle(values: np.ndarray, unit: str) -> str:
    """Without label and patient: these may be corrected in the cohort table, and the slide is not done again for it."""
    known = values[np.isfinite(values)]
    return f"{unit} {known.max():.4f}" if len(known) else "no tile could be read"


def _facts(prepared: PreparedSlide) -> dict[str, object]:
    slide, tiles, quality = prepared.slide, prepared.tiles, prepared.quality
    return {
        "file": prepared.record.path,
        "size": f"{slide.width} x {slide.height} px, {len(slide.levels)} levels",
        "scale": f"{slide.mpp:.4g} µm per pixel, from the {slide.mpp_source}",
        "reader": slide.backend,
        "tissue": f"{quality.tissue_share:.1%} of the slide, {quality.tissue_mm2:.3g} mm²",
        "tiles": f"{len(tiles)} of {tiles.tile} px at {tiles.mpp:g} µm per pixel, every {tiles.stride} px",
    }


def _side(prepared: PreparedSlide) -> float:
    """Of a tile, in level-0 px."""
    return prepared.tiles.tile * prepared.tiles.mpp / prepared.slide.mpp


def highest_apart(values: np.ndarray, x: np.ndarray, y: np.ndarray, *, side: float, count: int) -> list[int]:
    """Rows of up to `count` values, highest first, of squares of `side` that do not overlap; [N] each; NaN never, ties in order."""
    chosen: list[int] = []
    for row in np.argsort(-values, kind="stable"):
        if len(chosen) == count or not np.isfinite(values[row]):
            break
        apart = np.maximum(np.abs(x[chosen] - x[row]), np.abs(y[chosen] - y[row])) > side * 0.999
        if apart.all():
            chosen.append(int(row))
    return chosen


def preview_of(file: str) -> str:
    """Where the small picture of this picture is, relative to the slide's folder."""
    return f"preview/{pathlib.PurePath(file).stem}.jpg"


def preview(image: Image.Image) -> bytes:
    """The RGB picture as a JPEG of at most PREVIEW_BYTES; the smallest of the sizes where none is."""
    data, small = b"", image.copy()
    for side, quality in _PREVIEWS:
        small.thumbnail((side, side), Image.Resampling.BILINEAR, reducing_gap=1.0)
        data = _as_jpeg(small, quality)
        if len(data) <= PREVIEW_BYTES:
            break
    return data


def _sheet(tiles: Sequence[Image.Image]) -> Image.Image:
    """The tiles side by side, small, in rows of four."""
    step = _SHEET_TILE_PX + _SHEET_GAP_PX
    columns, rows = min(len(tiles), _SHEET_COLUMNS), -(-len(tiles) // _SHEET_COLUMNS)
    sheet = Image.new("RGB", (columns * step - _SHEET_GAP_PX, rows * step - _SHEET_GAP_PX), "white")
    for place, tile in enumerate(tiles):
        small = tile.resize((_SHEET_TILE_PX, _SHEET_TILE_PX), reducing_gap=1.0)
        sheet.paste(small, (place % columns * step, place // columns * step))
    return sheet


def _opened(path: pathlib.Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _as_jpeg(image: Image.Image, quality: int) -> bytes:
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=quality)
    return data.getvalue()


def _write_bytes(path: pathlib.Path, data: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)
