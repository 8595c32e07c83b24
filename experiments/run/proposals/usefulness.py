"""Which slides it is most useful to look at: those on which a model is in doubt, or at odds with itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.contours import Region
from data_pipelines.exports import StoredMap

ORDERS = ("usefulness", "nearness", "disagreement", "uncertain_mm2")


@dataclasses.dataclass(frozen=True)
class Doubt:
    """What a model's numbers say of a slide. score: of the slide; peak: the highest value of what is outlined, 0 where nothing is.
    nearness: 1 where the score is at its threshold, 0 where it is at an end. disagreement: 0 where score and peak are on the same side of
    their thresholds, else how sure the less sure of the two is, 0 to 1. uncertain_mm2: area of the map between the two limits."""

    slide_id: str
    score: float
    peak: float
    nearness: float
    disagreement: float
    uncertain_mm2: float

    @classmethod
    def of(
        cls,
        slide_id: str,
        found: StoredMap,
        score: float | None,
        regions: Sequence[Region],
        *,
        slide_threshold: float,
        map_threshold: float,
        limits: tuple[float, float],
    ) -> Doubt:
        """score None: the map's highest value stands for it."""
        known = found.values[np.isfinite(found.values)]
        peak = max((region.measurements["maximum"] for region in regions), default=0.0)
        score = float(known.max(initial=0.0)) if score is None else score
        near_slide, near_map = nearness(score, slide_threshold), nearness(peak, map_threshold)
        apart = (score > slide_threshold) != bool(regions)
        uncertain = int(((known >= limits[0]) & (known <= limits[1])).sum())
        return cls(
            slide_id,
            score,
            peak,
            near_slide,
            1 - max(near_slide, near_map) if apart else 0.0,
            uncertain * (found.mpp / 1000) ** 2,
        )


def nearness(score: float, threshold: float) -> float:
    """1 where a score between 0 and 1 is at its threshold, falling to 0 at either end."""
    room = 1 - threshold if score > threshold else threshold
    return 1 - abs(score - threshold) / room if room else 1.0


def usefulness(doubts: Sequence[Doubt]) -> np.ndarray:
    """float [S], 0 to 1: the mean of nearness, disagreement, and the uncertain area as a share of the largest among these slides."""
    largest = max((doubt.uncertain_mm2 for doubt in doubts), default=0.0)
    parts = [(d.nearness, d.disagreement, d.uncertain_mm2 / largest if largest else 0.0) for d in doubts]
    return np.asarray(parts, np.float64).reshape(-1, 3).mean(1)


def order(doubts: Sequence[Doubt], by: str) -> list[int]:
    """Positions of the slides, the most useful first by this one of ORDERS, of equals as they stand."""
    values = usefulness(doubts) if by == "usefulness" else np.asarray([getattr(doubt, by) for doubt in doubts])
    return np.argsort(-values, kind="stable").tolist()
