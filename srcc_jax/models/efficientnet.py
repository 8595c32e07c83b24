"""EfficientNet B0 to B7 and Lite0 to Lite4 (Tan & Le 2019), under the conventions of each framework that publishes weights."""

import dataclasses
import functools
import math
import string
from collections.abc import Mapping
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from srcc_jax.kernels.convolution import silu
from srcc_jax.models.architecture import TORCH, Architecture
from srcc_jax.models.layers import ConvNorm, DropPath, SqueezeExcite

_TORCH_AS_TF = dataclasses.replace(TORCH, padding="same", bn_epsilon=1e-3)

# Conventions by the source of the weights. timm: `efficientnet_*` and, with TensorFlow's weights, `tf_efficientnet_*`
# (`_ap`: those trained with AdvProp). lukemelas: the EfficientNet-PyTorch package and its Lite nets.
SOURCES = {
    "torchvision": TORCH,
    "timm": TORCH,
    "timm_tf": _TORCH_AS_TF,
    "timm_tf_ap": dataclasses.replace(_TORCH_AS_TF, mean=(127.5,) * 3, std=(127.5,) * 3),
    "keras": dataclasses.replace(_TORCH_AS_TF, bn_momentum=0.99, bn_unbiased=False),
    "lukemelas": dataclasses.replace(_TORCH_AS_TF, bn_momentum=0.99),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A row of the architecture's table, before scaling: `repeats` MBConv blocks, the first of them with `stride`."""

    expand: int  # channels inside the block as a multiple of its inputs; 1: no expansion layer
    kernel: int
    filters: int
    repeats: int
    stride: int


@dataclasses.dataclass(frozen=True)
class Block:
    """One MBConv block after scaling. stage and repeat count from 1 and 0; drop_path is its own rate."""

    stage: int
    repeat: int
    expand: int
    kernel: int
    inputs: int
    filters: int
    stride: int
    drop_path: float

    @property
    def name(self) -> str:
        """As Keras names it: block1a, block1b, block2a, ..."""
        return f"block{self.stage}{string.ascii_lowercase[self.repeat]}"

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.inputs == self.filters


STAGES = (
    Stage(1, 3, 16, 1, 1),
    Stage(6, 3, 24, 2, 2),
    Stage(6, 5, 40, 2, 2),
    Stage(6, 3, 80, 3, 2),
    Stage(6, 5, 112, 3, 1),
    Stage(6, 5, 192, 4, 2),
    Stage(6, 3, 320, 1, 1),
)
# Ours, for tests and the demo: 0.13 million parameters, last map at 1/16 of the image's side.
_TINY_STAGES = (Stage(1, 3, 16, 1, 1), Stage(4, 3, 24, 2, 2), Stage(4, 5, 40, 2, 2), Stage(4, 3, 64, 2, 2))

# width, depth, side of the images it was designed for in pixels, dropout
_SCALES = {
    "b0": (1.0, 1.0, 224, 0.2),
    "b1": (1.0, 1.1, 240, 0.2),
    "b2": (1.1, 1.2, 260, 0.3),
    "b3": (1.2, 1.4, 300, 0.3),
    "b4": (1.4, 1.8, 380, 0.4),
    "b5": (1.6, 2.2, 456, 0.4),
    "b6": (1.8, 2.6, 528, 0.5),
    "b7": (2.0, 3.1, 600, 0.5),
    "lite0": (1.0, 1.0, 224, 0.2),
    "lite1": (1.0, 1.1, 240, 0.2),
    "lite2": (1.1, 1.2, 260, 0.3),
    "lite3": (1.2, 1.4, 280, 0.3),
    "lite4": (1.4, 1.8, 300, 0.3),
    "tiny": (1.0, 1.0, 96, 0.2),
}
VARIANTS = tuple(_SCALES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientNetArchitecture(Architecture):
    """The shape of an EfficientNet. `source` is a key of SOURCES."""

    width: float
    depth: float
    resolution: int  # side in pixels of the images it was designed for; the network takes any size
    dropout: float  # before the classifier
    drop_path: float = 0.2  # stochastic depth: block b of N is dropped at this rate times b / N
    stem: int = 32
    head: int = 1280
    stages: tuple[Stage, ...] = STAGES
    lite: bool = False  # no squeeze-excite, ReLU6, and stem, head, first and last stage are not scaled

    def filters(self, count: int) -> int:
        """Channels scaled by the width, rounded to a multiple of 8 but never below 90 %."""
        scaled = count * self.width
        rounded = max(8, int(scaled + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * scaled else rounded

    @property
    def stem_filters(self) -> int:
        return self.stem if self.lite else self.filters(self.stem)

    @property
    def head_filters(self) -> int:
        return self.head if self.lite else self.filters(self.head)

    def blocks(self) -> tuple[Block, ...]:
        """The MBConv blocks in order. Of a stage's blocks only the first strides and changes the channels."""
        fixed = (0, len(self.stages) - 1) if self.lite else ()
        repeats = [s.repeats if i in fixed else math.ceil(self.depth * s.repeats) for i, s in enumerate(self.stages)]
        blocks: list[Block] = []
        inputs = self.stem_filters
        for number, (stage, count) in enumerate(zip(self.stages, repeats), start=1):
            for repeat in range(count):
                filters, stride = self.filters(stage.filters), stage.stride if repeat == 0 else 1
                rate = self.drop_path * len(blocks) / sum(repeats)
                blocks.append(Block(number, repeat, stage.expand, stage.kernel, inputs, filters, stride, rate))
                inputs = filters
        return tuple(blocks)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        if "stages" in values:
            values = {**values, "stages": tuple(Stage(**stage) for stage in values["stages"])}
        return super().from_dict(values)


def architecture(name: str, *, source: str, classes: int, **changes: Any) -> EfficientNetArchitecture:
    """The architecture of a variant under the conventions of a source of weights.

    name: one of VARIANTS; source: a key of SOURCES. changes: any field of EfficientNetArchitecture, to differ from both.
    """
    if name not in _SCALES:
        raise ValueError(f"{name!r} is no EfficientNet: choose one of {', '.join(VARIANTS)}")
    if source not in SOURCES:
        raise ValueError(f"{source!r} is no source of weights: choose one of {', '.join(SOURCES)}")
    width, depth, resolution, dropout = _SCALES[name]
    values: dict[str, Any] = {"width": width, "depth": depth, "resolution": resolution, "dropout": dropout}
    values |= dataclasses.asdict(SOURCES[source])
    if name.startswith("lite"):
        values["lite"] = True
        if source == "lukemelas":
            values |= {"mean": (127.0,) * 3, "std": (128.0,) * 3}
    if name == "tiny":
        values |= {"stem": 16, "head": 256, "stages": _TINY_STAGES}
    if name in ("b5", "b6", "b7") and source == "torchvision":
        values |= {"bn_epsilon": 1e-3, "bn_momentum": 0.99}
    return EfficientNetArchitecture(name=name, source=source, classes=classes, **(values | changes))


class MBConv(nn.Module):
    """Inverted residual block: [B, H, W, inputs] -> [B, H', W', filters]."""

    block: Block
    architecture: EfficientNetArchitecture
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, train_norm: bool) -> jax.Array:
        block, arch = self.block, self.architecture
        activation = nn.relu6 if arch.lite else silu
        conv_norm = functools.partial(ConvNorm, conventions=arch, folded=self.folded)
        inner = block.inputs * block.expand
        y = x
        if block.expand != 1:
            y = conv_norm(inner, activation=activation, name="expand")(y, train=train_norm)
        depthwise = functools.partial(conv_norm, size=block.kernel, stride=block.stride, depthwise=True)
        y = depthwise(inner, activation=activation, name="depthwise")(y, train=train_norm)
        if not arch.lite:
            y = SqueezeExcite(max(1, int(0.25 * block.inputs)), activation, name="squeeze_excite")(y)
        y = conv_norm(block.filters, name="project")(y, train=train_norm)
        return x + DropPath(block.drop_path)(y, train=train) if block.residual else y


class EfficientNet(nn.Module):
    """x [B, H, W, 3], normalised -> logits [B, classes], features [B, D] (pooled, before dropout), maps [B, h, w, D], and the
    maps along the way: stage1 [B, h, w, C], stage2, ..., the last of each stage. With `classes` 0 it has no logits.

    train: batch statistics, stochastic depth and dropout (a "dropout" key is needed where a rate is above 0).
    freeze_norm: keep BatchNorm in inference mode while training, for an epoch in which the trunk is frozen.
    folded: the parameters come from `layers.fold_batch_norm`. Logits and features are float32 whatever the dtype.
    """

    architecture: EfficientNetArchitecture
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, freeze_norm: bool = False) -> dict[str, jax.Array]:
        arch = self.architecture
        train_norm = train and not freeze_norm
        activation = nn.relu6 if arch.lite else silu
        conv_norm = functools.partial(ConvNorm, activation=activation, conventions=arch, folded=self.folded)
        x = x.astype(arch.dtype)
        x = conv_norm(arch.stem_filters, size=3, stride=2, name="stem")(x, train=train_norm)
        outputs: dict[str, jax.Array] = {}
        for block in arch.blocks():
            x = MBConv(block, arch, self.folded, name=block.name)(x, train=train, train_norm=train_norm)
            outputs[f"stage{block.stage}"] = x
        maps = conv_norm(arch.head_filters, name="top")(x, train=train_norm)
        features = maps.mean((1, 2), dtype=jnp.float32)
        outputs |= {"features": features, "maps": maps}
        if arch.classes:
            kept = nn.Dropout(arch.dropout, deterministic=not train)(features)
            classifier = nn.Dense(arch.classes, kernel_init=nn.initializers.glorot_uniform(), name="classifier")
            outputs["logits"] = classifier(kept)
        return outputs


def build(architecture: EfficientNetArchitecture, *, folded: bool = False) -> EfficientNet:
    """The network of an architecture. folded: for variables that `layers.fold_batch_norm` made."""
    return EfficientNet(architecture=architecture, folded=folded)
