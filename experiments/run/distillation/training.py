"""Training by reverse distillation on labelled patches: what the method decides, joined to patches, device and checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from data_pipelines.patches import Patches, PatchesError, PatchReader, ShuffledRows
from experiments.run.patch_feed import PatchFeed
from experiments.run.workdir import Workdir
from srcc_jax.methods.reverse_distillation import (
    FIXED_THRESHOLD,
    Config,
    Teacher,
    fold,
    make_anomaly_map,
    make_loss,
    patch_scores,
    training_rows,
)
from srcc_jax.metrics import accuracy, best_threshold, roc_auc
from srcc_jax.models.distillation import DistillationArchitecture
from srcc_jax.parallel import by_rows, put, whole
from srcc_jax.train import BestCheckpoint, Keep, TrainState, fit_to_best, init_state, make_train_step

METRIC, AUC = "validation_accuracy", "validation_auc"
STAGE = "train"


@dataclasses.dataclass
class DistillationStudy:
    """One run over a table of patches that have splits. Raises PatchesError where a kind of patch is missing where it is needed."""

    config: Config
    teacher: Teacher
    student: DistillationArchitecture
    mesh: Mesh
    workdir: Workdir
    patches: Patches
    threads: int
    stop: Callable[[], bool]

    def __post_init__(self) -> None:
        self.tumour = self.patches.is_one_of(self.config.positives)
        self.rows = {split: self.patches.rows(split) for split in ("train", "validation", "test")}
        for split, rows in self.rows.items():
            self._check_kinds(split, self.tumour[rows])
        train = self.rows["train"]
        self.rows["train"] = train[training_rows(self.tumour[train], self.config)]
        self.alpha = self.config.weight_of_normal(int(self.tumour[self.rows["train"]].sum()), len(self.rows["train"]))
        self.feed = PatchFeed(threads=self.threads)
        self._reader = PatchReader(self.patches, self.tumour.astype(np.float32), self.config.tile)
        score = make_anomaly_map(self.teacher, self.student)
        shardings = (whole(self.mesh), by_rows(self.mesh))
        self._fold = jax.jit(lambda variables: fold(variables, self.teacher, self.student))
        self._score = jax.jit(
            lambda folded, image: patch_scores(score(folded, image)), in_shardings=shardings, out_shardings=shardings[1]
        )

    def _check_kinds(self, split: str, tumour: np.ndarray) -> None:
        kinds = {"normal": (~tumour).sum(), ", ".join(self.config.positives): tumour.sum()}
        needed = list(kinds)[:1] if split == "train" else list(kinds)
        missing = [kind for kind in needed if not kinds[kind]]
        if missing:
            labels = sorted(set(self.patches.label.tolist()))
            raise PatchesError(
                f"no {' and no '.join(missing)} patch in the {split} split; labels are {', '.join(labels)}: say with --positive which "
                "of them are tumour, or give patches of both kinds"
            )

    def train(self, variables: Mapping[str, Any]) -> BestCheckpoint:
        """Trains until the last epoch or patience ends it. variables: {"params", "batch_stats", "teacher"}; the teacher's stay."""
        config = self.config
        sampler = ShuffledRows(self.rows["train"], config.batch, config.seed)
        end = max(1, round(config.last_epoch * sampler.steps_per_epoch))
        adam = optax.adam(config.rate, b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_epsilon)
        tx = optax.flatten(adam)  # one vector instead of hundreds of arrays: less to compile, one update
        selects = AUC if config.selection == "auc" else METRIC
        return fit_to_best(
            make_train_step(make_loss(self.teacher, self.student, config, alpha=self.alpha), tx, self.mesh),
            init_state(variables, tx, config.seed, self.mesh),
            lambda begin: self._batches(sampler, begin, end),
            folder=str(self.workdir.path / "checkpoints"),
            keep=Keep(metric=selects, mode="max", patience=config.patience),
            num_steps=end,
            mesh=self.mesh,
            evaluate=self.evaluate,
            every=max(1, round(sampler.steps_per_epoch)),
            log=self._log,
            stop=self.stop,
        )

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Of the validation patches: accuracy (at the threshold that the settings select by), best threshold, AUC."""
        tumour, score = self.scored({"params": state.params, **state.stats}, "validation")[1:]
        threshold, accuracy_there = best_threshold(tumour, score)
        at_fixed = float(accuracy(tumour, score, threshold=FIXED_THRESHOLD))
        return {
            METRIC: at_fixed if self.config.selection == "fixed" else accuracy_there,
            "validation_accuracy_at_2": at_fixed,
            AUC: float(roc_auc(tumour, score)),
            "threshold": threshold,
        }

    def scored(self, variables: Mapping[str, Any], split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """row int [n], tumour int [n], score float64 [n] of the readable patches of a split."""
        rows, folded = self.rows[split], self._fold(dict(variables))

        def score_of(image: np.ndarray) -> np.ndarray:
            return np.asarray(self._score(folded, put({"image": image}, self.mesh)["image"]))

        score = self.feed.scores(self._reader, rows, score_of, size=self.config.batch, what=f"scoring {split}")
        known = np.isfinite(score)
        self._check_kinds(split, self.tumour[rows[known]])
        return rows[known], self.tumour[rows[known]].astype(int), score[known]

    def _batches(self, sampler: ShuffledRows, begin: int, end: int) -> Iterator[Mapping[str, np.ndarray]]:
        for arrays in self.feed.training(self._reader, sampler, size=self.config.batch, begin=begin, end=end):
            yield {name: arrays[name] for name in ("image", "label", "weight")}

    def _log(self, step: int, row: dict[str, float]) -> None:
        self.workdir.log(STAGE, step, row)
        if METRIC in row:
            print(
                f"step {step}: validation accuracy {row[METRIC]:.4f}, AUC {row[AUC]:.4f}, "
                f"threshold {row['threshold']:.4f}",
                flush=True,
            )
