"""Random views of tiles, on the device and inside the step: the eight symmetries of the square, and colour shifts.

Translation is not here: the host reads the tile at a shifted place, so that nothing has to be invented at its border.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # Rec. 601
# RGB -> YIQ (NTSC 1953): grey lies on the first axis, hue is the angle in the plane of the other two.
YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What may happen to a training tile. Kanavati 2021 §2.4 names the kinds and gives no ranges."""

    flips: bool = True  # Kanavati 2021 §2.4
    rotations: bool = True  # Kanavati 2021 §2.4: by 90 degrees
    brightness: float = 0.1  # ours: added, up to this part of 255
    contrast: float = 0.1  # ours: the distance to the tile's mean colour times 1 +- this
    saturation: float = 0.1  # ours: the distance to grey times 1 +- this
    hue: float = 0.02  # ours: turned by up to this part of the colour circle

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation", "hue"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")


def augment(image: jax.Array, key: jax.Array, config: AugmentConfig) -> jax.Array:
    """A random view of every image: uint8 [B, H, W, 3] -> float32 [B, H, W, 3] in 0..255, not rounded.

    Each image draws from the key and its place in the batch, so the views do not depend on the number of devices.
    Raises ValueError for rotations of images that are not square.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(image)))
    draws = jax.vmap(lambda key: jax.random.uniform(key, (7,)))(keys)
    if config.rotations or config.flips:
        turns = jnp.floor(4 * draws[:, 0]).astype(jnp.int32) * config.rotations
        flip_rows, flip_columns = ((draws[:, i] < 0.5) & config.flips for i in (1, 2))
        image = turn(image, turns if config.rotations else None, flip_rows, flip_columns)
    shift = 2 * draws[:, 3:] - 1  # in [-1, 1)
    return recolour(
        image,
        brightness=config.brightness * shift[:, 0],
        contrast=1 + config.contrast * shift[:, 1],
        saturation=1 + config.saturation * shift[:, 2],
        hue=config.hue * shift[:, 3],
    )


def turn(image: jax.Array, turns: jax.Array | None, flip_rows: jax.Array, flip_columns: jax.Array) -> jax.Array:
    """Rotate anticlockwise by `turns` [B] quarter turns (None: not at all), then mirror where asked (bool [B] each).

    image [B, H, W, C] -> the same shape and type. Raises ValueError for turns of images that are not square.
    """
    height, width = image.shape[1:3]
    transposed = jnp.zeros(len(image), bool)
    if turns is not None:
        if height != width:
            raise ValueError(f"quarter turns need square images, these are {height} x {width}: set rotations to False")
        # np.rot90 as a transposition followed by mirroring: one read of the image serves all eight symmetries
        transposed = turns % 2 == 1
        flip_rows = flip_rows ^ ((turns == 1) | (turns == 2))
        flip_columns = flip_columns ^ ((turns == 2) | (turns == 3))

    def one(pixels: jax.Array, transposed: jax.Array, flip_rows: jax.Array, flip_columns: jax.Array) -> jax.Array:
        rows, columns = jnp.mgrid[:height, :width]
        rows = jnp.where(flip_rows, height - 1 - rows, rows)
        columns = jnp.where(flip_columns, width - 1 - columns, columns)
        y, x = jnp.where(transposed, columns, rows), jnp.where(transposed, rows, columns)
        return pixels.at[y, x].get(mode="promise_in_bounds")

    return jax.vmap(one)(image, transposed, flip_rows, flip_columns)


def recolour(
    image: jax.Array, *, brightness: jax.Array, contrast: jax.Array, saturation: jax.Array, hue: jax.Array
) -> jax.Array:
    """Shift colours, image by image: [B, H, W, 3] in 0..255 -> float32 of the same shape, clipped to 0..255 once, last.

    brightness [B]: part of 255 to add.  contrast [B]: factor on the distance to the image's mean of each channel.
    saturation [B]: factor on the distance to the pixel's luma.  hue [B]: part of the full circle to turn in the I-Q
    plane of YIQ (a linear stand-in for the hue of HSV).  In this order, each as a linear map: together they are one
    3x3 matrix and one offset per image, so the pixels are read once.
    """
    pixels = image.astype(jnp.float32)
    mean = pixels.mean((1, 2))
    matrix = jax.vmap(_colour_matrix)(saturation, hue)  # [B, 3, 3]
    constant = (1 - contrast[:, None]) * mean + 255 * brightness[:, None]
    offset = (matrix * constant[:, None, :]).sum(2)
    matrix = matrix * contrast[:, None, None]
    # a sum of three products, not an einsum: XLA runs it 60 times faster on CPU
    mixed = sum(pixels[..., c, None] * matrix[:, None, None, :, c] for c in range(3))
    return jnp.clip(mixed + offset[:, None, None], 0, 255)


def _colour_matrix(saturation: jax.Array, hue: jax.Array) -> jax.Array:
    """The 3x3 matrix on RGB columns that scales saturation (a scalar factor) and turns hue (a part of the circle)."""
    cosine, sine = jnp.cos(2 * math.pi * hue), jnp.sin(2 * math.pi * hue)
    one, zero = jnp.ones(()), jnp.zeros(())
    rotation = jnp.stack([one, zero, zero, zero, cosine, -sine, zero, sine, cosine]).reshape(3, 3)
    saturate = saturation * jnp.eye(3) + (1 - saturation) * jnp.broadcast_to(LUMA, (3, 3))
    return jnp.asarray(np.linalg.inv(YIQ)) @ rotation @ YIQ @ saturate
