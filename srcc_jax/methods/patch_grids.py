"""Supervised patch classifiers (Li & Ping 2018, NCRF): a network over grids of neighbouring patches, with or without the neural CRF.

With one patch a grid it is the ordinary patch classifier; with 3 × 3 and the CRF it is the comparison SLFCD of He & Li 2023.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from srcc_jax.augment import recolour, turn
from srcc_jax.losses import Loss, weighted_mean
from srcc_jax.models import zoo
from srcc_jax.models.architecture import Architecture, normalize
from srcc_jax.models.crf import GridClassifier
from srcc_jax.models.layers import fold_batch_norm
from srcc_jax.settings import check_settings, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run. Numbers without 'ours' are those of the code released with Li & Ping 2018."""

    side: int = setting(1, "patches along a side of a grid; 1: patches alone (the released baseline); 3: NCRF", least=1)
    crf: bool = setting(
        True, "whether the patches of a grid of 3 × 3 share a CRF; of a grid of one patch there is none"
    )
    tile: int = setting(256, "side of a patch in pixels; images of another size are resized", least=32)
    crop: int | None = setting(
        None,
        "side of the middle of each patch that the network sees; none: all of it; the released code: 224",
        least=32,
    )
    mpp: float = setting(0.243, "µm per pixel of patches cut from slides: level 0 of Camelyon16", above=0)
    positive: str = setting(
        "tumour", "labels of patches, or of slides, that are tumour, with commas between them (ours)"
    )
    batch: int = setting(10, "grids in a batch", least=1)
    epochs: int = setting(20, "passes over the training grids", least=1)
    learning_rate: float = setting(1e-3, "of stochastic gradient descent", above=0)
    momentum: float = setting(0.9, "of stochastic gradient descent", least=0, below=1)
    brightness: float = setting(64 / 255, "part of 255 that is added or taken, at most", least=0, below=1)
    contrast: float = setting(0.75, "of the distance to the mean colour, at most", least=0, below=1)
    saturation: float = setting(0.25, "of the distance to grey, at most", least=0, below=1)
    hue: float = setting(0.04, "part of the colour circle, at most", least=0, below=1)
    selection: str = setting(
        "accuracy",
        "what selects on the validation patches; accuracy: at probability 0.5, as in the released code; auc: ROC AUC (ours: where "
        "they are few, many steps share an accuracy)",
        choices=("accuracy", "auc"),
    )
    normal_patches: int | None = setting(None, "normal grids to train on; none: all there are", least=1)
    tumour_patches: int | None = setting(None, "tumour grids to train on; none: all there are", least=1)
    normal_spots: int = setting(500, "normal grids cut from each training slide (ours)", least=1)
    tumour_spots: int = setting(500, "tumour grids cut from each training slide (ours)", least=1)
    validation_spots: int = setting(200, "grids of each kind cut from each validation slide (ours)", least=1)
    test_spots: int = setting(200, "grids of each kind cut from each test slide (ours)", least=1)
    seed: int = setting(0, "seed of everything random in the run (ours)", least=0)
    split_seed: int = setting(0, "seed of splits that are not given (ours)", least=0)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.side % 2 == 0:
            raise ValueError(f"--side={self.side} must be odd: a grid is named by its middle patch")
        if self.crop is not None and self.crop > self.tile:
            raise ValueError(f"--crop={self.crop} must be at most --tile={self.tile}")

    @property
    def positives(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.positive.split(","))

    @property
    def image(self) -> int:
        """Side of a grid's image in pixels."""
        return self.side * self.tile

    @property
    def with_crf(self) -> bool:
        return self.crf and self.side > 1


def build(
    architecture: Architecture, *, side: int, crf: bool, crop: int | None, folded: bool = False
) -> GridClassifier:
    """The network over grids of a classification network with one class."""
    return GridClassifier(backbone=zoo.build(architecture, folded=folded), side=side, crf=crf, crop=crop)


def grid_variables(variables: Mapping[str, Any], *, side: int, crf: bool) -> dict[str, Any]:
    """Variables of the network over grids from those of its backbone; the CRF's begin at zero."""
    nested: dict[str, Any] = {name: {"backbone": part} for name, part in variables.items()}
    if crf:
        nested["params"]["crf"] = {"weight": jnp.zeros((side**2, side**2))}
    return nested


def views(image: jax.Array, label: jax.Array, key: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """A random symmetry and colour of each grid: image uint8 [B, H, W, 3] -> float32 of 0 to 255; label [B, side²] turned with it."""
    draws = jax.random.uniform(key, (len(image), 7))
    how = jnp.floor(4 * draws[:, 0]).astype(jnp.int32), draws[:, 1] < 0.5, draws[:, 2] < 0.5
    cells = turn(label.reshape(-1, config.side, config.side, 1), *how)
    shift = 2 * draws[:, 3:] - 1
    coloured = recolour(
        turn(image, *how),
        brightness=config.brightness * shift[:, 0],
        contrast=1 + config.contrast * shift[:, 1],
        saturation=1 + config.saturation * shift[:, 2],
        hue=config.hue * shift[:, 3],
    )
    return coloured, cells.reshape(label.shape)


def make_loss(architecture: Architecture, config: Config) -> Loss:
    """The `LossFn` of `train.make_train_step`: binary cross-entropy of every patch of a grid. batch: image uint8 [B, H, W, 3], label
    [B, side²] (1: tumour), weight [B]. Metric: accuracy of the patches at probability 0.5."""
    network = build(architecture, side=config.side, crf=config.with_crf, crop=config.crop)

    def loss_fn(params: Any, stats: Any, batch: Mapping[str, jax.Array], key: jax.Array):
        view_key, dropout_key = jax.random.split(key)
        image, label = views(batch["image"], batch["label"], view_key, config)
        variables, rngs = {"params": params, **stats}, {"dropout": dropout_key}
        seen = normalize(image, architecture)
        out, changed = network.apply(variables, seen, train=True, rngs=rngs, mutable=list(stats))
        each = optax.sigmoid_binary_cross_entropy(out["logits"], label).mean(1)
        right, weight = ((out["logits"] > 0) == (label > 0)).mean(1), batch["weight"]
        return weighted_mean(each, weight), (changed, {"accuracy": ((right * weight).sum(), weight.sum())})

    return loss_fn


def make_middle_logit(
    architecture: Architecture, *, side: int, crf: bool, crop: int | None
) -> Callable[[Mapping[str, Any], jax.Array], jax.Array]:
    """(variables from `fold`, images uint8 [B, H, W, 3]) -> logit [B] of the middle patch of each grid, after the CRF."""
    network = build(architecture, side=side, crf=crf, crop=crop, folded=True)

    def middle(variables: Mapping[str, Any], image: jax.Array) -> jax.Array:
        out: Any = network.apply(variables, normalize(image, architecture), train=False)
        return out["logits"][:, side**2 // 2]

    return middle


def fold(variables: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Variables with each BatchNorm in its convolution."""
    return fold_batch_norm(variables, epsilon=architecture.bn_epsilon)
