"""Reverse distillation in torch, for benchmarks: the teacher, bottleneck and student of srcc_jax, layer by layer, untrained.

torch is imported inside the functions: it is installed for benchmarks alone.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from experiments.run.benchmarks.torch_peers import untrained_network

if TYPE_CHECKING:
    import torch

LEVELS = 3


@dataclasses.dataclass(frozen=True)
class Shape:
    """widths: channels of the teacher's maps; depths: blocks of the student's stages, from deep to shallow; bottleneck, base_width:
    of the blocks, as in `srcc_jax.models.distillation`."""

    widths: tuple[int, int, int]
    depths: tuple[int, int, int]
    bottleneck: bool
    base_width: int = 64
    embedding_blocks: int = 3


SHAPES = {
    "wide_resnet50_2": Shape((256, 512, 1024), (3, 4, 6), bottleneck=True, base_width=128),
    "resnet18": Shape((64, 128, 256), (2, 2, 2), bottleneck=False, embedding_blocks=2),
}


def torch_task(task: str, network: str, side: int, batch: int) -> Callable[[], None]:
    """One round of "infer" or "train" over [batch, 3, side, side], channels last. network: the teacher's name."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    teacher, student = (part.to(memory_format=torch.channels_last) for part in build(network))
    image = torch.randn(batch, 3, side, side).to(memory_format=torch.channels_last)
    if task == "infer":
        student.eval()

        def infer() -> None:
            with torch.inference_mode():
                maps = teacher(image)
                patch_scores(maps, student(maps), side)

        return infer
    adam = torch.optim.Adam(student.parameters(), 1e-5, betas=(0.5, 0.999))
    tumour = torch.arange(batch) % 2 > 0

    def train() -> None:
        adam.zero_grad()
        with torch.no_grad():
            maps = teacher(image)
        focal_loss(maps, student(maps), tumour).backward()
        adam.step()

    return train


def build(network: str) -> tuple[Any, Any]:
    """The frozen teacher, image -> three maps, and bottleneck with student, those -> three maps."""
    from torch import nn

    trunk = untrained_network(network).eval().requires_grad_(False)

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool)
            self.stages = nn.ModuleList([trunk.layer1, trunk.layer2, trunk.layer3])

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            x, maps = self.stem(x), []
            for stage in self.stages:
                x = stage(x)
                maps.append(x)
            return maps

    return Teacher().eval(), make_student(SHAPES[network])


def make_student(shape: Shape) -> Any:
    import torch
    from torch import nn

    shallow, middle, deep = shape.widths

    class Student(nn.Module):
        """Fusion, one-class embedding and the mirrored stages."""

        def __init__(self) -> None:
            super().__init__()
            self.shallow = nn.Sequential(
                *_layer(shallow, middle, 3, 2), nn.ReLU(), *_layer(middle, deep, 3, 2), nn.ReLU()
            )
            self.middle = nn.Sequential(*_layer(middle, deep, 3, 2), nn.ReLU())
            filters = 2 * deep
            blocks = [_residual(shape, 3 * deep, filters, first=True)]
            blocks += [_residual(shape, filters, filters) for _ in range(shape.embedding_blocks - 1)]
            self.embedding = nn.Sequential(*blocks)
            self.stages = nn.ModuleList()
            for width, depth in zip(reversed(shape.widths), shape.depths):
                stage = [_residual(shape, filters, width, first=True, upwards=True)]
                self.stages.append(nn.Sequential(*stage, *(_residual(shape, width, width) for _ in range(depth - 1))))
                filters = width

        def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
            x = torch.cat([self.shallow(maps[0]), self.middle(maps[1]), maps[2]], dim=1)
            x, made = self.embedding(x), []
            for stage in self.stages:
                x = stage(x)
                made.append(x)
            return made[::-1]

    return Student()


def _layer(inputs: int, outputs: int, size: int = 1, stride: int = 1, *, upwards: bool = False) -> list[Any]:
    """Convolution and BatchNorm; upwards: where it strides, a transposed convolution that doubles the map."""
    from torch import nn

    if upwards and stride == 2:
        return [nn.ConvTranspose2d(inputs, outputs, 2, 2, bias=False), nn.BatchNorm2d(outputs)]
    return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]


def _residual(shape: Shape, inputs: int, outputs: int, *, first: bool = False, upwards: bool = False) -> Any:
    """A ResNet's block; the first of a stage halves the map, its shortcut with a 3×3 convolution, or doubles it."""
    import torch
    from torch import nn

    inner, stride = outputs // 4 * shape.base_width // 64, 2 if first else 1
    if shape.bottleneck:
        layers = [*_layer(inputs, inner), nn.ReLU(), *_layer(inner, inner, 3, stride, upwards=upwards), nn.ReLU()]
        layers += _layer(inner, outputs)
    else:
        layers = [*_layer(inputs, outputs, 3, stride, upwards=upwards), nn.ReLU(), *_layer(outputs, outputs, 3)]

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(*layers)
            around = _layer(inputs, outputs, 3, 2, upwards=upwards) if first else []
            self.shortcut = nn.Sequential(*around)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.branch(x) + self.shortcut(x))

    return Residual()


def patch_scores(teacher: list[Any], student: list[Any], side: int) -> Any:
    """Means [B] of the anomaly maps, which are the sum of three levels."""
    import torch
    from torch.nn import functional

    total = torch.zeros(len(teacher[0]), 1, side, side)
    for theirs, ours in zip(teacher, student):
        distance = 1 - functional.cosine_similarity(theirs, ours)
        total += functional.interpolate(distance[:, None], size=side, mode="bilinear", align_corners=True)
    return total.mean((1, 2, 3))


def focal_loss(teacher: list[Any], student: list[Any], tumour: Any, *, alpha: float = 0.1, gamma: float = 2.0) -> Any:
    """The released code's: one similarity of all values of a level, weighted, summed over the levels."""
    import torch
    from torch.nn import functional

    total = torch.zeros(len(tumour))
    for theirs, ours in zip(teacher, student):
        agree = functional.cosine_similarity(theirs.flatten(1), ours.flatten(1)).clamp(1e-6, 1 - 1e-6)
        normal = -alpha * (1 - agree) ** gamma * agree.log()
        total = total + torch.where(tumour, -(1 - alpha) * agree**gamma * (1 - agree).log(), normal)
    return total.mean()
