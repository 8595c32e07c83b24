"""From the features of a slide's most suspicious patches to its verdict: the feed-forward network of Yu et al. 2019, §4.1."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class ScreeningNet(nn.Module):
    """features [B, k, D], valid bool [B, k] -> logits [B, 1], float32: positive where the slide is.

    A dense layer of D to `width` and ReLU for each patch, the maximum over the patches, a dense layer to one: 263,169 parameters for
    512 and 512. A slide with fewer than k patches has the places that are not valid left out of the maximum; one with none has
    the value of features that all give 0.
    """

    width: int = 512

    @nn.compact
    def __call__(self, features: jax.Array, valid: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        del train  # it is the same network in training
        hidden = nn.relu(nn.Dense(self.width, kernel_init=nn.initializers.glorot_uniform(), name="instance")(features))
        pooled = jnp.where(valid[..., None], hidden, 0).max(
            1
        )  # ReLU is never below 0, so 0 in the others' places loses to all
        return {"logits": nn.Dense(1, kernel_init=nn.initializers.glorot_uniform(), name="classifier")(pooled)}
