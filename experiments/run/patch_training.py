"""Classifiers of patches: any classification network fitted to labelled patches, and what it says of patches.

One `PatchTrainer` compiles a step and an inference once, for all the fits and patches of a program.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from data_pipelines.exports import write_json
from data_pipelines.patches import (
    PatchesError,
    PatchReader,
    ShuffledRows,
    WeightedRows,
    class_weights,
)
from experiments.run.model import CARD, Network, save
from experiments.run.patch_feed import PatchFeed
from experiments.run.workdir import WorkdirError
from srcc_jax.losses import Prepare, softmax_cross_entropy
from srcc_jax.metrics import roc_auc
from srcc_jax.models.architecture import Architecture, normalize
from srcc_jax.models.features import pooled
from srcc_jax.models.layers import fold_batch_norm
from srcc_jax.models.zoo import build
from srcc_jax.parallel import by_rows, put, whole
from srcc_jax.schedules import by_cosine
from srcc_jax.train import Keep, TrainState, fit_to_best, init_state, make_train_step

METRIC = "validation_loss"
SCHEDULES = ("cosine", "by_epoch")
_SLOW_UNITS = 10  # epochs of steps in the half period of `by_epoch`, as in the code released with Lee 2023

Log = Callable[[int, dict[str, float]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a classifier is fitted. Sizes in patches.

    schedule: "cosine", one half period over all steps, or "by_epoch", the rate ½ base (1 + cos(π epoch / (10 · steps of an epoch))),
    which hardly falls. balanced: every class is drawn equally often, with replacement; otherwise each epoch is a new order.
    epoch_steps: of an epoch; None: as many as the training patches fill.
    """

    batch: int = 32
    scoring_batch: int = 256
    epochs: int = 30
    epoch_steps: int | None = None
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    balanced: bool = True


@dataclasses.dataclass(frozen=True)
class Outputs:
    """A batch of patches through the network. row int [n]; logits float32 [n, K]; features float32 [n, D], pooled as the classifier
    sees them. Patches that cannot be read are not among them."""

    row: np.ndarray
    logits: np.ndarray
    features: np.ndarray


@dataclasses.dataclass(frozen=True)
class TrainedPatches:
    """variables {"params", "batch_stats"} of the best checkpoint, its step, and its evaluation (validation_loss among it)."""

    variables: Mapping[str, Any]
    step: int
    metrics: Mapping[str, float]


