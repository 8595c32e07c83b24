"""Lesion FROC as Camelyon16 scores it: lesions of a tumour mask, detections against them, sensitivity at false positives per slide.

A lesion is a connected part of the tumour mask after neighbouring parts have been joined. Lesions smaller than isolated tumour cells
(ITC) are not counted, and detections on them are neither right nor wrong. The numbers of the official evaluation (Bejnordi
et al. 2017) are those at 7.776 µm per pixel of the mask (level 5 of slides at 0.243); a mask at another scale gives other lesions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from srcc_jax.metrics import Interval, percentile_interval

JOIN_UM = 37.5  # what is nearer to tumour than this belongs to the lesion, so that parts within 75 µm are one
ITC_UM = 275.0  # longest axis below which a lesion is isolated tumour cells
FP_RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false positives per slide at which sensitivity is averaged


@dataclasses.dataclass(frozen=True)
class Lesions:
    """Lesions of a slide. label int32 [H, W], 0 outside, else 1 to n in row-major order of first pixels; area [n] in pixels;
    major_axis [n] in pixels; itc bool [n]; downsample: level-0 pixels per pixel of the mask."""

    label: np.ndarray
    area: np.ndarray
    major_axis: np.ndarray
    itc: np.ndarray
    downsample: float


@dataclasses.dataclass(frozen=True)
class SlideHits:
    """What the detections of a slide hit. false float [F]: scores of those outside lesions. true float [n]: the best score on each
    lesion, -inf where it was missed or is ITC. lesions: how many count. label int [D]: the lesion under each detection."""

    false: np.ndarray
    true: np.ndarray
    lesions: int
    label: np.ndarray


@dataclasses.dataclass(frozen=True)
class Froc:
    """fp_per_slide and sensitivity [T], one point per threshold, falling to (0, 0); sensitivity_at the rates asked for, and their
    mean, the score."""

    fp_per_slide: np.ndarray
    sensitivity: np.ndarray
    sensitivity_at: np.ndarray
    score: float


def find_lesions(mask: np.ndarray, *, mpp: float, downsample: float) -> Lesions:
    """Lesions of a tumour mask bool [H, W] with `mpp` µm per pixel.

    Pixels closer than 37.5 µm to tumour are added, holes filled, 8-connected parts labelled. The longest axis is that of the ellipse
    with the same second moments.
    """
    near = ndimage.distance_transform_edt(~mask) < JOIN_UM / mpp if mask.any() else np.zeros(mask.shape, bool)
    label, count = ndimage.label(ndimage.binary_fill_holes(near), structure=np.ones((3, 3)))
    area, axis = _sizes(label, count)
    return Lesions(label.astype(np.int32), area, axis, axis < ITC_UM / mpp, downsample)


def _sizes(label: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Area and major axis [count], both in pixels: four times the root of the largest eigenvalue of the second central moments."""
    row, column = np.nonzero(label)
    each = label[row, column] - 1
    area = np.bincount(each, minlength=count)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(each, values, minlength=count) / area

    row, column = row - mean(row)[each], column - mean(column)[each]
    across, along, mixed = mean(row * row), mean(column * column), mean(row * column)
    largest = (across + along) / 2 + np.sqrt(((across - along) / 2) ** 2 + mixed**2)
    return area, 4 * np.sqrt(largest)


def score_slide(lesions: Lesions | None, score: np.ndarray, x: np.ndarray, y: np.ndarray) -> SlideHits:
    """Detections of one slide, score [D] (finite) at level-0 pixels x, y [D], against its lesions (None: a slide without tumour).

    The lesion under a detection is looked up in the pixel of the mask that contains it; a detection off the mask is false.
    """
    score = np.asarray(score, np.float64)
    if not np.isfinite(score).all():
        raise ValueError("scores of detections must be finite: -inf stands for a lesion that was missed")
    if lesions is None:
        return SlideHits(score, np.zeros(0), 0, np.zeros(len(score), np.int32))
    column, row = (np.floor_divide(np.asarray(v, np.float64), lesions.downsample).astype(int) for v in (x, y))
    height, width = lesions.label.shape
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    label = np.where(inside, lesions.label[np.where(inside, row, 0), np.where(inside, column, 0)], 0)
    best = np.full(len(lesions.itc) + 1, -np.inf)
    np.maximum.at(best, label, score)
    return SlideHits(score[label == 0], np.where(lesions.itc, -np.inf, best[1:]), int((~lesions.itc).sum()), label)


