"""A finished model of cell detection on disk: weights.npz with the network, and model.json, the card."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from data_pipelines.weights import WeightsError, read_weights
from experiments.run.model import LAYOUT, WEIGHTS, check, checksum, flatten, read_card, write
from experiments.run.workdir import WorkdirError
from srcc_jax.instances import Instances, find_instances
from srcc_jax.models import zoo
from srcc_jax.models.architecture import Architecture
from srcc_jax.models.layers import variable_shapes

KIND = "cell detection"
_FIELDS = ("mpp", "reduce", "window", "overlap", "threshold", "min_area", "beta", "spread", "about")


@dataclasses.dataclass(frozen=True)
class CellModel:
    """variables: {"params", "batch_stats"}. mpp: µm per pixel of images before they are reduced by the factor `reduce`; window, overlap: of
    inference in reduced pixels. threshold, min_area, beta: of `find_instances`; spread: standard deviation of the inner region's
    probability over the annotated images, for parts of slides. about: where it comes from."""

    architecture: Architecture
    variables: Mapping[str, Any]
    mpp: float
    reduce: int
    window: int
    overlap: int
    threshold: float
    min_area: int
    beta: float
    spread: float
    about: Mapping[str, Any]

    def instances(self, probability: np.ndarray, *, whole: bool) -> Instances:
        """The cells on a map of probabilities [H, W, 3]. whole: it is an image of its own; else a part of a slide, whose cells come out as
        on any other part that holds them whole."""
        spread = None if whole else self.spread
        return find_instances(
            probability, threshold=self.threshold, min_area=self.min_area, beta=self.beta, spread=spread
        )

    def save(self, folder: pathlib.Path) -> None:
        """Writes both files into the work directory."""
        flat, described = flatten(self.variables), self.architecture.as_dict()
        card = {
            "kind": KIND,
            "architecture": described,
            "layout": LAYOUT,
            "checksum": checksum(flat, described),
            **{name: getattr(self, name) for name in _FIELDS},
        }
        write(folder, flat, card)

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> CellModel:
        """What `save` wrote. Raises WorkdirError where there is no such model, or card and weights do not belong together."""
        folder = pathlib.Path(folder)
        card = read_card(folder)
        if card.get("kind") != KIND:
            raise WorkdirError(f"{folder} holds no model of {KIND}: train one with experiments.cell_detection")
        try:
            architecture = zoo.from_dict(card["architecture"])
            flat = read_weights(folder / WEIGHTS)
            check(flat, lambda: variable_shapes(zoo.build(architecture)), card)
            variables = flax.traverse_util.unflatten_dict(dict(flat), sep="/")
            return cls(architecture, variables, **{name: card[name] for name in _FIELDS})
        except (KeyError, TypeError, ValueError, WeightsError) as error:
            raise WorkdirError(f"{folder} holds a model this version cannot read: {error}") from error
