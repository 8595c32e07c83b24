"""Training of a patch classifier over grids: what the method decides, joined to images, device and checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from data_pipelines.patches import PatchBatch, Patches, PatchesError, PatchReader, ShuffledRows, patch_batches
from experiments.run.progress import progress
from experiments.run.scoring import probability
from experiments.run.workdir import Workdir
from srcc_jax.checkpoints import Checkpoints
from srcc_jax.methods.patch_grids import Config, fold, make_loss, make_middle_logit
from srcc_jax.methods.reverse_distillation import best_threshold
from srcc_jax.metrics import accuracy, log_loss, roc_auc
from srcc_jax.models.architecture import Architecture
from srcc_jax.parallel import by_rows, put, whole
from srcc_jax.train import Keep, TrainState, fit, init_state, make_train_step

METRIC = "validation_accuracy"
STAGE = "train"


@dataclasses.dataclass(frozen=True)
class TrainedGrids:
    """The variables of the best checkpoint, its step, and its evaluation."""

    variables: dict[str, Any]
    step: int
    metrics: Mapping[str, float]


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
        self.unreadable: dict[int, str] = {}
        self._reader = PatchReader(self.patches, np.zeros(len(self.patches)), self.config.image)
        config, shardings = self.config, (whole(self.mesh), by_rows(self.mesh))
        middle = make_middle_logit(self.architecture, side=config.side, crf=config.with_crf, crop=config.crop)
        self._fold = jax.jit(functools.partial(fold, architecture=self.architecture))
        self._logit = jax.jit(middle, in_shardings=shardings, out_shardings=shardings[1])

    def train(self, variables: Mapping[str, Any]) -> TrainedGrids:
        """Trains all epochs; the checkpoint with the best validation accuracy at 0.5 is the result, as in the released code."""
        config = self.config
        sampler = ShuffledRows(self.rows["train"], config.batch, config.seed)
        end = max(1, round(config.epochs * sampler.steps_per_epoch))
        tx = optax.flatten(optax.sgd(config.learning_rate, momentum=config.momentum))
        keep = Keep(metric=METRIC, mode="max")
        with Checkpoints(str(self.workdir.path / "checkpoints")) as checkpoints:
            result = fit(
                make_train_step(make_loss(self.architecture, config), tx, self.mesh),
                checkpoints.resume(init_state(variables, tx, config.seed, self.mesh)),
                lambda begin: self._batches(sampler, begin, end),
                num_steps=end,
                mesh=self.mesh,
                evaluate=self.evaluate,
                every=max(1, round(sampler.steps_per_epoch)),
                keep=keep,
                checkpoints=checkpoints,
                log=self._log,
                stop=self.stop,
            )
            step = keep.best_of(checkpoints).step
            assert step is not None
            found = checkpoints.restore({"params": result.state.params, "stats": result.state.stats}, step)
            return TrainedGrids({"params": found["params"], **found["stats"]}, step, checkpoints.metrics[step])

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Of the middle patches of the validation grids: accuracy at 0.5, log loss, AUC, and the threshold with the best accuracy."""
        label, score = self.scored({"params": state.params, **state.stats}, "validation")[1:]
        return {
            METRIC: float(accuracy(label, score, threshold=0.5)),
            "validation_loss": float(log_loss(label, score)),
            "validation_auc": float(roc_auc(label, score)),
            "threshold": best_threshold(label, score)[0],
        }

    def scored(self, variables: Mapping[str, Any], split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """row int [n], label int [n], probability float64 [n] of the middle patches of a split's readable grids."""
        rows, batch = self.rows[split], self.config.batch
        score = np.full(len(rows), np.nan)
        folded = self._fold(dict(variables))
        with progress(len(rows), f"scoring {split}", unit="grids") as bar:
            for step, found in enumerate(self._read(rows, batch)):
                part = score[step * batch : (step + 1) * batch]
                image = put({"image": found.arrays["image"]}, self.mesh)["image"]
                values = probability(np.asarray(self._logit(folded, image)))[: len(part)]
                part[:] = np.where(found.arrays["weight"][: len(part)] > 0, values, np.nan)
                bar.update(len(part))
        known = np.isfinite(score)
        if len(set(self.label[rows[known]])) < 2:
            raise PatchesError(f"the {split} patches that can be read are all of one kind: is the disk there?")
        return rows[known], self.label[rows[known]], score[known]

    def _read(self, rows: np.ndarray, batch: int) -> Iterator[PatchBatch]:
        steps = -(-len(rows) // batch)
        read = patch_batches(
            self._reader,
            lambda step: rows[step * batch : (step + 1) * batch],
            size=batch,
            begin=0,
            end=steps,
            threads=self.threads,
        )
        for found in read:
            self._note(found)
            yield found

    def _batches(self, sampler: ShuffledRows, begin: int, end: int) -> Iterator[Mapping[str, np.ndarray]]:
        """Raises PatchesError where no image of a batch can be read."""
        size = self.config.batch
        with progress((end - begin) * size, "training", unit="grids") as bar:
            for batch in patch_batches(self._reader, sampler, size=size, begin=begin, end=end, threads=self.threads):
                self._note(batch)
                if not batch.arrays["weight"].any():
                    reason = next(iter(batch.failed.values()))
                    raise PatchesError(f"no patch of a batch could be read: {reason}: is the disk there?")
                label = self.cells[batch.arrays["row"]].astype(np.float32)
                yield {"image": batch.arrays["image"], "label": label, "weight": batch.arrays["weight"]}
                bar.update(size)

    def _note(self, batch: PatchBatch) -> None:
        """Says once of each image that it cannot be read."""
        for row, reason in batch.failed.items():
            if row not in self.unreadable:
                print(f"left out: {reason}", file=sys.stderr, flush=True)
        self.unreadable |= batch.failed

    def _log(self, step: int, row: dict[str, float]) -> None:
        self.workdir.log(STAGE, step, row)
        if METRIC in row:
            print(f"step {step}: validation accuracy {row[METRIC]:.4f}, AUC {row['validation_auc']:.4f}", flush=True)
