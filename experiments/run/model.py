"""Weights on disk with all that makes them right: weights.npz, and model.json, the card.

The card of a Network says which architecture the weights are for, in all its conventions, and where they come from. That of
a Model says besides how slides are tiled for it. The same card travels in a .safetensors file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from data_pipelines.exports import write_json
from data_pipelines.files import atomic_write
from data_pipelines.safetensors_files import write_safetensors
from data_pipelines.tiles import Grid
from data_pipelines.weights import WeightsError, read_texts, read_weights
from experiments.run.workdir import WorkdirError
from srcc_jax.models import zoo
from srcc_jax.models.architecture import Architecture
from srcc_jax.models.layers import variable_shapes

WEIGHTS, CARD = "weights.npz", "model.json"
_TEXT = "srcc_jax"  # the card's name among the texts of a .safetensors file
LAYOUT = "images [B, H, W, C]; kernels [k, k, in, out], depthwise [k, k, 1, C], dense [in, out]"


@dataclasses.dataclass(frozen=True)
class Network:
    """architecture, variables {"params", "batch_stats"}; about: where they come from (file, its hash, versions)."""

    architecture: Architecture
    variables: Mapping[str, Any]
    about: Mapping[str, Any]

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> Network:
        """Of an imported or a trained model. Raises WorkdirError as `load` does."""
        found = load(folder)
        return Network(found.architecture, found.variables, found.about)


@dataclasses.dataclass(frozen=True)
class Model:
    """architecture, variables {"params", "batch_stats"}; grid and min_tissue: how slides are tiled; positive: the label that the
    probability is of; about: where it comes from (mode, step, validation loss, settings, versions)."""

    architecture: Architecture
    variables: Mapping[str, Any]
    grid: Grid
    min_tissue: float
    positive: str
    about: Mapping[str, Any]

    def save(self, workdir: pathlib.Path) -> None:
        """Writes the model into the work directory."""
        save(self, workdir)

    @classmethod
    def load(cls, workdir: str | pathlib.Path) -> Model:
        """Raises WorkdirError where there is no finished model, or the card and the weights do not belong together."""
        found = load(workdir)
        if not isinstance(found, Model):
            raise WorkdirError(
                f"{workdir} holds imported weights of {found.architecture.name}, no model of slides: train one from it with "
                f"slide_classification --pretrained={workdir}"
            )
        return found


def save(stored: Network | Model, folder: pathlib.Path) -> None:
    """Writes both files."""
    flat = flat_arrays(stored)
    write(folder, flat, card_of(stored, flat))


def write(folder: pathlib.Path, flat: Mapping[str, np.ndarray], card: Mapping[str, Any]) -> None:
    """Writes weights and card; the weights first, so that a card never stands without them."""
    with atomic_write(folder / WEIGHTS) as temporary, temporary.open("wb") as file:
        arrays: dict[str, Any] = dict(flat)
        np.savez(file, **arrays)
    write_json(folder / CARD, card)


def load(folder: str | pathlib.Path) -> Network | Model:
    """What `save` wrote. Raises WorkdirError where there is none, or the card and the weights do not belong together."""
    folder = pathlib.Path(folder)
    card = read_card(folder)
    try:
        return from_card(card, read_weights(folder / WEIGHTS))
    except (KeyError, TypeError, ValueError, WeightsError) as error:
        raise WorkdirError(f"{folder} holds a model this version cannot read: {error}") from error


def read_card(folder: pathlib.Path) -> dict[str, Any]:
    """The card of a model. Raises WorkdirError where there is none."""
    try:
        return json.loads((folder / CARD).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise WorkdirError(f"{folder} holds no finished model ({CARD} is missing): train one there first") from None
    except json.JSONDecodeError as error:
        raise WorkdirError(f"{folder / CARD} is not JSON ({error}): train again, or restore the file") from error


def write_exchange(stored: Network | Model, path: pathlib.Path) -> None:
    """Writes one .safetensors file with the arrays by path, and the card as JSON among its texts."""
    write_safetensors(path, flat_arrays(stored), {"format": "flax", _TEXT: card_text(stored)})


def read_exchange(path: pathlib.Path) -> Network | Model | None:
    """What `write_exchange` wrote; None where the file, of any kind of weights, has no such card. Raises WeightsError."""
    text = read_texts(path).get(_TEXT)
    if text is None:
        return None
    try:
        return from_card(json.loads(text), read_weights(path))
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: holds a model this version cannot read: {error}") from error


def flat_arrays(stored: Network | Model) -> dict[str, np.ndarray]:
    """The variables by path, "params/stem/conv/kernel"."""
    return flatten(stored.variables)


def flatten(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a tree by path."""
    flat = flax.traverse_util.flatten_dict(jax.device_get(variables), sep="/")
    return {name: np.asarray(value) for name, value in flat.items()}


