"""The rounds of a run: masks from boxes, from a model's own predictions, from those of the other model.

Masks are written to rounds/<number>_<kind>/<model>/<image>.png, what was detected to <image>.xml beside them, and rounds/<number>_<kind>/
<model>.json lists them, before they are trained on. A restart finds them there and repeats none.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data_pipelines.boxes import Boxes, read_boxes, write_boxes
from data_pipelines.cell_crops import CropSource
from data_pipelines.cell_images import CellImage
from data_pipelines.cell_masks import read_mask, write_mask
from data_pipelines.exports import write_json
from experiments.run.cells.learner import Learner, Place, instances_of
from experiments.run.progress import progress
from srcc_jax.instances import Instances
from srcc_jax.methods.cell_detection import (
    INNER,
    Agreement,
    Config,
    instance_mask,
    merge_masks,
    steps_per_epoch,
    target_mask,
)
from srcc_jax.train import Interrupted

BOXES, SELF, EXTRA = "boxes", "self", "extra"
MOST_INNER = 0.5  # ours: share of inner region in a round's masks above which it is told
GROWTH = 3  # ours: the same as a multiple of the share in the masks of the boxes
MaskOf = Callable[[CellImage], tuple[np.ndarray, Instances | None]]


@dataclasses.dataclass(frozen=True)
class CellData:
    """What a run trains on: images with boxes, images without cells, regions that nobody annotated."""

    annotated: Sequence[CellImage]
    normal: Sequence[CellImage]
    unlabelled: Sequence[CellImage] = ()


@dataclasses.dataclass(frozen=True)
class Round:
    """A round that has its masks. folder: where they are; begin, until: steps of the model before and after it; iou: agreement with the
    masks of the round before, None where there are none to compare; stopped: they agree so far that nobody trains on them; cells: image ->
    cells detected on it, None for the masks of boxes; inner: share of the pixels of all its masks that are inner region."""

    folder: pathlib.Path
    begin: int
    until: int
    iou: float | None
    stopped: bool
    cells: Mapping[str, int | None]
    inner: float

    @property
    def name(self) -> str:
        """As 01_self."""
        return self.folder.parent.name

    def mask(self, image: CellImage) -> pathlib.Path:
        """The file of an image's mask."""
        return self.folder / f"{image.name}.png"


