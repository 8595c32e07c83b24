"""ResNet-18, -34 and -50 (He et al. 2016) and WideResNet-50-2 (Zagoruyko & Komodakis 2016)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax

from srcc_jax.kernels.pooling import max_pool
from srcc_jax.models.architecture import TORCH, Architecture
from srcc_jax.models.layers import ConvNorm, classify, explicit_padding, rematerialised

_KERAS = dataclasses.replace(
    TORCH,
    bn_epsilon=1.001e-5,
    bn_momentum=0.99,
    bn_unbiased=False,
    mean=(123.68, 116.779, 103.939),
    std=(1.0, 1.0, 1.0),
    channels="bgr",
)

# Conventions by the source of the weights. keras: tf.keras.applications; keras_caffe: its predecessor of 2015 to 2018, whose
# layers have the names of the Caffe model (res2a_branch2a). Keras pads its ResNets as torch does.
SOURCES = {
    "torchvision": TORCH,
    "timm": TORCH,
    "keras": _KERAS,
    "keras_caffe": dataclasses.replace(_KERAS, bn_epsilon=1e-3),
}
VARIANTS = ("resnet18", "resnet34", "resnet50", "wide_resnet50_2")
_DEPTHS = {"resnet18": (2, 2, 2, 2)}


@dataclasses.dataclass(frozen=True)
class Block:
    """One residual block. stage and number count from 1; strides are those of its first two convolutions."""

    stage: int
    number: int
    inner: int  # channels inside a bottleneck
    filters: int  # of its output
    strides: tuple[int, int]
    projected: bool  # the shortcut is a 1×1 convolution, not the identity

    @property
    def name(self) -> str:
        return f"stage{self.stage}_block{self.number}"

    @property
    def stride(self) -> int:
        return self.strides[0] * self.strides[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetArchitecture(Architecture):
    """The shape of a ResNet. `source` is a key of SOURCES; with `classes` 0 it has no classifier and no logits."""

    depths: tuple[int, ...]  # blocks of each stage
    bottleneck: bool  # blocks of 1×1, 3×3 and 1×1 convolutions instead of two of 3×3
    width: int = 64  # channels of the stem; stage s is width · 2^(s - 1) wide, four times that after a bottleneck
    base_width: int = 64  # channels inside a bottleneck for each 64 of its stage's width
    stages: int = 4  # the network ends after this many; from 1 to len(depths)
    stride_first: bool = (
        False  # bottlenecks stride in the first 1×1 convolution (He et al., Keras), not in the 3×3 (torch)
    )
    conv_bias: bool = False  # convolutions have biases although a BatchNorm follows
    remat: bool = False  # training computes the inside of each block a second time instead of keeping it

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.stages <= len(self.depths):
            raise ValueError(f"stages is {self.stages}: {self.name} has 1 to {len(self.depths)}")

    def inner(self, width: int) -> int:
        """Channels inside a bottleneck of a stage of this width."""
        return width * self.base_width // 64

    def blocks(self) -> tuple[Block, ...]:
        """The blocks in order. Of a stage's blocks only the first strides (not in stage 1) and changes the channels."""
        blocks: list[Block] = []
        inputs = self.width
        for stage, depth in enumerate(self.depths[: self.stages], start=1):
            width = self.width * 2 ** (stage - 1)
            filters = 4 * width if self.bottleneck else width
            for number in range(1, depth + 1):
                stride = 2 if stage > 1 and number == 1 else 1
                strides = (1, stride) if self.bottleneck and not self.stride_first else (stride, 1)
                projected = stride > 1 or inputs != filters
                blocks.append(Block(stage, number, self.inner(width), filters, strides, projected))
                inputs = filters
        return tuple(blocks)


class Layer(Protocol):
    """A convolution with BatchNorm in a block, with the architecture's conventions: [B, H, W, C] -> [B, H', W', features]."""

    def __call__(
        self,
        x: jax.Array,
        features: int,
        name: str,
        *,
        size: int = 1,
        stride: int = 1,
        activation: Callable[[jax.Array], jax.Array] | None = nn.relu,
    ) -> jax.Array: ...


