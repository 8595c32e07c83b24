"""Slide classification of signet ring cell carcinoma (Kanavati et al. 2021): settings, samplers, selection and score.

Fully supervised (FS): `tiles_per_slide` random tiles of each drawn slide. Weakly supervised (WS): the `top_k` tiles that the model
itself finds most probable, collected until the buffer is full, then trained on. Both draw slides in turn from the
positives and the negatives. A slide's score is the largest probability of its tiles.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from srcc_jax.models.zoo import CLASSIFIERS
from srcc_jax.settings import check_settings, setting

# Purposes that a run's seed is folded with, so that no two uses share a random stream.
_DRAW, _TILES, _SHIFT, _SHUFFLE, _MINED = range(5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run. Numbers without 'ours' are the paper's."""

    mode: str = setting(
        "ws", "fs: fully supervised; ws: weakly supervised; fs_ws: FS, then WS (§2.2)", choices=("fs", "ws", "fs_ws")
    )
    annotations: bool = setting(
        True, "WS: take candidates of positive slides from annotated regions only (§3.2); off: WS-noanno"
    )
    positive: str = setting(
        "srcc", "label of the cohort table that counts as positive; every other label is negative (ours)"
    )
    backbone: str = setting("b1", "b0 to b7: EfficientNet; tiny: for tests and demo (§2.3: B1)", choices=CLASSIFIERS)
    mpp: float = setting(1.0, "µm per pixel of the tiles: 2.0, 1.0, 0.5 are the paper's x5, x10, x20 (§2.4)", above=0)
    tile: int = setting(224, "side of a tile in pixels (§2.4)", least=1)
    stride: int = setting(112, "stride of the grid in pixels, for training and prediction (§2.4)", least=1)
    flush: bool = setting(
        False, "add a last tile flush with the right and bottom edge, so that no strip is left out (ours)"
    )
    min_tissue: float = setting(
        0.5, "share of a tile that must be tissue (ours; the paper gives none)", least=0, most=1
    )
    min_annotated: float = setting(
        0.0,
        "a tile is annotated where more than this share of it is; 0 suits contours of single cells (ours; the paper gives none)",
        least=0,
        below=1,
    )
    tiles_per_slide: int = setting(40, "FS: random tiles from each drawn slide, k (§3.2)", least=1)
    top_k: int = setting(1, "WS: tiles kept from each drawn slide, k (§3.2)", least=1)
    mined_share: float = setting(
        0.5, "WS with --mine_negatives: share of a negative slide's tiles that are mined ones (ours)", above=0, most=1
    )
    buffer: int = setting(128, "WS: tiles collected before they are trained on, T (§3.2)", least=1)
    batch: int = setting(32, "tiles in a batch (§3.2)", least=1)
    learning_rate: float = setting(1e-3, "Adam's learning rate at the start (§3.2)", above=0)
    decay: float = setting(0.95, "factor on the learning rate (§3.2)", above=0, most=1)
    decay_epochs: int = setting(2, "epochs between two decays (§3.2)", least=1)
    adam_b1: float = setting(0.9, "Adam's β1 (§3.2)", least=0, below=1)
    adam_b2: float = setting(0.999, "Adam's β2 (§3.2)", least=0, below=1)
    adam_epsilon: float = setting(1e-7, "Adam's ε (the Keras default; the paper gives none)", above=0)
    frozen_epochs: int = setting(1, "epochs at the start in which only the last layer is trained (§2.3)", least=0)
    selection: str = setting(
        "auto",
        "the validation loss that selects: tile: of annotated tiles against all tiles of negative slides, each class counting half; "
        "slide: of the largest logit of each slide; auto: tile for FS, slide for WS (ours; the paper does not say)",
        choices=("auto", "tile", "slide"),
    )
    patience: int = setting(10, "stop after this many validations without a lower loss (§3.2)", least=1)
    max_epochs: int = setting(
        100, "stop after this many epochs at the latest (ours; the paper stops by patience alone)", least=1
    )
    dropout: float | None = setting(None, "before the last layer; none: the architecture's (B1 0.2)", least=0, below=1)
    drop_path: float | None = setting(None, "of the last block; none: the architecture's (B1 0.2)", least=0, below=1)
    bn_momentum: float | None = setting(
        None,
        "share of BatchNorm's running value that a step keeps; none: the source's (Keras 0.99). Short runs need 0.9 (ours)",
        least=0,
        below=1,
    )
    translation: int = setting(
        16, "augmentation: largest shift of a tile in pixels (ours; §2.4 names translations)", least=0
    )
    brightness: float = setting(
        0.1, "augmentation: largest change, as a share of 255 (ours; §2.4 names colour shifts)", least=0, below=1
    )
    contrast: float = setting(0.1, "augmentation: largest change of the contrast factor (ours)", least=0, below=1)
    saturation: float = setting(0.1, "augmentation: largest change of the saturation factor (ours)", least=0, below=1)
    hue: float = setting(
        0.02, "augmentation: largest turn of the hue, as a share of the circle (ours)", least=0, below=1
    )
    seed: int = setting(0, "seed of everything random in the run (ours)", least=0)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.stride > self.tile:
            raise ValueError(
                f"--stride={self.stride} is larger than --tile={self.tile}: tissue between tiles is not seen"
            )
        if self.buffer % self.top_k or self.buffer % self.batch:
            raise ValueError(
                f"--buffer={self.buffer} must be a multiple of --top_k={self.top_k} and of --batch={self.batch}"
            )

    @property
    def reads_annotations(self) -> bool:
        """Whether tiles of positive slides are taken from their annotation."""
        return self.mode != "ws" or self.annotations


