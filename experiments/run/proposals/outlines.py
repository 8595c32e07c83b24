"""From the probability map of a slide to outlines that somebody can edit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from skimage.measure import approximate_polygon

from data_pipelines.contours import Region, find_regions
from data_pipelines.exports import StoredMap
from srcc_jax.kernels.heat_maps import HeatMap, smoothed

_LEAST_SIGMA = 0.3  # of a cell: a narrower Gaussian changes nothing


@dataclasses.dataclass(frozen=True)
class OutlineRule:
    """threshold: probability from which on something is outlined; label: the class of the outlines; least_mm2: smaller ones, and smaller
    holes, are left out; smooth_um: σ of the Gaussian over the map before; simplify_um: how far an outline may be moved to save vertices."""

    threshold: float
    label: str
    least_mm2: float
    smooth_um: float
    simplify_um: float


def find_outlines(found: StoredMap, rule: OutlineRule) -> list[Region]:
    """The outlines of a map, in level-0 px, the one with the highest maximum first. Score of each, and its measurement "confidence": the
    mean probability inside."""
    heat_map = HeatMap(found.values, found.missing, found.downsample, found.origin, found.mpp)
    if rule.smooth_um / found.mpp >= _LEAST_SIGMA:
        heat_map = smoothed(heat_map, sigma=rule.smooth_um / found.mpp)
    least = max(1, math.ceil(rule.least_mm2 * 1e6 / found.mpp**2))
    regions = find_regions(heat_map, thresholds=(rule.threshold,), label=rule.label, least_cells=least)
    return [_editable(region, found, rule) for region in regions]


def _editable(region: Region, found: StoredMap, rule: OutlineRule) -> Region:
    level0_um = found.mpp / found.downsample
    tolerance, least_px = rule.simplify_um / level0_um, rule.least_mm2 * 1e6 / level0_um**2
    confidence = region.measurements["mean"]
    shape = dataclasses.replace(
        region.shape,
        exterior=_simplified(region.shape.exterior, tolerance),
        holes=tuple(_simplified(hole, tolerance) for hole in region.shape.holes if _area(hole) >= least_px),
        name=f"confidence {confidence:.2f}",
        group=rule.label,
        score=confidence,
    )
    kept = {name: region.measurements[name] for name in ("threshold", "maximum", "area µm^2")}
    return Region(shape, {"confidence": confidence, **kept})


def _simplified(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """The ring [n, 2] by Douglas and Peucker's rule; as it is where fewer than four vertices would be left."""
    closed = approximate_polygon(np.concatenate([ring, ring[:1]]), tolerance)
    return closed[:-1] if len(closed) > 4 else ring


def _area(ring: np.ndarray) -> float:
    x, y = (ring - ring[0]).T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def outlined_mm2(regions: Sequence[Region]) -> float:
    """Area of all outlines together, before they were simplified."""
    return sum(region.measurements["area µm^2"] for region in regions) / 1e6
