"""Every network by its name, whatever its family."""

import dataclasses
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax

from srcc_jax.models import (
    densenet,
    densenet_names,
    dla,
    dla_dense,
    dla_dense_names,
    dla_names,
    efficientnet,
    efficientnet_names,
    fcn,
    fcn_names,
    res2net,
    res2net_names,
    resnet,
    resnet_names,
    unet,
    unet_encoders,
    unet_encoders_names,
    unet_names,
)
from srcc_jax.models.architecture import Architecture, Conventions
from srcc_jax.models.layers import init_variables
from srcc_jax.models.names import Naming


@dataclasses.dataclass(frozen=True)
class Family:
    """Networks of one kind. variants: their names. sources: conventions by who publishes weights for them. namings: what each
    library calls their arrays. architecture(name, source=, classes=, **changes) and build(architecture, folded=) make them.
    dense: they judge pixels; the others judge images alone, with logits that "classifier" makes of the pooled "maps"."""

    variants: tuple[str, ...]
    sources: Mapping[str, Conventions]
    namings: Mapping[str, Naming]
    kind: type[Architecture]
    architecture: Callable[..., Architecture]
    build: Callable[..., nn.Module]
    dense: bool = False


def _family(networks: ModuleType, names: ModuleType, kind: type[Architecture], *, dense: bool = False) -> Family:
    """Of a module of networks and that of their names, which all are made alike."""
    return Family(
        networks.VARIANTS, networks.SOURCES, names.NAMINGS, kind, networks.architecture, networks.build, dense=dense
    )


FAMILIES = (
    _family(efficientnet, efficientnet_names, efficientnet.EfficientNetArchitecture),
    _family(resnet, resnet_names, resnet.ResNetArchitecture),
    _family(densenet, densenet_names, densenet.DenseNetArchitecture),
    _family(res2net, res2net_names, res2net.Res2NetArchitecture),
    _family(dla, dla_names, dla.DLAArchitecture),
    _family(fcn, fcn_names, fcn.FCNArchitecture, dense=True),
    _family(dla_dense, dla_dense_names, dla_dense.DenseDLAArchitecture, dense=True),
    _family(unet, unet_names, unet.UNetArchitecture, dense=True),
    _family(unet_encoders, unet_encoders_names, unet_encoders.EncoderUNetArchitecture, dense=True),
)
VARIANTS = tuple(name for family in FAMILIES for name in family.variants)
CLASSIFIERS = tuple(name for family in FAMILIES if not family.dense for name in family.variants)
SOURCES = tuple(dict.fromkeys(source for family in FAMILIES for source in family.sources))


def family(name: str) -> Family:
    """The family of a variant. ValueError where no network has this name."""
    for candidate in FAMILIES:
        if name in candidate.variants:
            return candidate
    raise ValueError(f"{name!r} is no network: choose one of {', '.join(VARIANTS)}")


def architecture(name: str, *, source: str, classes: int, **changes: Any) -> Architecture:
    """The architecture of a variant under the conventions of a source of weights.

    source: a key of the family's `sources`. changes: any field of the family's architecture, to differ from both.
    """
    return family(name).architecture(name, source=source, classes=classes, **changes)


def from_dict(values: Mapping[str, Any]) -> Architecture:
    """The architecture that `Architecture.as_dict` described. ValueError where it is none."""
    return family(values.get("name", "")).kind.from_dict(values)


def build(architecture: Architecture, *, folded: bool = False) -> nn.Module:
    """The network of an architecture. folded: for variables that `layers.fold_batch_norm` made."""
    return family(architecture.name).build(architecture, folded=folded)


def init(architecture: Architecture, key: jax.Array) -> dict[str, Any]:
    """Fresh variables {"params", "batch_stats"} of `build(architecture)`, for images of any size."""
    return init_variables(build(architecture), key)
