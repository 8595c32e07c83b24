"""The trained half of reverse distillation (Deng & Li 2022; He & Li 2023): a bottleneck behind the maps of a frozen teacher,
and a student that makes the teacher's maps again from what comes through it.

Where the papers leave layers open, they are those of the released codes (RD4AD, FW-RD).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from srcc_jax.models.architecture import TORCH, Architecture
from srcc_jax.models.layers import BatchNorm, ConvNorm, ConvTranspose, check_sides, init_variables, rematerialised
from srcc_jax.models.resnet import Block, ResNetArchitecture, basic_branch, bottleneck_branch

SHORTCUTS = ("3x3", "1x1")
_LEVELS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationArchitecture(Architecture):
    """The shape of bottleneck and student. `name` is the teacher's; there are no classes."""

    widths: tuple[
        int, ...
    ]  # channels of the teacher's three maps, from shallow to deep, each half the size of the last
    depths: tuple[int, ...] = (
        3,
        4,
        6,
    )  # blocks of the student's stages, from DEEP to shallow, as in the released codes
    bottleneck: bool = True  # blocks of 1×1, 3×3 and 1×1 convolutions instead of two of 3×3
    base_width: int = 64  # channels inside such a block for every 256 of its output
    embedding_blocks: int = 3  # of the one-class embedding
    shortcut: str = "3x3"  # around its strided block: He & Li's; "1x1": Deng & Li's
    remat: bool = False  # training computes the inside of each block a second time instead of keeping it

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut is {self.shortcut!r}: must be one of {', '.join(SHORTCUTS)}")
        for name in ("widths", "depths"):
            if len(getattr(self, name)) != _LEVELS:
                raise ValueError(f"{name} is {getattr(self, name)}: reverse distillation has {_LEVELS} levels")

    def block(self, stage: int, number: int, filters: int) -> Block:
        """Block `number` of a stage, both from 1. The first of a stage halves the map's sides, or doubles them."""
        stride = 2 if number == 1 else 1
        inner = filters // 4 * self.base_width // 64
        strides = (1, stride) if self.bottleneck else (stride, 1)
        return Block(stage, number, inner, filters, strides, projected=number == 1)


def architecture(teacher: ResNetArchitecture, *, shortcut: str, **changes: Any) -> DistillationArchitecture:
    """What fits the first three stages of a ResNet. changes: any field of DistillationArchitecture, to differ from it.

    The conventions are torch's whatever the teacher's, since these weights are trained here.
    """
    widths = {block.stage: block.filters for block in dataclasses.replace(teacher, stages=_LEVELS).blocks()}
    values: dict[str, Any] = dataclasses.asdict(TORCH) | {
        "widths": tuple(widths.values()),
        "depths": teacher.depths[:_LEVELS],
        "bottleneck": teacher.bottleneck,
        "base_width": teacher.base_width,
        "embedding_blocks": 3 if teacher.bottleneck else 2,
        "dtype": teacher.dtype,
        "remat": teacher.remat,
    }
    return DistillationArchitecture(
        name=teacher.name, source="torchvision", classes=0, shortcut=shortcut, **(values | changes)
    )


class TransposedNorm(nn.Module):
    """Transposed 2×2 convolution of stride 2, BatchNorm, activation: [B, H, W, C] -> [B, 2 H, 2 W, features]."""

    features: int
    architecture: DistillationArchitecture
    activation: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = ConvTranspose(self.features, size=2, stride=2, name="conv")(x)
        x = BatchNorm(self.architecture, name="norm")(x, train=train)
        return x if self.activation is None else self.activation(x)


class Residual(nn.Module):
    """ReLU of branch + shortcut: [B, H, W, C] -> [B, H', W', filters], the block of a ResNet.

    upwards: where that strides by 2, this doubles the map with a transposed convolution. shortcut_size: of the strided
    shortcut's convolution.
    """

    block: Block
    architecture: DistillationArchitecture
    folded: bool
    upwards: bool = False
    shortcut_size: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        arch, block = self.architecture, self.block

        def layer(x, features, name, *, size=1, stride=1, activation=nn.relu):
            if self.upwards and stride == 2:
                return TransposedNorm(features, arch, activation, name=name)(x, train=train)
            return ConvNorm(features, arch, activation, size, stride, folded=self.folded, name=name)(x, train=train)

        shortcut = x
        if block.projected:
            size, stride = self.shortcut_size, block.stride
            shortcut = layer(x, block.filters, "shortcut", size=size, stride=stride, activation=None)
        branch = bottleneck_branch if arch.bottleneck else basic_branch
        return nn.relu(branch(x, block, layer) + shortcut)


