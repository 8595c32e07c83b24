"""Where the tissue is on a small picture of a slide: Otsu's threshold on gray, saturation or stain, and colour deconvolution."""

from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu

# Ruifrok & Johnston (2001): optical density of R, G, B (columns) in hematoxylin, eosin, DAB (rows); used as printed.
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
DARKEST = 1e-6  # intensities below count as this one, whose optical density is the unit
MIN_CONTRAST = 8  # gray values; ours: below, both sides of the threshold are the noise of empty glass
GLASS_GRAY, GLASS_COLOUR = 200, 12  # ours: glass is at least this light and its channels differ by at most this


def otsu_threshold(values: np.ndarray) -> float:
    """Otsu's threshold: values <= it are the lower class.

    Integers have one bin per value, floats 256 bins over their range; the threshold is a bin's centre, the first of equally
    good ones; of a constant array it is its value. (scikit-image's definition, which the published pipelines use.)
    """
    return float(threshold_otsu(values))


def tissue_mask(rgb: np.ndarray, method: str = "otsu", *, scanned: np.ndarray | None = None) -> np.ndarray:
    """Tissue on a thumbnail: uint8 [H, W, 3] -> bool [H, W].

    method: "otsu" (gray <= threshold; Kanavati 2021), "saturation" (Camelyon's rule: saturated, not light in all channels, not
    black; He & Li 2023) or "stain" (hematoxylin + eosin density above its threshold; Yu 2019).
    scanned bool [H, W]: pixels that hold a picture. Others take no part in any threshold and are no tissue. By default pure
    white counts as not scanned where the slide has glass of another colour (white_padding). A picture without contrast has
    no tissue.
    """
    if method not in METHODS:
        raise ValueError(f"tissue method {method!r} is unknown: give one of {', '.join(METHODS)}")
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"the thumbnail must be uint8 [H, W, 3], not {rgb.dtype} {list(rgb.shape)}")
    if scanned is None:
        scanned = ~white_padding(rgb)
    mask = np.zeros(rgb.shape[:2], bool)
    pixels = rgb[scanned]
    if len(pixels) and _has_contrast(_gray(pixels)):
        mask[scanned] = METHODS[method](pixels)
    return mask


def white_padding(rgb: np.ndarray) -> np.ndarray:
    """Pure white pixels, if what is left still has glass of its own: then the white was never scanned. bool [H, W].

    A slide's missing tiles, and all outside its bounds, read as pure white. With real glass between it and the tissue in
    brightness, a threshold may fall between white and glass. Where white is the only background it stays a part.
    """
    white = (rgb == 255).all(axis=-1)
    rest = rgb[~white]
    if not white.any() or not len(rest):
        return np.zeros_like(white)
    gray = _gray(rest)
    light = gray > otsu_threshold(gray)
    if not light.any():  # one gray only
        light[...] = True
    spread = rest.max(axis=-1)[light] - rest.min(axis=-1)[light]
    is_glass = np.median(gray[light]) >= GLASS_GRAY and np.median(spread) <= GLASS_COLOUR
    return white if is_glass else np.zeros_like(white)


def hed(rgb: np.ndarray) -> np.ndarray:
    """Colour deconvolution (Ruifrok & Johnston): densities of hematoxylin, eosin and DAB, [..., 3], >= 0; white is 0.

    rgb [..., 3]: uint8, or floats in 0..1. The logarithm's base is DARKEST, as in scikit-image >= 0.18.
    """
    intensity = rgb / 255.0 if rgb.dtype == np.uint8 else np.asarray(rgb, np.float64)
    density = np.log(np.maximum(intensity, DARKEST)) / np.log(DARKEST)
    return np.maximum(density @ np.linalg.inv(STAINS), 0.0)


def stain_density(rgb: np.ndarray) -> np.ndarray:
    """Hematoxylin and eosin together, by `hed`: [..., 3] -> float64 [...]."""
    return hed(rgb)[..., :2].sum(axis=-1)


def stain_threshold(thumbnail: np.ndarray) -> float | None:
    """Otsu's threshold of `stain_density` on a thumbnail uint8 [H, W, 3], as of `tissue_mask(method="stain")`; above it there is
    tissue. None where the picture has no contrast."""
    pixels = thumbnail[~white_padding(thumbnail)]
    if not len(pixels) or not _has_contrast(_gray(pixels)):
        return None
    return otsu_threshold(stain_density(pixels))


def clean_up(mask: np.ndarray, *, opening: int = 3, closing: int = 5, min_pixels: int = 64) -> np.ndarray:
    """Optional, in no paper: opens and closes with squares of these sides, then drops 8-connected parts below min_pixels."""
    smooth = ndimage.grey_opening(mask.astype(np.uint8), size=opening)
    smooth = ndimage.grey_closing(smooth, size=closing)
    parts, _ = ndimage.label(smooth, structure=np.ones((3, 3)))
    large = np.bincount(parts.ravel()) >= min_pixels
    large[0] = False
    return large[parts]


def _gray(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma, uint8 [...] of uint8 [..., 3]."""
    flat = np.ascontiguousarray(rgb).reshape(1, -1, 3)
    return np.asarray(Image.fromarray(flat).convert("L")).reshape(rgb.shape[:-1])


def _has_contrast(gray: np.ndarray) -> bool:
    dark = gray <= otsu_threshold(gray)
    return not dark.all() and bool(gray[~dark].mean() - gray[dark].mean() >= MIN_CONTRAST)


def _by_gray(pixels: np.ndarray) -> np.ndarray:
    gray = _gray(pixels)
    return gray <= otsu_threshold(gray)


def _by_saturation(pixels: np.ndarray) -> np.ndarray:
    high, low = pixels.max(axis=-1).astype(np.float64), pixels.min(axis=-1)
    saturation = np.divide(high - low, high, out=np.zeros_like(high), where=high > 0)
    light = np.stack([channel > otsu_threshold(channel) for channel in pixels.T]).all(axis=0)
    return (saturation > otsu_threshold(saturation)) & ~light & (pixels > 50).all(axis=-1)


def _by_stain(pixels: np.ndarray) -> np.ndarray:
    density = stain_density(pixels)
    return density > otsu_threshold(density)


METHODS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # pixels uint8 [N, 3] -> bool [N]
    "otsu": _by_gray,
    "saturation": _by_saturation,
    "stain": _by_stain,
}