@dataclasses.dataclass(frozen=True)
class Rounds:
    """All rounds of a run. learners: its models, the first of which is handed on. after(learner, number, kind): called when a model has
    been trained in a round, in restarts too."""

    config: Config
    data: CellData
    place: Place
    learners: Sequence[Learner]
    after: Callable[[Learner, int, str], None]

    def run(self) -> dict[str, list[Round]]:
        """Trains through all rounds. Returns model -> its rounds. Raises Interrupted where the run is asked to stop."""
        done: dict[str, list[Round]] = {}
        own = {learner.name: self._alone(learner, done.setdefault(learner.name, [])) for learner in self.learners}
        if self.config.uses_unlabelled:
            self._together(own, done)
        return done

    def _alone(self, learner: Learner, done: list[Round]) -> Round:
        """Boxes, then self-training. Returns the round whose masks the model has seen last."""
        config, seen = self.config, self._first(learner)
        done.append(seen)
        self._train(learner, seen, 0, BOXES, seen)
        rounds = 0 if config.training == "full" else config.self_rounds
        for number in range(1, rounds + 1):
            found = self._choose(
                learner,
                number,
                SELF,
                self.data.annotated,
                self._own_masks(learner),
                before=seen,
                epochs=config.self_epochs,
            )
            self._tell(learner, done[0], found)
            done.append(found)
            if found.stopped:
                break
            self._train(learner, found, number, SELF, found)
            seen = found
        return seen

    def _together(self, own: Mapping[str, Round], done: Mapping[str, list[Round]]) -> None:
        """Unlabelled regions with masks by the other model, or by the same where there is one. All masks of a round are there before any
        model is trained on them."""
        config = self.config
        before: Mapping[str, Round | None] = dict.fromkeys(own)
        teachers = [*self.learners[1:], self.learners[0]]
        for number in range(1, config.extra_rounds + 1):
            place = config.self_rounds + number
            epochs = config.first_extra_epochs if number == 1 else config.extra_epochs
            chosen = {}
            for learner, teacher in zip(self.learners, teachers):
                chosen[learner.name] = self._choose(
                    learner, place, EXTRA, self.data.unlabelled, self._others_masks(teacher),
                    before=before[learner.name], epochs=epochs,
                )  # fmt: skip
                self._tell(learner, done[learner.name][0], chosen[learner.name])
                done[learner.name].append(chosen[learner.name])
            if all(found.stopped for found in chosen.values()):
                break
            for learner in self.learners:
                self._train(learner, chosen[learner.name], place, EXTRA, own[learner.name])
            before = chosen

    def _train(self, learner: Learner, found: Round, number: int, kind: str, annotated: Round) -> None:
        """Trains a model on the masks of a round, and those that its annotated images have in `annotated`."""
        sources = [CropSource(image, annotated.mask(image)) for image in self.data.annotated]
        sources += [CropSource(image, None) for image in self.data.normal]
        if kind == EXTRA:
            sources += [CropSource(image, found.mask(image)) for image in self.data.unlabelled]
        if learner.step < found.until:
            print(f"{learner.name}: round {number} ({kind}), steps {found.begin} to {found.until}", flush=True)
            learner.train(sources, found.until)
        if learner.step == found.until:
            self.after(learner, number, kind)

    def _first(self, learner: Learner) -> Round:
        def mask_of(image: CellImage) -> tuple[np.ndarray, None]:
            return self._target(image), None

        return self._choose(
            learner, 0, BOXES, self.data.annotated, lambda: mask_of, before=None, epochs=self.config.epochs
        )

    def _own_masks(self, learner: Learner) -> Callable[[], MaskOf]:
        """Of annotated images: what the model finds, merged with the boxes."""

        def begin() -> MaskOf:
            predict = learner.predictor()

            def mask_of(image: CellImage) -> tuple[np.ndarray, Instances]:
                found = instances_of(self.config, predict(image), self.config.self_threshold)
                return merge_masks(instance_mask(found), self._target(image)), found

            return mask_of

        return begin

    def _others_masks(self, teacher: Learner) -> Callable[[], MaskOf]:
        """Of unlabelled regions: what the teacher finds."""

        def begin() -> MaskOf:
            predict = teacher.predictor()

            def mask_of(image: CellImage) -> tuple[np.ndarray, Instances]:
                found = instances_of(self.config, predict(image), self.config.extra_threshold)
                return instance_mask(found), found

            return mask_of

        return begin

    def _target(self, image: CellImage) -> np.ndarray:
        config = self.config
        height, width = image.height // config.reduce, image.width // config.reduce
        return target_mask(
            image.boxes / config.reduce, height, width, edge_share=config.edge_share, edge_px=config.edge_px
        )

    def _choose(
        self, learner: Learner, number: int, kind: str, images: Sequence[CellImage], begin: Callable[[], MaskOf], *,
        before: Round | None, epochs: int,
    ) -> Round:  # fmt: skip
        """The masks of a round, made and listed, or as they were listed before."""
        folder = self.place.workdir.path / "rounds" / f"{number:02d}_{kind}" / learner.name
        listing = folder.with_name(f"{learner.name}.json")
        if not listing.exists():
            cells = self._write_masks(folder, images, begin, what=f"round {number} ({kind}): masks for {learner.name}")
            iou = self._agreement(folder, before, images) if before else None
            stopped = iou is not None and iou > self.config.stop_iou
            until = learner.step + (0 if stopped else epochs * self._epoch(kind))
            write_json(
                listing,
                {
                    "begin": learner.step, "until": until, "iou": iou, "stopped": stopped, "cells": cells,
                    "inner": inner_share(folder, images),
                },
            )  # fmt: skip
        found = json.loads(listing.read_text())
        if "inner" not in found:  # listed by an older version
            found["inner"] = inner_share(folder, images)
        return Round(folder, **found)

    def _tell(self, learner: Learner, boxes: Round, found: Round) -> None:
        """Says how much of the masks of a round that is yet to be trained on is inner region."""
        if learner.step == found.begin:
            print(f"{learner.name}, {found.name}: {found.inner:.1%} of the masks is inner region", flush=True)
            for warning in doubts(learner.name, [boxes, found]):
                print(warning, flush=True)

    def _write_masks(
        self, folder: pathlib.Path, images: Sequence[CellImage], begin: Callable[[], MaskOf], *, what: str
    ) -> dict[str, int | None]:
        """Image -> cells on it. An image whose detections a restart finds there is left as it is: they are written last."""
        mask_of, cells = begin(), dict[str, int | None]()
        with progress(len(images), what, unit="images") as bar:
            for image in images:
                if self.place.stop():
                    raise Interrupted(max(learner.step for learner in self.learners), saved=True)
                bar.update()
                detections = folder / f"{image.name}.xml"
                if detections.exists():
                    cells[image.name] = len(read_boxes(detections))
                    continue
                mask, found = mask_of(image)
                write_mask(folder / f"{image.name}.png", mask)
                cells[image.name] = None if found is None else len(found)
                if found is not None:
                    write_boxes(
                        detections, scaled(found, self.config.reduce),
                        image=image.path.name, width=image.width, height=image.height,
                    )  # fmt: skip
        return cells

    def _agreement(self, folder: pathlib.Path, before: Round, images: Sequence[CellImage]) -> float:
        agreement = Agreement()
        for image in images:
            agreement.add(read_mask(folder / f"{image.name}.png"), read_mask(before.mask(image)))
        return agreement.iou

    def _epoch(self, kind: str) -> int:
        data = self.data
        unlabelled = len(data.unlabelled) if kind == EXTRA else 0
        return steps_per_epoch(
            self.config, annotated=len(data.annotated), unlabelled=unlabelled, negative=len(data.normal)
        )


def scaled(found: Instances, factor: int) -> Boxes:
    """Boxes with scores in pixels of the image before it was reduced by a factor."""
    return Boxes(found.box * factor, found.score)


def inner_share(folder: pathlib.Path, images: Sequence[CellImage]) -> float:
    """Share of the pixels of all masks in a folder that are inner region."""
    counts = np.zeros(2)
    for image in images:
        mask = read_mask(folder / f"{image.name}.png")
        counts += (mask == INNER).sum(), mask.size
    return float(counts[0] / counts[1])


def doubts(model: str, rounds: Sequence[Round]) -> list[str]:
    """What is to be told of rounds of a model, the first of which has the masks of the boxes: that nearly everything became a cell, or
    that nothing did."""
    boxes = rounds[0].inner
    told = []
    for found in rounds[1:]:
        if found.inner > min(MOST_INNER, GROWTH * boxes):
            told.append(
                f"{model}, {found.name}: {found.inner:.1%} of the masks is inner region, {boxes:.1%} where the boxes are: it takes too "
                f"much for cells, or most cells had no box. Look at rounds/{found.name}/{model}"
            )
        elif found.inner == 0:
            told.append(f"{model}, {found.name}: no image holds a cell by the masks: all are trained on as background")
    return told
