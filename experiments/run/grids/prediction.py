"""Patch classifiers as predict_slides takes them: the probability of the middle patch of every grid over a slide."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from data_pipelines.cohort import SlideRecord
from experiments.run.cohort_report import Subject
from experiments.run.evaluation import Merit, measure
from experiments.run.grids.model import KIND, GridModel
from experiments.run.grids.training import STAGE
from experiments.run.predictors import PredictionFlags, Predictor
from experiments.run.scoring import TileScorer
from experiments.run.slide_formats import FORMATS, PROBABILITY_MAP
from experiments.run.slide_outputs import PredictionTask
from experiments.run.slide_result import SlideResult
from experiments.run.slide_state import Settings, model_hash
from experiments.run.workdir import Workdir
from srcc_jax.methods.patch_grids import fold, make_middle_logit
from srcc_jax.parallel import make_mesh

flags.disclaim_key_flags()

THRESHOLDS = (0.5, 0.9)  # ours: probabilities from which on regions are outlined
MIN_TISSUE = 0.1  # ours: share of a grid


class GridKind:
    """Of patch classifiers, with or without the CRF. It has no flags of its own."""

    name = KIND

    def __init__(self) -> None:
        self.flags: tuple[flags.FlagHolder, ...] = ()

    def load(self, given: PredictionFlags) -> Predictor:
        model = GridModel.load(given.workdir.value)
        settings = Settings(
            grid=given.grid(tile=model.side * model.tile, stride=model.tile, mpp=model.mpp),
            min_tissue=MIN_TISSUE,
            mpp_override=given.cohort.mpp_override.value,
            model=model_hash(model.architecture, model.variables),
            cam=False,
            formats=given.chosen_formats(FORMATS),
            thresholds=given.chosen_thresholds(THRESHOLDS, highest=1, what="probabilities"),
        )
        return Predictor(
            task=PredictionTask(settings),
            scorer=grid_scorer(model),
            variables=model.variables,
            subject=Subject(
                title=model.positive,
                name=_name(model),
                grid=settings.grid,
                maps=(PROBABILITY_MAP,),
                settings=model.about["settings"],
                training=_training_curves(Workdir(pathlib.Path(given.workdir.value))),
            ),
            judge=functools.partial(_judge, model, given.seed.value),
        )


def grid_scorer(model: GridModel) -> TileScorer:
    """Logits float32 [n] of the middle patches of windows of side × side patches, output "logit"."""
    middle = make_middle_logit(model.architecture, side=model.side, crf=model.crf, crop=model.crop)

    def outputs(variables: Mapping[str, Any], windows: jax.Array) -> dict[str, jax.Array]:
        return {"logit": middle(variables, windows)}

    folding = functools.partial(fold, architecture=model.architecture)
    return TileScorer(outputs, folding, tile=model.side * model.tile, mesh=make_mesh())


def _judge(model: GridModel, seed: int, records: Sequence[SlideRecord], results: Sequence[SlideResult]) -> Merit:
    scores = [row.probability for row in results]
    return measure(records, scores, positive=model.positive, name=_name(model), seed=seed)


def _name(model: GridModel) -> str:
    crf = ", CRF" if model.crf else ""
    return f"{KIND}, {model.architecture.name}, {model.side} × {model.side} patches{crf}"


def _training_curves(workdir: Workdir) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rows = [(row["step"], row["loss"]) for row in workdir.history(STAGE) if "loss" in row]
    if not rows:
        return {}
    steps, loss = zip(*rows)
    return {"training loss": (np.asarray(steps), np.asarray(loss))}
