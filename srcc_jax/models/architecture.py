"""What a network is besides its weights: its shape, and the conventions of the framework that its weights come from."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conventions:
    """Where the frameworks' versions of one architecture differ. Weights are right only under those they were trained with.

    mean and std are per channel (R, G, B) in the units of 8-bit pixels, 0 to 255.
    """

    padding: str  # of strided convolutions; "same": TensorFlow, asymmetric; "symmetric": torch
    bn_epsilon: float
    bn_momentum: float  # share of the old running value that a step keeps (flax, Keras); torch's momentum m is 1 - m
    bn_unbiased: bool  # the running variance collects n / (n - 1) of the batch variance (torch) or the variance (Keras)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channels: str = "rgb"  # in which order the network takes them; "bgr": Caffe and what descends from it

    def __post_init__(self) -> None:
        if self.padding not in ("same", "symmetric"):
            raise ValueError(f"padding is {self.padding!r}: must be 'same' (TensorFlow) or 'symmetric' (torch)")
        if self.channels not in ("rgb", "bgr"):
            raise ValueError(f"channels is {self.channels!r}: must be 'rgb' or 'bgr'")


TORCH = Conventions(
    padding="symmetric", bn_epsilon=1e-5, bn_momentum=0.9, bn_unbiased=True, mean=IMAGENET_MEAN, std=IMAGENET_STD
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture(Conventions):
    """Everything that makes two networks the same function of their weights. Travels with a checkpoint as JSON.

    Each family of networks has its own subclass with the fields of its shape.
    """

    name: str
    source: str  # whose conventions these are
    classes: int
    dtype: str = "float32"  # of the arithmetic; parameters stay float32

    def as_dict(self) -> dict[str, Any]:
        """Plain values that `json` writes; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The architecture that `as_dict` described. ValueError where fields are missing or unknown."""
        known = {field.name for field in dataclasses.fields(cls)}
        if set(values) != known:
            raise ValueError(f"not a description of {cls.__name__}: missing or extra {sorted(known ^ set(values))}")
        fields: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**fields)


def normalize(image: jax.Array, conventions: Conventions) -> jax.Array:
    """image [B, H, W, 3], R, G, B, 0 to 255 -> (image - mean) / std, float32, as the network was trained to see it."""
    mean, std = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 3) for values in (conventions.mean, conventions.std))
    scaled = (image.astype(jnp.float32) - mean) / std
    return scaled[..., ::-1] if conventions.channels == "bgr" else scaled
