"""U-Nets whose way down is a classifier of images, so that its published weights are a start."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from srcc_jax.kernels.resize import upsample_nearest
from srcc_jax.models import dla, resnet
from srcc_jax.models.architecture import TORCH, Architecture, Conventions
from srcc_jax.models.heads import ClassHead, PixelHead
from srcc_jax.models.layers import check_sides, rematerialised
from srcc_jax.models.unet import DoubleConv

SOURCES = {"timm": TORCH, "torchvision": TORCH, "ucbdrive": TORCH}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A classifier as the way down. variant: its own name. taps: its outputs at 1/2, 1/4, 1/8, 1/16 and 1/32 of the sides."""

    variant: str
    sources: Mapping[str, Conventions]
    architecture: Callable[..., Architecture]
    network: Callable[..., nn.Module]  # of (architecture, folded=, name=)
    taps: tuple[str, ...]


ENCODERS = {
    "unet_resnet34": Encoder(
        variant="resnet34",
        sources={name: resnet.SOURCES[name] for name in ("timm", "torchvision")},
        architecture=resnet.architecture,
        network=functools.partial(resnet.ResNet, branch=resnet.basic_branch),
        taps=("stem", "stage1", "stage2", "stage3", "stage4"),
    ),
    "unet_dla34": Encoder(
        variant="dla34",
        sources=dla.SOURCES,
        architecture=dla.architecture,
        network=dla.DLA,
        taps=("level1", "level2", "level3", "level4", "level5"),
    ),
}
VARIANTS = tuple(ENCODERS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderUNetArchitecture(Architecture):
    """The shape of a U-Net on a classifier. `source`: where the classifier's weights come from. classes: of a pixel."""

    widths: tuple[int, ...] = (256, 128, 64, 32, 16)  # channels of the way up, from 1/16 of the sides to the image's
    class_head: int = 0  # classes of the image; 0: the network has no class branch
    remat: bool = False  # training computes the inside of each block a second time instead of keeping it

    @property
    def trunk(self) -> Architecture:
        """The architecture of the classifier. Its variables lie under "trunk", named as they are in the classifier."""
        encoder = ENCODERS[self.name]
        conventions = {field.name: getattr(self, field.name) for field in dataclasses.fields(Conventions)}
        return encoder.architecture(
            encoder.variant, source=self.source, classes=0, dtype=self.dtype, remat=self.remat, **conventions
        )


def architecture(name: str, *, source: str, classes: int, **changes: Any) -> EncoderUNetArchitecture:
    """The architecture of a variant under the conventions of the source of its encoder's weights.

    name: one of VARIANTS; source: one of its encoder's `sources`. changes: any field of EncoderUNetArchitecture.
    """
    if name not in ENCODERS:
        raise ValueError(f"{name!r} is no U-Net on a classifier: choose one of {', '.join(VARIANTS)}")
    sources = ENCODERS[name].sources
    if source not in sources:
        raise ValueError(f"{source!r} is no source of weights for {name}: choose one of {', '.join(sources)}")
    values = dataclasses.asdict(sources[source]) | changes
    return EncoderUNetArchitecture(name=name, source=source, classes=classes, **values)


class EncoderUNet(nn.Module):
    """x [B, H, W, 3], normalised -> dense [B, H, W, classes] (logits of pixels), features [B, D] (pooled), maps [B, H/32,
    W/32, D], the classifier's other maps, and logits [B, class_head] where there is a class branch.

    Each step up doubles the sides by repeating pixels, joins the encoder's map of that size (none at the image's own) and
    convolves twice, as the decoder of segmentation_models_pytorch does. H and W are multiples of 32. freeze_norm: keep
    BatchNorm in inference mode while training. folded: the parameters come from `layers.fold_batch_norm`.
    """

    architecture: EncoderUNetArchitecture
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, freeze_norm: bool = False) -> dict[str, jax.Array]:
        arch, train_norm = self.architecture, train and not freeze_norm
        encoder = ENCODERS[arch.name]
        check_sides(x, 2 ** len(encoder.taps))
        trunk = encoder.network(arch.trunk, folded=self.folded, name="trunk")
        outputs = trunk(x, train=train, freeze_norm=freeze_norm)
        *skips, x = (outputs[tap] for tap in encoder.taps)
        for step, width in enumerate(arch.widths, start=1):
            block = DoubleConv(width, arch, batch_norm=True, folded=self.folded, name=f"up{step}")
            joined = [skips.pop()] if skips else []
            x = rematerialised(block, upsample_nearest(x, 2), *joined, remat=arch.remat, train=train_norm)
        outputs["dense"] = PixelHead(arch.classes, 3, name="classifier")(x)
        if arch.class_head:
            head = ClassHead(arch.class_head, arch, name="class_head")
            outputs["logits"] = head(outputs["features"], train=train_norm)
        return outputs


def build(architecture: EncoderUNetArchitecture, *, folded: bool = False) -> EncoderUNet:
    """The network of an architecture. folded: for variables that `layers.fold_batch_norm` made."""
    return EncoderUNet(architecture=architecture, folded=folded)
