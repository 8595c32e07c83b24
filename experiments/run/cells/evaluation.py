"""Detected cells against annotated boxes: the criteria of DigestPath and Li 2019 with intervals over images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data_pipelines.boxes import NONE, Boxes
from srcc_jax.detection_metrics import (
    FP_RATES,
    MIN_IOU,
    Matches,
    bootstrap_images,
    challenge_false_positives,
    collective_recall,
    instance_recall,
    match,
    normal_false_positives,
    precise_recall,
    recall_at_rates,
)
from srcc_jax.metrics import Interval

Metric = Callable[[Sequence[Matches], Sequence[np.ndarray]], float]
INSTANCE_RECALL, FALSE_POSITIVES, FROC = "instance recall", "false positives per normal image", "FROC (mean recall)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """How detections are scored. iou: a detection matches a box above it; covered: a box is found collectively above this share; steal,
    rule: of `detection_metrics`; challenge: the challenge's numbers, too."""

    iou: float = MIN_IOU
    covered: float = 0.3
    steal: bool = False
    rule: str = "above_next"
    challenge: bool = False

    def matches(self, truth: Mapping[str, Boxes | np.ndarray], found: Mapping[str, Boxes]) -> dict[str, Matches]:
        """Image -> its detections matched to its boxes; an image that `found` does not name has no detections."""
        boxes = {name: value.box if isinstance(value, Boxes) else value for name, value in truth.items()}
        return {
            name: match(box, found.get(name, NONE).box, found.get(name, NONE).score, min_iou=self.iou, steal=self.steal)
            for name, box in boxes.items()
        }

    def metrics(self, *, normal: bool) -> dict[str, Metric]:
        """Name -> metric of (annotated images, scores on normal images). normal: there are such images."""
        chosen: dict[str, Metric] = {
            INSTANCE_RECALL: lambda images, normal: instance_recall(images),
            f"collective recall (> {self.covered:g} covered)": self._collective,
        }
        if self.challenge:
            chosen["recall at precision ≥ 0.2"] = lambda images, normal: precise_recall(images)
        if normal:
            recall = functools.partial(recall_at_rates, rule=self.rule)
            chosen[FALSE_POSITIVES] = lambda images, normal: normal_false_positives(normal)
            chosen[FROC] = lambda images, normal: float(recall(images, normal).mean())
            for place, rate in enumerate(FP_RATES):
                chosen[f"recall at {rate} false positives"] = functools.partial(_recall_at, recall, place)
            if self.challenge:
                chosen["100 - false positives"] = lambda images, normal: challenge_false_positives(normal)
        return chosen

    def merit(self, images: Sequence[Matches], normal: Sequence[np.ndarray], *, seed: int) -> dict[str, Interval]:
        """Name -> value with its interval over images; empty where no image has a box."""
        if not any(image.truths for image in images):
            return {}
        chosen = self.metrics(normal=bool(normal))
        return {name: bootstrap_images(metric, images, normal, seed=seed) for name, metric in chosen.items()}

    def _collective(self, images: Sequence[Matches], normal: Sequence[np.ndarray]) -> float:
        return collective_recall(images, covered=self.covered)


def _recall_at(
    recall: Callable[..., np.ndarray], place: int, images: Sequence[Matches], normal: Sequence[np.ndarray]
) -> float:
    return float(recall(images, normal)[place])