class PatchTrainer:
    """Fits and applies one architecture. views: (image uint8 [B, H, W, 3], key) -> float [B, H, W, 3] in 0..255, the random views
    that are trained on; None: the patches as they are. stop: asked after each step, see `fit`."""

    def __init__(
        self,
        architecture: Architecture,
        recipe: Recipe,
        mesh: Mesh,
        *,
        views: Prepare | None = None,
        threads: int = 2,
        stop: Callable[[], bool] = lambda: False,
    ):
        def prepare(image: jax.Array, key: jax.Array) -> jax.Array:
            return normalize(image if views is None else views(image, key), architecture)

        network = build(architecture, folded=True)

        def infer(folded: Mapping[str, Any], image: jax.Array) -> tuple[jax.Array, jax.Array]:
            out: Any = network.apply(folded, normalize(image, architecture), train=False)
            return out["logits"].astype(np.float32), pooled(out, "mean")

        self.architecture, self.recipe, self.mesh = architecture, recipe, mesh
        self._feed = PatchFeed(threads=threads)
        self._stop = stop
        loss = softmax_cross_entropy(build(architecture), prepare=prepare)
        self._step = make_train_step(loss, self._optimizer(span=1, unit=1), mesh)
        self._fold = jax.jit(functools.partial(fold_batch_norm, epsilon=architecture.bn_epsilon))
        rows = by_rows(mesh)
        self._infer = jax.jit(infer, in_shardings=(whole(mesh), rows), out_shardings=(rows, rows))

    @property
    def unreadable(self) -> Mapping[pathlib.Path, str]:
        """File -> why, of the patches that could not be read."""
        return self._feed.unreadable

    def fit(
        self,
        variables: Mapping[str, Any],
        reader: PatchReader,
        *,
        train: np.ndarray,
        validation: np.ndarray,
        folder: pathlib.Path,
        seed: int,
        log: Log = lambda step, row: None,
    ) -> TrainedPatches:
        """The network with the least loss on the rows `validation`, after each epoch of the rows `train`, from `variables` on.

        The targets of `reader` are classes, 0 to K - 1. A killed fit goes on from the checkpoints in `folder`, bit for bit; a
        finished one leaves weights.npz and model.json there instead, which `Network.load` reads, and is not done again.
        Raises WorkdirError where the folder holds a fit on other patches, PatchesError where a batch cannot be read.
        """
        about = {"patches": _digest(reader, train, validation), "seed": seed, **dataclasses.asdict(self.recipe)}
        if (folder / CARD).exists():
            return self._finished(folder, about)
        steps = self.recipe.epoch_steps or math.ceil(len(train) / self.recipe.batch)
        end = self.recipe.epochs * steps
        span, unit = (end, 1) if self.recipe.schedule == "cosine" else (_SLOW_UNITS * steps, steps)
        best = fit_to_best(
            self._step,
            init_state(variables, self._optimizer(span=span, unit=unit), seed, self.mesh),
            lambda begin: self._batches(reader, train, seed, begin, end),
            folder=str(_claimed(folder, about)),
            keep=Keep(metric=METRIC, mode="min"),
            num_steps=end,
            mesh=self.mesh,
            evaluate=lambda state: self._evaluate(state, reader, validation),
            every=steps,
            log=log,
            stop=self._stop,
        )
        found = jax.device_get(best.variables)
        save(
            Network(self.architecture, found, {"fit": about, "step": best.step, "metrics": dict(best.metrics)}), folder
        )
        shutil.rmtree(folder / "checkpoints")
        return TrainedPatches(found, best.step, best.metrics)

    def outputs(self, variables: Mapping[str, Any], reader: PatchReader, rows: np.ndarray) -> Iterator[Outputs]:
        """What the network says of the patches of rows int [n], in their order, a batch at a time."""
        folded, size = self._fold(dict(variables)), self.recipe.scoring_batch
        for batch in self._feed.scoring(reader, rows, size=size):
            image = put({"image": batch.arrays["image"]}, self.mesh)["image"]
            logits, features = (np.asarray(part) for part in self._infer(folded, image))
            known = batch.arrays["weight"] > 0
            yield Outputs(batch.arrays["row"][known], logits[known], features[known])

    def probabilities(self, variables: Mapping[str, Any], reader: PatchReader, rows: np.ndarray) -> np.ndarray:
        """float64 [n, K]: the softmax of rows int [n]; NaN for patches that cannot be read."""
        return softmax(self._logits(variables, reader, rows))

    def features(self, variables: Mapping[str, Any], reader: PatchReader, rows: np.ndarray) -> np.ndarray:
        """float32 [n, D]: pooled features of rows int [n]; NaN for patches that cannot be read. All are held in memory: for more of
        them take `outputs`."""
        return self._table(variables, reader, rows, "features")

    def _logits(self, variables: Mapping[str, Any], reader: PatchReader, rows: np.ndarray) -> np.ndarray:
        return self._table(variables, reader, rows, "logits")

    def _table(self, variables: Mapping[str, Any], reader: PatchReader, rows: np.ndarray, name: str) -> np.ndarray:
        parts = [(part.row, getattr(part, name)) for part in self.outputs(variables, reader, rows)]
        width = parts[0][1].shape[1] if parts else 0
        by_row = np.full((len(reader.patches), width), np.nan, np.float32)
        for row, values in parts:
            by_row[row] = values
        return by_row[rows]

    def _optimizer(self, *, span: int, unit: int) -> optax.GradientTransformation:
        rate = by_cosine(self.recipe.learning_rate, span=span, unit=unit)
        return optax.flatten(optax.chain(optax.scale_by_adam(), rate))  # one vector: less to compile, one update

    def _finished(self, folder: pathlib.Path, about: Mapping[str, Any]) -> TrainedPatches:
        found = Network.load(folder)
        if found.about.get("fit") != about or found.architecture != self.architecture:
            raise WorkdirError(f"{folder} holds a network fitted to other patches or by another recipe: {_CURE}")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return TrainedPatches(found.variables, found.about["step"], found.about["metrics"])

    def _batches(
        self, reader: PatchReader, train: np.ndarray, seed: int, begin: int, end: int
    ) -> Iterator[Mapping[str, np.ndarray]]:
        sampler = self._sampler(reader, train, seed)
        for arrays in self._feed.training(reader, sampler, size=self.recipe.batch, begin=begin, end=end):
            label = arrays["label"].astype(np.int32)
            yield {"image": arrays["image"], "label": label, "weight": arrays["weight"]}

    def _sampler(self, reader: PatchReader, train: np.ndarray, seed: int) -> Callable[[int], np.ndarray]:
        if not self.recipe.balanced:
            return ShuffledRows(train, self.recipe.batch, seed)
        return WeightedRows(train, class_weights(reader.target[train]), self.recipe.batch, seed)

    def _evaluate(self, state: TrainState, reader: PatchReader, rows: np.ndarray) -> dict[str, float]:
        logits = self._logits({"params": state.params, **state.stats}, reader, rows)
        known = np.isfinite(logits).all(1)
        if not known.any():
            raise PatchesError(f"none of {len(rows)} validation patches can be read: is the disk there?")
        return judged(logits[known], reader.target[rows[known]].astype(int))


def softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [n, K], by the log-sum-exp form; NaN stays NaN."""
    return np.exp(_log_softmax(logits))


def judged(logits: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Mean cross-entropy and accuracy of logits [n, K] with label int [n]; where there are two classes, both present, ROC AUC."""
    log_probability = _log_softmax(logits)
    found = {
        METRIC: float(-np.take_along_axis(log_probability, label[:, None], 1).mean()),
        "validation_accuracy": float((logits.argmax(1) == label).mean()),
    }
    if logits.shape[1] == 2 and len(set(label.tolist())) == 2:
        found["validation_auc"] = float(roc_auc(label, log_probability[:, 1] - log_probability[:, 0]))
    return found


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


_CURE = "give another --workdir, or remove this folder"
_FIT = "fit.json"


def _claimed(folder: pathlib.Path, about: Mapping[str, Any]) -> pathlib.Path:
    """The folder of checkpoints of this fit. WorkdirError where they are of another."""
    note = folder / _FIT
    if not note.exists():
        write_json(note, about)
    if json.loads(note.read_text()) != about:
        raise WorkdirError(f"{folder} holds the checkpoints of a fit on other patches or by another recipe: {_CURE}")
    return folder / "checkpoints"


def _digest(reader: PatchReader, *rows: np.ndarray) -> str:
    """16 digits that change with the patches of these rows, their names, their targets or their order."""
    digest = hashlib.sha256()
    for part in rows:
        names = "\n".join(f"{reader.patches.path[row].name}\t{reader.target[row]:g}" for row in part)
        digest.update(f"{len(part)}\n{names}\n".encode())
    return digest.hexdigest()[:16]