def balanced_draws(labels: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Slides of one epoch, a positive and a negative in turn (§2.2.4). labels int [S] of 0 and 1; returns int [2 · max(P, Q)].

    The larger class is gone through once in random order, the smaller again and again, each time in a new order.
    """
    random = np.random.default_rng([seed, _DRAW, epoch])
    classes = [np.flatnonzero(labels == value) for value in (1, 0)]
    if not all(map(len, classes)):
        raise ValueError("training needs slides of both classes: check the label column and --positive")
    each = max(map(len, classes))
    orders = [np.concatenate([random.permutation(c) for _ in range(-(-each // len(c)))])[:each] for c in classes]
    return np.stack(orders, axis=1).reshape(-1)


def _shifts(config: Config, step: int, count: int) -> np.ndarray:
    random = np.random.default_rng([config.seed, _SHIFT, step])
    return random.integers(-config.translation, config.translation, (count, 2), endpoint=True)


@dataclasses.dataclass(frozen=True)
class SupervisedSampler:
    """FS: rows for each step. candidates: per slide, the rows int [n] of its tiles that carry its label; labels int [S]."""

    config: Config
    candidates: Sequence[np.ndarray]
    labels: np.ndarray

    @property
    def steps_per_epoch(self) -> float:
        """Batches in one epoch; need not be whole (4,162.5 in the paper)."""
        return self._tiles_per_epoch / self.config.batch

    @property
    def _tiles_per_epoch(self) -> int:
        positives = int(self.labels.sum())
        return 2 * max(positives, len(self.labels) - positives) * self.config.tiles_per_slide

    @functools.cached_property
    def _epoch(self) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        return functools.lru_cache(maxsize=2)(self._draw_epoch)

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """rows, labels int [tiles of the epoch], shuffled. A slide with fewer than k tiles gives some of them again."""
        random = np.random.default_rng([self.config.seed, _TILES, epoch])
        k, rows, labels = self.config.tiles_per_slide, [], []
        for slide in balanced_draws(self.labels, seed=self.config.seed, epoch=epoch):
            pool = self.candidates[slide]
            rows.append(random.choice(pool, k, replace=len(pool) < k))
            labels.append(np.full(k, self.labels[slide]))
        order = random.permutation(len(rows) * k)
        return np.concatenate(rows)[order], np.concatenate(labels)[order]

    def __call__(self, step: int) -> Mapping[str, np.ndarray]:
        """The global batch of a step: row int [B], shift int [B, 2], label float [B], weight float [B]."""
        batch, size = self.config.batch, self._tiles_per_epoch
        positions = np.arange(step * batch, (step + 1) * batch)
        epochs, within = positions // size, positions % size
        drawn = [self._epoch(int(epoch)) for epoch in epochs]
        rows = np.asarray([epoch[0][i] for epoch, i in zip(drawn, within)])
        labels = np.asarray([epoch[1][i] for epoch, i in zip(drawn, within)], np.float32)
        return {
            "row": rows,
            "shift": _shifts(self.config, step, batch),
            "label": labels,
            "weight": np.ones(batch, np.float32),
        }


@dataclasses.dataclass(frozen=True)
class WeakSampler:
    """WS: the slides of each round, and the batches made of what was selected from them.

    A round is what fills the buffer once: the weights do not change while it fills, so a round is a function of the weights at its
    start and of its number, and a run that was cut off inside a round repeats that round alone. The sequence of draws
    goes on across epochs, so the remainder of an epoch is trained on with the start of the next.
    """

    config: Config
    labels: np.ndarray  # int [S] of 0 and 1

    @property
    def draws_per_epoch(self) -> int:
        positives = int(self.labels.sum())
        return 2 * max(positives, len(self.labels) - positives)

    @property
    def steps_per_round(self) -> int:
        return self.config.buffer // self.config.batch

    @property
    def draws_per_round(self) -> int:
        return self.config.buffer // self.config.top_k

    @property
    def rounds(self) -> int:
        """Rounds until `max_epochs` are over."""
        return -(-self.config.max_epochs * self.draws_per_epoch // self.draws_per_round)

    @property
    def steps_per_epoch(self) -> float:
        return self.draws_per_epoch * self.config.top_k / self.config.batch

    @property
    def frozen_steps(self) -> int:
        """Steps in which only the last layer is trained, in whole rounds."""
        return -(-frozen_steps(self.config, self.steps_per_epoch) // self.steps_per_round) * self.steps_per_round

    def draws(self, number: int) -> np.ndarray:
        """Slides int [draws_per_round] of round `number`."""
        positions = np.arange(number * self.draws_per_round, (number + 1) * self.draws_per_round)
        epochs, within = positions // self.draws_per_epoch, positions % self.draws_per_epoch
        sequence = {e: balanced_draws(self.labels, seed=self.config.seed, epoch=int(e)) for e in np.unique(epochs)}
        return np.asarray([sequence[e][i] for e, i in zip(epochs, within)])

    def ends_epoch(self, number: int) -> bool:
        """Whether an epoch ends in this round, or the last round is over: then the model is validated."""
        begin, end = number * self.draws_per_round, (number + 1) * self.draws_per_round
        return end // self.draws_per_epoch > begin // self.draws_per_epoch or self.finished(number)

    def finished(self, number: int) -> bool:
        """Whether `max_epochs` are over after this round."""
        return number + 1 >= self.rounds

    def rows_of_step(self, number: int, chosen: Mapping[int, np.ndarray]) -> Callable[[int], Mapping[str, np.ndarray]]:
        """chosen: per slide of the round, the rows of its top k tiles (fewer where it has fewer). Returns rows(step) for the steps
        of the round, the buffer shuffled; places that no tile fills have weight 0."""
        k, draws = self.config.top_k, self.draws(number)
        rows, weight = np.zeros((len(draws), k), np.int64), np.zeros((len(draws), k), np.float32)
        for position, slide in enumerate(draws):
            found = chosen[int(slide)][:k]
            rows[position, : len(found)], weight[position, : len(found)] = found, 1
        label = np.repeat(self.labels[draws], k).astype(np.float32)
        order = np.random.default_rng([self.config.seed, _SHUFFLE, number]).permutation(len(label))
        buffer: dict[str, np.ndarray] = {
            "row": rows.reshape(-1)[order],
            "label": label[order],
            "weight": weight.reshape(-1)[order],
        }

        def rows_of_step(step: int) -> Mapping[str, np.ndarray]:
            begin = (step - number * self.steps_per_round) * self.config.batch
            part = {name: values[begin : begin + self.config.batch] for name, values in buffer.items()}
            return {**part, "shift": _shifts(self.config, step, self.config.batch)}

        return rows_of_step


def frozen_steps(config: Config, steps_per_epoch: float) -> int:
    """Steps at the start in which only the last layer is trained."""
    return math.ceil(config.frozen_epochs * steps_per_epoch)


def candidate_rows(
    config: Config, *, supervised: bool, labels: np.ndarray, slide: np.ndarray, annotated: np.ndarray
) -> list[np.ndarray]:
    """Rows of the tiles that may be trained on, slide by slide.

    labels int [S]; slide int [N], the slide of each tile; annotated float [N], the share of the tile inside annotation. Negative slides:
    all tiles. Positive slides: the annotated ones under FS, and under WS with `config.annotations`; else all. Tiles of a positive slide
    outside its annotation are never negatives, because annotation is not exhaustive.
    """
    inside = (annotated > config.min_annotated) if supervised or config.annotations else np.ones(len(slide), bool)
    allowed = inside | (labels[slide] == 0)
    rows = np.flatnonzero(allowed)
    rows = rows[np.argsort(slide[rows], kind="stable")]
    return np.split(rows, np.searchsorted(slide[rows], np.arange(1, len(labels))))


def with_mined(rows: np.ndarray, mined: np.ndarray, config: Config, *, slide: int, number: int) -> np.ndarray:
    """The tiles of a negative slide in round `number`, int [k or fewer]: its most probable ones, `rows` int [n], best first, less those
    whose places tiles take that were mined with another model, `mined` int [m].

    Of the k places `mined_share` are theirs, on average over the rounds where that is no whole number; which of them is drawn by
    the seed. So what an earlier model mistook stays in the buffer when it is no longer among the slide's most probable tiles.
    """
    random = np.random.default_rng([config.seed, _MINED, number, slide])
    taken = random.permutation(mined)[: int(config.mined_share * config.top_k + random.random())]
    others = rows[~np.isin(rows, taken)][: config.top_k - len(taken)]
    return np.concatenate([others, taken])


def slide_scores(probability: np.ndarray, slide: np.ndarray, *, slides: int) -> np.ndarray:
    """Largest probability of each slide's tiles (§2.5). probability float [N], NaN where a tile could not be read; slide int
    [N]; returns float [slides], NaN for a slide without a readable tile."""
    scores = np.full(slides, np.nan)
    np.fmax.at(scores, slide, probability)
    return scores


def tile_loss(logit: np.ndarray, label: np.ndarray) -> float:
    """Binary cross-entropy of tiles, the mean of both classes' means: logit float [N], label int [N] of 0 and 1."""
    logit = np.asarray(logit, np.float64)
    each = np.logaddexp(0, logit) - label * logit
    return float((each[label == 1].mean() + each[label == 0].mean()) / 2)


def slide_loss(logit: np.ndarray, label: np.ndarray) -> float:
    """Mean binary cross-entropy of slides: logit float [S], the largest of each slide's tiles; label int [S] of 0 and 1.

    A fully supervised model is poorly selected by it: its largest logits are false positives, and it would be lowest before it learns.
    """
    logit = np.asarray(logit, np.float64)
    return float(np.mean(np.logaddexp(0, logit) - label * logit))
