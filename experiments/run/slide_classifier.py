"""Slide classifiers as predict_slides takes them: probabilities of tiles, of which the highest is the slide's, and Grad-CAM."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

from absl import flags

from data_pipelines.cohort import SlideRecord
from experiments.run.cohort_report import Subject, training_curves
from experiments.run.evaluation import Merit, measure
from experiments.run.model import Model
from experiments.run.predictors import SLIDE_CLASSIFIER, PredictionFlags, Predictor
from experiments.run.scoring import classifier_scorer
from experiments.run.slide_formats import FORMATS, GRAD_CAM_MAP, PROBABILITY_MAP
from experiments.run.slide_outputs import PredictionTask
from experiments.run.slide_result import SlideResult
from experiments.run.slide_state import Settings, model_hash
from experiments.run.workdir import Workdir
from srcc_jax.parallel import make_mesh

flags.disclaim_key_flags()

THRESHOLDS = (0.5, 0.9)  # ours: probabilities from which on regions are outlined


class ClassifierKind:
    """Defines its flags in the calling program."""

    name = SLIDE_CLASSIFIER

    def __init__(self) -> None:
        self._gradcam = flags.DEFINE_bool("gradcam", True, f"{SLIDE_CLASSIFIER}: make Grad-CAM maps")
        self.flags = (self._gradcam,)

    def load(self, given: PredictionFlags) -> Predictor:
        model = Model.load(given.workdir.value)
        settings = Settings(
            grid=given.grid(tile=model.grid.tile, stride=model.grid.stride, mpp=model.grid.mpp),
            min_tissue=model.min_tissue,
            mpp_override=given.cohort.mpp_override.value,
            model=model_hash(model.architecture, model.variables),
            cam=self._gradcam.value,
            formats=given.chosen_formats(FORMATS),
            thresholds=given.chosen_thresholds(THRESHOLDS, highest=1, what="probabilities"),
        )
        return Predictor(
            task=PredictionTask(settings),
            scorer=classifier_scorer(model.architecture, tile=settings.grid.tile, mesh=make_mesh(), cam=settings.cam),
            variables=model.variables,
            subject=Subject(
                title=model.positive,
                name=model.about["name"],
                grid=settings.grid,
                maps=(PROBABILITY_MAP, GRAD_CAM_MAP),
                settings=model.about["settings"],
                training=training_curves(Workdir(pathlib.Path(given.workdir.value))),
            ),
            judge=functools.partial(_judge, model, given.seed.value),
        )


def _judge(model: Model, seed: int, records: Sequence[SlideRecord], results: Sequence[SlideResult]) -> Merit:
    scores = [row.probability for row in results]
    return measure(records, scores, positive=model.positive, name=model.about["name"], seed=seed)