def froc(slides: Sequence[SlideHits], *, rates: Sequence[float] = FP_RATES) -> Froc:
    """The FROC over all slides, with and without tumour. ValueError where no lesion counts.

    As in the official evaluation the lowest score of all gives no point; that is of no consequence unless every lesion was hit.
    """
    scores = _Scores.of(slides)
    return scores.froc(np.ones(len(slides)), rates)


def bootstrap_froc(
    slides: Sequence[SlideHits],
    *,
    rates: Sequence[float] = FP_RATES,
    iterations: int = 1000,
    seed: int,
    level: float = 0.95,
) -> Interval:
    """The score with its percentile interval, slides being drawn with replacement; resamples without a lesion are dropped and counted."""
    scores = _Scores.of(slides)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(iterations):
        times = np.bincount(rng.integers(len(slides), size=len(slides)), minlength=len(slides)).astype(float)
        if times @ scores.lesions:
            values.append(scores.froc(times, rates).score)
    value = scores.froc(np.ones(len(slides)), rates).score
    return percentile_interval(value, values, iterations=iterations, level=level)


@dataclasses.dataclass(frozen=True)
class _Scores:
    """Every score of every slide, highest first: score, slide and hit (is it of a lesion?) [N]; lesions int [S]; last bool [N]: the
    last of its ties."""

    score: np.ndarray
    slide: np.ndarray
    hit: np.ndarray
    lesions: np.ndarray

    @classmethod
    def of(cls, slides: Sequence[SlideHits]) -> _Scores:
        lesions = np.asarray([s.lesions for s in slides])
        if not lesions.sum():
            raise ValueError(f"none of {len(slides)} slides has a lesion that counts: a FROC needs at least one")
        parts = [(values, n, hit) for n, s in enumerate(slides) for values, hit in ((s.false, False), (s.true, True))]
        score = np.concatenate([values for values, _, _ in parts])
        slide = np.concatenate([np.full(len(values), n) for values, n, _ in parts])
        hit = np.concatenate([np.full(len(values), hit) for values, _, hit in parts])
        order = np.argsort(-score, kind="stable")
        return cls(score[order], slide[order], hit[order], lesions)

    def froc(self, times: np.ndarray, rates: Sequence[float]) -> Froc:
        """With slide s counted times[s] times."""
        weight = times[self.slide]
        drawn = weight > 0
        score, weight, hit = self.score[drawn], weight[drawn], self.hit[drawn]
        last = np.append(score[1:] != score[:-1], False)  # the lowest score gives no point
        fp = (np.cumsum(weight * ~hit)[last] / times.sum())[::-1]
        sensitivity = (np.cumsum(weight * hit)[last] / (times @ self.lesions))[::-1]
        fp, sensitivity = np.append(fp, 0.0), np.append(sensitivity, 0.0)
        at = np.interp(rates, fp[::-1], sensitivity[::-1])
        return Froc(fp, sensitivity, at, float(at.mean()))


def candidates(
    values: np.ndarray, *, downsample: float, radius: int, stop: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lesion candidates of a map [H, W] by non-maximum suppression: score, x, y [D], highest score first.

    As long as the largest value left exceeds `stop` it becomes a candidate, at the centre of its pixel in level-0 pixels, and the
    square from `radius` pixels before it up to, not including, `radius` after it is cleared. NaN is never a candidate. Of equal values the
    first in row-major order wins.
    """
    known = np.where(np.isnan(values), -np.inf, values)
    flat = np.flatnonzero(known > stop)
    flat = flat[np.argsort(-known.ravel()[flat], kind="stable")]
    alive = np.ones(known.shape, bool)
    kept = []
    for row, column in zip(*np.unravel_index(flat, known.shape)):
        if alive[row, column]:
            kept.append((row, column))
            alive[max(row - radius, 0) : row + radius, max(column - radius, 0) : column + radius] = False
    rows, columns = np.asarray(kept, int).reshape(-1, 2).T
    return known[rows, columns], (columns + 0.5) * downsample, (rows + 0.5) * downsample
