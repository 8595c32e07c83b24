"""Numbers of merit of slide scores: ROC AUC, log loss, average precision, confusion, each with a bootstrap interval.

Every metric has one form, `metric(label [N], score [N], weight=[..., N]) -> [...]`: a resample is a row of weights (how
often each slide was drawn), so the bootstrap is one call on [iterations, N] weights instead of a thousand calls.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

import numpy as np

LOG_LOSS_CLIP = float(np.finfo(np.float64).eps)  # scikit-learn's for float64; saturated models make the choice matter
_CHUNK = 4_000_000  # weights held at a time by the bootstrap: 32 MB


class Metric(Protocol):
    """label [N] in {0, 1}, score [N], weight [..., N] (None: ones) -> [...]; NaN where the weights leave it undefined."""

    def __call__(self, label: np.ndarray, score: np.ndarray, /, *, weight: np.ndarray | None = None) -> np.ndarray: ...


@dataclass(frozen=True)
class Interval:
    """A number, its percentile bootstrap interval, and how many resamples were dropped for holding one class only."""

    value: float
    low: float
    high: float
    dropped: int = 0


@dataclass(frozen=True)
class RocCurve:
    """fpr, tpr, threshold [T], from (0, 0) at threshold inf to (1, 1); called positive is score >= threshold."""

    fpr: np.ndarray
    tpr: np.ndarray
    threshold: np.ndarray

    @property
    def area(self) -> float:
        return float(np.trapezoid(self.tpr, self.fpr))


@dataclass(frozen=True)
class Confusion:
    """Weights [...] of the four outcomes, rows called positive where score >= threshold."""

    tn: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    tp: np.ndarray


def roc_auc(label: np.ndarray, score: np.ndarray, *, weight: np.ndarray | None = None) -> np.ndarray:
    """P(score of a positive > score of a negative) + half of P(equal); ValueError where all labels are one class."""
    tp, fp = _at_or_above(label, score, weight)
    return _divide(np.trapezoid(_from_zero(tp), _from_zero(fp), axis=-1), tp[..., -1] * fp[..., -1])


def average_precision(label: np.ndarray, score: np.ndarray, *, weight: np.ndarray | None = None) -> np.ndarray:
    """Sum over thresholds of (R_n - R_{n-1}) P_n, without interpolation; ValueError where all labels are one class."""
    tp, fp = _at_or_above(label, score, weight)
    precision = _divide(tp, tp + fp, empty=0.0)  # nothing drawn so far: recall does not grow there either
    return _divide((np.diff(_from_zero(tp), axis=-1) * precision).sum(-1), tp[..., -1])


def log_loss(
    label: np.ndarray, score: np.ndarray, *, weight: np.ndarray | None = None, clip: float = LOG_LOSS_CLIP
) -> np.ndarray:
    """Mean of -ln(probability given to the true class), probabilities in [0, 1] clipped below at `clip`."""
    label, score, weight = _checked(label, score, weight)
    if score.min() < 0 or score.max() > 1:
        raise ValueError(f"log loss needs probabilities in [0, 1]; scores reach {score.min():g} to {score.max():g}")
    each = -np.log(np.maximum(np.where(label, score, 1 - score), clip))
    return _divide((weight * each).sum(-1), weight.sum(-1))


def confusion(label: np.ndarray, score: np.ndarray, *, threshold: float, weight: np.ndarray | None = None) -> Confusion:
    """True and false negatives and positives at a threshold; a score equal to the threshold is called positive."""
    label, score, weight = _checked(label, score, weight)
    called = score >= threshold
    outcomes = (~label & ~called, ~label & called, label & ~called, label & called)
    return Confusion(*((weight * outcome).sum(-1) for outcome in outcomes))


def sensitivity(
    label: np.ndarray, score: np.ndarray, *, threshold: float, weight: np.ndarray | None = None
) -> np.ndarray:
    """Share of the positives that are called positive; NaN without positives."""
    counts = confusion(label, score, threshold=threshold, weight=weight)
    return _divide(counts.tp, counts.tp + counts.fn)


def specificity(
    label: np.ndarray, score: np.ndarray, *, threshold: float, weight: np.ndarray | None = None
) -> np.ndarray:
    """Share of the negatives that are called negative; NaN without negatives."""
    counts = confusion(label, score, threshold=threshold, weight=weight)
    return _divide(counts.tn, counts.tn + counts.fp)


def accuracy(label: np.ndarray, score: np.ndarray, *, threshold: float, weight: np.ndarray | None = None) -> np.ndarray:
    """Share of all that is called what it is."""
    counts = confusion(label, score, threshold=threshold, weight=weight)
    right = counts.tp + counts.tn
    return _divide(right, right + counts.fp + counts.fn)


def dice(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + FN) of counts of pixels [...], float64; 1 where nothing is there and nothing was called."""
    tp, fp, fn = (np.asarray(count, np.float64) for count in (tp, fp, fn))
    return _divide(2 * tp, 2 * tp + fp + fn, empty=1.0)


