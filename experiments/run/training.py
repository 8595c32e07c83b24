"""Stages of training a slide classifier: what the method decides, joined to slides, stream, device and checkpoints."""

from __future__ import annotations

import csv
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from data_pipelines.exports import write_table
from data_pipelines.scan import ScanShape, prefetch, scan
from data_pipelines.shelf import Shelf
from data_pipelines.stream import Rows, TileReader, training_batches
from experiments.run.progress import progress
from experiments.run.scoring import TileScorer, probability
from experiments.run.slides import SlideSet
from experiments.run.workdir import Workdir
from srcc_jax.augment import AugmentConfig, augment
from srcc_jax.checkpoints import Checkpoints
from srcc_jax.kernels.top_k import select_top_k
from srcc_jax.losses import binary_cross_entropy
from srcc_jax.methods.slide_classification import (
    Config,
    SupervisedSampler,
    WeakSampler,
    candidate_rows,
    frozen_steps,
    slide_loss,
    slide_scores,
)
from srcc_jax.metrics import roc_auc
from srcc_jax.models.efficientnet import Architecture, build, normalize
from srcc_jax.parallel import make_mesh, process_rows
from srcc_jax.train import (
    FitResult,
    Keep,
    StepFn,
    TrainState,
    epoch_decay,
    fit,
    init_state,
    make_train_step,
    restart_optimizer,
)

METRIC = "validation_loss"


@dataclasses.dataclass(frozen=True)
class StageResult:
    """The variables of the best checkpoint of a stage, its step and its validation loss."""

    variables: dict[str, Any]
    step: int
    loss: float


@dataclasses.dataclass(frozen=True)
class Steps:
    """A stage's optimisers and steps: of the last layer alone for the first `frozen` steps, then of everything.

    Adam starts afresh when the rest is thawed, as Keras does when a model is compiled again: with a high count and empty
    moments its first steps would be several times too long. The learning rate goes on where it was.
    """

    frozen: int
    first: optax.GradientTransformation
    later: optax.GradientTransformation
    head: StepFn
    everything: StepFn

    def begin(self, variables: Mapping[str, Any], seed: int, mesh: Mesh) -> TrainState:
        """The state before the first step."""
        return init_state(variables, self.first if self.frozen else self.later, seed, mesh)

    def at(self, state: TrainState, mesh: Mesh) -> tuple[StepFn, TrainState]:
        """The step to go on with from this state, and the state as it wants it."""
        if int(state.step) < self.frozen:
            return self.head, state
        thawed = self.frozen and int(state.step) == self.frozen
        return self.everything, restart_optimizer(state, self.later, mesh) if thawed else state


