"""Deep layer aggregation (Yu et al. 2018): DLA-34 as a classifier and as the encoder of larger networks."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from srcc_jax.kernels.pooling import max_pool
from srcc_jax.models.architecture import TORCH, Architecture
from srcc_jax.models.layers import ConvNorm, check_sides, classify, rematerialised

# Conventions by the source of the weights: the authors' own (ucbdrive/dla), and the same weights as timm publishes them.
SOURCES = {"timm": TORCH, "ucbdrive": TORCH}
VARIANTS = ("dla34",)
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "leaky": functools.partial(nn.leaky_relu, negative_slope=0.01),  # after BatchNorm: the function of InPlace-ABN
}
STEMS = ("7x7", "3x3")
_DEPTHS = (1, 2, 2, 1)  # of the trees of levels 2 to 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class DLAArchitecture(Architecture):
    """The shape of a DLA-34. `source` is a key of SOURCES; with `classes` 0 it has no classifier and no logits."""

    stem: str = "7x7"  # "3x3": three 3×3 convolutions in its place (Yu et al. 2019)
    activation: str = "relu"  # a key of ACTIVATIONS
    remat: bool = False  # the gradient computes each block again from its inputs: less memory, a third more time
    widths: tuple[int, ...] = (16, 32, 64, 128, 256, 512)  # of levels 0 to 5, each half as large as the one before

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stem not in STEMS:
            raise ValueError(f"stem is {self.stem!r}: must be one of {', '.join(STEMS)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}: must be one of {', '.join(ACTIVATIONS)}")
        if len(self.widths) != 6:
            raise ValueError(f"widths is {self.widths}: must have one width for each of levels 0 to 5")


def architecture(name: str, *, source: str, classes: int, **changes: Any) -> DLAArchitecture:
    """The architecture of a variant under the conventions of a source of weights.

    name: one of VARIANTS; source: a key of SOURCES. changes: any field of DLAArchitecture, to differ from both.
    """
    if name not in VARIANTS:
        raise ValueError(f"{name!r} is no DLA: choose one of {', '.join(VARIANTS)}")
    if source not in SOURCES:
        raise ValueError(f"{source!r} is no source of weights: choose one of {', '.join(SOURCES)}")
    values = dataclasses.asdict(SOURCES[source]) | changes
    return DLAArchitecture(name=name, source=source, classes=classes, **values)


class Stem(nn.Module):
    """Three 3×3 convolutions in the place of one of 7×7: [B, H, W, 3] -> [B, H, W, filters]."""

    filters: int
    architecture: DLAArchitecture
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        arch = self.architecture
        for number in (1, 2, 3):
            layer = ConvNorm(
                self.filters, arch, ACTIVATIONS[arch.activation], 3, folded=self.folded, name=f"conv{number}"
            )
            x = layer(x, train=train)
        return x


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a residual: x [B, H, W, C], residual [B, H / stride, W / stride, filters] -> its shape."""

    filters: int
    stride: int
    architecture: DLAArchitecture
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array, *, train: bool) -> jax.Array:
        activation = ACTIVATIONS[self.architecture.activation]
        conv_norm = functools.partial(ConvNorm, self.filters, self.architecture, size=3, folded=self.folded)
        y = conv_norm(activation=activation, stride=self.stride, name="conv1")(x, train=train)
        return activation(conv_norm(name="conv2")(y, train=train) + residual)


class Root(nn.Module):
    """Aggregation of maps of one size by a 1×1 convolution of them all: [B, H, W, Ci] each -> [B, H, W, filters]."""

    filters: int
    architecture: DLAArchitecture
    folded: bool

    @nn.compact
    def __call__(self, *maps: jax.Array, train: bool) -> jax.Array:
        arch = self.architecture
        layer = ConvNorm(self.filters, arch, ACTIVATIONS[arch.activation], folded=self.folded, name="merge")
        return layer(jnp.concatenate(maps, axis=-1), train=train)


class Tree(nn.Module):
    """Hierarchical aggregation of 2^depth blocks: [B, H, W, C] -> [B, H / stride, W / stride, filters].

    level_root: the root sees the input of the level too. The maps in `children` come from the trees around this one.
    """

    filters: int
    depth: int
    stride: int
    architecture: DLAArchitecture
    folded: bool
    level_root: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *children: jax.Array, train: bool) -> jax.Array:
        arch, size = self.architecture, self.stride
        bottom = max_pool(x, size=size, stride=size, padding=((0, 0), (0, 0))) if size > 1 else x
        if self.level_root:
            children = (*children, bottom)
        if self.depth > 1:
            tree = functools.partial(Tree, self.filters, self.depth - 1, architecture=arch, folded=self.folded)
            first = tree(stride=self.stride, name="tree1")(x, train=train)
            return tree(stride=1, name="tree2")(first, *children, first, train=train)
        run = functools.partial(rematerialised, remat=arch.remat, train=train)
        if bottom.shape[-1] != self.filters:
            bottom = run(ConvNorm(self.filters, arch, folded=self.folded, name="project"), bottom)
        block = functools.partial(BasicBlock, self.filters, architecture=arch, folded=self.folded)
        first = run(block(stride=self.stride, name="tree1"), x, bottom)
        second = run(block(stride=1, name="tree2"), first, first)
        return run(Root(self.filters, arch, self.folded, name="root"), second, first, *children)


class DLA(nn.Module):
    """x [B, H, W, 3], normalised -> logits [B, classes], features [B, C] (pooled), maps = level5 [B, H/32, W/32, C], and
    level0 to level5, each half as large as the one before. H and W are multiples of 32.

    train: BatchNorm uses the batch; freeze_norm: it does not even so. folded: the parameters come from
    `layers.fold_batch_norm`. Logits and features are float32 whatever the dtype.
    """

    architecture: DLAArchitecture
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, freeze_norm: bool = False) -> dict[str, jax.Array]:
        arch = self.architecture
        check_sides(x, 2 ** (len(arch.widths) - 1))  # max-pooling and strided convolutions halve odd sides differently
        run = functools.partial(rematerialised, remat=arch.remat, train=train and not freeze_norm)
        conv_norm = functools.partial(
            ConvNorm, conventions=arch, activation=ACTIVATIONS[arch.activation], folded=self.folded
        )
        width, x = arch.widths[0], x.astype(arch.dtype)
        if arch.stem == "7x7":
            x = run(conv_norm(width, size=7, name="base_layer"), x)
        else:
            x = run(Stem(width, arch, self.folded, name="base_layer"), x)
        levels = {}
        for level, width in enumerate(arch.widths):
            if level < 2:
                layer = conv_norm(width, size=3, stride=level + 1, name=f"level{level}")
                x = run(layer, x)
            else:
                tree = Tree(width, _DEPTHS[level - 2], 2, arch, self.folded, level > 2, name=f"level{level}")
                x = tree(x, train=train and not freeze_norm)
            levels[f"level{level}"] = x
        return levels | classify(x, classes=arch.classes)


def build(architecture: DLAArchitecture, *, folded: bool = False) -> DLA:
    """The network of an architecture. folded: for variables that `layers.fold_batch_norm` made."""
    return DLA(architecture=architecture, folded=folded)
