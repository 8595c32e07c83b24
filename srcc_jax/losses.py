"""Losses of whole images: each factory closes over a model and gives the `LossFn` that `train.make_train_step` takes.

A batch holds `image` uint8 [B, H, W, 3], `label` [B] and `weight` float32 [B]; rows of weight 0 are padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

Prepare = Callable[[jax.Array, jax.Array], jax.Array]
"""(image uint8 [B, H, W, 3], key) -> float [B, H, W, 3] as the model wants it: augmented and normalised."""

Loss = Callable[[Any, Any, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, tuple[Any, dict]]]
"""(params, stats, batch, key) -> (scalar, (stats, metrics)): `train.LossFn`, which a leaf cannot import."""


def weighted_mean(each: jax.Array, weight: jax.Array) -> jax.Array:
    """Mean of each [B] by weight [B]; 0, and no gradient, where all weights are 0."""
    return (each * weight).sum() / jnp.maximum(weight.sum(), jnp.finfo(weight.dtype).tiny)


def binary_cross_entropy(model: nn.Module, *, prepare: Prepare, freeze_norm: bool = False) -> Loss:
    """Cross-entropy of the sigmoid of one logit, max(z, 0) - zy + log(1 + exp(-|z|)), with label [B] 0 or 1.

    The model gives logits [B, 1]. Metric: accuracy at probability 0.5.
    freeze_norm: BatchNorm stays in inference mode (the model must know this word), for training a new head alone.
    """

    def judge(logits: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
        if logits.shape[1:] != (1,):
            raise ValueError(f"binary cross-entropy needs logits [B, 1], the model gives {logits.shape}")
        each = optax.sigmoid_binary_cross_entropy(logits[:, 0], label.astype(logits.dtype))
        return each, (logits[:, 0] > 0) == (label > 0)

    return _loss(model, prepare, freeze_norm, judge)


def softmax_cross_entropy(model: nn.Module, *, prepare: Prepare, freeze_norm: bool = False) -> Loss:
    """Cross-entropy of the softmax, with label [B] the class, 0 to K - 1.

    The model gives logits [B, K]. Metric: accuracy of the largest logit. freeze_norm: as in `binary_cross_entropy`.
    """

    def judge(logits: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
        return optax.softmax_cross_entropy_with_integer_labels(logits, label), logits.argmax(1) == label

    return _loss(model, prepare, freeze_norm, judge)


def _loss(
    model: nn.Module,
    prepare: Prepare,
    freeze_norm: bool,
    judge: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
) -> Loss:
    """The weighted mean of what `judge`, (logits [B, K], label [B]) -> (loss [B], right [B]), says of a batch."""
    mode: dict[str, Any] = {"train": True, "freeze_norm": True} if freeze_norm else {"train": True}

    def loss_fn(params: Any, stats: Any, batch: Mapping[str, jax.Array], key: jax.Array):
        augment_key, dropout_key = jax.random.split(key)
        image = prepare(batch["image"], augment_key)
        variables, rngs = {"params": params, **stats}, {"dropout": dropout_key}
        out, stats = model.apply(variables, image, rngs=rngs, mutable=list(stats), **mode)
        each, right = judge(out["logits"].astype(jnp.float32), batch["label"])
        weight = batch["weight"]
        return weighted_mean(each, weight), (stats, {"accuracy": ((right * weight).sum(), weight.sum())})

    return loss_fn


PrepareBoth = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""(image uint8 [B, H, W, 3], mask uint8 [B, H, W], key) -> both as a random view, the image as the model wants it."""


def pixel_cross_entropy(dense: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over its pixels of each image's binary cross-entropy, from logits: dense [B, H, W, 1], mask [B, H, W] 0 or 1 -> [B]."""
    each = optax.sigmoid_binary_cross_entropy(dense[..., 0].astype(jnp.float32), mask.astype(jnp.float32))
    return each.mean((1, 2))


def multi_task(model: nn.Module, *, prepare: PrepareBoth, class_weight: float) -> Loss:
    """class_weight · softmax cross-entropy of the image's label + mean binary cross-entropy of its pixels (Yu et al. 2019, eq. 1).

    The model gives logits [B, K] and dense [B, H, W, 1]; the batch holds `mask` uint8 [B, H, W] besides. A model without "logits"
    has the pixels' part alone. Metrics: both parts, and the accuracy of the largest logit.
    """

    def loss_fn(params: Any, stats: Any, batch: Mapping[str, jax.Array], key: jax.Array):
        view_key, dropout_key = jax.random.split(key)
        image, mask = prepare(batch["image"], batch["mask"], view_key)
        variables, rngs = {"params": params, **stats}, {"dropout": dropout_key}
        out, stats = model.apply(variables, image, train=True, rngs=rngs, mutable=list(stats))
        weight = batch["weight"]
        parts = {"pixel_loss": pixel_cross_entropy(out["dense"], mask)}
        each = parts["pixel_loss"]
        if "logits" in out:
            logits, label = out["logits"].astype(jnp.float32), batch["label"].astype(jnp.int32)
            parts["class_loss"] = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            parts["accuracy"] = (logits.argmax(1) == label).astype(jnp.float32)
            each = class_weight * parts["class_loss"] + each
        metrics = {name: ((part * weight).sum(), weight.sum()) for name, part in parts.items()}
        return weighted_mean(each, weight), (stats, metrics)

    return loss_fn


def one_against_rest(dense: jax.Array, member: jax.Array, weight: jax.Array, *, index: int) -> jax.Array:
    """Mean binary cross-entropy -(y ln p + (1 - y) ln(1 - p)) of one class of a softmax, over pixels by weight; from logits.

    dense [B, H, W, K]; member, weight [B, H, W]: whether a pixel is of class `index`, 0 or 1, and what it counts. 0 where nothing counts.
    """
    whole = jax.nn.logsumexp(dense, axis=-1)
    others = jax.nn.logsumexp(jnp.concatenate([dense[..., :index], dense[..., index + 1 :]], axis=-1), axis=-1)
    each = -(member * (dense[..., index] - whole) + (1 - member) * (others - whole))
    return (each * weight).sum() / jnp.maximum(weight.sum(), 1)


def soft_intersection_over_union(
    probability: jax.Array, member: jax.Array, weight: jax.Array, *, smoothing: float
) -> jax.Array:
    """Σyp / (Σy + Σp - Σyp) over all pixels of all images by weight, `smoothing` pixels added above and below; all [B, H, W]."""
    both = (member * probability * weight).sum()
    either = ((member + probability) * weight).sum() - both
    return (both + smoothing) / (either + smoothing)