@dataclasses.dataclass
class Study:
    """What every stage of a run needs."""

    config: Config
    architecture: Architecture
    mesh: Mesh
    workdir: Workdir
    shelf: Shelf
    train: SlideSet
    validation: SlideSet
    threads: int
    stop: Callable[[], bool]

    def __post_init__(self) -> None:
        self.labels = labels_of(self.train, self.config)
        self.validation_labels = labels_of(self.validation, self.config)
        self._scorer = TileScorer(
            self.architecture, tile=self.config.tile, mesh=make_mesh(jax.local_devices()), cam=False
        )

    def logits(
        self, state: TrainState, slides: SlideSet, numbers: np.ndarray, what: str, *, allowed: np.ndarray | None = None
    ) -> np.ndarray:
        """float32 [N]: logits of the tiles of the slides `numbers` (of those that `allowed` admits), NaN elsewhere. The processes
        of a run share the slides among them."""
        mine = numbers[jax.process_index() :: jax.process_count()]
        folded = self._scorer.fold({"params": state.params, **state.stats})
        shape = ScanShape.of(slides.tiles.grid)
        table = np.full(len(slides.tiles), np.nan, np.float32)
        batches = prefetch(scan(slides.jobs(self.shelf, mine, allowed=allowed), shape, threads=self.threads))
        with progress(self._count(slides, mine, allowed), what) as bar:
            for scored in self._scorer.score(folded, batches):
                table[scored.row] = scored.logit
                bar.update(len(scored.row))
        if jax.process_count() > 1:
            table = np.fmax.reduce(multihost_utils.process_allgather(table))
        return table

    @staticmethod
    def _count(slides: SlideSet, numbers: np.ndarray, allowed: np.ndarray | None) -> int:
        chosen = np.isin(slides.slide, numbers)
        return int((chosen if allowed is None else chosen & allowed).sum())

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Loss and ROC AUC of the validation slides' scores (the largest logit of each)."""
        slides = self.validation
        logits = self.logits(state, slides, np.arange(len(slides.records)), "validating")
        scores = slide_scores(logits, slides.slide, slides=len(slides.records))
        known = np.isfinite(scores)
        label, scores = self.validation_labels[known], scores[known]
        return {METRIC: slide_loss(scores, label), "validation_auc": float(roc_auc(label, probability(scores)))}

    def steps(self, steps_per_epoch: float, *, frozen: int) -> Steps:
        """The compiled steps of a stage whose first `frozen` steps train the last layer alone."""
        config, model = self.config, build(self.architecture)
        decay = epoch_decay(config.learning_rate, config.decay, config.decay_epochs, steps_per_epoch)
        adam = functools.partial(optax.adam, b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_epsilon)
        colours = AugmentConfig(
            brightness=config.brightness, contrast=config.contrast, saturation=config.saturation, hue=config.hue
        )

        def prepare(image: jax.Array, key: jax.Array) -> jax.Array:
            return normalize(augment(image, key, colours), self.architecture)

        loss = functools.partial(binary_cross_entropy, model, prepare=prepare)
        # One vector instead of hundreds of small arrays: a third less to compile, and one update instead of hundreds.
        first, later = (optax.flatten(adam(rate)) for rate in (decay, lambda count: decay(count + frozen)))
        head = make_train_step(
            loss(freeze_norm=True), first, self.mesh, trainable=lambda path: path.startswith("classifier")
        )
        return Steps(frozen, first, later, head, make_train_step(loss(), later, self.mesh))

    def batches(self, rows: Rows, *, end: int) -> Callable[[int], Iterator[Mapping[str, np.ndarray]]]:
        """This process's batches from any step on, as `fit` wants them."""
        reader = TileReader(self.train.tiles, self.shelf)

        def begin_at(begin: int) -> Iterator[Mapping[str, np.ndarray]]:
            share = process_rows(self.config.batch, self.mesh)
            with progress((end - begin) * self.config.batch, "training") as bar:
                for batch in training_batches(reader, rows, begin=begin, end=end, share=share):
                    yield {name: batch[name] for name in ("image", "label", "weight")}
                    bar.update(self.config.batch)

        return begin_at

    def candidates(self, *, supervised: bool) -> list[np.ndarray]:
        """Rows of the training tiles that may be drawn, slide by slide."""
        tiles = self.train.tiles
        return candidate_rows(
            self.config, supervised=supervised, labels=self.labels, slide=self.train.slide, annotated=tiles.annotated
        )

    def fit(
        self,
        stage: str,
        checkpoints: Checkpoints,
        step_fn: StepFn,
        state: TrainState,
        rows: Rows,
        *,
        until: int,
        every: int,
    ) -> FitResult:
        """One call of the loop, logged. every: steps between validations; 0: none."""

        def log(step: int, row: dict[str, float]) -> None:
            if jax.process_index() == 0:
                self.workdir.log(stage, step, row)
            if METRIC in row:
                print(
                    f"{stage} step {step}: validation loss {row[METRIC]:.4f}, AUC {row['validation_auc']:.4f}",
                    flush=True,
                )

        keep = Keep(metric=METRIC, mode="min", patience=self.config.patience)
        return fit(
            step_fn,
            state,
            self.batches(rows, end=until),
            num_steps=until,
            mesh=self.mesh,
            evaluate=self.evaluate,
            every=every,
            keep=keep,
            checkpoints=checkpoints,
            log=log,
            stop=self.stop,
        )


def labels_of(slides: SlideSet, config: Config) -> np.ndarray:
    """int [S]: 1 where a slide's label is the positive one."""
    return np.asarray([record.label == config.positive for record in slides.records], int)


