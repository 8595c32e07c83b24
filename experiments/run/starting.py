"""The network that a training starts from: published or imported weights under a fresh head, or random weights."""

from __future__ import annotations

import dataclasses
import pathlib
import textwrap
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from data_pipelines.weights import read_weights
from experiments.run.model import CARD, Network
from experiments.run.program import UsageError
from experiments.run.workdir import file_hash
from srcc_jax.models import pretrained
from srcc_jax.models.architecture import Architecture
from srcc_jax.models.zoo import architecture, family, init


def arithmetic(dtype: str) -> str:
    """What --dtype asks for; auto: bfloat16 where the device is fast with it, which CPUs are not."""
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def pretrained_network(
    path: str | pathlib.Path,
    *,
    backbone: str,
    source: str | None,
    classes: int,
    key: jax.Array,
    changes: Mapping[str, Any],
) -> tuple[Architecture, dict[str, Any]]:
    """The network of --pretrained (a folder of import_weights, or a file) under a fresh head, and its variables.

    source: --pretrained_source, who published a file whose names do not tell. changes: fields of the architecture. Raises UsageError
    where the weights are of another network than --backbone, WeightsError or WorkdirError where they cannot be read.
    """
    path = pathlib.Path(path)
    try:
        if not path.is_dir():
            arrays = read_weights(path)
            published = pretrained.source_conventions(arrays, backbone, source=source, classes=classes)
            net = dataclasses.replace(published, **changes)
            return net, pretrained.load(arrays, net, init(net, key), replace_head=True)
        network = Network.load(path)
        if network.architecture.name != backbone or source:
            raise UsageError(
                f"--pretrained={path} is of --backbone={network.architecture.name} with the conventions of its card: "
                "give that backbone, and no --pretrained_source"
            )
        net = dataclasses.replace(network.architecture, classes=classes, **changes)
        return net, pretrained.transfer(network.variables, init(net, key), net)
    except pretrained.PretrainedError as error:
        problem = textwrap.shorten(str(error), 300, placeholder=" ...")  # it can name hundreds of arrays
        raise UsageError(f"--pretrained={path} does not fit --backbone={backbone}: {problem}") from error


def published_arrays(path: str | pathlib.Path, source: str | None) -> tuple[Mapping[str, np.ndarray], str | None]:
    """The weights of a file, or of a folder made by import_weights, by the names of who published them, and who that is as far as is
    known. source: who published a file, where its names do not tell. WeightsError, WorkdirError."""
    path = pathlib.Path(path)
    if not path.is_dir():
        return read_weights(path), source
    network = Network.load(path)
    published = network.architecture.source
    namings = family(network.architecture.name).namings
    naming = next(key for key, naming in namings.items() if published in naming.sources)
    return pretrained.export(network.variables, network.architecture, naming), published


def random_network(
    *, backbone: str, classes: int, key: jax.Array, changes: Mapping[str, Any]
) -> tuple[Architecture, dict[str, Any]]:
    """The network with random weights, under the conventions of the family's first source."""
    net = architecture(backbone, source=next(iter(family(backbone).sources)), classes=classes, **changes)
    return net, init(net, key)


def pretrained_hash(path: str | pathlib.Path | None) -> str | None:
    """Of the file of --pretrained; of a folder's card, which holds the checksum of its weights; None where there is none."""
    if not path:
        return None
    path = pathlib.Path(path)
    return file_hash(path / CARD if path.is_dir() else path)
