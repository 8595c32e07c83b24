"""Contact sheets: pictures in rows, the first of a row framed and apart, each with a line of text below. Arrays in, an array out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.overlays import INK, PAPER, label_font

_MARGIN_PX, _TEXT_PX, _FRAME_PX = 10, 18, 3
_FRAME = (196, 43, 28)


@dataclasses.dataclass(frozen=True)
class Picture:
    """rgb uint8 [h, w, 3], resized to the sheet's side; text: what stands below it."""

    rgb: np.ndarray
    text: str


def contact_sheet(rows: Sequence[Sequence[Picture]], *, side: int = 112) -> np.ndarray:
    """uint8 [H, W, 3]. rows: pictures from left to right, `side` px wide; the first of each is what the others go with.
    ValueError where there is none."""
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        raise ValueError("a contact sheet needs a picture")
    step, height = side + _MARGIN_PX, side + _TEXT_PX + _MARGIN_PX
    canvas = Image.new("RGB", (columns * step + 3 * _MARGIN_PX, len(rows) * height + _MARGIN_PX), PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, row in enumerate(rows):
        top = _MARGIN_PX + number * height
        for place, picture in enumerate(row):
            left = _MARGIN_PX + place * step + (_MARGIN_PX if place else 0)
            image = Image.fromarray(picture.rgb).resize((side, side), Image.Resampling.BICUBIC)
            canvas.paste(image, (left, top))
            if place == 0:
                draw.rectangle([left, top, left + side - 1, top + side - 1], outline=_FRAME, width=_FRAME_PX)
            draw.text((left, top + side + 2), picture.text, fill=INK, font=label_font())
    return np.asarray(canvas)
