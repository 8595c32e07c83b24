"""Dense prediction on DLA-34: the decoder of its authors (ucbdrive/dla) and that of CenterNet (Zhou et al. 2019)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from srcc_jax.kernels.resize import bilinear_kernel, upsample_transposed
from srcc_jax.models import dla
from srcc_jax.models.deform import DeformConv
from srcc_jax.models.dla import ACTIVATIONS, DLAArchitecture
from srcc_jax.models.heads import ClassHead, PixelHead
from srcc_jax.models.layers import BatchNorm, Conv, ConvNorm, TransposedUpsample, rematerialised

SOURCES = dla.SOURCES
VARIANTS = ("dla34_dense",)
NODES = ("conv", "deformable")
DECODERS = ("ucbdrive", "centernet")
_HEAD_FILTERS = 256  # of CenterNet's head


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseDLAArchitecture(DLAArchitecture):
    """The shape of a DLA-34 with a decoder. classes: of a pixel. The fields of the encoder are those of its own class.

    The defaults are the network of the authors. That of Yu et al. 2019: stem="3x3", activation="leaky",
    nodes="deformable", class_head=2, and one class.
    """

    decoder: str = "ucbdrive"  # maps merge by concatenation; "centernet": by sums, projected by deformable convolutions
    nodes: str = "conv"  # 3×3 convolutions of the decoder; "deformable": of version 1, as CenterNet's always are here
    down_ratio: int  # the decoder ends at so many times smaller sides than the image's: 2, 4, 8 or 16
    class_head: int = 0  # classes of the image; 0: the network has no class branch

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder is {self.decoder!r}: must be one of {', '.join(DECODERS)}")
        if self.nodes not in NODES:
            raise ValueError(f"nodes is {self.nodes!r}: must be one of {', '.join(NODES)}")
        if self.down_ratio not in ((2, 4, 8) if self.decoder == "centernet" else (2, 4, 8, 16)):
            raise ValueError(f"down_ratio is {self.down_ratio}: must be 2, 4, 8 or, unless for centernet, 16")

    @property
    def trunk(self) -> DLAArchitecture:
        """The architecture of the encoder. Its variables lie under "trunk", named as those of the classifier."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(DLAArchitecture)}
        return DLAArchitecture(**fields | {"name": "dla34", "classes": 0})

    @property
    def finest(self) -> int:
        """The level of the encoder at whose size the decoder ends."""
        return self.down_ratio.bit_length() - 1


def architecture(name: str, *, source: str, classes: int, **changes: Any) -> DenseDLAArchitecture:
    """The architecture of a variant under the conventions of the source of its encoder's weights.

    name: one of VARIANTS; source: a key of SOURCES. changes: any field of DenseDLAArchitecture, to differ from both.
    """
    if name not in VARIANTS:
        raise ValueError(f"{name!r} is no dense DLA: choose one of {', '.join(VARIANTS)}")
    if source not in SOURCES:
        raise ValueError(f"{source!r} is no source of weights: choose one of {', '.join(SOURCES)}")
    values = dataclasses.asdict(SOURCES[source]) | {"down_ratio": 4 if changes.get("decoder") == "centernet" else 2}
    values |= changes
    return DenseDLAArchitecture(name=name, source=source, classes=classes, **values)


class DeformNorm(nn.Module):
    """3×3 deformable convolution, BatchNorm, activation: [B, H, W, C] -> [B, H, W, features]. Else as ConvNorm."""

    features: int
    architecture: DenseDLAArchitecture
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        use_bias = self.folded or self.architecture.decoder == "centernet"
        x = DeformConv(self.features, size=3, use_bias=use_bias, name="conv")(x)
        if not self.folded:
            x = BatchNorm(self.architecture, name="norm")(x, train=train)
        return ACTIVATIONS[self.architecture.activation](x)


