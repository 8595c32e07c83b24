"""Models of cell detection as predict_slides takes them: the cells of whole slides, each once (Li et al. 2019)."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh

from data_pipelines.cohort import SlideRecord
from data_pipelines.tiles import Grid
from experiments.run.cells.cell_outputs import (
    CELL_FORMATS,
    CELLS_MAP,
    COLUMN,
    DENSITY_MAP,
    WRITERS,
    CellSettings,
    CellTask,
)
from experiments.run.cells.model import KIND, CellModel
from experiments.run.cells.prediction_windows import OUTPUT
from experiments.run.cohort_report import Subject
from experiments.run.evaluation import Merit, measure
from experiments.run.predictors import PredictionFlags, Predictor
from experiments.run.program import UsageError
from experiments.run.scoring import TileScorer
from experiments.run.slide_result import SlideResult
from experiments.run.slide_state import model_hash
from experiments.run.workdir import Workdir
from srcc_jax.methods.cell_detection import fold, make_probability
from srcc_jax.metrics import roc_auc
from srcc_jax.parallel import make_mesh

flags.disclaim_key_flags()

THRESHOLDS = (50.0, 200.0)  # ours: cells per mm² from which on regions are outlined
DENSEST = 1e5  # cells per mm²: of 3 µm, side by side
ANY_TISSUE = 1e-9  # share of a window; whether there is any in its core decides
_CHUNK = {"cpu": 1}  # windows at a time on each device; one of 1024 pixels takes hundreds of megabytes
_ACCELERATOR_CHUNK = 4


class CellKind:
    """Defines its flags in the calling program."""

    name = KIND

    def __init__(self) -> None:
        self._min_score = flags.DEFINE_float(
            "min_score",
            0.0,
            f"{KIND}: cells with a lower score are left out; the score is the mean probability of the inner region over the cell's seed",
            lower_bound=0,
            upper_bound=1,
        )
        self._square = flags.DEFINE_float(
            "density_um", 250.0, f"{KIND}: side in µm of the squares of the density map", lower_bound=1
        )
        self._measures = flags.DEFINE_bool(
            "measure_masks",
            False,
            f"{KIND}: tell of each cell the area of its inner region and its share of the cell's area; these are classes of the network's "
            "masks, not nucleus and cytoplasm, which it does not tell apart",
        )
        self.flags = (self._min_score, self._square, self._measures)

    def load(self, given: PredictionFlags) -> Predictor:
        model = CellModel.load(given.workdir.value)
        settings = self._settings(model, given)
        threads = given.cohort.threads.value
        return Predictor(
            task=CellTask(
                settings,
                find=functools.partial(model.instances, whole=False),
                pool=ThreadPoolExecutor(threads, thread_name_prefix="cells"),
                threads=threads,
            ),
            scorer=cell_scorer(model, mesh=make_mesh()),
            variables=model.variables,
            subject=Subject(
                title=settings.label,
                name=_name(model),
                grid=settings.grid,
                maps=(CELLS_MAP, DENSITY_MAP),
                settings=model.about["settings"],
                training=_training_curves(Workdir(pathlib.Path(given.workdir.value)), model),
            ),
            judge=functools.partial(_judge, model, settings.label, given.seed.value),
        )

    def _settings(self, model: CellModel, given: PredictionFlags) -> CellSettings:
        return CellSettings(
            grid=window_grid(model, given),
            min_tissue=ANY_TISSUE,
            mpp_override=given.cohort.mpp_override.value,
            model=model_hash(model.architecture, model.variables),
            threshold=model.threshold,
            min_area=model.min_area,
            beta=model.beta,
            spread=model.spread,
            min_score=self._min_score.value,
            square_um=self._square.value,
            mask_measures=self._measures.value,
            label=model.about["settings"].get("positive", "cell"),
            formats=given.chosen_formats(WRITERS, CELL_FORMATS),
            thresholds=given.chosen_thresholds(THRESHOLDS, highest=DENSEST, what="cells per mm²"),
        )


def window_grid(model: CellModel, given: PredictionFlags) -> Grid:
    """The model's windows, overlapping by twice what they overlap by in images: there overlaps are averaged, here every cell is taken from
    one window, beyond whose core it has the model's overlap on each side. UsageError for a --stride below half a window."""
    stride = model.window - min(2 * model.overlap, model.window // 2)
    grid = given.grid(tile=model.window, stride=stride, mpp=model.mpp * model.reduce)
    if 2 * grid.stride < grid.tile:
        raise UsageError(
            f"--stride={grid.stride} is below half the model's window of {grid.tile} px: cells would be looked for in windows that do not "
            f"touch; give {grid.tile // 2} to {grid.tile}"
        )
    return Grid(tile=grid.tile, stride=grid.stride, mpp=grid.mpp, flush=True)


def cell_scorer(model: CellModel, *, mesh: Mesh) -> TileScorer:
    """Probabilities float16 [n, H, W, 3] of background, edge and inner region in windows of the model's size."""
    probability = make_probability(model.architecture)

    def outputs(variables: Mapping[str, Any], windows: jax.Array) -> dict[str, jax.Array]:
        return {OUTPUT: probability(variables, windows).astype(jnp.float16)}

    folding = functools.partial(fold, architecture=model.architecture)
    chunk = _CHUNK.get(mesh.devices.flat[0].platform, _ACCELERATOR_CHUNK)
    return TileScorer(outputs, folding, tile=model.window, mesh=mesh, chunk=chunk)


def _judge(
    model: CellModel, label: str, seed: int, records: Sequence[SlideRecord], results: Sequence[SlideResult]
) -> Merit:
    scores = [row.measure(COLUMN) for row in results]
    return measure(records, scores, positive=label, name=_name(model), seed=seed, metrics={"ROC AUC": roc_auc})


def _name(model: CellModel) -> str:
    return f"{KIND} (cells per mm² of tissue), {model.architecture.name}"


def _training_curves(workdir: Workdir, model: CellModel) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rows = [row for row in workdir.history(f"0_{model.about['settings'].get('network')}") if "loss" in row]
    return {"training loss": (np.array([r["step"] for r in rows]), np.array([r["loss"] for r in rows]))} if rows else {}
