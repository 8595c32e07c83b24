"""What is made of the slides of a cohort: the part in which predictions of each kind, and extraction of features, differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from data_pipelines.cohort import SlideRecord
from data_pipelines.prepare import PreparedSlide
from experiments.run.collector import TileCollector
from experiments.run.journal import Journal
from experiments.run.slide_state import Place, TileSettings


@dataclasses.dataclass(frozen=True)
class Begun:
    """An open slide with tiles to score or files to write. basis: what its results will rest on; journal: what is known of it."""

    place: Place
    basis: Mapping[str, Any]
    prepared: PreparedSlide
    journal: Journal | None


class Task(Protocol):
    """doing, done: what is said of a slide meanwhile and at the end, "predicting" and "predicted". measures: the columns of
    slides.csv that say what was found on a slide."""

    @property
    def doing(self) -> str: ...

    @property
    def done(self) -> str: ...

    @property
    def measures(self) -> tuple[str, ...]: ...

    @property
    def settings(self) -> TileSettings: ...

    def prepare(self, record: SlideRecord) -> PreparedSlide:
        """Opens the slide, finds its tissue and its tiles, in any thread. Raises SlideError or RegionError."""

    def fits(self, journal: Journal, place: Place, basis: Mapping[str, Any], tiles: int) -> bool:
        """Whether the slide at this place, of so many tiles, can go on from its journal on this basis of scores."""

    def collector(self, begun: Begun, first_row: int) -> TileCollector:
        """What gathers the slide's tiles, whose rows begin at first_row."""