Branch = Callable[[jax.Array, Block, Layer], jax.Array]  # what a block adds to its shortcut


def basic_branch(x: jax.Array, block: Block, layer: Layer) -> jax.Array:
    """Two 3×3 convolutions."""
    y = layer(x, block.filters, "conv1", size=3, stride=block.strides[0])
    return layer(y, block.filters, "conv2", size=3, stride=block.strides[1], activation=None)


def bottleneck_branch(x: jax.Array, block: Block, layer: Layer) -> jax.Array:
    """1×1 to the inner width, 3×3, 1×1 to the filters."""
    y = layer(x, block.inner, "conv1", stride=block.strides[0])
    y = layer(y, block.inner, "conv2", size=3, stride=block.strides[1])
    return layer(y, block.filters, "conv3", activation=None)


class ResidualBlock(nn.Module):
    """ReLU of branch + shortcut: [B, H, W, C] -> [B, H', W', filters]."""

    block: Block
    architecture: ResNetArchitecture
    branch: Branch
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        arch, block = self.architecture, self.block

        def layer(x, features, name, *, size=1, stride=1, activation=nn.relu):
            conv_norm = ConvNorm(
                features, arch, activation, size, stride, folded=self.folded, use_bias=arch.conv_bias, name=name
            )
            return conv_norm(x, train=train)

        shortcut = x
        if block.projected:
            shortcut = layer(x, block.filters, "shortcut", stride=block.stride, activation=None)
        return nn.relu(self.branch(x, block, layer) + shortcut)


class ResNet(nn.Module):
    """x [B, H, W, 3], normalised -> logits [B, classes], features [B, D] (pooled), and maps [B, h, w, C] along the way:
    stem (1/2 of the image's sides, before pooling), stage1 (1/4), stage2 (1/8), ...; maps is the last of them.

    freeze_norm: keep BatchNorm in inference mode while training. folded: the parameters come from
    `layers.fold_batch_norm`. Logits and features are float32 whatever the dtype.
    """

    architecture: ResNetArchitecture
    branch: Branch
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, freeze_norm: bool = False) -> dict[str, jax.Array]:
        arch = self.architecture
        train_norm = train and not freeze_norm
        stem = ConvNorm(arch.width, arch, nn.relu, 7, 2, folded=self.folded, use_bias=arch.conv_bias, name="stem")
        x = stem(x.astype(arch.dtype), train=train_norm)
        taps = {"stem": x}
        x = max_pool(x, size=3, stride=2, padding=explicit_padding(arch.padding, x.shape[1:3], 3, 2))
        for block in arch.blocks():
            layer = ResidualBlock(block, arch, self.branch, self.folded, name=block.name)
            x = rematerialised(layer, x, remat=arch.remat, train=train_norm)
            taps[f"stage{block.stage}"] = x
        return taps | classify(x, classes=arch.classes)


def architecture(name: str, *, source: str, classes: int, **changes: Any) -> ResNetArchitecture:
    """The architecture of a variant under the conventions of a source of weights.

    name: one of VARIANTS; source: a key of SOURCES. changes: any field of ResNetArchitecture, to differ from both.
    """
    if name not in VARIANTS:
        raise ValueError(f"{name!r} is no ResNet: choose one of {', '.join(VARIANTS)}")
    if source not in SOURCES:
        raise ValueError(f"{source!r} is no source of weights: choose one of {', '.join(SOURCES)}")
    values: dict[str, Any] = {
        "depths": _DEPTHS.get(name, (3, 4, 6, 3)),
        "bottleneck": name not in ("resnet18", "resnet34"),
        "base_width": 128 if name == "wide_resnet50_2" else 64,
        "stride_first": source.startswith("keras"),
        "conv_bias": source.startswith("keras"),
    }
    values |= dataclasses.asdict(SOURCES[source])
    return ResNetArchitecture(name=name, source=source, classes=classes, **(values | changes))


def build(architecture: ResNetArchitecture, *, folded: bool = False) -> ResNet:
    """The network of an architecture. folded: for variables that `layers.fold_batch_norm` made."""
    branch = bottleneck_branch if architecture.bottleneck else basic_branch
    return ResNet(architecture=architecture, branch=branch, folded=folded)
