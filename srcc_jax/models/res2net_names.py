"""What timm calls the weights of a Res2Net; the authors' own files have the same names."""

from srcc_jax.models.layers import variable_shapes
from srcc_jax.models.names import TORCH_LEAVES, ModuleNaming, Path
from srcc_jax.models.res2net import Res2NetArchitecture, build
from srcc_jax.models.resnet_names import block_number, torch_module


def _module(architecture: Res2NetArchitecture, path: Path) -> str:
    """As in a ResNet, but for the chain of narrow convolutions: layer1.0.convs.0 and layer1.0.bns.0."""
    if len(path) < 3 or not path[1].startswith("branch"):
        return torch_module(architecture, path)
    stage, number = block_number(path[0])
    chain = {"conv": "convs", "norm": "bns"}[path[2]]
    return f"layer{stage}.{number - 1}.{chain}.{int(path[1].removeprefix('branch')) - 1}"


NAMINGS = {
    "timm": ModuleNaming(
        sources=("timm",),
        classifier_bias="fc.bias",
        shapes=lambda architecture: variable_shapes(build(architecture)),
        module=_module,
        leaves=TORCH_LEAVES,
    )
}
