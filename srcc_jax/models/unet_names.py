"""Names of a U-Net's weights: those of the Pytorch-UNet package (milesial), and the same without BatchNorm."""

from srcc_jax.models.layers import variable_shapes
from srcc_jax.models.names import TORCH_LEAVES, ModuleNaming, Path
from srcc_jax.models.unet import UNetArchitecture, build


def _module(architecture: UNetArchitecture, path: Path) -> str:
    """inc, down1.maxpool_conv.1, ..., up1.up, up1.conv, outc.conv; up1 is the deepest of the ways up."""
    part = path[0]
    if part == "classifier":
        return "outc.conv"
    if part == "class_head":
        return ".".join(path)
    way, level = part[:-1], int(part[-1])
    up = f"up{len(architecture.widths) - 1 - level}"
    if way == "upsample":
        return f"{up}.up"
    down = f"down{level}.maxpool_conv.1" if level else "inc"
    position = 0 if path[1] == "conv1" else 3 if architecture.batch_norm else 2
    return f"{f'{up}.conv' if way == 'up' else down}.double_conv.{position + (path[-1] == 'norm')}"


def _naming(source: str) -> ModuleNaming:
    return ModuleNaming(
        sources=(source,),
        classifier_bias="outc.conv.bias",
        shapes=lambda architecture: variable_shapes(build(architecture)),
        module=_module,
        leaves=TORCH_LEAVES,
    )


NAMINGS = {"milesial": _naming("milesial"), "original": _naming("original")}
