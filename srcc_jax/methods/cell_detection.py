"""Signet ring cells from incomplete boxes (Li et al. 2019): targets, loss, pseudo-masks and the plan of rounds.

A pixel is background, edge or inner region of a cell. A network learns that from ellipses in the annotated boxes; then its own
predictions (self-training), or those of a second network (cooperative training), add cells that nobody annotated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from srcc_jax.augment import turn
from srcc_jax.instances import BACKGROUND, BETA, EDGE, INNER, Instances
from srcc_jax.losses import Loss, one_against_rest, soft_intersection_over_union
from srcc_jax.models import zoo
from srcc_jax.models.architecture import Architecture, normalize
from srcc_jax.models.layers import fold_batch_norm
from srcc_jax.settings import check_settings, setting

IGNORED = 255  # pixels beyond the image
TRAININGS = ("full", "self", "self_extra", "cooperative")
NETWORKS = tuple(name for family in zoo.FAMILIES if family.dense for name in family.variants if "unet" in name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run. Numbers without 'ours' are the paper's."""

    training: str = setting(
        "cooperative",
        "full: boxes alone (FT); self: rounds with its own predictions (ST); self_extra: then unlabelled regions with its own (ST-Ex); "
        "cooperative: then with those of a second network (CT) (§2.3)",
        choices=TRAININGS,
    )
    network: str = setting("unet_dla34", "the network that is handed on (§3.2: U-Net with DLA-34)", choices=NETWORKS)
    second_network: str = setting(
        "unet_resnet34", "cooperative: the other one (§3.2: U-Net with ResNet-34)", choices=NETWORKS
    )
    mpp: float = setting(0.25, "µm per pixel of regions cut from slides (§3.1: x40)", above=0)
    reduce: int = setting(
        1, "images are reduced by this factor before all else; pixels below are reduced ones (ours)", least=1
    )
    crop: int = setting(512, "side of a training crop in pixels (§3.2)", least=32)
    batch: int = setting(16, "crops in a batch (§3.2)", least=1)
    learning_rate: float = setting(1e-3, "Adam's learning rate (§3.2)", above=0)
    epochs: int = setting(50, "epochs on the boxes (§3.2)", least=1)
    self_rounds: int = setting(5, "rounds of self-training at most (§3.2)", least=0)
    self_epochs: int = setting(10, "epochs of a round of self-training (§3.2)", least=1)
    extra_rounds: int = setting(2, "rounds with unlabelled regions at most (§3.2)", least=0)
    first_extra_epochs: int = setting(50, "epochs of the first round with unlabelled regions (§3.2)", least=1)
    extra_epochs: int = setting(10, "epochs of each later round with unlabelled regions (§3.2)", least=1)
    epoch_steps: int | None = setting(
        None, "steps of an epoch; none: as many as give each image a crop, the rarer kind duplicated (ours)", least=1
    )
    self_threshold: float = setting(
        0.7, "self-training: probability above which a pixel is a cell's inner region (§3.2)", above=0, below=1
    )
    extra_threshold: float = setting(0.33, "the same in rounds with unlabelled regions (§3.2)", above=0, below=1)
    stop_iou: float = setting(
        0.98, "self-training ends when masks of two rounds agree by more than this IoU (ours)", above=0, most=1
    )
    threshold: float = setting(
        0.5, "detection: probability above which a pixel is a cell's inner region (ours)", above=0, below=1
    )
    min_area: int = setting(100, "pixels of inner region that make a cell (ours)", least=1)
    beta: float = setting(BETA, "the random walker's reluctance to cross differences (scikit-image's default)", above=0)
    edge_share: float = setting(
        0.1, "width of the edge as a share of the box's shorter side (ours)", above=0, below=0.5
    )
    edge_px: float = setting(3.0, "least width of the edge in pixels (ours)", above=0)
    smoothing: float = setting(1.0, "pixels added to intersection and union in the loss (ours)", above=0)
    negative_share: float = setting(
        0.5, "share of crops from images without cells, where there are any (ours)", least=0, below=1
    )
    unlabelled_share: float = setting(
        0.5, "share of the other crops from unlabelled regions, where there are any (ours)", least=0, below=1
    )
    window: int = setting(1024, "side of an inference window in pixels (§3.2)", least=32)
    overlap: int = setting(128, "overlap of inference windows in pixels (ours)", least=0)
    folds: int = setting(
        0, "parts that images are divided into, of which one is held out; 0: none is (§3.1: 3)", least=0
    )
    fold: int = setting(0, "which part is held out, from 0", least=0)
    fold_mode: str = setting(
        "hard",
        "easy: images are divided; hard: slides, patients and organs, as far as known (§3.1)",
        choices=("easy", "hard"),
    )
    region_px: int = setting(2000, "side of regions cut from slides in pixels (§3.1)", least=64)
    regions: int = setting(4, "regions drawn from each slide, unlabelled or without cells, at most (ours)", least=1)
    seed: int = setting(0, "seed of everything random in the run (ours)", least=0)
    split_seed: int = setting(
        0, "seed of the division into folds, so that seeds share their held-out images (ours)", least=0
    )

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("crop", "window"):
            if getattr(self, name) % 32:
                raise ValueError(
                    f"--{name}={getattr(self, name)} must be a multiple of 32: the networks halve it five times"
                )
        if self.overlap >= self.window:
            raise ValueError(f"--overlap={self.overlap} must be below --window={self.window}")
        if self.folds == 1 or self.fold >= max(self.folds, 1):
            raise ValueError(
                f"--fold={self.fold} of --folds={self.folds}: give at least 2 folds, and a fold below their number"
            )

    @property
    def uses_unlabelled(self) -> bool:
        return self.training in ("self_extra", "cooperative")

    @property
    def networks(self) -> tuple[str, ...]:
        """Of the models of a run; the first is handed on."""
        return (self.network, self.second_network) if self.training == "cooperative" else (self.network,)


