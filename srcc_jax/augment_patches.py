"""Random views of labelled patches as Lee et al. 2023 train on them: scale, symmetry, distortion, filter, light, in this order.

What moves pixels is composed before any is read, so that a view is interpolated once; their pipeline does it up to four times.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from srcc_jax.augment_filters import GAUSSIAN, MEAN, WINDOWS, add_noise, blur, median
from srcc_jax.augment_geometry import (
    LEFT_RIGHT,
    TOP_BOTTOM,
    TRANSPOSITION,
    Places,
    about_centre,
    elastic_field,
    mirrored,
    pixel_places,
    read_at,
    rotation,
    triangle_map,
)

_GAUSSIAN_ODDS = (
    0.2,
    0.4,
    0.4,
)  # of the windows 3, 5, 7: 3 to 7 is drawn evenly there, and 4 and 6 become the next odd one


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchViewConfig:
    """What may happen to a training patch. Every number is of the released code of Lee et al. 2023; their paper gives none.

    The probabilities are of one of a group, each of which is as likely as the others.
    """

    scale: float = 0.5  # every view, by a factor of 1 - this to 1 + this
    symmetry: float = 0.5  # probability of a transposition or a mirror image, left to right or top to bottom
    distortion: float = 0.8  # probability of an elastic deformation or a rotation
    elastic_alpha: float = 1.0  # factor on the smoothed noise of -1 to 1, in pixels
    elastic_sigma: float = 50.0  # of the filter that smooths it, in pixels
    elastic_affine: float = 50.0  # pixels that each of three points may move along either axis
    rotation: float = 25.0  # degrees, either way
    filtering: float = 0.2  # probability of a mean, a Gaussian, noise or a median, with windows of 3 to 7 pixels
    least_variance: float = 10.0  # of the noise, of values 0 to 255
    most_variance: float = 50.0
    lighting: float = 0.5  # probability of a change of brightness and contrast
    brightness: float = 0.2  # added, up to this part of 255
    contrast: float = 0.2  # values times 1 +- this

    def __post_init__(self) -> None:
        for name in ("symmetry", "distortion", "filtering", "lighting"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, 0 to 1, not {getattr(self, name)}")
        for name in ("scale", "brightness", "contrast"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if not 0 <= self.least_variance <= self.most_variance:
            raise ValueError(f"the noise's variance cannot go from {self.least_variance} to {self.most_variance}")


def patch_views(image: jax.Array, key: jax.Array, config: PatchViewConfig, *, mesh: Mesh | None = None) -> jax.Array:
    """A random view of every patch: uint8 [B, H, W, 3] -> float32 [B, H, W, 3] in 0..255.

    Each patch draws from the key and its place in the batch, so the views do not depend on the number of devices. mesh: over which the
    batch is split by rows; each device then makes its own views, and nothing is exchanged. On CPU one patch follows
    the other and only what it drew is computed; elsewhere all run at once. Raises ValueError for patches that are not square.
    """
    if image.shape[1] != image.shape[2]:
        raise ValueError(f"views of patches need square ones, these are {image.shape[1]} x {image.shape[2]}")
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(image)))
    one = functools.partial(_view, config=config)

    def views(image: jax.Array, keys: jax.Array) -> jax.Array:
        return lax.platform_dependent(
            image,
            keys,
            cpu=lambda image, keys: lax.map(lambda both: one(*both), (image, keys)),
            default=jax.vmap(one),
        )

    if mesh is None:
        return views(image, keys)
    rows = PartitionSpec("data")
    return jax.shard_map(views, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(image, keys)


def _view(image: jax.Array, key: jax.Array, config: PatchViewConfig) -> jax.Array:
    """uint8 [H, H, 3] -> float32 [H, H, 3]."""
    moving, filtering, lighting = jax.random.split(key, 3)
    moved = jnp.round(read_at(image, _source(image.shape[0], moving, config))).astype(jnp.uint8)
    filtered = _filtered(moved, filtering, config) if config.filtering else moved.astype(jnp.float32)
    return _lit(filtered, lighting, config)


def _source(side: int, key: jax.Array, config: PatchViewConfig) -> Places:
    """Where in the patch each pixel of its view lies. The last change of the pipeline is the first to be undone."""
    draw_key, distort_key = jax.random.split(key)
    draws, places = jax.random.uniform(draw_key, (3,)), pixel_places(side, side)
    if config.distortion:
        distort = [functools.partial(change, config=config) for change in (_deformed, _rotated)]
        places = lax.switch(
            _one_of(draws[0], config.distortion, 2), [*distort, lambda places, _: places], places, distort_key
        )
    symmetry = jnp.stack([TRANSPOSITION, LEFT_RIGHT, TOP_BOTTOM, jnp.eye(2)])[_one_of(draws[1], config.symmetry, 3)]
    factor = 1 + config.scale * (2 * draws[2] - 1)
    return mirrored(about_centre(mirrored(places), symmetry / factor))


def _one_of(draw: jax.Array, probability: float, count: int) -> jax.Array:
    """Which of `count` equally likely things, of which there is one with this probability; `count` for none. draw: in [0, 1)."""
    if not probability:
        return jnp.int32(count)
    return jnp.minimum((count / probability * draw).astype(jnp.int32), count)


def _rotated(places: Places, key: jax.Array, *, config: PatchViewConfig) -> Places:
    degrees = jax.random.uniform(key, minval=-config.rotation, maxval=config.rotation)
    return about_centre(places, rotation(degrees))


def _deformed(places: Places, key: jax.Array, *, config: PatchViewConfig) -> Places:
    """An affine map of the patch, then an elastic field over it."""
    noise_key, corner_key = jax.random.split(key)
    noise = jax.random.uniform(noise_key, (2, *places[0].shape), minval=-1)
    field = elastic_field(noise, alpha=config.elastic_alpha, sigma=config.elastic_sigma)
    shift = jax.random.uniform(corner_key, (3, 2), minval=-config.elastic_affine, maxval=config.elastic_affine)
    return triangle_map(mirrored((places[0] + field[0], places[1] + field[1])), shift)


def _filtered(image: jax.Array, key: jax.Array, config: PatchViewConfig) -> jax.Array:
    """uint8 [H, H, 3] -> float32 of the same shape."""
    draw_key, noise_key = jax.random.split(key)
    draws = jax.random.uniform(draw_key, (3,))
    window = (len(WINDOWS) * draws[1]).astype(jnp.int32)
    gaussian = jnp.searchsorted(jnp.cumsum(jnp.asarray(_GAUSSIAN_ODDS))[:-1], draws[1])
    variance = config.least_variance + (config.most_variance - config.least_variance) * draws[2]
    filters = (
        lambda: blur(image, jnp.asarray(MEAN)[window]),
        lambda: blur(image, jnp.asarray(GAUSSIAN)[gaussian]),
        lambda: add_noise(image, variance, noise_key),
        lambda: median(image, jnp.asarray(WINDOWS)[window]).astype(jnp.float32),
        lambda: image.astype(jnp.float32),
    )
    return lax.switch(_one_of(draws[0], config.filtering, len(filters) - 1), filters)


def _lit(image: jax.Array, key: jax.Array, config: PatchViewConfig) -> jax.Array:
    draws = jax.random.uniform(key, (3,))
    change = (draws[0] < config.lighting) * (2 * draws[1:] - 1)
    return jnp.clip(image * (1 + config.contrast * change[0]) + 255 * config.brightness * change[1], 0, 255)
