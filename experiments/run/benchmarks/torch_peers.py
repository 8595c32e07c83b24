"""The torch side of the benchmarks: the same networks from torchvision and timm, with the settings that are fastest on CPU.

torch is imported inside the functions: it is installed for benchmarks alone.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

DENSE = ("unet",)  # networks that give a value for each pixel


def torch_task(task: str, network: str, side: int, batch: int) -> Callable[[], None]:
    """One round of "infer" or "train" of a network over [batch, 3, side, side], channels last."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = untrained_network(network).to(memory_format=torch.channels_last)
    image = torch.randn(batch, 3, side, side).to(memory_format=torch.channels_last)
    if task == "infer":
        model.eval()

        def infer() -> None:
            with torch.inference_mode():
                model(image)

        return infer
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    shape = (batch, 1, side, side) if network in DENSE else (batch, 1)
    label = (torch.arange(batch) % 2).float().reshape(-1, *(1,) * (len(shape) - 1)).expand(shape)

    def train() -> None:
        adam.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(image), label).backward()
        adam.step()

    return train


def untrained_network(name: str) -> Any:
    """Untrained, with one class: torchvision's where it has the network, else timm's; the U-Net is in neither."""
    import torch

    # torchvision's wheel is built for CUDA; beside torch's CPU build its operators are absent, and only their names are needed.
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    if name == "unet":
        return _unet()
    import torchvision.models

    name = {"b0": "efficientnet_b0", "b1": "efficientnet_b1", "b4": "efficientnet_b4"}.get(name, name)
    if name in torchvision.models.list_models():
        return torchvision.models.get_model(name, num_classes=1, weights=None)
    with contextlib.redirect_stdout(
        sys.stderr
    ):  # it prints what it lacks for downloads, where the seconds are answered
        import timm

    return timm.create_model(name, num_classes=1, pretrained=False)


def _unet() -> Any:
    """The U-Net of 31.03 million parameters (Ronneberger et al. 2015), padded so that the size stays."""
    import torch
    from torch import nn

    def double(inputs: int, outputs: int) -> nn.Sequential:
        layers = [
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.ReLU(),
        ]
        return nn.Sequential(*layers)

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = (64, 128, 256, 512, 1024)
            self.down = nn.ModuleList([double(i, o) for i, o in zip((3, *widths), widths)])
            self.up = nn.ModuleList([nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1])])
            self.join = nn.ModuleList([double(2 * w, w) for w in reversed(widths[:-1])])
            self.head = nn.Conv2d(64, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            skips = []
            for number, down in enumerate(self.down):
                x = down(nn.functional.max_pool2d(x, 2) if number else x)
                skips.append(x)
            for up, join, skip in zip(self.up, self.join, reversed(skips[:-1])):
                x = join(torch.cat([skip, up(x)], dim=1))
            return self.head(x)

    return UNet()
