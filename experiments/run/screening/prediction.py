"""Models of gastric screening as predict_slides takes them: verdict and lesion of whole slides, in one pass (Yu et al. 2019)."""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from data_pipelines.cohort import SlideRecord
from data_pipelines.tiles import Grid
from experiments.run.cohort_report import Subject
from experiments.run.evaluation import Merit, measure
from experiments.run.predictors import PredictionFlags, Predictor
from experiments.run.program import UsageError
from experiments.run.screening.features import patch_scorer
from experiments.run.screening.model import KIND, ScreeningModel
from experiments.run.screening.prediction_gates import FOREGROUND, OTSU, SlideGates
from experiments.run.screening.screening_outputs import (
    LESION_MAP,
    SCREENING_FORMATS,
    WRITERS,
    JudgeSlide,
    ScreeningSettings,
    ScreeningTask,
)
from experiments.run.slide_formats import PROBABILITY_MAP
from experiments.run.slide_result import SlideResult
from experiments.run.slide_state import model_hash
from experiments.run.workdir import Workdir
from srcc_jax.metrics import Metric, roc_auc, sensitivity, specificity
from srcc_jax.models import zoo
from srcc_jax.models.screening import ScreeningNet
from srcc_jax.parallel import make_mesh

flags.disclaim_key_flags()

THRESHOLDS = (0.5, 0.9)  # ours: lesion probabilities from which on regions are outlined
CELL_UM = 8.0  # ours: the widest cell of the lesion map


class ScreeningKind:
    """Defines its flags in the calling program."""

    name = KIND

    def __init__(self) -> None:
        self._tissue = flags.DEFINE_enum(
            "tissue",
            None,
            [FOREGROUND, OTSU],
            f"{KIND}: how tissue is found; foreground: by the model's network, and by Otsu's threshold where it finds none; none: that "
            "network where the model has one",
        )
        self._focus = flags.DEFINE_integer(
            "focus_patches",
            64,
            f"{KIND}: patches of a slide that are looked at for its focus, before any is judged; 0: none",
            lower_bound=0,
        )
        self._blurred = flags.DEFINE_float(
            "most_blurred",
            0.5,
            f"{KIND}: a slide of which a larger share of these is out of focus is reported as blurred, and not judged (ours)",
            lower_bound=0,
            upper_bound=1,
        )
        self.flags = (self._tissue, self._focus, self._blurred)

    def load(self, given: PredictionFlags) -> Predictor:
        model = ScreeningModel.load(given.workdir.value)
        settings = self._settings(model, given)
        return Predictor(
            task=ScreeningTask(settings, SlideGates(model.variables, model.gates), slide_judge(model)),
            scorer=patch_scorer(
                model.architecture, tile=settings.grid.tile, cells=settings.grid.tile // settings.cell, mesh=make_mesh()
            ),
            variables=model.variables["patches"],
            subject=Subject(
                title=model.positive,
                name=model.about["name"],
                grid=settings.grid,
                maps=(LESION_MAP, PROBABILITY_MAP),
                settings=model.about["settings"],
                training=_training_curves(Workdir(pathlib.Path(given.workdir.value))),
            ),
            judge=functools.partial(_judge, model, given.seed.value),
        )

    def _settings(self, model: ScreeningModel, given: PredictionFlags) -> ScreeningSettings:
        grid, has_foreground = model.grid, FOREGROUND in model.variables
        tissue = self._tissue.value or (FOREGROUND if has_foreground else OTSU)
        if tissue == FOREGROUND and not has_foreground:
            raise UsageError(
                f"--tissue={FOREGROUND}: {given.workdir.value} has no foreground network: give --tissue={OTSU}"
            )
        has_map = model.architecture.name not in zoo.CLASSIFIERS
        stride = overlapping_stride(grid) if has_map else grid.stride
        finer = given.grid(tile=grid.tile, stride=stride, mpp=grid.mpp)
        if grid.stride % finer.stride:
            raise UsageError(
                f"--stride={finer.stride} does not divide the model's stride of {grid.stride} px, on whose grid the patches of the verdict "
                f"lie: give {grid.stride // 2} or {grid.stride // 4}"
            )
        return ScreeningSettings(
            grid=finer,
            min_tissue=model.min_tissue,
            mpp_override=given.cohort.mpp_override.value,
            model=model_hash(model.architecture, model.variables),
            judged_stride=grid.stride,
            top_k=model.screening.top_k,
            features=model.screening.features,
            cell=lesion_cell(finer),
            tissue=tissue,
            focus_patches=self._focus.value,
            most_blurred=self._blurred.value,
            threshold=model.screening.threshold,
            validation_threshold=model.screening.validation_threshold,
            formats=given.chosen_formats(WRITERS, SCREENING_FORMATS),
            thresholds=given.chosen_thresholds(THRESHOLDS, highest=1, what="probabilities"),
        )


def overlapping_stride(grid: Grid) -> int:
    """Of lesion maps without seams: the model's stride, halved until it is at most half a tile, as far as it can be."""
    stride = grid.stride
    while 2 * stride > grid.tile and stride % 2 == 0:
        stride //= 2
    return stride


def lesion_cell(grid: Grid) -> int:
    """Pixels along a cell of the lesion map: the largest divisor of tile and stride that is not wider than CELL_UM, or 1."""
    common = math.gcd(grid.tile, grid.stride)
    return max((side for side in range(2, common + 1) if common % side == 0 and side * grid.mpp <= CELL_UM), default=1)


def slide_judge(model: ScreeningModel) -> JudgeSlide:
    """The screening network of a model, for one slide."""
    spec, variables = model.screening, model.variables["screening"]
    network = ScreeningNet(spec.width)

    @jax.jit
    def logit(features: jax.Array, valid: jax.Array) -> jax.Array:
        out: Any = network.apply(variables, features[None], valid[None], train=False)
        return out["logits"][0, 0]

    def judge(features: np.ndarray) -> float:
        empty = spec.top_k - len(features)
        padded = np.pad(features, [(0, empty), (0, 0)])
        found = float(logit(padded, np.arange(spec.top_k) < len(features)))
        return float(1 / (1 + np.exp(-np.float64(found))))

    return judge


def _judge(model: ScreeningModel, seed: int, records: Sequence[SlideRecord], results: Sequence[SlideResult]) -> Merit:
    metrics: dict[str, Metric] = {"ROC AUC": roc_auc}
    spec = model.screening
    for name, value in (("", spec.threshold), ("validation threshold ", spec.validation_threshold)):
        above = float(np.nextafter(value, np.inf))  # a slide is positive above a threshold, not at it
        metrics[f"sensitivity at {name}{value:.4g}"] = functools.partial(sensitivity, threshold=above)
        metrics[f"specificity at {name}{value:.4g}"] = functools.partial(specificity, threshold=above)
    scores = [row.probability for row in results]
    return measure(records, scores, positive=model.positive, name=model.about["name"], seed=seed, metrics=metrics)


def _training_curves(workdir: Workdir) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Loss of each network over its steps, as far as the work directory has a log of them."""
    curves = {}
    for stage in ("multitask", "screening"):
        for key, name in (("loss", "training"), ("validation_loss", "validation")):
            points = [(row["step"], row[key]) for row in workdir.history(stage) if key in row]
            if points:
                steps, values = zip(*points)
                curves[f"{stage}, {name} loss"] = (np.asarray(steps), np.asarray(values))
    return curves
