"""Boxes of cells, as people annotate them and programs detect them: one file an image, or one table for all."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

import numpy as np

from data_pipelines.annotations import read_annotation
from data_pipelines.files import atomic_write
from data_pipelines.polygons import Shape

IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".svs"})
ANNOTATIONS = frozenset({".xml", ".json", ".geojson"})
_CORNERS = ("x1", "y1", "x2", "y2")
_SCORES = ("score", "confidence", "prob", "probability")


class BoxesError(ValueError):
    """Boxes that cannot be used; the message names the file and the cure."""


@dataclasses.dataclass(frozen=True)
class Boxes:
    """box float64 [N, 4], [x1, y1, x2, y2) in pixels of the image; score float64 [N], NaN where there is none."""

    box: np.ndarray
    score: np.ndarray

    def __len__(self) -> int:
        return len(self.box)

    def __post_init__(self) -> None:
        if self.box.shape != (len(self.score), 4):
            raise ValueError(f"boxes {self.box.shape} with {len(self.score)} scores")


NONE = Boxes(np.zeros((0, 4)), np.zeros(0))


def read_boxes(path: str | os.PathLike) -> Boxes:
    """Of one image, from any format of annotations: the box around each shape that has an area. AnnotationError, OSError."""
    return shape_boxes(read_annotation(path))


def shape_boxes(shapes: Iterable[Shape]) -> Boxes:
    """The box around each shape that has an area."""
    shapes = [shape for shape in shapes if shape.kind != "point"]
    box = np.asarray([shape.bounds for shape in shapes]).reshape(-1, 4)
    return Boxes(box, np.asarray([math.nan if shape.score is None else shape.score for shape in shapes], float))


def by_image(files: Iterable[pathlib.Path]) -> dict[str, pathlib.Path]:
    """Image -> its annotation file. Raises BoxesError where an image has two."""
    found: dict[str, pathlib.Path] = {}
    for path in files:
        name = image_name(path.name)
        other = found.setdefault(name, path)
        if other != path:
            raise BoxesError(f"{path.parent}: two files for the image {name}, {other.name} and {path.name}: keep one")
    return found


def read_box_folder(folder: str | os.PathLike) -> dict[str, Boxes]:
    """Image -> boxes, of every annotation file in a folder; an image goes by `image_name` of the file."""
    files = by_image(path for path in sorted(pathlib.Path(folder).iterdir()) if path.suffix.lower() in ANNOTATIONS)
    return {name: read_boxes(path) for name, path in files.items()}


def read_box_table(path: str | os.PathLike) -> dict[str, Boxes]:
    """Image -> boxes, of a CSV with the columns image, x1, y1, x2, y2 and score (or confidence, prob, probability).

    An image may come with its folder and ending; it goes by its name without them. Corners may come in any order. A line with
    an image and nothing else says that the image was looked at and has no boxes.
    """
    path = pathlib.Path(path)
    rows: dict[str, list[list[float]]] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        score = [name for name in _SCORES if name in names]
        missing = [name for name in ("image", *_CORNERS) if name not in names] + ["score"] * (not score)
        if missing:
            raise BoxesError(f"{path}: no column {', '.join(missing)}: the columns are image, x1, y1, x2, y2, score")
        for row in reader:
            boxes = rows.setdefault(image_name(row["image"]), [])
            if any(row[name] for name in _CORNERS):
                boxes.append([_number(path, reader.line_num, name, row[name]) for name in (*_CORNERS, score[0])])
    tables = {image: np.asarray(boxes, float).reshape(-1, 5) for image, boxes in rows.items()}
    return {image: Boxes(_in_order(table[:, :4]), table[:, 4]) for image, table in tables.items()}


def _in_order(corners: np.ndarray) -> np.ndarray:
    """Boxes [N, 4] of any two opposite corners (x, y, x, y)."""
    return np.sort(corners.reshape(-1, 2, 2), axis=1).reshape(-1, 4)


def write_boxes(
    path: str | os.PathLike, boxes: Boxes, *, image: str, width: int, height: int, label: str = "ring_cell_cancer"
) -> None:
    """Boxes of an image of width x height pixels as Pascal VOC XML after DigestPath, with <confidence> where they have scores.

    Corners are whole pixels, as DigestPath has them: those of the smallest such box around each.
    """
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = image
    size = ElementTree.SubElement(root, "size")
    for name, value in (("width", width), ("height", height), ("depth", 3)):
        ElementTree.SubElement(size, name).text = str(value)
    for (x1, y1, x2, y2), score in zip(boxes.box, boxes.score):
        item = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(item, "name").text = label
        corners = {"xmin": math.floor(x1), "ymin": math.floor(y1), "xmax": math.ceil(x2), "ymax": math.ceil(y2)}
        place = ElementTree.SubElement(item, "bndbox")
        for name, value in corners.items():
            ElementTree.SubElement(place, name).text = str(value)
        if math.isfinite(score):
            ElementTree.SubElement(item, "confidence").text = repr(float(score))
    ElementTree.indent(root, "\t")
    with atomic_write(path) as part:
        ElementTree.ElementTree(root).write(part, encoding="utf-8", xml_declaration=True)


def image_name(image: str) -> str:
    """The name by which an image goes: of its file, without folder and endings (case.svs.xml is the annotation of case.svs)."""
    name = pathlib.PurePath(image)
    while name.suffix.lower() in IMAGE_ENDINGS | ANNOTATIONS:
        name = name.with_suffix("")
    return name.name


def require_scores(boxes: dict[str, Boxes], *, where: str) -> None:
    """Refuses detections without scores: BoxesError that names the first image."""
    bare = [image for image, found in boxes.items() if not np.isfinite(found.score).all()]
    if bare:
        raise BoxesError(
            f"{where}: detections of {bare[0]} have no score: an FROC needs one for each (in XML: <confidence>)"
        )


def _number(path: pathlib.Path, line: int, name: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BoxesError(f"{path}, line {line}: {name} is {text!r}: give a number")
    return value


def read_names(path: str | os.PathLike) -> Sequence[str]:
    """Names of images: a text file with one on each line, or a folder of them."""
    path = pathlib.Path(path)
    if path.is_dir():
        return sorted({image_name(file.name) for file in path.iterdir() if file.suffix.lower() in IMAGE_ENDINGS})
    return [image_name(line.strip()) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