def target_mask(boxes: np.ndarray, height: int, width: int, *, edge_share: float, edge_px: float) -> np.ndarray:
    """uint8 [height, width]: the classes that boxes [N, 4], [x1, y1, x2, y2) in pixels, say.

    A box stands for the ellipse inscribed in it; its border band, as wide as `edge_share` of the box's shorter side and at least
    `edge_px`, is edge, what is inside the band inner region. A pixel counts by its centre. Where cells overlap the inner region wins.
    """
    mask = np.zeros((height, width), np.uint8)
    for x1, y1, x2, y2 in np.asarray(boxes, np.float64).reshape(-1, 4):
        top, left = max(0, int(np.floor(y1))), max(0, int(np.floor(x1)))
        part = mask[top : max(top, int(np.ceil(y2))), left : max(left, int(np.ceil(x2)))]
        y = np.arange(part.shape[0])[:, None] + top + 0.5 - (y1 + y2) / 2
        x = np.arange(part.shape[1])[None] + left + 0.5 - (x1 + x2) / 2
        band = max(edge_px, edge_share * min(x2 - x1, y2 - y1))
        for value, shrunk in ((EDGE, 0.0), (INNER, band)):
            a, b = (x2 - x1) / 2 - shrunk, (y2 - y1) / 2 - shrunk
            if a > 0 and b > 0:
                inside = np.square(x / a) + np.square(y / b) <= 1
                np.maximum(part, np.where(inside, value, BACKGROUND), out=part, casting="unsafe")
    return mask


def instance_mask(found: Instances) -> np.ndarray:
    """uint8 [H, W]: the classes that instances stand for: inner region in the seeds, edge in what the random walker gave to them."""
    return np.where(found.seed, INNER, np.where(found.label > 0, EDGE, BACKGROUND)).astype(np.uint8)


def merge_masks(predicted: np.ndarray, annotated: np.ndarray) -> np.ndarray:
    """uint8 [H, W]: first the inner regions of either, then the edges of either where there is no inner region; the rest is background."""
    inner = (predicted == INNER) | (annotated == INNER)
    edge = (predicted == EDGE) | (annotated == EDGE)
    return np.where(inner, INNER, np.where(edge, EDGE, BACKGROUND)).astype(np.uint8)


