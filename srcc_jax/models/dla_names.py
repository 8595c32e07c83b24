"""What each library calls the weights of a DLA-34, as a classifier and as the encoder of a dense network."""

import dataclasses

from srcc_jax.models.architecture import Architecture
from srcc_jax.models.dla import DLAArchitecture, build
from srcc_jax.models.layers import variable_shapes
from srcc_jax.models.names import TORCH_LEAVES, Entry, ModuleNaming, Path

# The authors' trees of two levels have a projection that their network computes and does not use. timm left it out.
UNREAD = tuple(
    f"level{level}.project.{leaf}"
    for level in (3, 4)
    for leaf in ("0.weight", *(f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var")))
)


def torch_module(architecture: DLAArchitecture, path: Path) -> str:
    """As the authors have them, and timm: base_layer.0, level3.tree1.project.1, level5.tree1.bn2, level5.root.conv."""
    if path == ("classifier",):
        return "fc"
    *outer, part, kind = path
    number = {"conv": 0, "norm": 1}[kind]
    if part == "merge":
        names = [{"conv": "conv", "norm": "bn"}[kind]]
    elif outer == ["base_layer"]:  # the stem of three convolutions, as one Sequential of (convolution, BatchNorm, ReLU)
        names = [str(3 * (int(part.removeprefix("conv")) - 1) + number)]
    elif part in ("conv1", "conv2"):
        names = [part if kind == "conv" else part.replace("conv", "bn")]
    else:  # project, base_layer, level0, level1
        names = [part, str(number)]
    return ".".join([*outer, *names])


@dataclasses.dataclass(frozen=True)
class _ClassifierNaming(ModuleNaming):
    """In the files the classifier is a 1×1 convolution, (classes, features, 1, 1)."""

    def table(self, architecture: Architecture) -> dict[str, Entry]:
        """Name in the file -> Entry, for every array of the network."""
        entries = super().table(architecture)
        if "fc.weight" in entries:
            entries["fc.weight"] = dataclasses.replace(entries["fc.weight"], trailing_ones=2)
        return entries


def _naming(source: str, unread: tuple[str, ...]) -> ModuleNaming:
    return _ClassifierNaming(
        sources=(source,),
        classifier_bias="fc.bias",
        shapes=lambda architecture: variable_shapes(build(architecture)),
        module=torch_module,
        leaves=TORCH_LEAVES,
        unread=unread,
    )


NAMINGS = {"timm": _naming("timm", ()), "ucbdrive": _naming("ucbdrive", UNREAD)}
