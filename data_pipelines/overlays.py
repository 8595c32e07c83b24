"""Heat maps painted over thumbnails, with a legend and a scale bar in µm. Arrays in, an array out; exports.py writes it.

Matplotlib lends its colours and its font. Its import takes a while, so that only who draws waits for it.
"""

import functools
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, RULE, PAPER = (40, 44, 52), (205, 208, 214), (250, 250, 251)
_HATCH_DARK, _HATCH_LIGHT, _HATCH_PERIOD_PX = (
    (96, 100, 108),
    (176, 180, 188),
    8,
)  # neither white nor black: no tissue is so
_STRIP_PX, _MARGIN_PX, _LEAST_WIDTH_PX = 46, 14, 420


@functools.cache
def label_font() -> ImageFont.FreeTypeFont:
    """The font that comes with Matplotlib: Pillow's own has no µ."""
    from matplotlib import font_manager

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 11)


class SlideMap(Protocol):
    """A map over a slide; srcc_jax.kernels.heat_maps.HeatMap is one, and so is one read back from a file."""

    @property
    def values(self) -> np.ndarray: ...  # [H, W] float32, NaN where nothing is known
    @property
    def missing(self) -> np.ndarray: ...  # [H, W] bool, tiles that could not be read
    @property
    def downsample(self) -> float: ...  # level-0 px per cell
    @property
    def origin(self) -> tuple[float, float]: ...  # (x, y) level-0 px of the top-left corner of cell (0, 0)
    @property
    def mpp(self) -> float: ...  # µm per cell


def draw_overlay(
    thumbnail: np.ndarray,
    slide_map: SlideMap,
    *,
    thumbnail_downsample: float,
    alpha: float = 0.5,
    colormap: str = "turbo",
    limits: tuple[float, float] = (0.0, 1.0),
    label: str = "probability",
) -> np.ndarray:
    """thumbnail uint8 [h, w, 3] of the whole slide, at thumbnail_downsample level-0 px per px -> uint8 [h', w', 3].

    Values from limits[0] to limits[1] take the colours of a Matplotlib map, mixed in by alpha. Cells that could not be
    read are hatched in gray, opaque; where there is no tile the slide shows. Below: legend, and scale bar in µm or mm.
    """
    picture = _paint(thumbnail, slide_map, thumbnail_downsample, alpha, colormap, limits)
    height, width = picture.shape[:2]
    canvas = Image.new("RGB", (max(width, _LEAST_WIDTH_PX), height + _STRIP_PX), PAPER)
    canvas.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(canvas)
    draw.line([(0, height), (canvas.width, height)], fill=RULE)
    left = _draw_colour_bar(canvas, height, colormap, limits, label)
    if slide_map.missing.any():
        _draw_missing_key(canvas, left + 2 * _MARGIN_PX, height)
    _draw_scale_bar(draw, canvas.width, height, slide_map.mpp / slide_map.downsample * thumbnail_downsample)
    return np.asarray(canvas)


def _paint(
    thumbnail: np.ndarray,
    slide_map: SlideMap,
    thumbnail_downsample: float,
    alpha: float,
    colormap: str,
    limits: tuple[float, float],
) -> np.ndarray:
    values, missing = _onto_thumbnail(slide_map, thumbnail.shape[:2], thumbnail_downsample)
    known = ~np.isnan(values)
    colours = map_colours(values[known], colormap, limits)
    picture = thumbnail.astype(np.float32)
    picture[known] += alpha * (colours - picture[known])
    picture = np.rint(picture).astype(np.uint8)
    unread = missing & ~known
    if unread.any():
        picture[unread] = hatch(*thumbnail.shape[:2])[unread]
    return picture


