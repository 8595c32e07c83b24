"""What a run of cell detection leaves for people: detections/, pictures/, metrics.json and report.html."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.cell_images import CellImage, load_image
from data_pipelines.cell_masks import draw_cells, read_mask
from data_pipelines.exports import write_image, write_json, write_text
from data_pipelines.files import atomic_folder
from experiments.run.cells.evaluation import FALSE_POSITIVES, FROC, INSTANCE_RECALL
from experiments.run.cells.held_out import HELD_OUT, TRUTH, HeldOut
from experiments.run.cells.rounds import CellData, Round, doubts
from experiments.run.workdir import Workdir, versions
from srcc_jax.methods.cell_detection import Config
from srcc_jax.methods.cell_detection_paper import TABLE
from srcc_jax.report import Report, SlideRow, Table, render

PICTURES = 12  # ours: of each kind that a report shows


def write_results(
    held_out: HeldOut, notes: Sequence[str], done: Mapping[str, Sequence[Round]], *, workdir: Workdir, data: CellData,
    settings: Mapping[str, Any],
) -> None:  # fmt: skip
    """Everything, metrics.json last."""
    notes = [*notes, *(note for name, rounds in done.items() for note in doubts(name, rounds))]
    model = next(iter(done))
    last = _folders(held_out, done)[model][-1][1]
    merit = held_out.merit(last) if held_out.images else {}
    slides = [*_held_out_rows(held_out, last, workdir.path), *_training_rows(held_out.config, data, done, workdir.path)]
    curves = {
        f"{name}: loss": (np.array([row["step"] for row in found]), np.array([row["loss"] for row in found]))
        for name in done
        if (found := [row for row in workdir.history(name) if "loss" in row])
    }
    report = Report(
        title="Cell detection",
        subtitle=f"{settings['training']}, {', '.join(done)}",
        summary={name: {"image": interval} for name, interval in merit.items()},
        notes=[*_notes(held_out, data), *_inner(done)],
        warnings=list(notes),
        comparison=_comparison(held_out, done),
        slides=slides,
        training=curves,
        configuration=settings,
        versions=versions(),
    )
    write_text(workdir.path / "report.html", render(report))
    if held_out.images:
        _copy_detections(held_out, last, workdir.path / "detections")
    write_json(
        workdir.path / "metrics.json", {**merit, **_about(held_out, notes, done, data), "settings": dict(settings)}
    )


def _about(
    held_out: HeldOut, notes: Sequence[str], done: Mapping[str, Sequence[Round]], data: CellData
) -> dict[str, Any]:
    """What a run did, of which images."""
    rounds = {
        name: [
            {"folder": r.name, "steps": r.until - r.begin, "iou": r.iou, "stopped": r.stopped, "inner": r.inner}
            for r in found
        ]
        for name, found in done.items()
    }
    images = {
        "annotated": len(data.annotated),
        "boxes": sum(len(image.boxes) for image in data.annotated),
        "normal": len(data.normal),
        "unlabelled": len(data.unlabelled),
        "held out": len(held_out.images),
    }
    return {"rounds": rounds, "images": images, "notes": list(notes), "versions": versions()}


def _folders(held_out: HeldOut, done: Mapping[str, Sequence[Round]]) -> dict[str, list[tuple[str, pathlib.Path]]]:
    """Model -> (round, folder of held-out detections) of the rounds that were trained in."""
    found = {}
    for name, rounds in done.items():
        places = [r.name for r in rounds if not r.stopped]
        found[name] = [(place, held_out.rounds / place / (name + HELD_OUT)) for place in places]
    return found


def _comparison(held_out: HeldOut, done: Mapping[str, Sequence[Round]]) -> Table | None:
    """Held-out numbers after each round, and the rows of the paper's Table 1."""
    if not held_out.images:
        return None
    scoring = held_out.scoring
    collective = next(name for name in scoring.metrics(normal=False) if name.startswith("collective"))
    names = (collective, INSTANCE_RECALL, FALSE_POSITIVES, FROC)
    rows: list[list[Any]] = []
    for model, folders in _folders(held_out, done).items():
        for place, folder in folders:
            values = held_out.values(folder)
            rows.append([f"{model}, {place}", *(values.get(name) for name in names)])
    mode = held_out.config.fold_mode
    kinds = {"full": "FT", "self": "ST", "self_extra": "ST-Ex", "cooperative": "CT"}
    rows += [[f"paper, {kinds[kind]} ({mode})", *TABLE[mode, kind]] for kind in kinds]
    return Table(
        ["model and round", *names], rows, caption="on the images held out here, and on the paper's own (three folds)"
    )