@dataclasses.dataclass
class Agreement:
    """How far the masks of two rounds agree: pixels of cells in both, and in either, over all images added so far."""

    both: int = 0
    either: int = 0

    def add(self, mask: np.ndarray, before: np.ndarray) -> None:
        """Counts the pixels of an image that are no background. Both uint8 [H, W]."""
        a, b = mask != BACKGROUND, before != BACKGROUND
        self.both += int((a & b).sum())
        self.either += int((a | b).sum())

    @property
    def iou(self) -> float:
        """Intersection over union; 1 where no mask has a cell."""
        return self.both / self.either if self.either else 1.0


def cell_loss(
    dense: jax.Array, mask: jax.Array, weight: jax.Array, *, smoothing: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Eq. 3: cross-entropies (eq. 1, with the sign that makes them a loss, as means) and 1 - IoU (eq. 2), summed over edge and inner
    region. dense [B, H, W, 3]; mask [B, H, W]; weight [B]: 0 for padding. Returns the loss and its parts."""
    dense = dense.astype(jnp.float32)
    counts = (mask != IGNORED) * weight[:, None, None]
    probability = jax.nn.softmax(dense)
    parts = {}
    for name, index in (("edge", EDGE), ("inner", INNER)):
        member = (mask == index).astype(jnp.float32)
        parts[f"{name}_cross_entropy"] = one_against_rest(dense, member, counts, index=index)
        overlap = soft_intersection_over_union(probability[..., index], member, counts, smoothing=smoothing)
        parts[f"{name}_iou_loss"] = 1 - overlap
    return sum(parts.values(), jnp.zeros(())), parts


def make_loss(architecture: Architecture, config: Config) -> Loss:
    """The `LossFn` of `train.make_train_step`. batch: image uint8 [B, S, S, 3], mask uint8 [B, S, S] of classes, weight [B].

    Image and mask are turned and mirrored together by one of the eight symmetries of the square. Metrics: the parts of the loss.
    """
    network = zoo.build(architecture)

    def loss_fn(params: Any, stats: Any, batch: Mapping[str, jax.Array], key: jax.Array):
        view_key, dropout_key = jax.random.split(key)
        both = random_symmetry(jnp.concatenate([batch["image"], batch["mask"][..., None]], axis=-1), view_key)
        image = normalize(both[..., :3], architecture)
        variables, rngs = {"params": params, **stats}, {"dropout": dropout_key}
        out, changed = network.apply(variables, image, train=True, rngs=rngs, mutable=list(stats))
        loss, parts = cell_loss(out["dense"], both[..., 3], batch["weight"], smoothing=config.smoothing)
        one = jnp.ones(())
        return loss, ({**stats, **changed}, {name: (part, one) for name, part in parts.items()})

    return loss_fn


def random_symmetry(pixels: jax.Array, key: jax.Array) -> jax.Array:
    """[B, S, S, C] -> the same, each image turned by quarter turns and mirrored at random, all its channels alike."""
    draws = jax.random.uniform(key, (3, len(pixels)))
    return turn(pixels, jnp.floor(4 * draws[0]).astype(jnp.int32), draws[1] < 0.5, draws[2] < 0.5)


def make_probability(architecture: Architecture) -> Callable[[Mapping[str, Any], jax.Array], jax.Array]:
    """(variables from `fold`, image uint8 [B, H, W, 3]) -> probabilities of the classes, float32 [B, H, W, 3]."""
    network = zoo.build(architecture, folded=True)

    def probability(variables: Mapping[str, Any], image: jax.Array) -> jax.Array:
        out: Any = network.apply(variables, normalize(image, architecture), train=False)
        return jax.nn.softmax(out["dense"].astype(jnp.float32))

    return probability


def fold(variables: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Variables {"params", "batch_stats"} with each BatchNorm in its convolution where there is one before it."""
    return fold_batch_norm(variables, epsilon=architecture.bn_epsilon)


def steps_per_epoch(config: Config, *, annotated: int, unlabelled: int, negative: int) -> int:
    """Steps of an epoch: a crop of every image, images of the rarer kind (with cells, without) repeated as often as the others."""
    if config.epoch_steps is not None:
        return config.epoch_steps
    with_cells = annotated + unlabelled
    balanced = bool(negative) and config.negative_share > 0
    crops = 2 * max(with_cells, negative) if balanced else with_cells
    return max(1, round(crops / config.batch))