def wilson_interval(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """A proportion and its Wilson score interval with continuity correction (Newcombe 1998, method 4): 99 of 102 is 0.9706 [0.9102,
    0.9924]. NaN of no trials; its ends are 0 and 1 at the most."""
    if not trials:
        return Interval(np.nan, np.nan, np.nan)
    n, p, z = trials, successes / trials, NormalDist().inv_cdf((1 + level) / 2)
    q = 1 - p
    middle, scale = 2 * n * p + z**2, 2 * (n + z**2)
    low = (middle - 1 - z * math.sqrt(z**2 - 2 - 1 / n + 4 * p * (n * q + 1))) / scale if successes else 0.0
    high = (middle + 1 + z * math.sqrt(z**2 + 2 - 1 / n + 4 * p * (n * q - 1))) / scale if successes < n else 1.0
    return Interval(p, max(low, 0.0), min(high, 1.0))


def roc_curve(label: np.ndarray, score: np.ndarray) -> RocCurve:
    """One point per distinct score (ties together), none left out; ValueError where all labels are one class."""
    tp, fp = _at_or_above(label, score, None)
    thresholds = np.unique(np.asarray(score, np.float64))[::-1]
    return RocCurve(_from_zero(fp) / fp[-1], _from_zero(tp) / tp[-1], np.concatenate([[np.inf], thresholds]))


def bootstrap(
    metric: Metric,
    label: np.ndarray,
    score: np.ndarray,
    *,
    units: Sequence | np.ndarray | None = None,
    iterations: int = 1000,
    seed: int,
    level: float = 0.95,
) -> Interval:
    """Percentile interval over resamples with replacement of slides, or of `units` [N] (patients) with all their slides.

    Resamples of one class are dropped and counted, whatever the metric. If none is left, low and high are NaN. Equal
    seeds draw equal resamples, so metrics and models over the same slides are comparable resample by resample.
    """
    label, score, _ = _checked(label, score, None)
    if units is not None and len(units) != len(label):
        raise ValueError(f"{len(units)} units for {len(label)} slides: give each slide its patient")
    unit = np.arange(len(label)) if units is None else np.unique(np.asarray(units), return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    values = []
    per_chunk = max(1, _CHUNK // len(label))
    for begin in range(0, iterations, per_chunk):
        weight = _resamples(rng, min(per_chunk, iterations - begin), unit)
        both = weight[:, label].any(1) & weight[:, ~label].any(1)
        values.append(metric(label, score, weight=weight[both]))
    return percentile_interval(float(metric(label, score)), np.concatenate(values), iterations=iterations, level=level)


def percentile_interval(
    value: float, resampled: Sequence[float] | np.ndarray, *, iterations: int, level: float = 0.95
) -> Interval:
    """The interval of a value from what its resamples gave: of `iterations`, those missing in `resampled` were dropped.

    Where all were, its ends are NaN.
    """
    outside = (1 - level) / 2
    low, high = np.quantile(resampled, [outside, 1 - outside]) if len(resampled) else (np.nan, np.nan)
    return Interval(value, float(low), float(high), iterations - len(resampled))


def _resamples(rng: np.random.Generator, count: int, unit: np.ndarray) -> np.ndarray:
    """[count, N] times each slide was drawn, when as many units as there are, are drawn with replacement."""
    units = int(unit.max()) + 1
    drawn = rng.integers(units, size=(count, units)) + units * np.arange(count)[:, None]
    times = np.bincount(drawn.ravel(), minlength=count * units).reshape(count, units)
    return times[:, unit].astype(np.float64)


def _checked(
    label: np.ndarray, score: np.ndarray, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """label [N] bool, score [N] float64, weight [..., N] float64, or ValueError."""
    label, score = np.asarray(label), np.asarray(score, np.float64)
    if label.ndim != 1 or label.shape != score.shape or not label.size:
        raise ValueError(f"labels and scores are one number per slide, at least one; got {label.shape}, {score.shape}")
    if not np.isin(label, (0, 1)).all():
        raise ValueError(f"labels are 0 or 1; found {sorted(set(label.tolist()) - {0, 1})[:5]}")
    if not np.isfinite(score).all():
        raise ValueError(
            f"{(~np.isfinite(score)).sum()} of {len(score)} scores are not finite: leave failed slides out"
        )
    weight = np.ones(len(label)) if weight is None else np.asarray(weight, np.float64)
    if weight.shape[-1] != len(label):
        raise ValueError(f"weights of {weight.shape[-1]} slides for {len(label)} labels")
    return label.astype(bool), score, weight


def _at_or_above(label: np.ndarray, score: np.ndarray, weight: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Weight of positives and of negatives at or above each distinct score, highest score first: two [..., T]."""
    label, score, weight = _checked(label, score, weight)
    if label.all() or not label.any():
        raise ValueError(f"both classes are needed, but all {len(label)} slides are labelled {int(label[0])}")
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))  # the last of each run of ties
    label, weight = label[order], weight[..., order]
    return np.cumsum(weight * label, -1)[..., last], np.cumsum(weight * ~label, -1)[..., last]


def _from_zero(values: np.ndarray) -> np.ndarray:
    """[..., T] -> [..., T + 1], starting at 0."""
    return np.concatenate([np.zeros_like(values[..., :1]), values], -1)


def _divide(a: np.ndarray, b: np.ndarray, *, empty: float = np.nan) -> np.ndarray:
    """a / b, and `empty` where b is 0."""
    return np.where(b == 0, empty, a / np.where(b == 0, 1, b))


def best_threshold(label: np.ndarray, score: np.ndarray) -> tuple[float, float]:
    """The threshold with the highest accuracy, and that: positive is what scores at least that. label [N], score float [N].

    Thresholds lie halfway between neighbouring scores, or at the lowest, or above the highest; of equals the lowest is taken.
    """
    score, positive = np.asarray(score, np.float64), np.asarray(label) > 0
    values = np.unique(score)
    thresholds = np.concatenate([values[:1], (values[1:] + values[:-1]) / 2, [np.nextafter(values[-1], np.inf)]])
    below = np.searchsorted(np.sort(score[~positive]), thresholds)  # negative ones rightly left
    above = positive.sum() - np.searchsorted(np.sort(score[positive]), thresholds)
    right = (below + above) / len(score)
    best = int(right.argmax())
    return float(thresholds[best]), float(right[best])
