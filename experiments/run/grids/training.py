"""Training of a patch classifier over grids: what the method decides, joined to images, device and checkpoints."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from data_pipelines.patches import Patches, PatchesError, PatchReader, ShuffledRows
from experiments.run.patch_feed import PatchFeed
from experiments.run.scoring import probability
from experiments.run.workdir import Workdir
from srcc_jax.methods.patch_grids import Config, fold, make_loss, make_middle_logit
from srcc_jax.metrics import accuracy, best_threshold, log_loss, roc_auc
from srcc_jax.models.architecture import Architecture
from srcc_jax.parallel import by_rows, put, whole
from srcc_jax.train import BestCheckpoint, Keep, TrainState, fit_to_best, init_state, make_train_step

METRIC, AUC = "validation_accuracy", "validation_auc"
STAGE = "train"


@dataclasses.dataclass
class GridStudy:
    """One run over a table of images that have splits. cells bool [N, side²]: which of their patches are tumour; an image is judged by
    its middle patch. rows: split -> rows of the table that are used."""

    config: Config
    architecture: Architecture
    mesh: Mesh
    workdir: Workdir
    patches: Patches
    cells: np.ndarray
    rows: Mapping[str, np.ndarray]
    threads: int
    stop: Callable[[], bool]

    def __post_init__(self) -> None:
        self.label = self.cells[:, self.config.side**2 // 2].astype(int)
        for split, rows in self.rows.items():
            if len(set(self.label[rows])) < 2:
                raise PatchesError(
                    f"the {split} split needs normal and tumour patches: say with --positive which are tumour"
                )
        self.feed = PatchFeed(threads=self.threads, unit="grids")
        self._reader = PatchReader(self.patches, np.zeros(len(self.patches)), self.config.image)
        config, shardings = self.config, (whole(self.mesh), by_rows(self.mesh))
        middle = make_middle_logit(self.architecture, side=config.side, crf=config.with_crf, crop=config.crop)
        self._fold = jax.jit(functools.partial(fold, architecture=self.architecture))
        self._logit = jax.jit(middle, in_shardings=shardings, out_shardings=shardings[1])

    def train(self, variables: Mapping[str, Any]) -> BestCheckpoint:
        """Trains all epochs; the result is the checkpoint that the settings select on the validation patches."""
        config = self.config
        sampler = ShuffledRows(self.rows["train"], config.batch, config.seed)
        end = max(1, round(config.epochs * sampler.steps_per_epoch))
        tx = optax.flatten(optax.sgd(config.learning_rate, momentum=config.momentum))
        return fit_to_best(
            make_train_step(make_loss(self.architecture, config), tx, self.mesh),
            init_state(variables, tx, config.seed, self.mesh),
            lambda begin: self._batches(sampler, begin, end),
            folder=str(self.workdir.path / "checkpoints"),
            keep=Keep(metric=AUC if config.selection == "auc" else METRIC, mode="max"),
            num_steps=end,
            mesh=self.mesh,
            evaluate=self.evaluate,
            every=max(1, round(sampler.steps_per_epoch)),
            log=self._log,
            stop=self.stop,
        )

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Of the middle patches of the validation grids: accuracy at 0.5, log loss, AUC, and the threshold with the best accuracy."""
        label, score = self.scored({"params": state.params, **state.stats}, "validation")[1:]
        return {
            METRIC: float(accuracy(label, score, threshold=0.5)),
            "validation_loss": float(log_loss(label, score)),
            AUC: float(roc_auc(label, score)),
            "threshold": best_threshold(label, score)[0],
        }

    def scored(self, variables: Mapping[str, Any], split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """row int [n], label int [n], probability float64 [n] of the middle patches of a split's readable grids."""
        rows, folded = self.rows[split], self._fold(dict(variables))

        def score_of(image: np.ndarray) -> np.ndarray:
            return probability(np.asarray(self._logit(folded, put({"image": image}, self.mesh)["image"])))

        score = self.feed.scores(self._reader, rows, score_of, size=self.config.batch, what=f"scoring {split}")
        known = np.isfinite(score)
        if len(set(self.label[rows[known]])) < 2:
            raise PatchesError(f"the {split} patches that can be read are all of one kind: is the disk there?")
        return rows[known], self.label[rows[known]], score[known]

    def _batches(self, sampler: ShuffledRows, begin: int, end: int) -> Iterator[Mapping[str, np.ndarray]]:
        for arrays in self.feed.training(self._reader, sampler, size=self.config.batch, begin=begin, end=end):
            label = self.cells[arrays["row"]].astype(np.float32)
            yield {"image": arrays["image"], "label": label, "weight": arrays["weight"]}

    def _log(self, step: int, row: dict[str, float]) -> None:
        self.workdir.log(STAGE, step, row)
        if METRIC in row:
            print(f"step {step}: validation accuracy {row[METRIC]:.4f}, AUC {row[AUC]:.4f}", flush=True)
