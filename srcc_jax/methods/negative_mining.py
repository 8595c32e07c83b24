"""Hard negative mining (Lee et al. 2023): settings, splits, the rule of false positives, the union of neighbours, numbers of merit.

A weak model is trained on labelled patches. Of each negative patch that it takes for a positive one, the most similar tiles of slides
known negative are looked up in the space of its features; a strong model is trained on the labelled patches and these tiles.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np

from srcc_jax.metrics import Metric, accuracy, average_precision, confusion, roc_auc, sensitivity, specificity
from srcc_jax.settings import check_settings, setting

QUERIES = ("l2", "cosine", "random")
SCHEDULES = ("cosine", "by_epoch")
SOURCES = ("validation", "out_of_fold")
THRESHOLDS = (0.5, 0.1)  # of the tables (the larger logit, in the released code), and of the text
SEEDS = (42, 43, 44)  # of the three runs of each setting, in the released code
_SPLIT, _FOLDS, _SUBSET, _RANDOM = range(4)  # purposes that a seed is folded with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run. Numbers without 'ours' are the paper's, or of its released code where that is said."""

    backbone: str = setting(
        "resnet18", "the network; any classifier that import_weights --list shows (Methods: ResNet-18)"
    )
    positive: str = setting("pos", "labels of patches that are positive, with commas between them (released code: pos)")
    tile: int = setting(
        224, "side of a patch as the network sees it, in pixels; others are resized (Methods)", least=32
    )
    mpp: float = setting(
        1024 / 224, "µm per pixel of tiles cut from slides: 512 px of 2 µm, resized to 224 (Methods)", above=0
    )
    weak_share: float = setting(
        1 / 3, "share of a negative slide's tiles that are kept, at random (Methods)", above=0, most=1
    )
    positive_spots: int = setting(
        6, "positive patches cut from each annotated slide (ours; the paper has 302 of 48 slides)", least=1
    )
    negative_spots: int = setting(
        14, "negative patches cut from each annotated slide (ours; the paper has 671 of 48 slides)", least=1
    )
    tile_seed: int = setting(
        0,
        "seed of what is cut from slides and of which tiles are kept, so that seeds of a run share them (ours)",
        least=0,
    )
    min_tissue: float = setting(
        0.5, "tiles of slides with less tissue than this share are left out (ours)", least=0, most=1
    )
    batch: int = setting(32, "patches in a batch (released code)", least=1)
    scoring_batch: int = setting(256, "patches in a batch that is only scored (released code)", least=1)
    epochs: int = setting(
        30, "passes over the training patches; that of least validation loss is kept (Methods)", least=1
    )
    epoch_steps: int | None = setting(
        None,
        "steps of an epoch; none: as many as the training patches fill; a number makes weak and strong fits equally long (ours)",
        least=1,
    )
    learning_rate: float = setting(1e-4, "Adam's learning rate (Methods)", above=0)
    schedule: str = setting(
        "cosine",
        "cosine: to 0 over all steps (Methods); by_epoch: as the released code has it, 5 % lower at the end of 30 epochs of 20 steps",
        choices=SCHEDULES,
    )
    balanced: bool = setting(True, "each class is drawn equally often, with replacement (released code)")
    views: bool = setting(True, "train on random views: scale, symmetry, distortion, filter, light (released code)")
    bn_momentum: float | None = setting(
        None,
        "share of BatchNorm's running statistics that a step keeps; none: that of the weights' source (ours: 0.9 for short fits from "
        "weights of Keras or Lite, which keep 0.99)",
        above=0,
        below=1,
    )
    swap_channels: bool = setting(
        False, "give the network blue for red, as the released code does; ImageNet weights expect the other order"
    )
    alpha: int = setting(20, "tiles looked up for each false positive (Methods)", least=1)
    query: str = setting(
        "l2",
        "how they are found; l2, cosine: by the distance of features (Methods); random: the control, and what the released code does",
        choices=QUERIES,
    )
    threshold: float = setting(
        0.1, "a negative patch of at least this probability is a false positive (Methods)", above=0, below=1
    )
    false_positives: str = setting(
        "validation",
        "where they are looked for; validation: as the released code; out_of_fold: among the training patches, each judged by a model "
        "that was not trained on its slide, so that the validation patches select no training data (ours)",
        choices=SOURCES,
    )
    folds: int = setting(5, "parts of the training slides for --false_positives=out_of_fold (ours)", least=2)
    seed: int = setting(SEEDS[0], "seed of the split and of everything random (released code: 42, 43, 44)", least=0)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.tile % 32:
            raise ValueError(f"--tile={self.tile} must be a multiple of 32, by which networks reduce a patch")

    @property
    def positives(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.positive.split(","))


def split_sizes(units: int) -> tuple[int, int, int]:
    """Train, validation and test: a fifth of the units, rounded up, is for the test, then a fifth of the rest for validation, as the
    released code has it (64:16:20; the paper says 6:2:2)."""
    test = math.ceil(0.2 * units)
    validation = math.ceil(0.2 * (units - test))
    return units - test - validation, validation, test


