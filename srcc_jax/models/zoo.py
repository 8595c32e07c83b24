"""Every network by its name, whatever its family."""

import dataclasses
from collections.abc import Callable, Mapping
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


FAMILIES = (
    Family(
        variants=efficientnet.VARIANTS,
        sources=efficientnet.SOURCES,
        namings=efficientnet_names.NAMINGS,
        kind=efficientnet.EfficientNetArchitecture,
        architecture=efficientnet.architecture,
        build=efficientnet.build,
    ),
    Family(
        variants=resnet.VARIANTS,
        sources=resnet.SOURCES,
        namings=resnet_names.NAMINGS,
        kind=resnet.ResNetArchitecture,
        architecture=resnet.architecture,
        build=resnet.build,
    ),
    Family(
        variants=densenet.VARIANTS,
        sources=densenet.SOURCES,
        namings=densenet_names.NAMINGS,
        kind=densenet.DenseNetArchitecture,
        architecture=densenet.architecture,
        build=densenet.build,
    ),
    Family(
        variants=res2net.VARIANTS,
        sources=res2net.SOURCES,
        namings=res2net_names.NAMINGS,
        kind=res2net.Res2NetArchitecture,
        architecture=res2net.architecture,
        build=res2net.build,
    ),
    Family(
        variants=dla.VARIANTS,
        sources=dla.SOURCES,
        namings=dla_names.NAMINGS,
        kind=dla.DLAArchitecture,
        architecture=dla.architecture,
        build=dla.build,
    ),
    Family(
        variants=fcn.VARIANTS,
        sources=fcn.SOURCES,
        namings=fcn_names.NAMINGS,
        kind=fcn.FCNArchitecture,
        architecture=fcn.architecture,
        build=fcn.build,
        dense=True,
    ),
    Family(
        variants=dla_dense.VARIANTS,
        sources=dla_dense.SOURCES,
        namings=dla_dense_names.NAMINGS,
        kind=dla_dense.DenseDLAArchitecture,
        architecture=dla_dense.architecture,
        build=dla_dense.build,
        dense=True,
    ),
    Family(
        variants=unet.VARIANTS,
        sources=unet.SOURCES,
        namings=unet_names.NAMINGS,
        kind=unet.UNetArchitecture,
        architecture=unet.architecture,
        build=unet.build,
        dense=True,
    ),
    Family(
        variants=unet_encoders.VARIANTS,
        sources=unet_encoders.SOURCES,
        namings=unet_encoders_names.NAMINGS,
        kind=unet_encoders.EncoderUNetArchitecture,
        architecture=unet_encoders.architecture,
        build=unet_encoders.build,
        dense=True,
    ),
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
