"""One stage of gastric screening as a run of the one training loop: an epoch is a fit, before which the learning rate is set."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines.exports import write_json
from data_pipelines.patches import BatchReader, PatchBatch, PatchesError, patch_batches
from data_pipelines.weights import WeightsError, read_weights
from experiments.run.model import CARD, WEIGHTS, checksum, flatten, read_card, write
from experiments.run.progress import progress
from experiments.run.workdir import Workdir, WorkdirError
from srcc_jax.checkpoints import Checkpoints
from srcc_jax.losses import Loss
from srcc_jax.methods.gastric_screening import Config, Judge
from srcc_jax.parallel import by_rows, put, whole
from srcc_jax.plateau import adjustable_adam, rate_of, with_rate
from srcc_jax.train import Keep, StepFn, TrainState, best_checkpoint, fit, init_state, make_train_step

METRIC = "validation_loss"
LEAST_LOSS = Keep(metric=METRIC, mode="min")
LAST = Keep(metric="trained_steps", mode="max")
KIND = "stage of gastric screening"
_BEGUN = "begun.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What one network learns from. rows(step): int [batch]; epoch: examples in one; validation: rows int [V].

    loss: takes batches with the arrays `inputs` of the reader's. judge: gives numbers of each example of such a batch. summary: of
    what it gave of the validation rows, in their order, with label float [V] among it, makes the metrics; METRIC is added. digest:
    of all that decides which examples are seen (see `digest_of`). keep: which of the networks after each epoch is the stage's.
    """

    name: str
    reader: BatchReader
    inputs: tuple[str, ...]
    rows: Callable[[int], np.ndarray]
    epoch: int
    epochs: int
    batch: int
    validation: np.ndarray
    loss: Loss
    judge: Judge
    summary: Callable[[Mapping[str, np.ndarray]], Mapping[str, float]]
    digest: str
    keep: Keep = LEAST_LOSS

    @property
    def ends(self) -> list[int]:
        """Steps at which the epochs end; each has one at least."""
        ends = [0]
        for number in range(1, self.epochs + 1):
            ends.append(max(ends[-1] + 1, round(number * self.epoch / self.batch)))
        return ends[1:]