def split_units(unit: np.ndarray, *, seed: int) -> np.ndarray:
    """The split of each patch, str [N]: all of a unit (its patient, its slide, or itself; str [N]) in the same one. It depends on the
    units' names and the seed alone: tiles that are mined later move nobody."""
    names = np.unique(unit)
    train, validation, test = split_sizes(len(names))
    split = np.repeat(["train", "validation", "test"], [train, validation, test])
    of_name = np.empty(len(names), split.dtype)
    of_name[np.random.default_rng([seed, _SPLIT]).permutation(len(names))] = split
    return of_name[np.searchsorted(names, unit)]


def folds_of(unit: np.ndarray, folds: int, *, seed: int) -> np.ndarray:
    """The fold of each patch, int [N], 0 to folds - 1: all of a unit (str [N]) in the same one, units dealt out evenly."""
    names = np.unique(unit)
    of_name = np.empty(len(names), int)
    of_name[np.random.default_rng([seed, _FOLDS]).permutation(len(names))] = np.arange(len(names)) % folds
    return of_name[np.searchsorted(names, unit)]


def subset(label: np.ndarray, *, positive: float = 1.0, negative: float = 1.0, seed: int) -> np.ndarray:
    """Rows int [n], ascending, of the share of each class of label [N] (0, 1) that is kept, at least one of each that is there. What a
    smaller share keeps is a part of what a larger one does, by the same seed."""
    random = np.random.default_rng([seed, _SUBSET])
    kept = []
    for value, share in ((0, negative), (1, positive)):
        rows = random.permutation(np.flatnonzero(label == value))
        kept.append(rows[: max(1, round(share * len(rows)))])
    return np.sort(np.concatenate(kept))


def false_positive_rows(label: np.ndarray, probability: np.ndarray, *, threshold: float) -> np.ndarray:
    """Rows int [n] of the negative patches (label [N], 0 or 1) whose probability [N] is at least the threshold; none where it is NaN."""
    return np.flatnonzero((label == 0) & (probability >= threshold))


@dataclasses.dataclass(frozen=True)
class Union:
    """The tiles that were found, each once. row int [m]: of the candidates, in the order of discovery; query, rank int [m]: for which
    query, and as its how manieth, from 0, each was found first."""

    row: np.ndarray
    query: np.ndarray
    rank: np.ndarray


def union(index: np.ndarray) -> Union:
    """Of neighbours int [N, k], query by query and within a query by rank; a tile that several queries found counts once."""
    rows, first = np.unique(index, return_index=True)
    order = np.argsort(first)
    query, rank = np.divmod(first[order], max(1, index.shape[1]))
    return Union(rows[order], query, rank)


def random_neighbours(queries: int, candidates: int, *, alpha: int, seed: int) -> np.ndarray:
    """int [queries, min(alpha, candidates)]: for each query other candidates at random, none twice, as the released code does."""
    draws = (np.random.default_rng([seed, _RANDOM, query]) for query in range(queries))
    found = [draw.choice(candidates, min(alpha, candidates), replace=False) for draw in draws]
    return np.array(found, np.int64).reshape(queries, min(alpha, candidates))


def random_union(queries: int, candidates: int, *, size: int, seed: int) -> Union:
    """`size` different candidates at random, dealt out to the queries in turn: a control with as many tiles as a search has found."""
    rows = np.random.default_rng([seed, _RANDOM]).choice(candidates, min(size, candidates), replace=False)
    rank, query = np.divmod(np.arange(len(rows)), queries)
    return Union(rows, query, rank)


def f1_score(label: np.ndarray, score: np.ndarray, *, threshold: float, weight: np.ndarray | None = None) -> np.ndarray:
    """2 TP / (2 TP + FP + FN) of the positive class; NaN where that is 0 / 0."""
    counts = confusion(label, score, threshold=threshold, weight=weight)
    errors = 2 * counts.tp + counts.fp + counts.fn
    return np.where(errors == 0, np.nan, 2 * counts.tp / np.where(errors == 0, 1, errors))


def macro_average_precision(label: np.ndarray, score: np.ndarray, *, weight: np.ndarray | None = None) -> np.ndarray:
    """The mean of the average precision of the positive class by its probability and of the negative one by its: the "AUPRC" of the
    released code."""
    label, score = np.asarray(label), np.asarray(score, np.float64)
    return (average_precision(label, score, weight=weight) + average_precision(1 - label, -score, weight=weight)) / 2


def _metrics() -> dict[str, Metric]:
    found: dict[str, Metric] = {
        "AUROC": roc_auc,
        "AP, positive": average_precision,
        "AP, macro": macro_average_precision,
    }
    for threshold in THRESHOLDS:
        for name, metric in (
            ("accuracy", accuracy),
            ("F1", f1_score),
            ("sensitivity", sensitivity),
            ("specificity", specificity),
        ):
            found[f"{name} at {threshold:g}"] = functools.partial(metric, threshold=threshold)
    return found


METRICS: Mapping[str, Metric] = _metrics()
"""Name -> metric of label [N] and probability [N]. The paper's "F1" is the accuracy at 0.5, its "AUPRC" the macro AP."""


def merit(label: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """All METRICS of these patches."""
    return {name: float(metric(label, probability)) for name, metric in METRICS.items()}


def implied_prevalence(*, sensitivity: float, specificity: float, accuracy: float) -> float:
    """The share of positives among the patches that these three were measured on: (specificity - accuracy) / (specificity -
    sensitivity), since accuracy is their mean by prevalence. Ill-conditioned where the two are close."""
    return (specificity - accuracy) / (specificity - sensitivity)
