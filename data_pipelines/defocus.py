"""Images as a microscope out of focus shows them."""

from __future__ import annotations

import numpy as np
from scipy import ndimage, signal

_SUBPIXELS = 9  # along a pixel's side, to find its part under the rim of the disc


def disc(radius_px: float) -> np.ndarray:
    """float64 [n, n], sum 1: the uniform disc of this radius, each pixel with its part of the area. n is odd."""
    reach = int(np.ceil(radius_px - 0.5)) if radius_px > 0.5 else 0
    fine = (np.arange((2 * reach + 1) * _SUBPIXELS) + 0.5) / _SUBPIXELS - (reach + 0.5)
    inside = (fine[:, None] ** 2 + fine[None] ** 2 <= radius_px**2).astype(np.float64)
    kernel = inside.reshape(2 * reach + 1, _SUBPIXELS, 2 * reach + 1, _SUBPIXELS).mean((1, 3))
    return kernel / kernel.sum() if kernel.any() else np.ones((1, 1))


def defocus(rgb: np.ndarray, radius_px: float) -> np.ndarray:
    """uint8 [H, W, 3] -> the same with every point spread over a disc of this radius in pixels, which is what geometrical optics makes
    of a point that lies out of the focal plane. Beyond its border the image goes on as its mirror image. Radius 0: as it is."""
    kernel = disc(radius_px)
    reach = len(kernel) // 2
    if not reach:
        return rgb
    padded = np.pad(rgb.astype(np.float64), ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    if reach < 4:
        spread = ndimage.convolve(padded, kernel[..., None])[reach:-reach, reach:-reach]
    else:
        spread = signal.fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1))
    return np.clip(np.rint(spread), 0, 255).astype(np.uint8)