def digest_of(*arrays: np.ndarray) -> str:
    """16 digits that change with any value, or its place."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Trained:
    """variables of the checkpoint that is kept, its step and its evaluation. digest: of the examples that it was trained on."""

    variables: Mapping[str, Any]
    step: int
    metrics: Mapping[str, float]
    digest: str


@dataclasses.dataclass
class Fitter:
    """Runs stages in one work directory. What is finished there is taken as it stands."""

    config: Config
    mesh: Mesh
    workdir: Workdir
    threads: int
    stop: Callable[[], bool]

    def __post_init__(self) -> None:
        self._told: set[str] = set()

    def finished(self, name: str) -> Trained | None:
        """The network of a stage that has been trained. Raises WorkdirError where its files do not belong together."""
        folder = self.workdir.path / name
        if not (folder / CARD).exists():
            return None
        card = read_card(folder)
        try:
            flat = read_weights(folder / WEIGHTS)
        except WeightsError as error:
            raise WorkdirError(f"{folder}: {error}: remove this folder, and the stage is done again") from error
        if card.get("kind") != KIND or card.get("checksum") != checksum(flat):
            raise WorkdirError(f"{folder}: the weights are not those of the card: remove this folder")
        variables = flax.traverse_util.unflatten_dict(dict(flat), sep="/")
        return Trained(variables, card["step"], card["metrics"], card["digest"])

    def checksums(self, *names: str) -> dict[str, str]:
        """Stage -> checksum of its weights, as its card has it, of those of these stages that are finished."""
        folders = {name: self.workdir.path / name for name in names}
        return {name: str(read_card(at)["checksum"]) for name, at in folders.items() if (at / CARD).exists()}

    def trained(self, stage: Stage, variables: Mapping[str, Any]) -> Trained:
        """The network of a stage that is kept, trained from `variables` on where that is not done. A killed run goes on
        from its last checkpoint. Raises WorkdirError where the stage was begun on other examples."""
        folder = self.workdir.path / stage.name
        found = self.finished(stage.name)
        note = folder / _BEGUN
        if not found and not note.exists():
            write_json(note, {"digest": stage.digest})
        if (found.digest if found else json.loads(note.read_text())["digest"]) != stage.digest:
            raise WorkdirError(
                f"{folder}: the stage was begun on other examples: slides, annotations or the networks before it have changed, or slides "
                "could not be read in one start. Make them as they were, remove this folder and what was made with it, or give another "
                "--workdir"
            )
        return found or self._fit(stage, variables, folder)

    def _fit(self, stage: Stage, variables: Mapping[str, Any], folder: pathlib.Path) -> Trained:
        tx = adjustable_adam(self.config.learning_rate)
        step_fn = make_train_step(stage.loss, tx, self.mesh)
        judge = self._compiled(stage.judge)
        with Checkpoints(str(folder / "checkpoints")) as checkpoints:
            state = checkpoints.resume(init_state(variables, tx, self.config.seed, self.mesh))
            for end in stage.ends:
                if int(state.step) < end:
                    state = self._epoch(stage, checkpoints, step_fn, judge, state, end)
            best = best_checkpoint(stage.keep, checkpoints, state)
            metrics = dict(best.metrics)
        flat = flatten(best.variables)
        about = {"step": best.step, "metrics": metrics, "digest": stage.digest}
        write(folder, flat, {"kind": KIND, "checksum": checksum(flat), **about})
        shutil.rmtree(folder / "checkpoints")
        return Trained(flax.traverse_util.unflatten_dict(flat, sep="/"), best.step, metrics, stage.digest)

    def judged(self, stage: Stage, variables: Mapping[str, Any], rows: np.ndarray) -> dict[str, np.ndarray]:
        """What the judge of a stage says of these rows [n]: arrays [n'] by name, with the rows that could be read as `row`, and their
        `label`."""
        return self._judged(stage, self._compiled(stage.judge), dict(variables), rows)

    def _compiled(self, judge: Judge) -> Judge:
        rows = by_rows(self.mesh)
        return jax.jit(judge, in_shardings=(whole(self.mesh), rows), out_shardings=rows)

    def _epoch(
        self, stage: Stage, checkpoints: Checkpoints, step_fn: StepFn, judge: Judge, state: TrainState, end: int
    ) -> TrainState:
        """One fit, at the learning rate that the validation losses before it give."""
        rows = self.workdir.history(stage.name)
        past = [row[METRIC] for row in rows if METRIC in row and row["step"] <= int(state.step)]
        state = with_rate(state, self.config.plateau.rate(past), self.mesh)

        def evaluate(state: TrainState) -> dict[str, float]:
            found = self._judged(stage, judge, {"params": state.params, **state.stats}, stage.validation)
            loss, rate = float(found["loss"].mean()), float(rate_of(state))
            place = {LAST.metric: float(end)} if stage.keep == LAST else {}
            return {METRIC: loss, "learning_rate": rate, **place, **stage.summary(found)}

        return fit(
            step_fn,
            state,
            lambda begin: self._batches(stage, begin, end),
            num_steps=end,
            mesh=self.mesh,
            evaluate=evaluate,
            every=end,
            keep=stage.keep,
            checkpoints=checkpoints,
            log=lambda step, row: self._log(stage, step, row),
            stop=self.stop,
        ).state

    def _judged(self, stage: Stage, judge: Judge, variables: Any, rows: np.ndarray) -> dict[str, np.ndarray]:
        parts: list[dict[str, np.ndarray]] = []
        for batch in self._read(stage, lambda step: rows[step * stage.batch : (step + 1) * stage.batch], len(rows)):
            known = batch.arrays["weight"] > 0
            found = jax.device_get(judge(variables, put({n: batch.arrays[n] for n in stage.inputs}, self.mesh)))
            every = {**found, "row": batch.arrays["row"], "label": batch.arrays["label"]}
            parts.append({name: np.asarray(values)[known] for name, values in every.items()})
        if not any(len(part["row"]) for part in parts):
            raise PatchesError(f"{stage.name}: none of {len(rows)} examples can be read: is the disk there?")
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _read(self, stage: Stage, rows: Callable[[int], np.ndarray], count: int) -> Iterator[PatchBatch]:
        steps = -(-count // stage.batch)
        for batch in patch_batches(stage.reader, rows, size=stage.batch, begin=0, end=steps, threads=self.threads):
            self._note(batch)
            yield batch

    def _batches(self, stage: Stage, begin: int, end: int) -> Iterator[Mapping[str, np.ndarray]]:
        size = stage.batch
        with progress((end - begin) * size, stage.name, unit="examples") as bar:
            for batch in patch_batches(stage.reader, stage.rows, size=size, begin=begin, end=end, threads=self.threads):
                self._note(batch)
                if not batch.arrays["weight"].any():
                    reason = next(iter(batch.failed.values()))
                    raise PatchesError(f"{stage.name}: nothing of a batch could be read: {reason}: is the disk there?")
                yield {name: batch.arrays[name] for name in (*stage.inputs, "weight")}
                bar.update(size)

    def _note(self, batch: PatchBatch) -> None:
        """Says each reason once."""
        for reason in batch.failed.values():
            if reason not in self._told:
                print(f"left out: {reason}", file=sys.stderr, flush=True)
        self._told |= set(batch.failed.values())

    def _log(self, stage: Stage, step: int, row: dict[str, float]) -> None:
        self.workdir.log(stage.name, step, row)
        if METRIC in row:
            numbers = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in row.items())
            print(f"{stage.name}, step {step}: {numbers}", flush=True)
