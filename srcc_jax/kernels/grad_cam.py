"""Grad-CAM: which places of a tile's last feature maps raise the logit."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def grad_cam(head: Callable[[jax.Array], jax.Array], maps: jax.Array, *, index: int = 0) -> jax.Array:
    """ReLU(sum_k alpha_k A_k), alpha_k the mean over pixels of d logit / d A_k (Selvaraju et al. 2017, eq. 1-2).

    head: maps [B, h, w, D] -> logits [B, K] before any sigmoid, each row depending on its own maps only (inference mode).
    index: which of the K logits.  Returns [B, h, w] float32, >= 0, not normalised, so that tiles can be compared and
    averaged. For pooling followed by a dense layer alpha is that layer's weights / (h w).
    """
    maps = maps.astype(jnp.float32)
    gradient = jax.grad(lambda maps: head(maps)[:, index].astype(jnp.float32).sum())(maps)
    alpha = gradient.mean((1, 2))
    return jax.nn.relu(jnp.einsum("bhwd,bd->bhw", maps, alpha, precision=jax.lax.Precision.HIGHEST))
