"""The multi-task network in torch and in JAX as two processes that take turns (see `experiments.run.benchmarks.peers`).

python -m experiments.run.benchmarks.screening_peers torch train dla_dcn 512 2
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.run.benchmarks.peers import serve
from experiments.run.benchmarks.torch_deform import load_operators

CLASS_WEIGHT = 0.01


def torch_task(task: str, network: str, side: int, batch: int) -> Callable[[], None]:
    """One round of "infer" or "train" over [batch, 3, side, side], channels last; network: dla_dcn, or dla without deformable nodes."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = _torch_network(deformable=network == "dla_dcn").to(memory_format=torch.channels_last)
    image = torch.randn(batch, 3, side, side).to(memory_format=torch.channels_last)
    if task == "infer":
        model.eval()

        def infer() -> None:
            with torch.inference_mode():
                model(image)

        return infer
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    label, mask = torch.arange(batch) % 2, torch.zeros(batch, 1, side, side)

    def train() -> None:
        adam.zero_grad()
        dense, logits = model(image)
        loss = functional.binary_cross_entropy_with_logits(dense, mask)
        (loss + CLASS_WEIGHT * functional.cross_entropy(logits, label)).backward()
        adam.step()

    return train


def jax_task(task: str, network: str, side: int, batch: int) -> Callable[[], None]:
    """The same of ours, as the program runs it: scored as the stage `features` and a map besides, trained by the step of `fit`."""
    import jax

    from experiments.run.program import prefer_wide_vectors
    from srcc_jax import parallel
    from srcc_jax.kernels.windows import make_window_fn
    from srcc_jax.methods.gastric_screening import Config, patch_architecture, patch_loss
    from srcc_jax.models import zoo
    from srcc_jax.models.architecture import normalize
    from srcc_jax.models.layers import fold_batch_norm
    from srcc_jax.plateau import adjustable_adam
    from srcc_jax.train import init_state, make_train_step

    prefer_wide_vectors()
    devices = len(os.sched_getaffinity(0))
    parallel.set_cpu_devices(max(count for count in range(1, devices + 1) if batch % count == 0))
    mesh = parallel.make_mesh()
    config = Config(model=network, class_weight=CLASS_WEIGHT)
    net = patch_architecture(config)
    variables = zoo.init(net, jax.random.key(0))
    image = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
    if task == "infer":
        module: Any = zoo.build(net, folded=True)

        def outputs(variables: Any, windows: jax.Array) -> dict[str, jax.Array]:
            out = module.apply(variables, normalize(windows, net), train=False)
            return {name: out[name] for name in ("dense", "logits", "features")}

        score = make_window_fn(outputs, tile=side, mesh=mesh)
        folded = parallel.replicate(fold_batch_norm(variables, epsilon=net.bn_epsilon), mesh)
        window = np.stack([np.arange(batch), *np.zeros((2, batch), int)], axis=1).astype(np.int32)
        return lambda: jax.block_until_ready(score(folded, image, window, batch))
    tx = adjustable_adam(1e-3)
    step, state = make_train_step(patch_loss(config, net), tx, mesh), init_state(variables, tx, 0, mesh)
    ones = np.ones(batch, np.float32)
    arrays = {
        "image": image,
        "mask": np.zeros(image.shape[:3], np.uint8),
        "label": np.arange(batch) % 2,
        "weight": ones,
    }

    def train() -> None:
        nonlocal state
        state, _ = step(state, parallel.put(arrays, mesh))
        jax.block_until_ready(state)

    return train


def _torch_network(*, deformable: bool) -> Any:
    """timm's DLA-34 with three 3×3 convolutions first, the decoder of its authors (nodes deformable or not), and both heads."""
    load_operators()  # before timm, which imports torchvision, which asks for them

    with contextlib.redirect_stdout(
        sys.stderr
    ):  # it prints what it lacks for downloads, where the seconds are answered
        import timm
    import torch
    from torch import nn

    def norm(channels: int) -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm2d(channels), nn.LeakyReLU(0.01, inplace=True))

    class Node(nn.Module):
        """3×3, deformable by offsets of its own; version 1: all masks are 1."""

        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm(outputs)
            self.offset = nn.Conv2d(inputs, 18, 3, padding=1) if deformable else None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.offset is None:
                return self.norm(self.conv(x))
            empty = x.new_zeros(x.shape[0], 1), x.new_zeros(self.conv.out_channels)
            options = (1, 1, 1, 1, 1, 1, 1, 1, False)
            return self.norm(torch.ops.torchvision.deform_conv2d(x, self.conv.weight, self.offset(x), *empty, *options))

    class Merge(nn.Module):
        """The authors' IDAUp: deeper maps projected, enlarged and joined one by one."""

        def __init__(self, width: int, deeper: list[int]) -> None:
            super().__init__()
            self.project = nn.ModuleList(
                nn.Sequential(nn.Conv2d(w, width, 1, bias=False), norm(width)) if w != width else nn.Identity()
                for w in deeper
            )
            self.up = nn.ModuleList(
                nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, groups=width, bias=False) for _ in deeper
            )
            self.node = nn.ModuleList(Node(2 * width, width) for _ in deeper)

        def forward(self, shallow: torch.Tensor, deeper: list[torch.Tensor]) -> list[torch.Tensor]:
            merged = [shallow]
            for x, project, up, node in zip(deeper, self.project, self.up, self.node):
                merged.append(node(torch.cat([merged[-1], up(project(x))], dim=1)))
            return merged[1:]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = (32, 64, 128, 256, 512)  # of levels 1 to 5
            trunk: Any = timm.create_model("dla34", features_only=True, pretrained=False, out_indices=range(6))
            stem = [nn.Sequential(nn.Conv2d(i, 16, 3, padding=1, bias=False), norm(16)) for i in (3, 16, 16)]
            trunk["base_layer"] = nn.Sequential(*stem)
            self.trunk: nn.Module = trunk
            self.merges = nn.ModuleList(Merge(widths[level], [widths[level + 1]] * (4 - level)) for level in range(4))
            head = (nn.BatchNorm1d(512), nn.LeakyReLU(0.01), nn.Linear(512, 2))
            self.dense, self.classes = nn.Conv2d(32, 1, 1), nn.Sequential(*head)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            *shallow, deepest = self.trunk(x)[1:]
            deeper = [deepest]
            for level in reversed(range(4)):
                deeper = [shallow[level], *self.merges[level](shallow[level], deeper)]
            dense = nn.functional.interpolate(self.dense(deeper[-1]), scale_factor=2, mode="bilinear")
            return dense, self.classes(deepest.mean((2, 3)))

    return Net()


if __name__ == "__main__":
    serve({"torch": torch_task, "jax": jax_task}, *sys.argv[1:])