def train_supervised(study: Study, variables: Mapping[str, Any]) -> StageResult:
    """FS: the last layer alone for the first epochs, then everything, until patience or the last epoch ends it."""
    config = study.config
    sampler = SupervisedSampler(config, study.candidates(supervised=True), study.labels)
    last = round(config.max_epochs * sampler.steps_per_epoch)
    steps = study.steps(sampler.steps_per_epoch, frozen=min(frozen_steps(config, sampler.steps_per_epoch), last))
    epoch = max(1, round(sampler.steps_per_epoch))
    with Checkpoints(str(study.workdir.path / "fs")) as checkpoints:
        state = checkpoints.resume(steps.begin(variables, config.seed, study.mesh))
        for until in (steps.frozen, last):
            if int(state.step) > until or not until:
                continue
            step_fn, state = steps.at(state, study.mesh)
            result = study.fit("fs", checkpoints, step_fn, state, sampler, until=until, every=epoch)
            state = result.state
            if result.stopped:
                break
        return best_of(result, checkpoints)


def train_weakly(study: Study, variables: Mapping[str, Any], *, fresh_head: bool) -> StageResult:
    """WS: in each round the slides drawn are scanned, their top tiles chosen and saved, and trained on.

    fresh_head: the last layer starts random and is trained alone at first; after FS it is not.
    """
    config = study.config
    sampler = WeakSampler(config, study.labels)
    steps = study.steps(sampler.steps_per_epoch, frozen=sampler.frozen_steps if fresh_head else 0)
    with Checkpoints(str(study.workdir.path / "ws")) as checkpoints:
        state = checkpoints.resume(steps.begin(variables, config.seed, study.mesh))
        for number in itertools.count(int(state.step) // sampler.steps_per_round):
            until = (number + 1) * sampler.steps_per_round
            rows = sampler.rows_of_step(number, choose_tiles(study, sampler, number, state))
            every = until if sampler.ends_epoch(number) else 0
            step_fn, state = steps.at(state, study.mesh)
            result = study.fit("ws", checkpoints, step_fn, state, rows, until=until, every=every)
            state = result.state
            if result.stopped or sampler.finished(number):
                return best_of(result, checkpoints)
    raise AssertionError("rounds end by patience or by the last epoch")


def choose_tiles(study: Study, sampler: WeakSampler, number: int, state: TrainState) -> dict[int, np.ndarray]:
    """slide -> rows of its most probable tiles, best first, for the slides of a round. Written to ws/rounds before it is used, and
    read back by a run that goes on inside the round."""
    path = study.workdir.path / "ws" / "rounds" / f"{number:05d}.csv"
    slides = np.unique(sampler.draws(number))
    if not path.exists():
        allowed = np.zeros(len(study.train.tiles), bool)
        allowed[np.concatenate(study.candidates(supervised=False))] = True
        logits = study.logits(state, study.train, slides, f"round {number}: selecting", allowed=allowed)
        rows, valid = select_top_k(logits, study.train.slide, slides=len(study.labels), k=study.config.top_k)
        chosen = {int(slide): np.asarray(rows[slide])[np.asarray(valid[slide])] for slide in slides}
        if jax.process_index() == 0:
            write_choice(path, study, chosen, logits)
        return chosen
    with open(path, newline="", encoding="utf-8") as file:
        entries = [(int(row["slide"]), int(row["row"])) for row in csv.DictReader(file)]
    return {int(slide): np.asarray([row for s, row in entries if s == slide], int) for slide in slides}


def write_choice(path: pathlib.Path, study: Study, chosen: Mapping[int, np.ndarray], logits: np.ndarray) -> None:
    """A row for each chosen tile, best first within its slide: where it is and how probable the model found it."""
    tiles = study.train.tiles
    slide = np.concatenate([np.full(len(rows), number) for number, rows in chosen.items()])
    row = np.concatenate(list(chosen.values()))
    columns = {
        "slide": slide,
        "row": row,
        "slide_id": tiles.slide_id[row],
        "label": study.labels[slide],
        "x": tiles.x[row],
        "y": tiles.y[row],
        "probability": probability(logits[row]),
    }
    write_table(path, columns)


def best_of(result: FitResult, checkpoints: Checkpoints) -> StageResult:
    """The variables of the best checkpoint."""
    assert result.best.step is not None and result.best.value is not None
    state = checkpoints.restore({"params": result.state.params, "stats": result.state.stats}, result.best.step)
    return StageResult({"params": state["params"], **state["stats"]}, result.best.step, result.best.value)
