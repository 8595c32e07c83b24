"""One small network of each kind in the zoo, for tests that are to see them all."""

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from data_pipelines.safetensors_files import write_safetensors
from srcc_jax.models import efficientnet, pretrained, zoo
from srcc_jax.models.layers import variable_shapes

# Fields that make a variant small.
CHANGES = {
    "tiny": {"stages": (efficientnet.Stage(1, 3, 16, 1, 1), efficientnet.Stage(4, 3, 24, 2, 2)), "head": 32},
    "resnet18": {"width": 8, "depths": (1, 1, 1, 1)},
    "resnet50": {"width": 8, "depths": (1, 2, 1, 1)},
    "densenet121": {"width": 8, "growth": 4, "depths": (1, 2, 1, 1)},
    "res2net50_26w_4s": {"width": 8, "depths": (2, 1, 1, 1)},
    "dla34": {"widths": (4, 4, 8, 8, 16, 16)},
    "fcn_resnet50": {"width": 8, "depths": (1, 1, 1, 1)},
    "dla34_dense": {"widths": (4, 4, 8, 8, 16, 16)},
    "unet": {"widths": (4, 8, 8, 8, 16)},
    "unet_resnet34": {},
    "unet_dla34": {},
}


def architecture(name, *, source=None, classes=2, **changes):
    """Of the first source of the family, unless another is given."""
    source = source or next(iter(zoo.family(name).sources))
    return zoo.architecture(name, source=source, classes=classes, **{**CHANGES[name], **changes})


def variables(net, seed=0):
    """Arrays of their own for everything, of the size of trained ones: variances 0.5 to 1.5, kernels of fan-in scale."""
    rng, drawn = np.random.default_rng(seed), {}
    for path, leaf in flatten_dict(variable_shapes(zoo.build(net))).items():
        if path[-1] in ("var", "scale"):
            drawn[path] = rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        else:
            spread = 0.1 if leaf.ndim == 1 else (2 / np.prod(leaf.shape[:-1])) ** 0.5
            drawn[path] = rng.normal(0, spread, leaf.shape).astype(np.float32)
    return unflatten_dict(drawn)


def published(folder):
    """The smallest network as torchvision would publish it: architecture, variables, a .safetensors file in the folder."""
    net = zoo.architecture("tiny", source="torchvision", classes=3)
    arrays = variables(net)
    path = folder / "tiny.safetensors"
    write_safetensors(path, pretrained.export(arrays, net, "torchvision"), {})
    return net, arrays, path
