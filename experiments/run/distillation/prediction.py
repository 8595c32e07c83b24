"""Models of reverse distillation as predict_slides takes them: a dense anomaly map of each slide (He & Li 2023)."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from data_pipelines.cohort import SlideRecord
from experiments.run.cohort_report import Subject
from experiments.run.distillation.anomaly_outputs import (
    ANOMALY_FORMATS,
    ANY_TISSUE,
    COLUMN,
    LEVELS,
    UNIT,
    WRITERS,
    AnomalySettings,
    AnomalyTask,
)
from experiments.run.distillation.model import KIND, DistillationModel
from experiments.run.distillation.training import STAGE
from experiments.run.evaluation import Merit, measure
from experiments.run.predictors import PredictionFlags, Predictor
from experiments.run.program import UsageError
from experiments.run.scoring import TileScorer
from experiments.run.slide_result import SlideResult
from experiments.run.slide_state import model_hash
from experiments.run.workdir import Workdir
from srcc_jax.kernels.anomaly_maps import dihedral_mean, gaussian_filter
from srcc_jax.methods.reverse_distillation import fold, make_anomaly_map, patch_scores
from srcc_jax.metrics import Metric, roc_auc, sensitivity, specificity
from srcc_jax.parallel import make_mesh

flags.disclaim_key_flags()

VALIDATION = "validation"
NMS_STOP = 1.0  # ours, of 3
STRIDES_PER_TILE = 4  # patches of 256 px every 64 px: the pixels of the released code's masks


class DistillationKind:
    """Defines its flags in the calling program."""

    name = KIND

    def __init__(self) -> None:
        self._define_for_patches()
        self._define_for_maps()
        patches = (self._tissue, self._pooling, self._patch_sigma, self._dihedral)
        self.flags = (*patches, self._map_sigma, self._slide_threshold, self._radius, self._stop)

    def _define_for_patches(self) -> None:
        self._tissue = flags.DEFINE_enum(
            "tissue_rule",
            "saturation",
            ["saturation", "otsu", "stain"],
            f"{KIND}: patches are scored whose middle is tissue by this rule; saturation: Camelyon's, by which training patches are "
            "drawn from slides, and which leaves out what is nearly black",
        )
        self._pooling = flags.DEFINE_enum(
            "pooling", "mean", ["mean", "max"], f"{KIND}: the score of a patch is this of its anomaly map (§3.3: mean)"
        )
        self._patch_sigma = flags.DEFINE_float(
            "patch_sigma",
            4.0,
            f"{KIND}: σ in pixels of the Gaussian over a patch's anomaly map (the released code) before --pooling=max; it does not "
            "change a mean, and is left out there",
            lower_bound=0,
        )
        self._dihedral = flags.DEFINE_bool(
            "dihedral",
            False,
            f"{KIND}: score every patch in its eight orientations and take the mean: eight times the work",
        )

    def _define_for_maps(self) -> None:
        self._map_sigma = flags.DEFINE_float(
            "map_sigma",
            0.0,
            f"{KIND}: σ in cells of a Gaussian over the slide's map, seen in its files and lesion candidates; the slide score and "
            "tiles.csv are of the map as it was; 0: none (the released code)",
            lower_bound=0,
        )
        self._slide_threshold = flags.DEFINE_string(
            "slide_threshold",
            None,
            f"{KIND}: the slide score is the mean of the map's values from here on, 0 where there is none; none: the model's, 2.01 "
            f"in the released code; {VALIDATION}: the one that was best on the validation patches, which those of models trained "
            "briefly, and of RD without tumour patches, need",
        )
        self._radius = flags.DEFINE_float(
            "nms_radius_um",
            93.3,
            f"{KIND}: half the side of the square that a lesion candidate clears, in µm: six cells of the released code",
            lower_bound=0,
        )
        self._stop = flags.DEFINE_float(
            "nms_stop",
            None,
            f"{KIND}: values up to this are no lesion candidates; none: 1 (ours; the released code has 0.5, which nearly all tissue "
            f"passes), with --slide_threshold={VALIDATION} half of that",
            lower_bound=0,
        )

    def load(self, given: PredictionFlags) -> Predictor:
        model = DistillationModel.load(given.workdir.value)
        settings = self._settings(model, given)
        return Predictor(
            task=AnomalyTask(settings),
            scorer=anomaly_scorer(
                model,
                mesh=make_mesh(),
                pooling=settings.pooling,
                patch_sigma=settings.patch_sigma,
                dihedral=settings.dihedral,
            ),
            variables=model.variables,
            subject=Subject(
                title=model.positive,
                name=_name(model),
                grid=settings.grid,
                maps=(settings.style,),
                settings=model.about["settings"],
                training=_training_curves(Workdir(pathlib.Path(given.workdir.value))),
            ),
            judge=functools.partial(_judge, model, settings.slide_threshold, given.seed.value),
        )

    def _settings(self, model: DistillationModel, given: PredictionFlags) -> AnomalySettings:
        pooling, (threshold, stop) = self._pooling.value, self._limits(model)
        known = tuple(model.thresholds.values())
        return AnomalySettings(
            grid=given.grid(tile=model.tile, stride=max(1, model.tile // STRIDES_PER_TILE), mpp=model.mpp),
            min_tissue=ANY_TISSUE,
            mpp_override=given.cohort.mpp_override.value,
            model=model_hash(model.teacher, model.variables, model.student),
            tissue=self._tissue.value,
            pooling=pooling,
            patch_sigma=self._patch_sigma.value if pooling == "max" else 0.0,
            dihedral=self._dihedral.value,
            map_sigma=self._map_sigma.value,
            slide_threshold=threshold,
            nms_radius_um=self._radius.value,
            nms_stop=stop,
            formats=given.chosen_formats(WRITERS, ANOMALY_FORMATS),
            thresholds=given.chosen_thresholds(known, highest=LEVELS, what="anomaly scores"),
            limits=(0.0, min(LEVELS, 2 * model.thresholds.get("validation", LEVELS / 2))),
        )

    def _limits(self, model: DistillationModel) -> tuple[float, float]:
        """Slide threshold, and the value up to which there are no candidates. UsageError for what is no threshold."""
        given, stop = self._slide_threshold.value, self._stop.value
        if given == VALIDATION:
            threshold = model.thresholds[VALIDATION]
            return threshold, threshold / 2 if stop is None else stop
        try:
            threshold = model.slide_threshold if given is None else float(given)
        except ValueError:
            threshold = -1.0
        if not 0 <= threshold < float("inf"):
            raise UsageError(f"--slide_threshold={given}: give a map value from 0 on, or {VALIDATION}")
        return threshold, NMS_STOP if stop is None else stop


def anomaly_scorer(
    model: DistillationModel, *, mesh: Mesh, pooling: str = "mean", patch_sigma: float = 0.0, dihedral: bool = False
) -> TileScorer:
    """Scores float32 [n] of patches of the model's size, output "score". The three levels are summed on the device, and the maps of
    the patches stay there. pooling: "mean" or "max" of a patch's map, before which it is smoothed with patch_sigma pixels."""
    maps_of = make_anomaly_map(model.teacher, model.student)

    def score(variables: Mapping[str, Any], windows: jax.Array) -> jax.Array:
        maps = maps_of(variables, windows)
        if patch_sigma:
            maps = gaussian_filter(maps, sigma=patch_sigma)
        return patch_scores(maps) if pooling == "mean" else maps.max((1, 2))

    def outputs(variables: Mapping[str, Any], windows: jax.Array) -> dict[str, jax.Array]:
        one = functools.partial(score, variables)
        return {COLUMN: dihedral_mean(one, windows) if dihedral else one(windows)}

    folding = functools.partial(fold, teacher=model.teacher, student=model.student)
    return TileScorer(outputs, folding, tile=model.tile, mesh=mesh)


