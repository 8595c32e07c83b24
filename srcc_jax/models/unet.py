"""U-Net (Ronneberger et al. 2015), with convolutions that keep the size of the map, so that a pixel in has a pixel out."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from srcc_jax.kernels.pooling import max_pool
from srcc_jax.models.architecture import TORCH, Architecture, Conventions
from srcc_jax.models.heads import ClassHead, PixelHead
from srcc_jax.models.layers import Conv, ConvNorm, ConvTranspose, check_sides, classify, rematerialised

# Conventions by the source of the weights. original: the paper's network, ImageNet's normalisation is ours; milesial: the
# Pytorch-UNet package, with BatchNorm and pixels scaled to [0, 1].
SOURCES = {"original": TORCH, "milesial": dataclasses.replace(TORCH, mean=(0.0,) * 3, std=(255.0,) * 3)}
VARIANTS = ("unet",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetArchitecture(Architecture):
    """The shape of a U-Net. `source` is a key of SOURCES; classes: of a pixel."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)  # channels from the image's size down, each half as large
    batch_norm: bool = False  # a BatchNorm follows each 3×3 convolution instead of a bias
    class_head: int = 0  # classes of the image; 0: the network has no class branch
    remat: bool = False  # training computes the inside of each pair of convolutions a second time instead of keeping it


def architecture(name: str, *, source: str, classes: int, **changes: Any) -> UNetArchitecture:
    """The architecture of a variant under the conventions of a source of weights.

    name: one of VARIANTS; source: a key of SOURCES. changes: any field of UNetArchitecture, to differ from both.
    """
    if name not in VARIANTS:
        raise ValueError(f"{name!r} is no U-Net: choose one of {', '.join(VARIANTS)}")
    if source not in SOURCES:
        raise ValueError(f"{source!r} is no source of weights: choose one of {', '.join(SOURCES)}")
    values = {**dataclasses.asdict(SOURCES[source]), "batch_norm": source == "milesial"} | changes
    return UNetArchitecture(name=name, source=source, classes=classes, **values)


class DoubleConv(nn.Module):
    """Two 3×3 convolutions, each with BatchNorm or a bias, and ReLU: [B, H, W, C] of all maps -> [B, H, W, features]."""

    features: int
    conventions: Conventions
    batch_norm: bool
    folded: bool

    @nn.compact
    def __call__(self, *maps: jax.Array, train: bool) -> jax.Array:
        x = jnp.concatenate(maps, axis=-1)
        for name in ("conv1", "conv2"):
            if self.batch_norm:
                layer = ConvNorm(self.features, self.conventions, nn.relu, 3, folded=self.folded, name=name)
                x = layer(x, train=train)
            else:
                x = nn.relu(Conv(self.features, 3, padding="symmetric", use_bias=True, name=name)(x))
        return x


class UNet(nn.Module):
    """x [B, H, W, 3], normalised -> dense [B, H, W, classes] (logits of pixels), maps [B, h, w, D] (the smallest), features
    [B, D] (their mean), and logits [B, class_head] where there is a class branch.

    H and W are multiples of 2^(number of widths - 1), 16 by default. freeze_norm: keep BatchNorm in inference mode while
    training. folded: the parameters come from `layers.fold_batch_norm`. Scores are float32 whatever the dtype.
    """

    architecture: UNetArchitecture
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, freeze_norm: bool = False) -> dict[str, jax.Array]:
        arch, train_norm = self.architecture, train and not freeze_norm
        check_sides(x, 2 ** (len(arch.widths) - 1))
        double_conv = functools.partial(DoubleConv, conventions=arch, batch_norm=arch.batch_norm, folded=self.folded)
        run = functools.partial(rematerialised, remat=arch.remat, train=train_norm)
        x = run(double_conv(arch.widths[0], name="down0"), x.astype(arch.dtype))
        skips = []
        for level, width in enumerate(arch.widths[1:], start=1):
            skips.append(x)
            x = max_pool(x, size=2, stride=2, padding=((0, 0), (0, 0)))
            x = run(double_conv(width, name=f"down{level}"), x)
        outputs = classify(x, classes=0)
        for level, skip in reversed(list(enumerate(skips))):
            width = arch.widths[level]
            x = ConvTranspose(width, 2, 2, use_bias=True, name=f"upsample{level}")(x)
            x = run(double_conv(width, name=f"up{level}"), skip, x)
        outputs["dense"] = PixelHead(arch.classes, name="classifier")(x)
        if arch.class_head:
            head = ClassHead(arch.class_head, arch, name="class_head")
            outputs["logits"] = head(outputs["features"], train=train_norm)
        return outputs


def build(architecture: UNetArchitecture, *, folded: bool = False) -> UNet:
    """The network of an architecture. folded: for variables that `layers.fold_batch_norm` made."""
    return UNet(architecture=architecture, folded=folded)
