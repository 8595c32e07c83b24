"""Random views of images together with their masks, on the device: what moves pixels moves both, what colours them the image alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from srcc_jax.augment import recolour, turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """What may happen to a training patch. Yu et al. 2019, §5.2, name the kinds and give no ranges: these are ours.

    crop: least side of the part that is cut out and enlarged again, as a share of the image's. aspect: its sides' ratio differs from
    1 by a factor of up to 1 + this. contrast: as of `augment`. density: largest change of the optical density, as a share of it: paler
    and darker stains. noise: largest standard deviation, in units of 8-bit pixels.
    """

    flips: bool = True
    rotations: bool = True
    crop: float = 0.75
    aspect: float = 0.2
    contrast: float = 0.2
    density: float = 0.0
    noise: float = 8.0

    def __post_init__(self) -> None:
        shares = all(0 <= share < 1 for share in (self.contrast, self.density))
        if not 0 < self.crop <= 1 or not shares or self.aspect < 0 or self.noise < 0:
            raise ValueError(
                f"crop is in (0, 1], contrast and density in [0, 1), aspect and noise are at least 0; not {self}"
            )


def random_views(image: jax.Array, mask: jax.Array, key: jax.Array, config: ViewConfig) -> tuple[jax.Array, jax.Array]:
    """image uint8 [B, S, S, 3], mask uint8 [B, S, S] of 0 and 1 -> float32 [B, S, S, 3] in 0..255 and float32 [B, S, S] of 0 and 1.

    Each image draws from the key and its place in the batch, so the views do not depend on the number of devices. The mask is
    interpolated as the image is, and cut at one half.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(image)))
    draws = jax.vmap(lambda key: jax.random.uniform(key, (9,)))(keys)
    both = jnp.concatenate([image, 255 * mask[..., None]], axis=-1)
    turns = jnp.floor(4 * draws[:, 0]).astype(jnp.int32) * config.rotations
    both = turn(both, turns, *((draws[:, i] < 0.5) & config.flips for i in (1, 2)))
    if config.crop < 1 or config.aspect > 0:
        both = _cropped(both.astype(jnp.float32), draws[:, 3:7], config)
    pixels, cut = both[..., :3].astype(jnp.float32), (both[..., 3] >= 127.5).astype(jnp.float32)
    if config.density > 0:
        drawn = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 2), minval=-1.0))(keys)
        pixels = 255 * (pixels / 255) ** (1 + config.density * drawn)[:, None, None, None]
    same = jnp.ones(len(image))
    contrast = 1 + config.contrast * (2 * draws[:, 7] - 1)
    pixels = recolour(pixels, brightness=0 * same, contrast=contrast, saturation=same, hue=0 * same)
    if config.noise > 0:
        grain = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1), pixels.shape[1:]))(keys)
        deviation = config.noise * draws[:, 8]
        pixels = jnp.clip(pixels + deviation[:, None, None, None] * grain, 0, 255)
    return pixels, cut


def _cropped(both: jax.Array, draws: jax.Array, config: ViewConfig) -> jax.Array:
    """A part of each image [B, S, S, C] enlarged to the whole, bilinearly. draws [B, 4]: size, aspect, and the place of the corner."""
    side = both.shape[1]
    size = config.crop + (1 - config.crop) * draws[:, 0]
    stretch = (1 + config.aspect) ** (draws[:, 1] - 0.5)  # of height over width: its square root, up and down alike
    extent = jnp.minimum(size[:, None] * jnp.stack([stretch, 1 / stretch], axis=1), 1)  # [B, 2], share of the side
    corner = (1 - extent) * draws[:, 2:4] * side

    def one(image: jax.Array, extent: jax.Array, corner: jax.Array) -> jax.Array:
        scale = 1 / extent
        return jax.image.scale_and_translate(
            image, image.shape, (0, 1), scale, -corner * scale, method="linear", antialias=False
        )

    return jax.vmap(one)(both, extent, corner)
