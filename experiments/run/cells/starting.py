"""The U-Nets of cell detection before training: fresh, whole as they were published, or with a published encoder."""

from __future__ import annotations

import dataclasses
import pathlib
import textwrap
from typing import Any

import jax

from data_pipelines.weights import read_weights
from experiments.run.model import read_card
from experiments.run.program import UsageError
from experiments.run.starting import published_arrays, random_network
from srcc_jax.models import pretrained, unet_encoders, zoo
from srcc_jax.models.architecture import Architecture

CLASSES = 3  # background, edge, inner region


def starting_network(
    name: str, weights: str | None, *, source: str | None, dtype: str, key: jax.Array
) -> tuple[Architecture, dict[str, Any]]:
    """Architecture and variables. weights: of the whole U-Net, whose last layer is made anew, or of the classifier that is its encoder; a
    file, or a folder made by import_weights. source: who published a file, where its names do not tell. Raises UsageError."""
    if weights is None:
        return random_network(backbone=name, classes=CLASSES, key=key, changes={"dtype": dtype})
    try:
        held = _held(name, pathlib.Path(weights))
        arrays, source = published_arrays(weights, source)
        published = pretrained.source_conventions(arrays, held, source=source, classes=CLASSES)
        if held == name:
            net = dataclasses.replace(published, dtype=dtype)
            return net, pretrained.load(arrays, net, zoo.init(net, key), replace_head=True)
        net = zoo.architecture(
            name, source=published.source, classes=CLASSES, dtype=dtype, mean=published.mean, std=published.std
        )
        return net, pretrained.load_trunk(arrays, published, zoo.init(net, key), module="trunk")
    except ValueError as error:  # PretrainedError among them, which can name hundreds of arrays
        problem = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise UsageError(f"{weights} is not weights for {name}: {problem}") from error


def _held(name: str, path: pathlib.Path) -> str:
    """Which network a folder of import_weights holds, or the names in a file speak of: the U-Net or its encoder."""
    encoder = unet_encoders.ENCODERS[name].variant if name in unet_encoders.ENCODERS else name
    if not path.is_dir():
        whole = any(array.startswith("encoder.") for array in read_weights(path))
        return name if whole else encoder
    held = read_card(path).get("architecture", {}).get("name")
    if held not in (name, encoder):
        raise UsageError(f"{path} is of {held}: give weights of {name}" + f" or of {encoder}" * (encoder != name))
    return held
