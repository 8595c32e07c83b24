"""What a thumbnail tells about a slide before any model does: how much of it is tissue, and pen marks by their colour."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from scipy import ndimage

# All ours, set on thumbnails of 16 µm per px: ink of real slides lies inside, tissue of six public sets of H&E patches outside.
# Hematoxylin's blue begins at a hue of 245 degrees; its densest nuclei, averaged over 16 µm, stay lighter than BLACK_VALUE.
GREEN_HUE, GREEN_SATURATION = (70.0, 200.0), 0.15
BLUE_HUE, BLUE_SATURATION = (200.0, 245.0), 0.30
BLACK_VALUE = 60  # of 255, in the brightest channel
SMALLEST_MARK_UM2 = 1000.0  # connected areas below are dust and debris
PEN_MM2 = 0.01  # marks of all colours together that are worth a flag
LITTLE_TISSUE_MM2 = 0.1  # ours: less than any biopsy, or its larger part was not found


@dataclasses.dataclass(frozen=True)
class SlideQuality:
    """tissue_share: part of the slide's area that is tissue. tissue_mm2: the area. pen_mm2: colour of ink -> area of its marks."""

    tissue_share: float
    tissue_mm2: float
    pen_mm2: Mapping[str, float]

    def flags(self) -> list[str]:
        """What somebody should look at, one line each; empty where nothing was seen."""
        found = []
        if self.tissue_mm2 < LITTLE_TISSUE_MM2:
            found.append(f"little tissue: {self.tissue_mm2:.2g} mm²")
        if sum(self.pen_mm2.values()) >= PEN_MM2:
            marks = (f"{colour} {area:.2g} mm²" for colour, area in self.pen_mm2.items() if area)
            found.append(f"pen marks: {', '.join(marks)}")
        return found


def slide_quality(thumbnail: np.ndarray, tissue: np.ndarray, *, mpp: float) -> SlideQuality:
    """thumbnail uint8 [H, W, 3] of the whole slide at `mpp` µm per px (the colours were set at 16), tissue bool [H, W]."""
    mm2 = (mpp / 1000) ** 2
    smallest = max(1, round(SMALLEST_MARK_UM2 / mpp**2))
    pen = {colour: _marked_px(mask, smallest) * mm2 for colour, mask in pen_marks(thumbnail).items()}
    return SlideQuality(float(tissue.mean()), float(tissue.sum()) * mm2, pen)


def pen_marks(rgb: np.ndarray) -> dict[str, np.ndarray]:
    """Pixels in the colours of ink on a thumbnail: uint8 [H, W, 3] -> {"green", "blue", "black"} bool [H, W] each.

    Green: hue 70 to 200 degrees, saturation at least 0.15. Blue: hue 200 to 245, saturation at least 0.30. Black: no channel
    above 59. No stain of H&E is there at 16 µm per px; red ink, which lies among the colours of eosin, is not looked for.
    A scanner's black border counts as black.
    """
    hue, saturation, value = _hsv(rgb)
    dark = value < BLACK_VALUE
    return {
        "green": ~dark & _between(hue, GREEN_HUE) & (saturation >= GREEN_SATURATION),
        "blue": ~dark & _between(hue, BLUE_HUE) & (saturation >= BLUE_SATURATION),
        "black": dark,
    }


def _between(hue: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    return (hue >= limits[0]) & (hue < limits[1])


def _hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees, saturation in 0..1, value in 0..255: float32 [H, W] each; the hue of gray is 0."""
    red, green, blue = np.moveaxis(rgb.astype(np.float32), -1, 0)
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    safe = np.where(chroma > 0, chroma, 1)
    sextant = np.select(
        [chroma == 0, value == red, value == green],
        [np.zeros_like(value), (green - blue) / safe % 6, (blue - red) / safe + 2],
        (red - green) / safe + 4,
    )
    return 60 * sextant, chroma / np.where(value > 0, value, 1), value


def _marked_px(mask: np.ndarray, smallest: int) -> int:
    """Pixels in 8-connected parts of at least `smallest` pixels."""
    parts, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(parts.ravel())[1:]
    return int(sizes[sizes >= smallest].sum())