def checksum(flat: Mapping[str, np.ndarray], *described: Mapping[str, Any]) -> str:
    """SHA-256 of names, shapes and values, whatever file they lie in, and of the descriptions of the networks that they are for."""
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(flat):
        digest.update(f"{name} {flat[name].dtype} {flat[name].shape}".encode())
        digest.update(np.ascontiguousarray(flat[name]).data)
    return digest.hexdigest()


def card_of(stored: Network | Model, flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What is to be known of weights besides their values, as plain values. flat: their `flat_arrays`."""
    card: dict[str, Any] = {
        "architecture": stored.architecture.as_dict(),
        "layout": LAYOUT,
        "checksum": checksum(flat, stored.architecture.as_dict()),
        "about": dict(stored.about),
    }
    if isinstance(stored, Model):
        grid = dataclasses.asdict(stored.grid)
        card |= {"grid": grid, "min_tissue": stored.min_tissue, "positive": stored.positive}
    return card


def card_text(stored: Network | Model) -> str:
    """The card as JSON."""
    return json.dumps(card_of(stored, flat_arrays(stored)), allow_nan=False)


def from_card(card: Mapping[str, Any], flat: Mapping[str, np.ndarray]) -> Network | Model:
    """What `card_of` and `flat_arrays` describe. Raises KeyError, TypeError or ValueError where they describe nothing, or the
    arrays are others than the card's."""
    if "kind" in card:
        raise ValueError(f"it is one of {card['kind']}, which this program does not take")
    architecture = zoo.from_dict(card["architecture"])
    check(flat, lambda: variable_shapes(zoo.build(architecture)), card)
    variables = flax.traverse_util.unflatten_dict(dict(flat), sep="/")
    if "grid" not in card:
        return Network(architecture, variables, card["about"])
    return Model(architecture, variables, Grid(**card["grid"]), card["min_tissue"], card["positive"], card["about"])


def check(
    flat: Mapping[str, np.ndarray],
    shapes: Callable[[], Mapping[str, Any]],
    card: Mapping[str, Any],
    networks: Sequence[str] = ("architecture",),
) -> None:
    """Raises ValueError where the weights are not those of the card, or not of its networks (keys of the card), whose variables have
    these shapes.

    What has the card's checksum has passed through `card_of`, with arrays of the network itself; only otherwise are the shapes asked
    for, which takes a second, to say what is wrong.
    """
    if checksum(flat, *(card[name] for name in networks)) == card["checksum"]:
        return
    wanted = {name: leaf.shape for name, leaf in flax.traverse_util.flatten_dict(shapes(), sep="/").items()}
    found = {name: value.shape for name, value in flat.items()}
    wrong = [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]
    if wrong:
        raise ValueError(
            f"the weights are of another network than the card's: {len(wrong)} arrays differ, the first {wrong[0]} "
            f"({found.get(wrong[0], 'absent')}, not {wanted.get(wrong[0], 'absent')})"
        )
    raise ValueError("the weights are not those that the card was written for: their checksum differs")
