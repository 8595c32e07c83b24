"""Tables from the names of published weights to ours, total in both directions.

A table holds, for every array of a library's file, which array of ours it is and how its axes are permuted.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from flax.traverse_util import flatten_dict

from srcc_jax.models.architecture import Architecture

Path = tuple[str, ...]  # of an array among our variables: collection, modules, leaf


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where an array of a file belongs among our variables.

    axes: the permutation from the file's axes to ours. trailing_ones: so many axes of length 1 end the file's array besides (a
    dense layer written as a 1×1 convolution); an array without them is read too.
    """

    target: Path
    axes: tuple[int, ...]
    trailing_ones: int = 0

    def shape(self, array: np.ndarray) -> tuple[int, ...] | None:
        """Of an array of the file in our layout; None where it has other axes than it should."""
        length, ones = len(self.axes), (1,) * self.trailing_ones
        if array.shape[length:] not in ((), ones) or array.ndim < length:
            return None
        return tuple(array.shape[axis] for axis in self.axes)

    def read(self, array: np.ndarray) -> np.ndarray:
        """An array of the file in our layout."""
        return np.transpose(array.reshape(array.shape[: len(self.axes)]), self.axes)

    def write(self, array: np.ndarray) -> np.ndarray:
        """An array of ours in the file's layout."""
        array = np.transpose(array, np.argsort(self.axes))
        return array.reshape(array.shape + (1,) * self.trailing_ones)


class Naming(Protocol):
    """How a library names the arrays of one family of networks."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of weights (keys of the family's conventions) whose files are named so."""

    @property
    def classifier_bias(self) -> str:
        """The name of the array that has one value for each class."""

    @property
    def unread(self) -> tuple[str, ...]:
        """Names that the library's files may hold besides, of arrays that its own network does not use."""

    def table(self, architecture: Any) -> dict[str, Entry]:
        """Name in the file -> Entry, for every array of the network."""


# Leaf and dimensions of an array of ours -> what the library calls it, and the axes; "shift" is the bias of a BatchNorm.
# Transposed convolutions are kept in the form that scatters, [k, k, C, F]; torch has them as (C, F, k, k).
Leaves = Mapping[tuple[str, int], tuple[str, tuple[int, ...]]]
TORCH_LEAVES: Leaves = {
    ("kernel", 4): ("weight", (2, 3, 1, 0)),
    ("kernel", 2): ("weight", (1, 0)),
    ("transposed_kernel", 4): ("weight", (2, 3, 0, 1)),
    ("score_kernel", 4): ("weight", (2, 3, 1, 0)),
    ("zero_kernel", 4): ("weight", (2, 3, 1, 0)),
    ("bilinear_kernel", 4): ("weight", (2, 3, 0, 1)),
    ("bias", 1): ("bias", (0,)),
    ("scale", 1): ("weight", (0,)),
    ("shift", 1): ("bias", (0,)),
    ("mean", 1): ("running_mean", (0,)),
    ("var", 1): ("running_var", (0,)),
}
KERAS_LEAVES: Leaves = {
    ("kernel", 4): ("kernel", (0, 1, 2, 3)),
    ("kernel", 2): ("kernel", (0, 1)),
    ("bias", 1): ("bias", (0,)),
    ("scale", 1): ("gamma", (0,)),
    ("shift", 1): ("beta", (0,)),
    ("mean", 1): ("moving_mean", (0,)),
    ("var", 1): ("moving_variance", (0,)),
}


@dataclasses.dataclass(frozen=True)
class ModuleNaming:
    """A naming in which every module of ours is one module of the library's: `<module><separator><leaf>`.

    shapes(architecture): our variables as shapes; module(architecture, path): the library's name of the module whose arrays
    lie at the path (without collection and leaf).
    """

    sources: tuple[str, ...]
    classifier_bias: str
    shapes: Callable[[Any], Mapping[str, Any]]
    module: Callable[[Any, Path], str]
    leaves: Leaves
    separator: str = "."
    unread: tuple[str, ...] = ()  # names of arrays that the library's files may hold and its network does not use

    def table(self, architecture: Architecture) -> dict[str, Entry]:
        """Name in the file -> Entry, for every array of the network."""
        shapes = flatten_dict(self.shapes(architecture))
        entries: dict[str, Entry] = {}
        for path, leaf in shapes.items():
            of_norm = path[-1] == "bias" and (*path[:-1], "scale") in shapes
            name, axes = self.leaves["shift" if of_norm else path[-1], leaf.ndim]
            entries[f"{self.module(architecture, path[1:-1])}{self.separator}{name}"] = Entry(path, axes)
        if len(entries) < len(shapes):
            raise ValueError(f"{architecture.name}: two arrays have one name in this naming")
        return entries
