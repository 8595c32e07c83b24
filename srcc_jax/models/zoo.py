"""Every network by its name, whatever its family."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from srcc_jax.models import efficientnet, efficientnet_names
from srcc_jax.models.architecture import Architecture, Conventions
from srcc_jax.models.layers import init_variables
from srcc_jax.models.names import Naming


@dataclasses.dataclass(frozen=True)
class Family:
    """Networks of one kind. variants: their names. sources: conventions by who publishes weights for them. namings: what each
    library calls their arrays. architecture(name, source=, classes=, **changes) and build(architecture, folded=) make them."""

    variants: tuple[str, ...]
    sources: Mapping[str, Conventions]
    namings: Mapping[str, Naming]
    kind: type[Architecture]
    architecture: Callable[..., Architecture]
    build: Callable[..., nn.Module]


FAMILIES = (
    Family(
        variants=efficientnet.VARIANTS,
        sources=efficientnet.SOURCES,
        namings=efficientnet_names.NAMINGS,
        kind=efficientnet.EfficientNetArchitecture,
        architecture=efficientnet.architecture,
        build=efficientnet.build,
    ),
)
VARIANTS = tuple(name for family in FAMILIES for name in family.variants)
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
