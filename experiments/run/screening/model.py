"""A finished model of gastric screening on disk: weights.npz with all its networks, and model.json, the card."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax

from data_pipelines.tiles import Grid
from data_pipelines.weights import WeightsError, read_weights
from experiments.run.model import LAYOUT, WEIGHTS, check, checksum, flatten, read_card, write
from experiments.run.workdir import WorkdirError
from srcc_jax.models import zoo
from srcc_jax.models.architecture import Architecture
from srcc_jax.models.blur import BlurNet
from srcc_jax.models.foreground import ForegroundNet
from srcc_jax.models.layers import init_variables, variable_shapes
from srcc_jax.models.screening import ScreeningNet

KIND = "gastric screening"
PICTURE = (1, 64, 64, 3)  # any shape that the small networks take


@dataclasses.dataclass(frozen=True)
class ScreeningSpec:
    """The screening network beside its weights, and how its input is chosen. top_k patches with `features` numbers each; width of the
    hidden layer; threshold: a slide is positive above it; validation_threshold: the one with the largest Youden index there."""

    top_k: int
    features: int
    width: int
    threshold: float
    validation_threshold: float


@dataclasses.dataclass(frozen=True)
class GateSpec:
    """The two small networks beside their weights. thumbnail: side in pixels of the square that a whole slide at thumbnail_mpp µm per
    pixel is resized to for the foreground; blur_side: of the blur gate's patches; blur_radius_um: defocus that it was taught to refuse."""

    thumbnail: int
    thumbnail_mpp: float
    blur_side: int
    blur_radius_um: float


@dataclasses.dataclass(frozen=True)
class ScreeningModel:
    """architecture: of the network of the patches. variables: "patches" {"params", "batch_stats"}, "screening" {"params"}, and, where
    these stages were run, "foreground" and "blur" {"params"}. grid, min_tissue: how slides are tiled. positive: the label that the
    probability is of. about: where it comes from."""

    architecture: Architecture
    variables: Mapping[str, Any]
    grid: Grid
    min_tissue: float
    positive: str
    screening: ScreeningSpec
    gates: GateSpec
    about: Mapping[str, Any]

    def save(self, folder: pathlib.Path) -> None:
        """Writes both files into the folder."""
        flat = flatten(self.variables)
        card = {
            "kind": KIND,
            "architecture": self.architecture.as_dict(),
            "screening": dataclasses.asdict(self.screening),
            "layout": LAYOUT,
            "checksum": checksum(flat, self.architecture.as_dict(), dataclasses.asdict(self.screening)),
            "networks": sorted(self.variables),
            "grid": dataclasses.asdict(self.grid),
            "gates": dataclasses.asdict(self.gates),
            **{name: getattr(self, name) for name in ("min_tissue", "positive", "about")},
        }
        write(folder, flat, card)

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> ScreeningModel:
        """What `save` wrote. Raises WorkdirError where there is no such model, or card and weights do not belong together."""
        folder = pathlib.Path(folder)
        card = read_card(folder)
        if card.get("kind") != KIND:
            raise WorkdirError(f"{folder} holds no model of {KIND}: train one with experiments.gastric_screening")
        try:
            architecture, screening = zoo.from_dict(card["architecture"]), ScreeningSpec(**card["screening"])
            flat = read_weights(folder / WEIGHTS)
            shapes = {name: _shapes(architecture, screening)[name] for name in card["networks"]}
            check(flat, lambda: shapes, card, networks=("architecture", "screening"))
            return cls(
                architecture,
                flax.traverse_util.unflatten_dict(dict(flat), sep="/"),
                Grid(**card["grid"]),
                card["min_tissue"],
                card["positive"],
                screening,
                GateSpec(**card["gates"]),
                card["about"],
            )
        except (KeyError, TypeError, ValueError, WeightsError) as error:
            raise WorkdirError(f"{folder} holds a model this version cannot read: {error}") from error


def _shapes(architecture: Architecture, screening: ScreeningSpec) -> dict[str, Any]:
    seen = (1, screening.top_k, screening.features)
    return {
        "patches": variable_shapes(zoo.build(architecture)),
        "screening": variable_shapes(ScreeningNet(screening.width), seen, seen[:2]),
        "foreground": variable_shapes(ForegroundNet(), PICTURE),
        "blur": variable_shapes(BlurNet(), PICTURE),
    }


def fresh_screening(width: int, features: tuple[int, ...], key: jax.Array) -> dict[str, Any]:
    """Variables of a ScreeningNet before training. features: shape [S, k, D] of what it is to see."""
    shape = (1, *features[1:])
    return init_variables(ScreeningNet(width), key, shape, shape[:2])
