"""One vector of features for an image, out of the maps that a network makes of it."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from srcc_jax.models import zoo
from srcc_jax.models.architecture import Architecture
from srcc_jax.models.layers import variable_shapes

_SCORES = ("dense",)  # maps of logits, not of features


def pooled(outputs: Mapping[str, jax.Array], pooling: str) -> jax.Array:
    """A network's outputs for B images -> float32 [B, D].

    pooling: "mean", what a classifier sees; "max" over the pixels of the last maps; "mean_max", the two after each other; or the
    name of maps on the way, such as "stage3", for their mean over the pixels.
    """
    if pooling == "mean":
        return outputs["features"].astype(jnp.float32)
    if pooling == "max":
        return outputs["maps"].max((1, 2)).astype(jnp.float32)
    if pooling == "mean_max":
        return jnp.concatenate([pooled(outputs, "mean"), pooled(outputs, "max")], axis=-1)
    return outputs[pooling].mean((1, 2), dtype=jnp.float32)


def widths(architecture: Architecture, *, side: int) -> dict[str, int]:
    """Pooling -> D, for each that `pooled` takes of this network. side: of the images, px; ValueError where it takes none such."""
    network = zoo.build(architecture)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    outputs = jax.eval_shape(
        lambda variables, image: network.apply(variables, image, train=False), variable_shapes(network), image
    )
    maps = {name: out.shape[-1] for name, out in outputs.items() if len(out.shape) == 4 and name not in _SCORES}
    mean, largest = outputs["features"].shape[-1], maps["maps"]
    return {"mean": mean, "max": largest, "mean_max": mean + largest} | maps
