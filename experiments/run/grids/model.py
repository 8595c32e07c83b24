"""A finished patch classifier on disk: weights.npz, and model.json, the card."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.traverse_util

from data_pipelines.weights import WeightsError, read_weights
from experiments.run.model import LAYOUT, WEIGHTS, check, checksum, flatten, read_card, write
from experiments.run.workdir import WorkdirError
from srcc_jax.methods.patch_grids import build
from srcc_jax.models import zoo
from srcc_jax.models.architecture import Architecture
from srcc_jax.models.layers import variable_shapes

KIND = "patch classification"
_FIELDS = ("side", "crf", "crop", "tile", "mpp", "positive", "thresholds", "about")


@dataclasses.dataclass(frozen=True)
class GridModel:
    """variables {"params", "batch_stats"} of `patch_grids.build`; side, crf, crop: its form. tile, mpp: side in pixels and µm per pixel
    of a patch. positive: the label that high scores mean. thresholds: name -> lowest probability that is called positive."""

    architecture: Architecture
    variables: Mapping[str, Any]
    side: int
    crf: bool
    crop: int | None
    tile: int
    mpp: float
    positive: str
    thresholds: Mapping[str, float]
    about: Mapping[str, Any]

    def save(self, folder: pathlib.Path) -> None:
        """Writes both files into the work directory."""
        flat = flatten(self.variables)
        described = self.architecture.as_dict()
        card = {"kind": KIND, "architecture": described, "layout": LAYOUT, "checksum": checksum(flat, described)}
        write(folder, flat, card | {name: getattr(self, name) for name in _FIELDS})

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> GridModel:
        """What `save` wrote. Raises WorkdirError where there is no such model, or card and weights do not belong together."""
        folder = pathlib.Path(folder)
        card = read_card(folder)
        if card.get("kind") != KIND:
            raise WorkdirError(f"{folder} holds no model of {KIND}: train one with experiments.patch_classification")
        try:
            architecture, flat = zoo.from_dict(card["architecture"]), read_weights(folder / WEIGHTS)
            network = build(architecture, side=card["side"], crf=card["crf"], crop=None)
            shape = (1, 32 * card["side"], 32 * card["side"], 3)
            check(flat, lambda: variable_shapes(network, shape), card)
            variables = flax.traverse_util.unflatten_dict(dict(flat), sep="/")
            return cls(architecture=architecture, variables=variables, **{name: card[name] for name in _FIELDS})
        except (KeyError, TypeError, ValueError, WeightsError) as error:
            raise WorkdirError(f"{folder} holds a model this version cannot read: {error}") from error
