"""Held-out images through a model, after each round: what it finds, and what that is worth."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data_pipelines.boxes import Boxes, read_boxes, write_boxes
from data_pipelines.cell_images import ANNOTATED, NORMAL, CellImage, load_image
from data_pipelines.cell_masks import draw_cells, read_mask, write_mask
from data_pipelines.exports import write_image, write_json
from experiments.run.cells.evaluation import Scoring
from experiments.run.cells.learner import Learner, instances_of
from experiments.run.cells.rounds import scaled
from experiments.run.progress import progress
from srcc_jax.methods.cell_detection import Config, instance_mask
from srcc_jax.metrics import Interval

HELD_OUT = "_held_out"  # follows the model in the names of folders
FOUND, TRUTH = (40, 200, 90), (40, 110, 250)  # colours of boxes in pictures: detections, annotation


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Images that no round is trained on, and the folder rounds of the run."""

    config: Config
    images: Sequence[CellImage]
    scoring: Scoring
    rounds: pathlib.Path

    def folder(self, learner: str, number: int, kind: str) -> pathlib.Path:
        """Where masks and detections of a model after a round are."""
        return self.rounds / f"{number:02d}_{kind}" / (learner + HELD_OUT)

    def judge(self, learner: Learner, number: int, kind: str) -> None:
        """Writes masks (PNG), detections (XML) and the numbers (<folder>.json, once all are there) of a model after a round."""
        folder = self.folder(learner.name, number, kind)
        if not self.images or numbers_file(folder).exists():
            return
        predict = learner.predictor()
        write_found(self.config, folder, self.images, predict, what=f"round {number} ({kind}): held-out images")
        merit = self.merit(folder)
        write_json(numbers_file(folder), {"step": learner.step, **merit})
        told = ", ".join(f"{name} {value.value:.4f}" for name, value in list(merit.items())[:4])
        print(f"{learner.name} after round {number} ({kind}): {told}", flush=True)

    def merit(self, folder: pathlib.Path) -> dict[str, Interval]:
        """The numbers of the detections in a folder."""
        found = self.found(folder)
        truth = {image.name: image.boxes for image in self.images if image.kind == ANNOTATED}
        normal = [found[image.name].score for image in self.images if image.kind == NORMAL]
        return self.scoring.merit(list(self.scoring.matches(truth, found).values()), normal, seed=self.config.seed)

    def found(self, folder: pathlib.Path) -> dict[str, Boxes]:
        """Image -> its detections in a folder."""
        return {image.name: read_boxes(folder / f"{image.name}.xml") for image in self.images}

    def values(self, folder: pathlib.Path) -> Mapping[str, float]:
        """Name -> value, as `judge` wrote them; empty where it did not."""
        try:
            found = json.loads(numbers_file(folder).read_text())
        except FileNotFoundError:
            return {}
        return {name: value["value"] for name, value in found.items() if isinstance(value, dict)}

    def draw(self, folder: pathlib.Path, image: CellImage, to: pathlib.Path) -> None:
        """A picture of an image with its mask, detections (green) and annotation (blue), reduced as the network sees it."""
        reduce = self.config.reduce
        boxes = {TRUTH: image.boxes / reduce, FOUND: read_boxes(folder / f"{image.name}.xml").box / reduce}
        pixels = load_image(image, reduce=reduce)
        write_image(to, draw_cells(pixels, read_mask(folder / f"{image.name}.png"), boxes, width=max(1, 3 // reduce)))


def numbers_file(folder: pathlib.Path) -> pathlib.Path:
    """Where the numbers of the detections in a folder are: beside it, for in it every JSON would be an annotation."""
    return folder.with_name(f"{folder.name}.json")


def write_found(
    config: Config, folder: pathlib.Path, images: Sequence[CellImage], predict: Callable[[CellImage], np.ndarray], *, what: str
) -> float:  # fmt: skip
    """Masks (PNG) and detections (XML with <confidence>) of images. Returns the standard deviation of the inner region's probability over
    all their pixels, 0 where there are none."""
    moments = np.zeros(3)
    with progress(len(images), what, unit="images") as bar:
        for image in images:
            probability = predict(image)
            inner = probability[..., 2].astype(np.float64)
            moments += inner.size, inner.sum(), np.square(inner).sum()
            found = instances_of(config, probability, config.threshold)
            write_mask(folder / f"{image.name}.png", instance_mask(found))
            write_boxes(
                folder / f"{image.name}.xml", scaled(found, config.reduce),
                image=image.path.name, width=image.width, height=image.height,
            )  # fmt: skip
            bar.update()
    count, total, squares = moments
    return float(np.sqrt(max(0.0, squares / count - (total / count) ** 2))) if count else 0.0
