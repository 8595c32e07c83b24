"""Detected boxes against annotated ones, where the annotation is incomplete: recall on annotated images, false positives on normal ones.

Boxes are [x1, y1, x2, y2) in pixels. On images with annotated cells an unmatched detection is not counted against the detector, because
the cell may be there and not annotated; false positives are counted on images known to have none (Li et al. 2019, §3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from srcc_jax.metrics import Interval, percentile_interval

MIN_IOU = 0.3  # a detection matches above this
FP_RATES = (1, 2, 4, 8, 16, 32)  # false positives per normal image at which recall is averaged
RULES = ("above_next", "at_kth")


@dataclasses.dataclass(frozen=True)
class Matches:
    """Of one annotated image: score float and hit bool [P], by detection; coverage float [G]: share of each annotated box that lies
    under detections."""

    score: np.ndarray
    hit: np.ndarray
    coverage: np.ndarray

    @property
    def truths(self) -> int:
        return len(self.coverage)


def intersection_over_union(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a [A, 4], b [B, 4] -> [A, B]; 0 where both are empty."""
    both = _overlap(a, b)
    union = _area(a)[:, None] + _area(b)[None] - both
    return np.where(union > 0, both / np.where(union > 0, union, 1), 0.0)


def match(
    truth: np.ndarray, box: np.ndarray, score: np.ndarray, *, min_iou: float = MIN_IOU, steal: bool = False
) -> Matches:
    """Greedy matching in descending score (ties in the order given): truth [G, 4], box [P, 4], score [P].

    Each detection takes the annotated box with the largest IoU, if that exceeds `min_iou`, of those still free. steal: of all; where
    it is taken already, the detection is lost (as some public evaluations do).
    """
    truth, box = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (truth, box))
    score = np.asarray(score, np.float64)
    iou = intersection_over_union(box, truth)
    free, hit = np.ones(len(truth), bool), np.zeros(len(box), bool)
    for n in np.argsort(-score, kind="stable") if len(truth) else ():
        best = int(np.where(free | steal, iou[n], -1).argmax())
        hit[n] = free[best] and iou[n, best] > min_iou
        free[best] &= not hit[n]
    return Matches(score, hit, np.asarray([_covered(each, box) for each in truth]))


def instance_recall(images: Sequence[Matches]) -> float:
    """Matched share of all annotated boxes of all images; ValueError where there is none."""
    return float(sum(image.hit.sum() for image in images) / _truths(images))


def collective_recall(images: Sequence[Matches], *, covered: float = 0.3) -> float:
    """Share of all annotated boxes of which more than `covered` lies under detections, however these cut cells apart."""
    return float(sum((image.coverage > covered).sum() for image in images) / _truths(images))


def normal_false_positives(normal: Sequence[np.ndarray]) -> float:
    """Mean number of detections on a normal image; normal: the scores [P] of each image."""
    if not normal:
        raise ValueError("false positives are counted on images without cells, of which there is none")
    return float(np.mean([len(scores) for scores in normal]))


def challenge_false_positives(normal: Sequence[np.ndarray]) -> float:
    """The challenge's score of false positives, 100 less their mean number, not below 0."""
    return max(100.0 - normal_false_positives(normal), 0.0)


def precise_recall(images: Sequence[Matches], *, min_precision: float = 0.2) -> float:
    """The challenge's recall: that of all detections submitted, 0 where fewer than `min_precision` of them match."""
    detections = sum(len(image.hit) for image in images)
    precise = sum(image.hit.sum() for image in images) >= min_precision * detections
    return instance_recall(images) if precise else 0.0


def recall_at_rates(
    images: Sequence[Matches],
    normal: Sequence[np.ndarray],
    *,
    rates: Sequence[float] = FP_RATES,
    rule: str = "above_next",
) -> np.ndarray:
    """Recall [rates] where at most rate false positives per normal image are allowed; its mean is the FROC score of the paper.

    rule: "above_next" keeps every detection scored above the first false positive too many, which is the best that the rate allows;
    "at_kth" keeps those scored at least as high as the last one allowed. Where there are no more false positives, all are kept.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}: choose one of {', '.join(RULES)}")
    normal_false_positives(normal)
    false = np.sort(np.concatenate(list(normal)))[::-1]
    hits = np.concatenate([image.score[image.hit] for image in images])
    truths = _truths(images)
    recalls = []
    for rate in rates:
        allowed = int(np.floor(rate * len(normal) + 1e-9))
        if allowed >= len(false) or (rule == "at_kth" and allowed == 0):
            kept = len(hits) if allowed >= len(false) else 0
        else:
            kept = (hits > false[allowed]).sum() if rule == "above_next" else (hits >= false[allowed - 1]).sum()
        recalls.append(kept / truths)
    return np.asarray(recalls)


def bootstrap_images(
    metric: Callable[[Sequence[Matches], Sequence[np.ndarray]], float],
    images: Sequence[Matches],
    normal: Sequence[np.ndarray],
    *,
    iterations: int = 1000,
    seed: int,
    level: float = 0.95,
) -> Interval:
    """A metric of (annotated images, scores on normal images) with its percentile interval.

    Annotated and normal images are drawn with replacement, each among themselves; resamples without an annotated box are dropped
    and counted.
    """
    rng, values = np.random.default_rng(seed), []
    for _ in range(iterations):
        drawn = [images[n] for n in rng.integers(len(images), size=len(images))]
        others = [normal[n] for n in rng.integers(max(1, len(normal)), size=len(normal))]
        if any(image.truths for image in drawn):
            values.append(metric(drawn, others))
    return percentile_interval(float(metric(images, normal)), values, iterations=iterations, level=level)


def _truths(images: Sequence[Matches]) -> int:
    truths = sum(image.truths for image in images)
    if not truths:
        raise ValueError(f"none of {len(images)} images has an annotated box: recall needs at least one")
    return truths


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Area of the intersections, [A, B]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.prod(np.maximum(high - low, 0), axis=2)


def _covered(truth: np.ndarray, boxes: np.ndarray) -> float:
    """Share of the box truth [4] that lies under the union of boxes [P, 4]: between the borders of the boxes, cell by cell."""
    inside = np.stack([np.clip(boxes[:, axis], *truth[axis % 2 :: 2]) for axis in range(4)], axis=1)
    x, y = (np.unique(np.append(inside[:, axis::2], truth[axis::2])) for axis in (0, 1))
    middle_x, middle_y = (x[1:] + x[:-1]) / 2, (y[1:] + y[:-1]) / 2
    in_x = (inside[:, None, 0] <= middle_x) & (middle_x < inside[:, None, 2])
    in_y = (inside[:, None, 1] <= middle_y) & (middle_y < inside[:, None, 3])
    under = (in_y[:, :, None] & in_x[:, None, :]).any(0)
    area = float(_area(truth[None])[0])
    return float((under * np.outer(np.diff(y), np.diff(x))).sum() / area) if area else 0.0
