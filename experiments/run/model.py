"""A finished model on disk: weights.npz, and model.json that says what network they are for and how slides are tiled for it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from data_pipelines.exports import write_json
from data_pipelines.files import atomic_write
from data_pipelines.tiles import Grid
from data_pipelines.weights import WeightsError, read_weights
from experiments.run.workdir import WorkdirError
from srcc_jax.models import zoo
from srcc_jax.models.architecture import Architecture
from srcc_jax.models.layers import variable_shapes

_WEIGHTS, _CARD = "weights.npz", "model.json"


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
        """Writes the model into the work directory; weights first, so that a card never stands without them."""
        flat = flax.traverse_util.flatten_dict(jax.device_get(self.variables), sep="/")
        with atomic_write(workdir / _WEIGHTS) as temporary, temporary.open("wb") as file:
            arrays: dict[str, Any] = {name: np.asarray(value) for name, value in flat.items()}
            np.savez(file, **arrays)
        card = {
            "architecture": self.architecture.as_dict(),
            "grid": dataclasses.asdict(self.grid),
            "min_tissue": self.min_tissue,
            "positive": self.positive,
            "about": dict(self.about),
        }
        write_json(workdir / _CARD, card)

    @classmethod
    def load(cls, workdir: str | pathlib.Path) -> Model:
        """Raises WorkdirError where there is no finished model, or the card and the weights do not belong together."""
        folder = pathlib.Path(workdir)
        try:
            card = json.loads((folder / _CARD).read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise WorkdirError(
                f"{folder} holds no finished model ({_CARD} is missing): train one there first"
            ) from None
        except json.JSONDecodeError as error:
            raise WorkdirError(f"{folder / _CARD} is not JSON ({error}): train again, or restore the file") from error
        try:
            flat = read_weights(folder / _WEIGHTS)
            architecture, grid = zoo.from_dict(card["architecture"]), Grid(**card["grid"])
            _check_shapes(flat, architecture)
            variables = flax.traverse_util.unflatten_dict(flat, sep="/")
            return cls(architecture, variables, grid, card["min_tissue"], card["positive"], card["about"])
        except (KeyError, TypeError, ValueError, WeightsError) as error:
            raise WorkdirError(f"{folder} holds a model this version cannot read: {error}") from error


def _check_shapes(flat: Mapping[str, np.ndarray], architecture: Architecture) -> None:
    """Raises ValueError where the weights are not those of the network."""
    wanted = {
        name: leaf.shape
        for name, leaf in flax.traverse_util.flatten_dict(variable_shapes(zoo.build(architecture)), sep="/").items()
    }
    found = {name: value.shape for name, value in flat.items()}
    wrong = [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]
    if wrong:
        raise ValueError(
            f"{_WEIGHTS} is of another network than {_CARD}: {len(wrong)} arrays differ, the first {wrong[0]} "
            f"({found.get(wrong[0], 'absent')}, not {wanted.get(wrong[0], 'absent')})"
        )
