"""What predict_slides needs of a kind of model: its flags, and from its work directory the parts of a run over slides.

A kind is what the card of a model (model.json) says in "kind"; a card without one is of a slide classifier.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from absl import flags

from data_pipelines.cohort import SlideRecord
from data_pipelines.tiles import Grid
from experiments.run.cohort_program import CohortFlags
from experiments.run.cohort_report import Subject
from experiments.run.evaluation import Merit
from experiments.run.model import read_card
from experiments.run.program import UsageError
from experiments.run.scoring import TileScorer
from experiments.run.slide_formats import DEFAULT_FORMATS, FORMATS, Writer, chosen_formats
from experiments.run.slide_result import SlideResult
from experiments.run.task import Task
from experiments.run.workdir import WorkdirError

flags.disclaim_key_flags()

SLIDE_CLASSIFIER = "slide classification"


@dataclasses.dataclass(frozen=True)
class PredictionFlags:
    """The flags that concern models of every kind."""

    cohort: CohortFlags
    workdir: flags.FlagHolder[str]
    stride: flags.FlagHolder[int | None]
    formats: flags.FlagHolder[list[str] | None]
    thresholds: flags.FlagHolder[list[str] | None]
    seed: flags.FlagHolder[int]

    def grid(self, *, tile: int, stride: int, mpp: float) -> Grid:
        """The model's, but for --stride. UsageError where tissue between tiles would not be seen."""
        stride = self.stride.value or stride
        if stride > tile:
            raise UsageError(
                f"--stride={stride} is larger than the model's tile of {tile} px: tissue between tiles is not seen"
            )
        return Grid(tile=tile, stride=stride, mpp=mpp)

    def chosen_formats(
        self, writers: Mapping[str, Writer], default: Sequence[str] = DEFAULT_FORMATS
    ) -> tuple[str, ...]:
        """--formats, out of those of the kind. UsageError for another."""
        return chosen_formats(self.formats.value, writers, default)

    def chosen_thresholds(self, default: Sequence[float], *, highest: float, what: str) -> tuple[float, ...]:
        """--thresholds, ascending; what: the values, from 0 to `highest`, that they are of. UsageError for what are no such values."""
        if self.thresholds.value is None:
            return tuple(sorted(set(default)))
        try:
            values = tuple(sorted({float(value) for value in self.thresholds.value}))
        except ValueError:
            values = ()
        if not values or not all(0 <= value <= highest for value in values):
            example = ",".join(f"{value:g}" for value in sorted(set(default)))
            raise UsageError(
                f"--thresholds={','.join(self.thresholds.value)}: give {what} between 0 and {highest:g}, such as {example}"
            )
        return values


def define_prediction_flags(cohort: CohortFlags) -> PredictionFlags:
    """Defines them, in the calling program."""
    return PredictionFlags(
        cohort=cohort,
        workdir=flags.DEFINE_string("workdir", None, "work directory of a finished model", required=True),
        stride=flags.DEFINE_integer(
            "stride",
            None,
            "stride in pixels, where it should not be the model's; 32 is the paper's for Grad-CAM; of maps of reverse distillation "
            "a quarter of the tile, 64 for the paper's; of lesion maps of gastric screening half a tile, without seams: the tile itself "
            "takes a quarter of the time for the same verdict",
            lower_bound=1,
        ),
        formats=flags.DEFINE_list(
            "formats",
            None,
            f"files of each slide, out of {', '.join(FORMATS)}, and those that a kind of model has besides; none: "
            f"{','.join(DEFAULT_FORMATS)}, and those of its kind",
        ),
        thresholds=flags.DEFINE_list(
            "thresholds",
            None,
            "values from which on regions are outlined (geojson, asap); none: probabilities 0.5,0.9, or those of the model",
        ),
        seed=flags.DEFINE_integer("seed", 0, "seed of the bootstrap", lower_bound=0),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictor:
    """A finished model, ready for slides. task: what is made of each; scorer, variables: its network and weights; subject: what the
    report says of it; judge: how good its results are, where the records have labels."""

    task: Task
    scorer: TileScorer
    variables: Mapping[str, Any]
    subject: Subject
    judge: Callable[[Sequence[SlideRecord], Sequence[SlideResult]], Merit]


class Kind(Protocol):
    """A kind of model. name: its "kind" in the card; flags: those of the program that not every kind takes, and this one does."""

    @property
    def name(self) -> str: ...

    @property
    def flags(self) -> Sequence[flags.FlagHolder]: ...

    def load(self, given: PredictionFlags) -> Predictor:
        """The model of --workdir, under the flags. Raises WorkdirError or UsageError."""


def kind_of(kinds: Sequence[Kind], workdir: str) -> Kind:
    """The kind of the model in a work directory. WorkdirError where there is no model, or one of none of these kinds; UsageError
    for a flag on the command line that its kind does not take."""
    name = read_card(pathlib.Path(workdir)).get("kind", SLIDE_CLASSIFIER)
    found = next((kind for kind in kinds if kind.name == name), None)
    if found is None:
        known = ", ".join(kind.name for kind in kinds)
        raise WorkdirError(f"{workdir} holds a model of {name}, of which slides are not predicted: give one of {known}")
    taken = {flag.name for flag in found.flags}
    for kind in kinds:
        for flag in kind.flags:
            if flag.present and flag.name not in taken:
                raise UsageError(
                    f"--{flag.name} is for models of {kind.name}, {workdir} holds one of {name}: leave it out"
                )
    return found
