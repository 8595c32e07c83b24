"""What torchvision calls the weights of a DenseNet, now and in its published files; timm's names are the present ones."""

import functools

from srcc_jax.models.densenet import DenseNetArchitecture, build
from srcc_jax.models.layers import variable_shapes
from srcc_jax.models.names import TORCH_LEAVES, ModuleNaming, Path

_LAYER_PARTS = {
    ("norm",): ("norm", 1),
    ("squeeze", "conv"): ("conv", 1),
    ("squeeze", "norm"): ("norm", 2),
    ("grow",): ("conv", 2),
}


def _module(architecture: DenseNetArchitecture, path: Path, *, dot: str) -> str:
    """features.denseblock1.denselayer1.norm1, and so on. dot: what stands between `norm` or `conv` and its number."""
    part, *rest = path
    if part == "classifier":
        return part
    if part == "stem":
        return f"features.{rest[0]}0"
    if part == "norm":
        return "features.norm5"
    if part.startswith("transition"):
        return f"features.{part}.{'norm' if rest == ['norm'] else 'conv'}"
    stage, layer = part.removeprefix("stage").split("_layer")
    kind, number = _LAYER_PARTS[tuple(rest)]
    return f"features.denseblock{stage}.denselayer{layer}.{kind}{dot}{number}"


def _naming(dot: str) -> ModuleNaming:
    return ModuleNaming(
        sources=("torchvision", "timm"),
        classifier_bias="classifier.bias",
        shapes=lambda architecture: variable_shapes(build(architecture)),
        module=functools.partial(_module, dot=dot),
        leaves=TORCH_LEAVES,
    )


NAMINGS = {"torchvision": _naming(""), "torchvision_old": _naming(".")}