class Fusion(nn.Module):
    """The teacher's maps side by side at the size of the deepest: three [B, h, w, C] -> [B, h3, w3, 3 · C3]."""

    architecture: DistillationArchitecture
    folded: bool

    @nn.compact
    def __call__(self, *maps: jax.Array, train: bool) -> jax.Array:
        shallow, middle, deep = maps

        def halve(x, features, name):
            conv_norm = ConvNorm(features, self.architecture, nn.relu, 3, 2, folded=self.folded, name=name)
            return conv_norm(x, train=train)

        _, to_middle, to_deep = self.architecture.widths
        shallow = halve(halve(shallow, to_middle, "shallow1"), to_deep, "shallow2")
        return jnp.concatenate([shallow, halve(middle, to_deep, "middle1"), deep], axis=-1)


class Bottleneck(nn.Module):
    """Fusion of the teacher's maps and one-class embedding: three [B, h, w, C] -> [B, h3 / 2, w3 / 2, 2 · C3]."""

    architecture: DistillationArchitecture
    folded: bool = False

    @nn.compact
    def __call__(self, *maps: jax.Array, train: bool) -> jax.Array:
        arch = self.architecture
        widths = tuple(x.shape[-1] for x in maps)
        if widths != arch.widths:
            raise ValueError(f"the teacher's maps have {widths} channels: this bottleneck was built for {arch.widths}")
        check_sides(maps[0], 2**_LEVELS)
        x = Fusion(arch, self.folded, name="fusion")(*(x.astype(arch.dtype) for x in maps), train=train)
        size = int(arch.shortcut[0])
        for number in range(1, arch.embedding_blocks + 1):
            block = arch.block(_LEVELS + 1, number, 2 * arch.widths[-1])
            layer = Residual(block, arch, self.folded, shortcut_size=size, name=f"block{number}")
            x = rematerialised(layer, x, remat=arch.remat, train=train)
        return x


class Student(nn.Module):
    """The embedding [B, h, w, C] -> maps stage1, stage2 and stage3, named as the teacher's, of its shapes; none is negative."""

    architecture: DistillationArchitecture
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        arch, maps = self.architecture, {}
        for stage, depth in zip(range(_LEVELS, 0, -1), arch.depths):
            for number in range(1, depth + 1):
                block = arch.block(stage, number, arch.widths[stage - 1])
                layer = Residual(block, arch, self.folded, upwards=True, name=block.name)
                x = rematerialised(layer, x, remat=arch.remat, train=train)
            maps[f"stage{stage}"] = x
        return maps


class ReverseDistillation(nn.Module):
    """The teacher's maps stage1, stage2, stage3 [B, h, w, C] -> the student's, by the same names, and the "embedding".

    The sides of stage1 are multiples of 8. folded: the parameters come from `layers.fold_batch_norm`.
    """

    architecture: DistillationArchitecture
    folded: bool = False

    @nn.compact
    def __call__(self, *maps: jax.Array, train: bool) -> dict[str, jax.Array]:
        embedding = Bottleneck(self.architecture, self.folded, name="bottleneck")(*maps, train=train)
        return Student(self.architecture, self.folded, name="student")(embedding, train=train) | {
            "embedding": embedding
        }


def build(architecture: DistillationArchitecture, *, folded: bool = False) -> ReverseDistillation:
    """Bottleneck and student of an architecture. folded: for variables that `layers.fold_batch_norm` made."""
    return ReverseDistillation(architecture=architecture, folded=folded)


def map_shapes(architecture: DistillationArchitecture, *, side: int) -> Sequence[tuple[int, int, int, int]]:
    """Shapes [1, h, w, C] of the teacher's maps, the shallowest of them `side` pixels wide and high."""
    return [(1, side >> level, side >> level, width) for level, width in enumerate(architecture.widths)]


def init(architecture: DistillationArchitecture, key: jax.Array) -> dict[str, Any]:
    """Fresh variables {"params", "batch_stats"} of `build(architecture)`, for maps of any size."""
    return init_variables(build(architecture), key, *map_shapes(architecture, side=2**_LEVELS))