def _judge(
    model: DistillationModel,
    threshold: float,
    seed: int,
    records: Sequence[SlideRecord],
    results: Sequence[SlideResult],
) -> Merit:
    metrics: dict[str, Metric] = {
        "ROC AUC": roc_auc,
        f"sensitivity at {threshold:g}": functools.partial(sensitivity, threshold=threshold),
        f"specificity at {threshold:g}": functools.partial(specificity, threshold=threshold),
    }
    scores = [row.measure(COLUMN) for row in results]
    merit = measure(records, scores, positive=model.positive, name=_name(model), seed=seed, metrics=metrics)
    return dataclasses.replace(merit, warnings=_blind(model, threshold, results))


def _blind(model: DistillationModel, threshold: float, results: Sequence[SlideResult]) -> list[str]:
    """A warning where every slide scores 0, because no map reaches the threshold."""
    known = [row for row in results if row.measure(COLUMN) is not None]
    if not known or any(row.measure(COLUMN) for row in known):
        return []
    highest = max(row.measure("highest") or 0.0 for row in known)
    return [
        f"All {len(known)} slides score 0: no map reaches the slide threshold {threshold:g}, the highest value is {highest:.4g}. "
        f"--slide_threshold={VALIDATION} takes {model.thresholds[VALIDATION]:.4g}, which was best on the validation patches."
    ]


def _name(model: DistillationModel) -> str:
    return f"{KIND} ({UNIT}), teacher {model.teacher.name}"


def _training_curves(workdir: Workdir) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rows = [(row["step"], row["loss"]) for row in workdir.history(STAGE) if "loss" in row]
    if not rows:
        return {}
    steps, loss = zip(*rows)
    return {"training loss": (np.asarray(steps), np.asarray(loss))}
