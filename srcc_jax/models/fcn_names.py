"""Names of an FCN's weights: the trunk's are those of torchvision's ResNet, the others are ours (nobody publishes them)."""

from srcc_jax.models.fcn import FCNArchitecture, build
from srcc_jax.models.layers import variable_shapes
from srcc_jax.models.names import TORCH_LEAVES, ModuleNaming, Path
from srcc_jax.models.resnet_names import torch_module


def _module(architecture: FCNArchitecture, path: Path) -> str:
    return torch_module(architecture.trunk, path[1:]) if path[0] == "trunk" else ".".join(path)


NAMINGS = {
    "torchvision": ModuleNaming(
        sources=("torchvision", "timm"),
        classifier_bias="score4.bias",
        shapes=lambda architecture: variable_shapes(build(architecture)),
        module=_module,
        leaves=TORCH_LEAVES,
    )
}
