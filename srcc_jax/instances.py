"""Instances of cells from maps of probabilities: seeds, the random walker of Grady (2006) on what is undecided, boxes and scores.

Host side mathematics: the systems that the walker solves are sparse and of another size for every image.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.linalg import splu
from skimage.segmentation import watershed

BACKGROUND, EDGE, INNER = range(3)  # classes of a pixel
BETA = 130.0  # scikit-image's default
_FLOOR = 1e-10  # added to every weight, as scikit-image does, so that no edge is cut
_LARGEST = 400_000  # undecided pixels in one piece: beyond, the factors of its system may take gigabytes
_COLUMNS = 32  # seeds solved for at a time


@dataclasses.dataclass(frozen=True)
class Instances:
    """Of one image: label int32 [H, W], 0 for none, 1 to N; box float64 [N, 4], [x1, y1, x2, y2) in pixels; score float64 [N], the
    mean probability of the inner region over the seed; area int64 [N] in pixels; seed bool [H, W]: pixels of the seeds."""

    label: np.ndarray
    box: np.ndarray
    score: np.ndarray
    area: np.ndarray
    seed: np.ndarray

    def __len__(self) -> int:
        return len(self.score)


def find_instances(
    probability: np.ndarray, *, threshold: float, min_area: int, beta: float = BETA, spread: float | None = None
) -> Instances:
    """The cells on a map of probabilities float [H, W, 3] of background, edge and inner region (Li et al. 2019, §2.2).

    Seeds are the 4-connected parts, of at least `min_area` pixels, where the inner region is more probable than `threshold` and than
    either other class. The walker gives each pixel whose most probable class is not background, and which is no seed, to one of the
    seeds it is connected with; what is connected with none is background. spread: standard deviation that differences of probability
    are measured by; None: this map's own. A part of a larger map gets the labels that it has there, as far as its cells lie inside,
    where the larger map's is given.
    """
    inner = np.asarray(probability[..., INNER], np.float64)
    most_probable = probability.argmax(-1)
    parts, found = ndimage.label((inner > threshold) & (most_probable == INNER))
    size = np.bincount(parts.ravel(), minlength=found + 1)
    large = size >= min_area
    large[0] = False
    seeds = np.where(large, np.cumsum(large), 0)[parts].astype(np.int32)
    markers = np.where(seeds == 0, np.where(most_probable > 0, 0, -1), seeds)
    label = random_walker(inner, markers, beta=beta, spread=spread)
    return measure_instances(label, seeds, inner)


def measure_instances(label: np.ndarray, seeds: np.ndarray, inner: np.ndarray) -> Instances:
    """Boxes, areas and scores of instances: label, seeds int32 [H, W], 1 to N; inner [H, W]: probability of the inner region."""
    count = int(seeds.max(initial=0))
    numbers = np.arange(1, count + 1)
    corners = [
        (columns.start, rows.start, columns.stop, rows.stop)
        for rows, columns in (places for places in ndimage.find_objects(label, count) if places is not None)
    ]
    score = ndimage.mean(inner, seeds, numbers) if count else np.zeros(0)
    area = np.bincount(label.ravel(), minlength=count + 1)[1:]
    return Instances(label, np.asarray(corners, np.float64).reshape(-1, 4), np.asarray(score), area, seeds > 0)


def random_walker(
    data: np.ndarray, labels: np.ndarray, *, beta: float = BETA, spread: float | None = None
) -> np.ndarray:
    """int32 [H, W]: the seed that a walker starting at each undecided pixel most probably reaches first; of equals the lowest.

    data float [H, W]; labels int [H, W]: -1 inactive, 0 undecided, 1 to N seeds. A step between 4-neighbours has the weight
    exp(-beta Δ² / (10 spread)) + 1e-10, as in scikit-image, whose `spread` is the standard deviation of the whole array (None). Inactive
    pixels, and undecided ones that no seed can reach, come back as 0. Labels are those that scikit-image's exact solver gives, found
    piece by piece: a connected piece of undecided pixels that touches one seed is that seed's, and only one that touches several is
    solved for. A piece of more than 400,000 pixels is flooded by a watershed instead, which is as deterministic and needs no memory.
    """
    result = np.maximum(labels, 0).astype(np.int32)
    pieces, count = ndimage.label(labels == 0)
    if not count:
        return result
    spread = float(np.std(data)) if spread is None else spread
    scale = beta / (10 * spread) if spread > 0 else 0.0
    for number, places in enumerate(ndimage.find_objects(pieces), start=1):
        rows, columns = (slice(max(0, p.start - 1), p.stop + 1) for p in places)
        window = (rows, columns)
        undecided = pieces[window] == number
        owner = _owner(np.asarray(data[window], np.float64), undecided, result[window], scale)
        result[window][undecided] = owner
    return result


def walker_probabilities(
    data: np.ndarray, undecided: np.ndarray, labels: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Seeds that touch the undecided pixels int [k], ascending, and the probability of each at each of them, float64 [n, k].

    data float [H, W]; undecided bool [H, W], n pixels in row-major order; labels int [H, W]: seeds, 0 where there is none. Every
    connected piece of the undecided pixels touches a seed. scale: what the squared differences are multiplied by in the exponent.
    """
    number = np.full(data.shape, -1)
    number[undecided] = np.arange(undecided.sum())
    active = undecided | (labels > 0)
    size = int(undecided.sum())
    diagonal = np.zeros(size)
    inside: list[np.ndarray] = []  # (row, column, weight) of pairs of undecided pixels
    outside: list[np.ndarray] = []  # (row, seed, weight) of steps into a seed
    for here, there in (
        ((slice(None), slice(None, -1)), (slice(None), slice(1, None))),
        (slice(None, -1), slice(1, None)),
    ):
        pair = active[here] & active[there] & (undecided[here] | undecided[there])
        weight = np.exp(-scale * np.square(data[here][pair] - data[there][pair])) + _FLOOR
        for a, b in ((here, there), (there, here)):
            row, other, seed = number[a][pair], number[b][pair], labels[b][pair]
            leaves = row >= 0
            diagonal += np.bincount(row[leaves], weight[leaves], minlength=size)
            both, into = leaves & (other >= 0), leaves & (other < 0)
            inside.append(np.stack([row[both], other[both], weight[both]]))
            outside.append(np.stack([row[into], seed[into], weight[into]]))
    row, column, weight = np.concatenate(inside, axis=1)
    index = np.arange(size)
    laplacian = sparse.csc_array((-weight, (row, column)), shape=(size, size)) + sparse.csc_array(
        (diagonal, (index, index))
    )
    touched, (row, seed, weight) = _seeds_touched(outside)
    steps = sparse.csc_array((weight, (row, np.searchsorted(touched, seed))), shape=(size, len(touched)))
    factors = splu(laplacian, permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True}, diag_pivot_thresh=0.0)
    blocks = (slice(begin, begin + _COLUMNS) for begin in range(0, len(touched), _COLUMNS))
    return touched, np.concatenate([factors.solve(steps[:, block].toarray()) for block in blocks], axis=1)


def _seeds_touched(outside: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    steps = np.concatenate(outside, axis=1)
    return np.unique(steps[1]).astype(int), steps


def _owner(data: np.ndarray, undecided: np.ndarray, labels: np.ndarray, scale: float) -> np.ndarray | int:
    """The seed of each undecided pixel of one piece, in row-major order; one number where it is the same for all."""
    touching = np.unique(labels[ndimage.binary_dilation(undecided) & (labels > 0)])
    if len(touching) < 2:
        return int(touching[0]) if len(touching) else 0
    if undecided.sum() > _LARGEST:
        seeds = np.where(np.isin(labels, touching), labels, 0)
        return watershed(-data, seeds, mask=undecided | (seeds > 0))[undecided]
    touched, probability = walker_probabilities(data, undecided, labels, scale)
    return touched[probability.argmax(1)]
