"""Few-shot tumour maps by reverse distillation (He & Li 2023): settings, losses, scores and thresholds.

A student makes the maps of a frozen teacher again from a bottleneck. Trained to do so on normal tissue and to fail on tumour, it
differs from the teacher where there is tumour: that difference is the anomaly map. The baseline (RD, Deng & Li 2022) is the
loss `plain` without tumour patches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from srcc_jax.kernels.anomaly_maps import anomaly_map, cosine_similarity
from srcc_jax.losses import Loss, weighted_mean
from srcc_jax.models import distillation
from srcc_jax.models.distillation import SHORTCUTS, DistillationArchitecture
from srcc_jax.models.efficientnet import EfficientNetArchitecture
from srcc_jax.models.layers import fold_batch_norm
from srcc_jax.models.resnet import ResNetArchitecture
from srcc_jax.models.teachers import teacher_maps
from srcc_jax.settings import check_settings, setting

Teacher = ResNetArchitecture | EfficientNetArchitecture
FIXED_THRESHOLD = 2.0  # §4.1: a patch whose anomaly map has at least this mean is tumour
SLIDE_THRESHOLD = 2.01  # of the released code: a slide's score is the mean of its map's values from here on
PRESETS = {"paper": (1e-5, 50), "code": (1e-6, 10)}  # learning rate and epochs: §4.1; the released code
_CLIP = 1e-6  # ours: similarities are kept this far from 0 and 1, where the logarithms have no value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run. Numbers without 'ours' are the paper's."""

    preset: str = setting(
        "paper",
        "learning rate and epochs; paper: 1e-5, 50 (§4.1); code: 1e-6, 10 (the released code)",
        choices=tuple(PRESETS),
    )
    loss: str = setting(
        "focal",
        "focal: the weighted similarity loss (§3.2, eq. 2); plain: 1 - S for normal patches and S for tumour (§3.2 without its "
        "weights; without tumour patches the RD baseline)",
        choices=("focal", "plain"),
    )
    similarity: str = setting(
        "flat",
        "S of a level; flat: one cosine of all its values, as the released code has it; pixel: one for each pixel (§3.1, eq. 1)",
        choices=("flat", "pixel"),
    )
    alpha: float = setting(0.1, "weight of normal patches; tumour patches have 1 - α (§3.2)", above=0, below=1)
    alpha_by_share: bool = setting(
        False,
        "α is the tumour patches' share of all instead: 0.09 for 500 of 5500, 0.5 when balanced (§4.4 varies α so)",
    )
    gamma: float = setting(2.0, "exponent that lets easy patches count less (§3.2)", least=0)
    shortcut: str = setting(
        "3x3", "around the bottleneck's strided block; 3x3: the released code; 1x1: RD (§4.1)", choices=SHORTCUTS
    )
    positive: str = setting(
        "tumour", "labels of patches, or of slides, that are tumour, with commas between them (ours)"
    )
    tile: int = setting(256, "side of a patch in pixels; patches of another are resized (§4.1)", least=32)
    mpp: float = setting(0.243, "µm per pixel of patches cut from slides: level 0 of Camelyon16 (§4.1: x40)", above=0)
    normal_patches: int | None = setting(None, "normal patches to train on; none: all there are (§4.1: 5000)", least=1)
    tumour_patches: int | None = setting(None, "tumour patches to train on; none: all there are (§4.1: 500)", least=0)
    batch: int = setting(32, "patches in a batch (§4.1)", least=1)
    learning_rate: float | None = setting(None, "Adam's learning rate; none: the preset's", above=0)
    epochs: int | None = setting(None, "passes over the training patches; none: the preset's", least=1)
    adam_b1: float = setting(0.5, "Adam's β1 (§4.1)", least=0, below=1)
    adam_b2: float = setting(0.999, "Adam's β2 (§4.1)", least=0, below=1)
    adam_epsilon: float = setting(1e-8, "Adam's ε (torch's default; the paper gives none)", above=0)
    selection: str = setting(
        "chosen",
        "what selects on the validation patches; chosen: accuracy at the threshold that is best there (ours: a short run, and RD, "
        "stay below 2 everywhere); fixed: at 2 (§4.1); auc: ROC AUC (ours: where they are few, many steps share an accuracy)",
        choices=("chosen", "fixed", "auc"),
    )
    patience: int | None = setting(
        None,
        "stop after this many epochs without a better validation; none: train them all, as the paper does",
        least=1,
    )
    normal_spots: int = setting(500, "normal patches cut from each training slide (§4.1: 5000 from 10)", least=1)
    tumour_spots: int = setting(50, "tumour patches cut from each training slide (§4.1: 500 from 10)", least=1)
    validation_spots: int = setting(
        2000,
        "patches of each kind cut from each validation slide, normal ones from a slide with tumour, too (ours: of §4.1's normal and "
        "tumour slide 4000 + 2000, where it has 2000 + 2000)",
        least=1,
    )
    test_normal_spots: int = setting(77, "normal patches cut from each test slide (the released list)", least=1)
    test_tumour_spots: int = setting(
        400, "tumour patches cut from each test slide at most (the released list)", least=1
    )
    seed: int = setting(0, "seed of everything random in the run (ours)", least=0)
    split_seed: int = setting(
        0, "seed of splits that are not given, so that seeds share their test patches (ours)", least=0
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.tile % 32:
            raise ValueError(f"--tile={self.tile} must be a multiple of 32: the bottleneck's map is 1/32 of a patch")

    @property
    def positives(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.positive.split(","))

    @property
    def rate(self) -> float:
        return PRESETS[self.preset][0] if self.learning_rate is None else self.learning_rate

    @property
    def last_epoch(self) -> int:
        return PRESETS[self.preset][1] if self.epochs is None else self.epochs

    def weight_of_normal(self, tumour: int, patches: int) -> float:
        """α for training on `patches` patches of which `tumour` hold tumour. ValueError where it would be 0."""
        if self.alpha_by_share and self.loss == "focal" and not tumour:
            raise ValueError("--alpha_by_share without tumour patches is α = 0, no loss at all: give --loss=plain (RD)")
        return tumour / patches if self.alpha_by_share else self.alpha


def training_rows(tumour: np.ndarray, config: Config) -> np.ndarray:
    """The rows trained on, int [n]: tumour bool [N] -> as many of each kind as the settings ask for. What a run with fewer tumour
    patches draws is a part of what one with more draws by the same seed, as in Table 3. ValueError where there are too few."""
    random = np.random.default_rng([config.seed, 0])
    chosen = []
    for what, rows, wanted in (
        ("normal", np.flatnonzero(~tumour), config.normal_patches),
        ("tumour", np.flatnonzero(tumour), config.tumour_patches),
    ):
        if wanted is not None and wanted > len(rows):
            raise ValueError(f"--{what}_patches={wanted}: there are {len(rows)} {what} patches to train on")
        chosen.append(random.permutation(rows)[:wanted])
    return np.sort(np.concatenate(chosen))


def similarities(teacher: Sequence[jax.Array], student: Sequence[jax.Array], *, flat: bool) -> list[jax.Array]:
    """S of each level, float32: cosines of maps [B, h, w, C], [B] of all values (flat) or [B, h, w] of each pixel's channels."""
    axes = (1, 2, 3) if flat else -1
    return [cosine_similarity(theirs, ours, axis=axes) for theirs, ours in zip(teacher, student, strict=True)]


def focal_loss(similarity: jax.Array, tumour: jax.Array, *, alpha: float, gamma: float) -> jax.Array:
    """Eq. 2, elementwise: normal -α (1 - S)^γ ln S, tumour -(1 - α) S^γ ln(1 - S); S and 1 - S cut to [1e-6, 1 - 1e-6].

    similarity float32 [...]; tumour [...], 0 or 1. Both logarithms are of the number itself, never of one minus another that was
    rounded near 1, so that they are right to float32 at both ends.
    """
    agree, differ = (jnp.clip(value, _CLIP, 1 - _CLIP) for value in (similarity, 1 - similarity))
    normal = -alpha * differ**gamma * jnp.log(agree)
    abnormal = -(1 - alpha) * agree**gamma * jnp.log(differ)
    return jnp.where(tumour > 0, abnormal, normal)


def plain_loss(similarity: jax.Array, tumour: jax.Array) -> jax.Array:
    """Elementwise: normal 1 - S (Deng & Li 2022), tumour S (§3.2)."""
    return jnp.where(tumour > 0, similarity, 1 - similarity)


def patch_losses(levels: Sequence[jax.Array], tumour: jax.Array, config: Config, *, alpha: float) -> jax.Array:
    """The loss of each patch [B]: the sum over the levels of the mean over a level's pixels. levels: `similarities`."""
    focal = functools.partial(focal_loss, alpha=alpha, gamma=config.gamma)
    judge = focal if config.loss == "focal" else plain_loss
    total = jnp.zeros(tumour.shape, jnp.float32)
    for level in levels:
        label = tumour.reshape(-1, *(1,) * (level.ndim - 1))
        each = judge(level, label)
        total = total + each.reshape(len(each), -1).mean(1)
    return total


def make_loss(teacher: Teacher, student: DistillationArchitecture, config: Config, *, alpha: float) -> Loss:
    """The `LossFn` of `train.make_train_step`. stats holds the student's "batch_stats" and the "teacher"'s variables, which come
    out as they went in. batch: image uint8 [B, H, W, 3], label [B] (1: tumour), weight [B].

    Metrics: mean similarity of the patches of each kind, over the levels.
    """
    network = distillation.build(student)

    def loss_fn(params: Any, stats: Any, batch: Mapping[str, jax.Array], key: jax.Array):
        maps = teacher_maps(teacher, stats["teacher"], batch["image"])
        variables = {"params": params, "batch_stats": stats["batch_stats"]}
        out, changed = network.apply(variables, *maps, train=True, mutable=["batch_stats"])
        levels = similarities(maps, _in_order(out), flat=config.similarity == "flat")
        tumour, weight = batch["label"], batch["weight"]
        each = patch_losses(levels, tumour, config, alpha=alpha)
        agreement = jnp.stack([level.reshape(len(level), -1).mean(1) for level in levels]).mean(0)
        kinds = {"similarity_normal": weight * (tumour == 0), "similarity_tumour": weight * (tumour > 0)}
        metrics = {name: ((agreement * chosen).sum(), chosen.sum()) for name, chosen in kinds.items()}
        return weighted_mean(each, weight), ({**stats, **changed}, metrics)

    return loss_fn


def make_anomaly_map(
    teacher: Teacher, student: DistillationArchitecture
) -> Callable[[Mapping[str, Any], jax.Array], jax.Array]:
    """(variables from `fold`, image [B, H, W, 3] of 0 to 255) -> anomaly maps float32 [B, H, W], 0 to 3 (§3.3), not smoothed."""
    network = distillation.build(student, folded=True)

    def maps_of(variables: Mapping[str, Any], image: jax.Array) -> jax.Array:
        maps = teacher_maps(teacher, variables["teacher"], image, folded=True)
        out: Any = network.apply(variables["student"], *maps, train=False)
        return anomaly_map(maps, _in_order(out), (image.shape[1], image.shape[2]))

    return maps_of


def fold(variables: Mapping[str, Any], teacher: Teacher, student: DistillationArchitecture) -> dict[str, Any]:
    """Variables {"params", "batch_stats", "teacher"} with each BatchNorm in its convolution where there is one before it."""
    ours = {name: variables[name] for name in ("params", "batch_stats")}
    return {
        "teacher": fold_batch_norm(variables["teacher"], epsilon=teacher.bn_epsilon),
        "student": fold_batch_norm(ours, epsilon=student.bn_epsilon),
    }


def _in_order(out: Mapping[str, jax.Array]) -> list[jax.Array]:
    return [out[f"stage{level}"] for level in (1, 2, 3)]


def patch_scores(maps: jax.Array) -> jax.Array:
    """Score of each patch [B]: the mean of its anomaly map [B, H, W]. Smoothing the map first, as for pictures of it, would not
    change the mean, because the map goes on as its mirror image at its border."""
    return maps.mean((1, 2))


def slide_score(values: np.ndarray, *, threshold: float = SLIDE_THRESHOLD) -> float:
    """Mean of a slide's map values (any shape, NaN where there are none) that are at least the threshold; 0 where none is."""
    values = np.asarray(values, np.float64)
    high = values[values >= threshold]
    return float(high.mean()) if len(high) else 0.0
