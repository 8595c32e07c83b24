"""The frozen half of reverse distillation: a published classifier up to its maps at 1/4, 1/8 and 1/16 of the image's sides."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax import lax

from srcc_jax.models import distillation, efficientnet, resnet, zoo
from srcc_jax.models.architecture import TORCH, Architecture, normalize
from srcc_jax.models.distillation import DistillationArchitecture
from srcc_jax.models.efficientnet import EfficientNetArchitecture
from srcc_jax.models.resnet import ResNetArchitecture

TEACHERS = (*resnet.VARIANTS, *efficientnet.VARIANTS)
_SCALES = (4, 8, 16)  # how often the image's sides are divided in the maps


def cut(architecture: Architecture) -> ResNetArchitecture | EfficientNetArchitecture:
    """The network without its classifier, and a ResNet without the stage behind the last map. ValueError for other networks."""
    if isinstance(architecture, ResNetArchitecture):
        return dataclasses.replace(architecture, classes=0, stages=len(_SCALES))
    if isinstance(architecture, EfficientNetArchitecture):
        return dataclasses.replace(architecture, classes=0)
    raise ValueError(f"{architecture.name} has no maps for a student: the teacher is one of {', '.join(TEACHERS)}")


def taps(teacher: ResNetArchitecture | EfficientNetArchitecture) -> dict[str, int]:
    """Output -> channels of the three maps, from shallow to deep: of each size the last that the network makes."""
    scale = 4 if isinstance(teacher, ResNetArchitecture) else 2  # behind the stem
    last: dict[int, tuple[str, int]] = {}
    for block in teacher.blocks():
        scale *= block.stride
        last[scale] = f"stage{block.stage}", block.filters
    return dict(last[scale] for scale in _SCALES)


def student_architecture(
    teacher: ResNetArchitecture | EfficientNetArchitecture, *, shortcut: str, **changes: Any
) -> DistillationArchitecture:
    """Bottleneck and student that fit the maps. For an EfficientNet, which no paper has as teacher, the student has blocks of
    two 3×3 convolutions, as for the small ResNets. changes: any field of DistillationArchitecture, to differ from it."""
    if isinstance(teacher, ResNetArchitecture):
        return distillation.architecture(teacher, shortcut=shortcut, **changes)
    values: dict[str, Any] = dataclasses.asdict(TORCH) | {
        "widths": tuple(taps(teacher).values()),
        "depths": (2, 2, 2),
        "bottleneck": False,
        "embedding_blocks": 2,
        "dtype": teacher.dtype,
    }
    return DistillationArchitecture(
        name=teacher.name, source="torchvision", classes=0, shortcut=shortcut, **(values | changes)
    )


def teacher_maps(
    teacher: ResNetArchitecture | EfficientNetArchitecture,
    variables: Mapping[str, Any],
    image: jax.Array,
    *,
    folded: bool = False,
) -> tuple[jax.Array, ...]:
    """What the teacher sees: image [B, H, W, 3], R, G, B, 0 to 255 -> three maps [B, h, w, C], none negative, without gradient.

    BatchNorm is in inference mode. folded: the variables come from `layers.fold_batch_norm`. The maps of a ResNet end in a
    ReLU; those of an EfficientNet do not and are given one, because a student's maps are never negative (ours).
    """
    network = zoo.build(teacher, folded=folded)
    out: Any = network.apply(lax.stop_gradient(dict(variables)), normalize(image, teacher), train=False)
    return tuple(lax.stop_gradient(nn.relu(out[name])) for name in taps(teacher))