def _notes(held_out: HeldOut, data: CellData) -> list[str]:
    boxes = sum(len(image.boxes) for image in data.annotated)
    return [
        f"Trained on {boxes} boxes in {len(data.annotated)} images, {len(data.normal)} images without cells and {len(data.unlabelled)} "
        "unlabelled regions.",
        f"A detection matches above an IoU of {held_out.scoring.iou:g}, in descending score, one to a box; its score is the mean "
        "probability of the inner region over its seed. Unmatched detections on annotated images are not counted.",
        "The model is that of the last step, as in the paper: held-out images select nothing.",
        "Intervals: percentile bootstrap, annotated and normal images each drawn with replacement, 1000 resamples.",
        "In pictures: inner region red, edge yellow, detections green, annotation blue.",
    ]


def _inner(done: Mapping[str, Sequence[Round]]) -> list[str]:
    return [
        f"Inner region in the masks of {model}, of unlabelled regions in rounds called extra, else of annotated images: "
        + ", ".join(f"{r.name} {r.inner:.1%}" for r in rounds)
        + "."
        for model, rounds in done.items()
    ]


def _held_out_rows(held_out: HeldOut, folder: pathlib.Path, workdir: pathlib.Path) -> list[SlideRow]:
    found = held_out.found(folder) if held_out.images else {}
    matches = held_out.scoring.matches({image.name: image.boxes for image in held_out.images}, found)
    rows = []
    for number, image in enumerate(held_out.images):
        pictures: dict[str, bytes | str] = {}
        if number < PICTURES:
            held_out.draw(folder, image, workdir / "pictures" / "held_out" / f"{image.name}.png")
            pictures["held out"] = f"pictures/held_out/{image.name}.png"
        measures = {
            "boxes": len(image.boxes), "detected": len(found[image.name]), "matched": int(matches[image.name].hit.sum())
        }  # fmt: skip
        rows.append(SlideRow(slide_id=image.name, label=f"held out, {image.kind}", measures=measures, images=pictures))
    return rows


def _training_rows(
    config: Config, data: CellData, done: Mapping[str, Sequence[Round]], workdir: pathlib.Path
) -> list[SlideRow]:
    """Masks of training images by round."""
    rows = []
    for images in (data.annotated, data.unlabelled):
        for image in images[:PICTURES]:
            pictures: dict[str, bytes | str] = {}
            for model, rounds in done.items():
                for r in rounds:
                    if image.name in r.cells:
                        path = pathlib.Path("pictures") / model / r.name / f"{image.name}.png"
                        _draw_mask(config, image, r, workdir / path)
                        pictures[f"{model}, {r.name}"] = path.as_posix()
            measures = {"boxes": len(image.boxes), "detected": None, "matched": None}
            rows.append(
                SlideRow(slide_id=image.name, label=f"trained on, {image.kind}", measures=measures, images=pictures)
            )
    return rows


def _draw_mask(config: Config, image: CellImage, found: Round, to: pathlib.Path) -> None:
    if not to.exists():
        pixels = load_image(image, reduce=config.reduce)
        boxes = {TRUTH: image.boxes / config.reduce}
        write_image(to, draw_cells(pixels, read_mask(found.mask(image)), boxes, width=max(1, 3 // config.reduce)))


def _copy_detections(held_out: HeldOut, folder: pathlib.Path, to: pathlib.Path) -> None:
    """The detections on held-out images after the last round, as evaluate_detection reads them."""
    if to.exists():
        shutil.rmtree(to)
    with atomic_folder(to) as temporary:
        for image in held_out.images:
            shutil.copy(folder / f"{image.name}.xml", temporary / f"{image.name}.xml")
