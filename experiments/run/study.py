"""What every stage of training a slide classifier does: its steps, batches, scans and validations."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from data_pipelines.cohort import CohortError
from data_pipelines.scan import ScanShape, prefetch, scan
from data_pipelines.shelf import Shelf
from data_pipelines.slides import SlideError
from data_pipelines.stream import FAILED, Rows, TileReader, training_batches
from experiments.run.progress import progress
from experiments.run.scoring import classifier_scorer, probability
from experiments.run.slides import SlideSet
from experiments.run.workdir import Workdir
from srcc_jax.augment import AugmentConfig, augment
from srcc_jax.checkpoints import Checkpoints
from srcc_jax.losses import binary_cross_entropy
from srcc_jax.methods.slide_classification import Config, candidate_rows, slide_loss, slide_scores, tile_loss
from srcc_jax.metrics import roc_auc
from srcc_jax.models.architecture import Architecture, normalize
from srcc_jax.models.zoo import build
from srcc_jax.parallel import make_mesh, process_rows
from srcc_jax.train import (
    FitResult,
    Interrupted,
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
    """What every stage of a run needs. mined: number of a training slide -> rows of its tiles that were mined as negatives."""

    config: Config
    architecture: Architecture
    mesh: Mesh
    workdir: Workdir
    shelf: Shelf
    train: SlideSet
    validation: SlideSet
    threads: int
    stop: Callable[[], bool]
    mined: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keep = Keep(metric=METRIC, mode="min", patience=self.config.patience)
        self._unreadable: set[str] = set()
        self.labels = labels_of(self.train, self.config)
        self.validation_labels = labels_of(self.validation, self.config)
        self._scorer = classifier_scorer(
            self.architecture, tile=self.config.tile, mesh=make_mesh(jax.local_devices()), cam=False
        )

    def logits(
        self,
        state: TrainState,
        slides: SlideSet,
        numbers: np.ndarray,
        what: str,
        *,
        allowed: np.ndarray | None = None,
        interruptible: bool = False,
    ) -> np.ndarray:
        """float32 [N]: logits of the tiles of the slides `numbers` (of those that `allowed` admits), NaN elsewhere. The processes
        of a run share the slides among them. interruptible: ends at once when the run is asked to stop, which loses nothing where
        a round's choice and the checkpoints before it are on disk."""
        mine = numbers[jax.process_index() :: jax.process_count()]
        folded = self._scorer.fold({"params": state.params, **state.stats})
        shape = ScanShape.of(slides.tiles.grid)
        batches = prefetch(scan(slides.jobs(self.shelf, mine, allowed=allowed), shape, threads=self.threads))
        with progress(self._count(slides, mine, allowed), what) as bar:

            def scored_tiles(count: int) -> None:
                bar.update(count)
                if interruptible and self.stop() and jax.process_count() == 1:
                    raise Interrupted(int(state.step), saved=True)

            table = self._scorer.logits(folded, batches, rows=len(slides.tiles), scored_tiles=scored_tiles)
        if jax.process_count() > 1:
            table = np.fmax.reduce(multihost_utils.process_allgather(table))
        return table

    @staticmethod
    def _count(slides: SlideSet, numbers: np.ndarray, allowed: np.ndarray | None) -> int:
        chosen = np.isin(slides.slide, numbers)
        return int((chosen if allowed is None else chosen & allowed).sum())

    def evaluate(self, state: TrainState, *, by_tiles: bool) -> dict[str, float]:
        """The loss that selects (of tiles, or of the slides' scores), and the ROC AUC of the validation slides' scores."""
        slides = self.validation
        logits = self.logits(state, slides, np.arange(len(slides.records)), "validating")
        scores = slide_scores(logits, slides.slide, slides=len(slides.records))
        known = np.isfinite(scores)
        if len(set(self.validation_labels[known])) < 2:
            raise SlideError(
                f"only {known.sum()} of {len(known)} validation slides could be read, of one class: is the disk there?"
            )
        label, scores = self.validation_labels[known], scores[known]
        loss = self._tile_loss(logits) if by_tiles else slide_loss(scores, label)
        return {METRIC: loss, "validation_auc": float(roc_auc(label, probability(scores)))}

    def _tile_loss(self, logits: np.ndarray) -> float:
        """Of the annotated tiles of the validation slides against all tiles of the negative ones."""
        slides = self.validation
        positive = slides.tiles.annotated > self.config.min_annotated
        chosen = np.isfinite(logits) & (positive | (self.validation_labels[slides.slide] == 0))
        return tile_loss(logits[chosen], positive[chosen].astype(int))

    def selects_by_tiles(self, stage: str) -> bool:
        """Whether a stage ("fs" or "ws") is selected by the loss of tiles. FS falls back to slides where no validation slide has
        an annotated tile; where tiles are asked for, that is a CohortError."""
        annotated = bool((self.validation.tiles.annotated > self.config.min_annotated).any())
        if self.config.selection == "tile" and not annotated:
            raise CohortError(
                "--selection=tile: no tile of the validation split is annotated. Fill the column `annotation` of its positive "
                "slides, or give --selection=slide"
            )
        return self.config.selection == "tile" or (self.config.selection == "auto" and stage == "fs" and annotated)

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
        reader = TileReader(self.train.tiles, self.shelf, threads=self.threads)

        def begin_at(begin: int) -> Iterator[Mapping[str, np.ndarray]]:
            share = process_rows(self.config.batch, self.mesh)
            with progress((end - begin) * self.config.batch, "training") as bar:
                for batch in training_batches(reader, rows, begin=begin, end=end, share=share):
                    self._check_read(batch)
                    yield {name: batch[name] for name in ("image", "label", "weight")}
                    bar.update(self.config.batch)

        return begin_at

    def _check_read(self, batch: Mapping[str, np.ndarray]) -> None:
        """Says once of each slide that tiles of it cannot be read. Raises SlideError where none of a batch can."""
        failed = batch["status"] == FAILED
        slides = {str(self.train.tiles.slides[self.train.tiles.slide[row]]) for row in batch["row"][failed]}
        for name in sorted(slides - self._unreadable):
            print(f"train: tiles of {name} cannot be read: they count for nothing", file=sys.stderr, flush=True)
        self._unreadable |= slides
        if failed.all():
            raise SlideError(f"no tile of a batch could be read ({', '.join(sorted(slides))}): is the disk there?")

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

        return fit(
            step_fn,
            state,
            self.batches(rows, end=until),
            num_steps=until,
            mesh=self.mesh,
            evaluate=functools.partial(self.evaluate, by_tiles=self.selects_by_tiles(stage)),
            every=every,
            keep=self.keep,
            checkpoints=checkpoints,
            log=log,
            stop=self.stop,
        )


def labels_of(slides: SlideSet, config: Config) -> np.ndarray:
    """int [S]: 1 where a slide's label is the positive one."""
    return np.asarray([record.label == config.positive for record in slides.records], int)
