"""What each library calls the weights of a ResNet."""

import string

from srcc_jax.models.layers import variable_shapes
from srcc_jax.models.names import KERAS_LEAVES, TORCH_LEAVES, ModuleNaming, Path
from srcc_jax.models.resnet import ResNetArchitecture, build


def shapes(architecture: ResNetArchitecture) -> dict:
    """The network's variables as shapes."""
    return variable_shapes(build(architecture))


def block_number(name: str) -> tuple[int, int]:
    """Stage and number, both from 1, of the block of this name."""
    stage, number = name.removeprefix("stage").split("_block")
    return int(stage), int(number)


def torch_module(architecture: ResNetArchitecture, path: Path) -> str:
    """As torchvision has them, and timm: layer1.0.conv1, layer1.0.bn1, layer1.0.downsample.0."""
    if path == ("classifier",):
        return "fc"
    part, kind = path[-2:]
    if part == "stem":
        return {"conv": "conv1", "norm": "bn1"}[kind]
    stage, number = block_number(path[0])
    if part == "shortcut":
        module = {"conv": "downsample.0", "norm": "downsample.1"}[kind]
    else:
        module = part if kind == "conv" else part.replace("conv", "bn")
    return f"layer{stage}.{number - 1}.{module}"


def _keras_module(architecture: ResNetArchitecture, path: Path) -> str:
    """conv2_block1_1_conv, conv2_block1_1_bn; number 0 is the shortcut, and the stem counts as conv1."""
    if path == ("classifier",):
        return "predictions"
    part, kind = path[0], {"conv": "conv", "norm": "bn"}[path[-1]]
    if part == "stem":
        return f"conv1_{kind}"
    stage, number = block_number(part)
    layer = 0 if path[1] == "shortcut" else path[1].removeprefix("conv")
    return f"conv{stage + 1}_block{number}_{layer}_{kind}"


def _caffe_module(architecture: ResNetArchitecture, path: Path) -> str:
    """res2a_branch2a and bn2a_branch2a for the first convolution of stage 1's first block; branch1 is the shortcut."""
    if path == ("classifier",):
        return "fc1000"
    part, kind = path[0], path[-1]
    if part == "stem":
        return {"conv": "conv1", "norm": "bn_conv1"}[kind]
    stage, number = block_number(part)
    letters = string.ascii_lowercase
    branch = "1" if path[1] == "shortcut" else f"2{letters[int(path[1].removeprefix('conv')) - 1]}"
    return f"{'res' if kind == 'conv' else 'bn'}{stage + 1}{letters[number - 1]}_branch{branch}"


NAMINGS = {
    "torchvision": ModuleNaming(
        sources=("torchvision", "timm"),
        classifier_bias="fc.bias",
        shapes=shapes,
        module=torch_module,
        leaves=TORCH_LEAVES,
    ),
    "keras": ModuleNaming(
        sources=("keras",),
        classifier_bias="predictions/bias",
        shapes=shapes,
        module=_keras_module,
        leaves=KERAS_LEAVES,
        separator="/",
    ),
    "keras_caffe": ModuleNaming(
        sources=("keras_caffe",),
        classifier_bias="fc1000/bias",
        shapes=shapes,
        module=_caffe_module,
        leaves=KERAS_LEAVES,
        separator="/",
    ),
}
