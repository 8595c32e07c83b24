"""DenseNet-121 (Huang et al. 2017): every layer of a block sees the outputs of all layers before it."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from srcc_jax.kernels.pooling import avg_pool, max_pool
from srcc_jax.models.architecture import TORCH, Architecture
from srcc_jax.models.layers import BatchNorm, Conv, ConvNorm, classify, explicit_padding, rematerialised

SOURCES = {"torchvision": TORCH, "timm": TORCH}
VARIANTS = ("densenet121",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseNetArchitecture(Architecture):
    """The shape of a DenseNet. `source` is a key of SOURCES; with `classes` 0 it has no classifier and no logits."""

    depths: tuple[int, ...] = (6, 12, 24, 16)  # layers of each block
    growth: int = 32  # channels that a layer adds
    squeeze: int = 4  # channels before a layer's 3×3 convolution as a multiple of the growth
    compression: float = 0.5  # share of the channels that goes on to the next block
    width: int = 64  # channels of the stem
    remat: bool = (
        False  # training computes each layer a second time: without it, its memory grows with the depth squared
    )


class DenseLayer(nn.Module):
    """What a layer adds to its block: maps [B, H, W, C_i] -> [B, H, W, growth]. Takes them apart, so that it is here that
    they are joined, and rematerialised without being kept."""

    architecture: DenseNetArchitecture
    folded: bool

    @nn.compact
    def __call__(self, maps: list[jax.Array], *, train: bool) -> jax.Array:
        arch = self.architecture
        x = jnp.concatenate(maps, axis=-1)
        x = nn.relu(BatchNorm(arch, name="norm")(x, train=train))
        squeeze = ConvNorm(arch.squeeze * arch.growth, arch, nn.relu, folded=self.folded, name="squeeze")
        return Conv(arch.growth, 3, padding=arch.padding, name="grow")(squeeze(x, train=train))


class Transition(nn.Module):
    """Between two blocks: [B, H, W, C] -> [B, H // 2, W // 2, features]."""

    architecture: DenseNetArchitecture
    features: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.relu(BatchNorm(self.architecture, name="norm")(x, train=train))
        # Published with the mean after the convolution: the same by linearity, at four times the work.
        x = avg_pool(x, size=2, stride=2, padding=((0, 0), (0, 0)))
        return Conv(self.features, name="project")(x)


class DenseNet(nn.Module):
    """x [B, H, W, 3], normalised -> logits [B, classes], features [B, D] (pooled), maps [B, h, w, D] after the last
    BatchNorm and ReLU, and on the way stem (1/2 of the image's sides, before pooling) and the blocks stage1 (1/4) to stage4.

    freeze_norm: keep BatchNorm in inference mode while training. folded: the variables come from `layers.fold_batch_norm`;
    a BatchNorm before a convolution stays. Logits and features are float32 whatever the dtype.
    """

    architecture: DenseNetArchitecture
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, freeze_norm: bool = False) -> dict[str, jax.Array]:
        arch = self.architecture
        train_norm = train and not freeze_norm
        stem = ConvNorm(arch.width, arch, nn.relu, 7, 2, folded=self.folded, name="stem")
        x = stem(x.astype(arch.dtype), train=train_norm)
        taps = {"stem": x}
        x = max_pool(x, size=3, stride=2, padding=explicit_padding(arch.padding, x.shape[1:3], 3, 2))
        for stage, depth in enumerate(arch.depths, start=1):
            if stage > 1:
                features = int(x.shape[-1] * arch.compression)
                x = Transition(arch, features, name=f"transition{stage - 1}")(x, train=train_norm)
            maps = [x]
            for number in range(1, depth + 1):
                layer = DenseLayer(arch, self.folded, name=f"stage{stage}_layer{number}")
                maps.append(rematerialised(layer, maps, remat=arch.remat, train=train_norm))
            x = taps[f"stage{stage}"] = jnp.concatenate(maps, axis=-1)
        x = nn.relu(BatchNorm(arch, name="norm")(x, train=train_norm))
        return taps | classify(x, classes=arch.classes)


def architecture(name: str, *, source: str, classes: int, **changes: Any) -> DenseNetArchitecture:
    """The architecture of a variant under the conventions of a source of weights.

    name: one of VARIANTS; source: a key of SOURCES. changes: any field of DenseNetArchitecture, to differ from both.
    """
    if name not in VARIANTS:
        raise ValueError(f"{name!r} is no DenseNet: choose one of {', '.join(VARIANTS)}")
    if source not in SOURCES:
        raise ValueError(f"{source!r} is no source of weights: choose one of {', '.join(SOURCES)}")
    values = dataclasses.asdict(SOURCES[source])
    return DenseNetArchitecture(name=name, source=source, classes=classes, **(values | changes))


def build(architecture: DenseNetArchitecture, *, folded: bool = False) -> DenseNet:
    """The network of an architecture. folded: for variables that `layers.fold_batch_norm` made."""
    return DenseNet(architecture=architecture, folded=folded)
