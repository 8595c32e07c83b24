"""FCN-8s (Long et al. 2015) on ResNet-50: a classifier of pixels, if asked with a classifier of the image beside it."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from srcc_jax.kernels.resize import resize_bilinear
from srcc_jax.models import resnet
from srcc_jax.models.architecture import TORCH
from srcc_jax.models.heads import ClassHead, PixelHead

SOURCES = {"torchvision": TORCH, "timm": TORCH}
VARIANTS = ("fcn_resnet50",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FCNArchitecture(resnet.ResNetArchitecture):
    """The shape of an FCN. `source` is a key of SOURCES: where the trunk's weights come from. classes: of a pixel."""

    class_head: int = 0  # classes of the image; 0: the network has no class branch

    @property
    def trunk(self) -> resnet.ResNetArchitecture:
        """The architecture of the ResNet. Its variables lie under "trunk", named as they are in the classifier."""
        return dataclasses.replace(self, classes=0)


class FCN(nn.Module):
    """x [B, H, W, 3], normalised -> dense [B, H, W, classes] (logits of pixels), features [B, D] (pooled), maps [B, H/32,
    W/32, D], the trunk's other maps, and logits [B, class_head] where there is a class branch.

    Stages 2, 3 and 4 of the trunk are scored by 1×1 convolutions; scores are brought to the next finer size, at last to the
    image's, bilinearly and added. Any size of image. freeze_norm: keep BatchNorm in inference mode while training. folded:
    the variables come from `layers.fold_batch_norm`. Scores are float32.
    """

    architecture: FCNArchitecture
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, freeze_norm: bool = False) -> dict[str, jax.Array]:
        arch = self.architecture
        trunk = resnet.ResNet(arch.trunk, resnet.bottleneck_branch, folded=self.folded, name="trunk")
        outputs = trunk(x, train=train, freeze_norm=freeze_norm)
        coarse, middle, fine = (
            PixelHead(arch.classes, name=f"score{stage}")(outputs[f"stage{stage}"]) for stage in (4, 3, 2)
        )
        scores = fine + _resized(middle + _resized(coarse, middle), fine)
        outputs["dense"] = _resized(scores, x)
        if arch.class_head:
            head = ClassHead(arch.class_head, arch, name="class_head")
            outputs["logits"] = head(outputs["features"], train=train and not freeze_norm)
        return outputs


def _resized(scores: jax.Array, image: jax.Array) -> jax.Array:
    """Scores [B, h, w, classes] at the height and width of another array."""
    _, height, width, _ = image.shape
    return resize_bilinear(scores, (height, width), align_corners=False)


def architecture(name: str, *, source: str, classes: int, **changes: Any) -> FCNArchitecture:
    """The architecture of a variant under the conventions of the source of its trunk's weights.

    name: one of VARIANTS; source: a key of SOURCES. changes: any field of FCNArchitecture, to differ from both.
    """
    if name not in VARIANTS:
        raise ValueError(f"{name!r} is no FCN: choose one of {', '.join(VARIANTS)}")
    if source not in SOURCES:
        raise ValueError(f"{source!r} is no source of weights: choose one of {', '.join(SOURCES)}")
    values: dict[str, Any] = {"depths": (3, 4, 6, 3), "bottleneck": True, **dataclasses.asdict(SOURCES[source])}
    return FCNArchitecture(name=name, source=source, classes=classes, **(values | changes))


def build(architecture: FCNArchitecture, *, folded: bool = False) -> FCN:
    """The network of an architecture. folded: for variables that `layers.fold_batch_norm` made."""
    return FCN(architecture=architecture, folded=folded)
