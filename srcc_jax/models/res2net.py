"""Res2Net-50 (Gao et al. 2019): ResNet's bottlenecks with the 3×3 convolution split into a chain of narrower ones."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from srcc_jax.kernels.pooling import avg_pool
from srcc_jax.models.architecture import TORCH
from srcc_jax.models.resnet import Block, Layer, ResNet, ResNetArchitecture

SOURCES = {"timm": TORCH}
VARIANTS = ("res2net50_26w_4s",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Res2NetArchitecture(ResNetArchitecture):
    """The shape of a Res2Net: `scales` groups of channels in a bottleneck, `base_width` wide for each 64 of the stage's."""

    scales: int = 4

    def inner(self, width: int) -> int:
        """Channels inside a bottleneck of a stage of this width, all groups together."""
        return self.scales * super().inner(width)


@dataclasses.dataclass(frozen=True)
class SplitBranch:
    """A bottleneck whose middle is split: each group but the last goes through a 3×3 convolution and is added to the next.

    Where the shortcut is projected, the groups stay apart, and the last is averaged over 3×3 pixels, padding counted as 0.
    """

    scales: int

    def __call__(self, x: jax.Array, block: Block, layer: Layer) -> jax.Array:
        *groups, last = jnp.split(layer(x, block.inner, "conv1"), self.scales, axis=-1)
        outputs: list[jax.Array] = []
        for number, group in enumerate(groups, start=1):
            if outputs and not block.projected:
                group = group + outputs[-1]
            outputs.append(layer(group, group.shape[-1], f"branch{number}", size=3, stride=block.stride))
        if block.projected:
            last = avg_pool(last, size=3, stride=block.stride, padding=((1, 1), (1, 1)))
        return layer(jnp.concatenate([*outputs, last], axis=-1), block.filters, "conv3", activation=None)


def architecture(name: str, *, source: str, classes: int, **changes: Any) -> Res2NetArchitecture:
    """The architecture of a variant under the conventions of a source of weights.

    name: one of VARIANTS; source: a key of SOURCES. changes: any field of Res2NetArchitecture, to differ from both.
    """
    if name not in VARIANTS:
        raise ValueError(f"{name!r} is no Res2Net: choose one of {', '.join(VARIANTS)}")
    if source not in SOURCES:
        raise ValueError(f"{source!r} is no source of weights: choose one of {', '.join(SOURCES)}")
    values: dict[str, Any] = {"depths": (3, 4, 6, 3), "bottleneck": True, "base_width": 26}
    values |= dataclasses.asdict(SOURCES[source])
    return Res2NetArchitecture(name=name, source=source, classes=classes, **(values | changes))


def build(architecture: Res2NetArchitecture, *, folded: bool = False) -> ResNet:
    """The network of an architecture. folded: for variables that `layers.fold_batch_norm` made."""
    return ResNet(architecture=architecture, branch=SplitBranch(architecture.scales), folded=folded)