def _onto_thumbnail(slide_map: SlideMap, shape: tuple[int, int], downsample: float) -> tuple[np.ndarray, np.ndarray]:
    """Values [h, w] and missing [h, w] at the centre of each thumbnail px. Cells finer than that are first joined.

    Joined cells take their highest value, so that a hot spot of one cell does not fall between two px.
    """
    join = max(1, int(np.ceil(downsample / slide_map.downsample)))
    values, missing = (_block_maximum(a, join) for a in (slide_map.values, slide_map.missing))
    at = []
    for size, cells, origin in zip(shape, values.shape, reversed(slide_map.origin)):
        cell = np.floor(((np.arange(size) + 0.5) * downsample - origin) / (slide_map.downsample * join)).astype(int)
        at.append(np.where((cell >= 0) & (cell < cells), cell, cells))  # one beyond the last: outside
    values = np.pad(values, (0, 1), constant_values=np.nan)
    return values[np.ix_(*at)], np.pad(missing, (0, 1))[np.ix_(*at)]


def _block_maximum(values: np.ndarray, size: int) -> np.ndarray:
    """Maximum of size x size blocks, NaN (in the padding, too) losing against any number."""
    rows, columns = (-(-n // size) for n in values.shape)
    fill = np.nan if values.dtype.kind == "f" else False
    padding = [(0, rows * size - values.shape[0]), (0, columns * size - values.shape[1])]
    blocks = np.pad(values, padding, constant_values=fill).reshape(rows, size, columns, size)
    return np.fmax.reduce(np.fmax.reduce(blocks, axis=3), axis=1)


def map_colours(values: np.ndarray, colormap: str, limits: tuple[float, float]) -> np.ndarray:
    """[N] -> float32 [N, 3] in 0..255."""
    low, high = limits
    if not high > low:
        raise ValueError(f"limits of the colours must rise; got {low} to {high}")
    import matplotlib

    return np.float32(255) * matplotlib.colormaps[colormap]((values - low) / (high - low))[:, :3].astype(np.float32)


def hatch(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3] of diagonal stripes."""
    stripe = np.add.outer(np.arange(height), np.arange(width)) % _HATCH_PERIOD_PX < _HATCH_PERIOD_PX // 2
    return np.array([_HATCH_LIGHT, _HATCH_DARK], np.uint8)[stripe.astype(int)]


def _draw_colour_bar(canvas: Image.Image, top: int, colormap: str, limits: tuple[float, float], label: str) -> int:
    """Draws it and returns the x where it ends."""
    draw, font = ImageDraw.Draw(canvas), label_font()
    left, width = _MARGIN_PX, 110
    bar = map_colours(np.linspace(0, 1, width), colormap, (0, 1)).astype(np.uint8)
    canvas.paste(Image.fromarray(np.repeat(bar[None], 10, 0)), (left, top + 10))
    draw.text((left, top + 23), f"{limits[0]:g}", INK, font)
    draw.text((left + width, top + 23), f"{limits[1]:.3g}", INK, font, anchor="ra")
    draw.text((left + width + 8, top + 8), label, INK, font)
    return int(left + width + 8 + draw.textlength(label, font))


def _draw_missing_key(canvas: Image.Image, left: int, top: int) -> None:
    canvas.paste(Image.fromarray(hatch(10, 20)), (left, top + 10))
    ImageDraw.Draw(canvas).text((left + 27, top + 8), "not readable", INK, label_font())


def _draw_scale_bar(draw: ImageDraw.ImageDraw, right: int, top: int, mpp: float) -> None:
    """A round number of µm, at most 120 px long, at the right end of the strip."""
    longest_um = 120 * mpp
    power = 10.0 ** np.floor(np.log10(longest_um))
    length_um = power * max(m for m in (1, 2, 5) if m * power <= longest_um)
    text = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    left, middle = right - _MARGIN_PX - round(length_um / mpp), right - _MARGIN_PX - round(length_um / mpp / 2)
    draw.rectangle([left, top + 12, right - _MARGIN_PX - 1, top + 15], fill=INK)
    draw.text((middle, top + 20), text, INK, label_font(), anchor="ma")
