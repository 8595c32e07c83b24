"""The neural conditional random field over a grid of neighbouring patches (Li & Ping 2018, NCRF)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

ITERATIONS = 10  # of mean field, as in the released code


class CRF(nn.Module):
    """Logits [B, N] of the N patches of each grid, from their features [B, N, D] and their own logits [B, N]; float32.

    Mean field: l_i = u_i + Σ_j w_ij cos(f_i, f_j) (2 σ(l_j) - 1), with u the patches' own logits, j = i among the others, and w the
    symmetric part of a trained matrix, which begins at zero: then the logits are the patches' own.
    """

    iterations: int = ITERATIONS

    @nn.compact
    def __call__(self, features: jax.Array, logits: jax.Array) -> jax.Array:
        nodes = logits.shape[-1]
        weight = self.param("weight", nn.initializers.zeros, (nodes, nodes), jnp.float32)
        features, own = features.astype(jnp.float32), logits.astype(jnp.float32)
        square = (features**2).sum(-1, keepdims=True)
        unit = features * jax.lax.rsqrt(jnp.maximum(square, 1e-16))  # with a gradient where all features are zero
        pairwise = (unit @ unit.swapaxes(1, 2)) * ((weight + weight.T) / 2)[None]
        logits = own
        for _ in range(self.iterations):
            logits = own + jnp.einsum("bij,bj->bi", pairwise, jnp.tanh(logits / 2))  # 2 σ(l) - 1
        return logits


class GridClassifier(nn.Module):
    """One logit for each of side × side patches of an image, row by row: x [B, H, W, 3], normalised -> logits [B, side²] and features
    [B, side², D].

    backbone: a classification network with one class, which sees each patch by itself. crf: whether their logits then pass
    through a CRF. crop: side in pixels of the middle of each patch that the backbone sees; None: all of it. ValueError where
    the image cannot be divided so.
    """

    backbone: nn.Module
    side: int
    crf: bool
    crop: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        patches = split_grid(x, self.side)
        if self.crop is not None:
            top, left = ((side - self.crop) // 2 for side in patches.shape[1:3])
            patches = patches[:, top : top + self.crop, left : left + self.crop]
        out = self.backbone(patches, train=train)
        logits, features = (out[name].reshape(len(x), self.side**2, -1) for name in ("logits", "features"))
        logits = logits[..., 0]
        return {"logits": CRF(name="crf")(features, logits) if self.crf else logits, "features": features}


def split_grid(x: jax.Array, side: int) -> jax.Array:
    """[B, H, W, C] -> [B · side², H / side, W / side, C]: the patches of each image, row by row. ValueError for other sides."""
    batch, height, width, channels = x.shape
    if height % side or width % side:
        raise ValueError(f"images of {height} × {width} pixels cannot be divided into {side} × {side} patches")
    patches = x.reshape(batch, side, height // side, side, width // side, channels)
    return patches.swapaxes(2, 3).reshape(batch * side**2, height // side, width // side, channels)
