"""Names of a dense DLA's weights: those of its authors (ucbdrive/dla), in their way also where they have none."""

import dataclasses

from srcc_jax.models import dla_names
from srcc_jax.models.dla_dense import DenseDLAArchitecture, build
from srcc_jax.models.layers import variable_shapes
from srcc_jax.models.names import TORCH_LEAVES, ModuleNaming, Path

_PARTS = {"project": "proj", "up": "up", "node": "node"}
# The authors keep the encoder's classifier, unused, and the fixed bilinear kernel that brings the scores to the image's size.
_UNREAD = ("up.weight", "base.fc.weight", "base.fc.bias", *(f"base.{name}" for name in dla_names.UNREAD))


def _module(architecture: DenseDLAArchitecture, path: Path) -> str:
    """base.level3.tree1.bn1, dla_up.ida_0.proj_1.1, dla_up.ida_0.up_1, fc.0; CenterNet's last merge is ida_up."""
    if path[0] == "trunk":
        return f"base.{dla_names.torch_module(architecture.trunk, path[1:])}"
    if path[0] == "classifier":
        return "fc.0" if architecture.decoder == "ucbdrive" else "fc.2"
    if path[0] == "head":
        return "fc.0"
    if path[0] == "class_head":
        return ".".join(path)
    prefix, inner = ("ida_up", path[1:]) if path[0] == "merge" else (f"dla_up.ida_{path[1][-1]}", path[2:])
    part, *layer = inner
    kinds = {"conv": "0", "norm": "1", "offset": "conv_offset"}
    return ".".join([prefix, f"{_PARTS[part[:-1]]}_{part[-1]}", *(kinds[kind] for kind in layer)])


def _naming(source: str) -> ModuleNaming:
    return ModuleNaming(
        sources=(source,),
        classifier_bias="fc.0.bias",
        shapes=lambda architecture: variable_shapes(build(architecture)),
        module=_module,
        leaves=TORCH_LEAVES,
        unread=_UNREAD,
    )


NAMINGS = {"ucbdrive": _naming("ucbdrive"), "timm": dataclasses.replace(_naming("timm"), unread=())}
