"""Names of the weights of a U-Net on a classifier: those of segmentation_models_pytorch around the classifier's own."""

from collections.abc import Callable, Mapping
from typing import Any

from srcc_jax.models import dla_names, resnet_names
from srcc_jax.models.layers import variable_shapes
from srcc_jax.models.names import TORCH_LEAVES, ModuleNaming, Path
from srcc_jax.models.unet_encoders import SOURCES, EncoderUNetArchitecture, build

_ENCODER_MODULES: Mapping[str, Callable[[Any, Path], str]] = {
    "unet_resnet34": resnet_names.torch_module,
    "unet_dla34": dla_names.torch_module,
}


def _module(architecture: EncoderUNetArchitecture, path: Path) -> str:
    """encoder.layer1.0.bn1, decoder.blocks.0.conv1.1, segmentation_head.0."""
    if path[0] == "trunk":
        return f"encoder.{_ENCODER_MODULES[architecture.name](architecture.trunk, path[1:])}"
    if path[0] == "classifier":
        return "segmentation_head.0"
    if path[0] == "class_head":
        return ".".join(path)
    block, conv, kind = path
    return f"decoder.blocks.{int(block[-1]) - 1}.{conv}.{('conv', 'norm').index(kind)}"


NAMINGS = {
    source: ModuleNaming(
        sources=(source,),
        classifier_bias="segmentation_head.0.bias",
        shapes=lambda architecture: variable_shapes(build(architecture)),
        module=_module,
        leaves=TORCH_LEAVES,
    )
    for source in SOURCES
}
