"""Masks of cells on disk as pictures that any viewer shows, and drawings of masks and boxes over images."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from data_pipelines.boxes import BoxesError
from data_pipelines.files import atomic_write

_PALETTE = ((20, 20, 24), (250, 200, 40), (220, 40, 60))  # background, edge, inner region


def write_mask(path: str | os.PathLike[str], mask: np.ndarray) -> None:
    """mask uint8 [H, W] of 0 (background), 1 (edge), 2 (inner region) as a PNG with a palette: dark, yellow, red."""
    picture = Image.fromarray(mask, mode="P")
    picture.putpalette([value for colour in _PALETTE for value in colour])
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=3)


def read_mask(path: str | os.PathLike[str]) -> np.ndarray:
    """What `write_mask` wrote. Raises BoxesError."""
    try:
        with Image.open(path) as file:
            mask = np.asarray(file)
    except OSError as error:
        raise BoxesError(
            f"{path}: cannot be read ({error}): take away its folder, and the round is done again"
        ) from error
    if mask.ndim != 2 or mask.dtype != np.uint8 or mask.max(initial=0) >= len(_PALETTE):
        raise BoxesError(f"{path}: is no mask of cells: take away its folder, and the round is done again")
    return mask


def draw_cells(
    image: np.ndarray, mask: np.ndarray, boxes: Mapping[tuple[int, int, int], np.ndarray], *, width: int = 2
) -> np.ndarray:
    """uint8 [H, W, 3]: the image with the borders of the mask's regions in the mask's colours, and boxes [N, 4] in those given."""
    picture = image.copy()
    for value in (1, 2):
        region = mask >= value
        picture[region & ~ndimage.binary_erosion(region, iterations=width)] = _PALETTE[value]
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    for colour, found in boxes.items():
        for x1, y1, x2, y2 in found.tolist():
            draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=width)
    return np.asarray(canvas)