class IterativeAggregation(nn.Module):
    """Merges maps one by one, from shallow to deep (the authors' IDAUp).

    maps: [B, H, W, C] and deeper ones, smaller by `factors`. Each deeper one is projected to C channels, upsampled, merged
    with what came before and convolved. Returns the results of all merges, each [B, H, W, C].
    """

    factors: tuple[int, ...]
    architecture: DenseDLAArchitecture
    folded: bool

    @nn.compact
    def __call__(self, *maps: jax.Array, train: bool) -> list[jax.Array]:
        arch = self.architecture
        filters, centernet = maps[0].shape[-1], arch.decoder == "centernet"
        run = functools.partial(rematerialised, remat=arch.remat, train=train)
        plain = functools.partial(ConvNorm, filters, arch, activation=ACTIVATIONS[arch.activation], folded=self.folded)
        deformable = functools.partial(DeformNorm, filters, arch, self.folded)
        merged = [maps[0]]
        for i, (x, factor) in enumerate(zip(maps[1:], self.factors, strict=True), start=1):
            if centernet:
                x = run(deformable(name=f"project{i}"), x)
            elif x.shape[-1] != filters:
                x = run(plain(name=f"project{i}"), x)
            x = TransposedUpsample(factor, name=f"up{i}")(x)
            x = merged[-1] + x if centernet else jnp.concatenate([merged[-1], x], axis=-1)
            is_deformable = centernet or arch.nodes == "deformable"
            node = deformable(name=f"node{i}") if is_deformable else plain(size=3, name=f"node{i}")
            merged.append(run(node, x))
        return merged[1:]


class Decoder(nn.Module):
    """Repeated iterative aggregation from the deepest map on (the authors' DLAUp).

    maps: the encoder's, from shallow to deep, each half as large as the one before. Each round takes in the next shallower
    map and puts the results of its merges in the places of the deeper ones. Returns the last map of every round, from shallow
    to deep, with the deepest of `maps` at the end.
    """

    architecture: DenseDLAArchitecture
    folded: bool

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], *, train: bool) -> list[jax.Array]:
        *remaining, deepest = maps
        deeper, results = [deepest], [deepest]
        for i, shallow in enumerate(reversed(remaining)):
            merge = IterativeAggregation((2,) * len(deeper), self.architecture, self.folded, name=f"ida{i}")
            deeper = [shallow, *merge(shallow, *deeper, train=train)]
            results.insert(0, deeper[-1])
        return results


class DenseDLA(nn.Module):
    """x [B, H, W, 3], normalised -> dense [B, H, W, classes] (logits of pixels), features [B, D] (pooled level 5), maps =
    level5, level0 to level5, and logits [B, class_head] where there is a class branch. H and W are multiples of 32.

    Scores are brought from the decoder's size to the image's by a fixed bilinear transposed convolution. train, freeze_norm
    and folded as of DLA; all scores are float32.
    """

    architecture: DenseDLAArchitecture
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, freeze_norm: bool = False) -> dict[str, jax.Array]:
        arch, train_norm = self.architecture, train and not freeze_norm
        outputs = dla.DLA(arch.trunk, self.folded, name="trunk")(x, train=train, freeze_norm=freeze_norm)
        maps = [outputs[f"level{level}"] for level in range(arch.finest, len(arch.widths))]
        decoded = Decoder(arch, self.folded, name="decoder")(maps, train=train_norm)
        if arch.decoder == "centernet":
            *merged, _ = decoded
            factors = tuple(2**i for i in range(1, len(merged)))
            x = IterativeAggregation(factors, arch, self.folded, name="merge")(*merged, train=train_norm)[-1]
            x = nn.relu(Conv(_HEAD_FILTERS, 3, use_bias=True, name="head")(x))
        else:
            x = decoded[0]
        scores = PixelHead(arch.classes, name="classifier")(x)
        outputs["dense"] = upsample_transposed(scores, jnp.asarray(bilinear_kernel(arch.down_ratio, arch.classes)))
        if arch.class_head:
            head = ClassHead(arch.class_head, arch, name="class_head")
            outputs["logits"] = head(outputs["features"], train=train_norm)
        return outputs


def build(architecture: DenseDLAArchitecture, *, folded: bool = False) -> DenseDLA:
    """The network of an architecture. folded: for variables that `layers.fold_batch_norm` made."""
    return DenseDLA(architecture=architecture, folded=folded)
