"""Numbers that sum up a slide's tumour probability map, for a classifier of slides (after Wang et al. 2016, HMS&MIT).

The paper names some of its 28 features: share of tumour in tissue, area ratio to the convex hull, mean prediction, longest axis. These are
31, those of a public reimplementation, in µm instead of pixels.
"""

from __future__ import annotations

import warnings

import numpy as np
from scipy.stats import kurtosis, skew
from skimage.measure import label, regionprops

HIGH, LOW = 0.9, 0.5  # Wang et al. 2016: regions above 0.9; ours: the largest region is sought from 0.5 on
_SHAPES = ("area", "perimeter", "eccentricity", "extent", "solidity")
_MOMENTS = {"max": np.max, "mean": np.mean, "variance": np.var, "skewness": skew, "kurtosis": kurtosis}
NAMES = (
    "regions",
    "tumour_share_of_tissue",
    "largest_area_um2",
    "largest_axis_um",
    "tumour_area_um2",
    "mean_prediction",
    *(f"{moment}_{shape}" for shape in _SHAPES for moment in _MOMENTS),
)


def map_features(values: np.ndarray, *, mpp: float, high: float = HIGH, low: float = LOW) -> dict[str, float]:
    """NAMES -> number. values float [H, W], NaN where there is no tissue; mpp: µm per cell.

    Regions are 8-connected cells of at least `high`: their number, share of the tissue, area, mean value, and the moments of their area
    (µm²), perimeter (µm), eccentricity, extent (area / bounding box) and solidity (area / convex hull). The largest area and its longest
    axis are of regions of at least `low`. Where there is no region, and for moments that one region does not have, 0.
    """
    tissue = np.isfinite(values)
    score = np.where(tissue, values, -np.inf)
    regions, wide = (regionprops(label(score >= limit, connectivity=2)) for limit in (high, low))
    largest = max(wide, key=lambda region: region.area, default=None)
    tumour = score >= high
    scale = {"area": mpp**2, "perimeter": mpp}
    found = {
        "regions": len(regions),
        "tumour_share_of_tissue": tumour.sum() / max(1, tissue.sum()),
        "largest_area_um2": largest.area * mpp**2 if largest else 0.0,
        "largest_axis_um": largest.axis_major_length * mpp if largest else 0.0,
        "tumour_area_um2": tumour.sum() * mpp**2,
        "mean_prediction": values[tumour].mean() if regions else 0.0,
    }
    for shape in _SHAPES:
        each = np.array([getattr(region, shape) for region in regions]) * scale.get(shape, 1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of equal regions, which have no skewness
            found |= {f"{name}_{shape}": moment(each) if regions else 0.0 for name, moment in _MOMENTS.items()}
    return {name: float(np.nan_to_num(found[name])) for name in NAMES}
