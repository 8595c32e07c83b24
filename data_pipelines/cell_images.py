"""Images with boxes of cells: a folder, in DigestPath's layout or flat, to a table that has been checked; and its division into folds."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.annotations import AnnotationError
from data_pipelines.boxes import ANNOTATIONS, IMAGE_ENDINGS, BoxesError, by_image, image_name, read_boxes
from data_pipelines.cohort_rows import SPLIT_NAMES, listed

POSITIVE, NEGATIVE = "sig-train-pos", "sig-train-neg"  # folders of DigestPath
ANNOTATED, NORMAL, UNLABELLED = "annotated", "normal", "unlabelled"
_LEVEL = "-lv0-"  # what follows the slide's name in the names of DigestPath


@dataclasses.dataclass(frozen=True, eq=False)
class CellImage:
    """name: of the file (see `image_name`); kind: annotated, normal (no cells) or unlabelled; boxes float64 [N, 4], [x1, y1, x2, y2) in
    pixels, inside the image; width, height in pixels."""

    name: str
    path: Path
    kind: str
    boxes: np.ndarray
    width: int
    height: int

    @property
    def slide_id(self) -> str:
        """Of the slide that it was cut from, as far as the name tells; else its own name."""
        return self.name.split(_LEVEL)[0]


@dataclasses.dataclass(frozen=True)
class CellImages:
    """Images in the order of their names. left_out: file -> why it cannot be used. notes: what was assumed of files that are used."""

    images: tuple[CellImage, ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def of(self, kind: str) -> tuple[CellImage, ...]:
        """The images of a kind."""
        return tuple(image for image in self.images if image.kind == kind)


def read_cell_images(folder: str | os.PathLike[str]) -> CellImages:
    """The images of a folder with annotation files beside them, of any format that has boxes, under the image's name.

    In DigestPath's layout sig-train-pos holds annotated images and sig-train-neg images without cells, which need no annotation. In a flat
    folder an annotation without a box says that its image has no cells. An image that cannot be decoded or has no annotation where it
    needs one, and an annotation that cannot be read or has no image, are left out and told. Raises BoxesError where nothing can be used,
    and for two images of one name or two annotations of one image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BoxesError(f"{folder}: no such folder of images with annotations")
    places = {POSITIVE: True, NEGATIVE: False}
    if not any((folder / name).is_dir() for name in places):
        places = {"": True}
    tables = [_read_folder(folder / name, annotated) for name, annotated in places.items() if (folder / name).is_dir()]
    images = [image for table in tables for image in table.images]
    left_out = {file: reason for table in tables for file, reason in table.left_out.items()}
    _check_names(folder, images)
    if not any(image.kind == ANNOTATED for image in images):
        first = next((f"; {Path(file).name}: {reason}" for file, reason in left_out.items()), "")
        raise BoxesError(
            f"{folder}: none of {len(images) + len(left_out)} files is an image with an annotated box{first}"
        )
    return CellImages(tuple(images), left_out, tuple(note for table in tables for note in table.notes))


def read_unlabelled(folder: str | os.PathLike[str]) -> CellImages:
    """The images of a folder of regions that nobody annotated. Raises BoxesError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BoxesError(f"{folder}: no such folder of unlabelled images")
    images, left_out = [], {}
    for path, size in _sizes([path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_ENDINGS]):
        if isinstance(size, str):
            left_out[str(path)] = size
        else:
            images.append(CellImage(image_name(path.name), path, UNLABELLED, np.zeros((0, 4)), *size))
    _check_names(folder, images)
    if not images:
        raise BoxesError(f"{folder}: holds no image that can be read")
    return CellImages(tuple(images), left_out)


def load_image(image: CellImage, *, reduce: int = 1) -> np.ndarray:
    """uint8 [H, W, 3], reduced by a whole factor (means of squares; what is left over at the far edges is dropped). BoxesError."""
    try:
        with Image.open(image.path) as file:
            picture = file.convert("RGB")
            if reduce > 1:
                width, height = (side // reduce * reduce for side in picture.size)
                picture = picture.crop((0, 0, width, height)).reduce(reduce)
            return np.asarray(picture)
    except OSError as error:
        raise BoxesError(f"{image.path}: cannot be read ({error}): copy it again, or take it away") from error


def clip_boxes(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Boxes [N, 4] cut to the image, without those of which nothing is left."""
    inside = np.clip(boxes, 0, (width, height, width, height))
    return inside[(inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])]


def _read_folder(folder: Path, needs_annotation: bool) -> CellImages:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    annotations = by_image(path for path in files if path.suffix.lower() in ANNOTATIONS)
    pictures = [path for path in files if path.suffix.lower() in IMAGE_ENDINGS]
    names = {image_name(path.name) for path in pictures}
    left_out = {
        str(path): "has no image of its name beside it" for name, path in annotations.items() if name not in names
    }
    images: list[CellImage] = []
    notes: list[str] = []
    for path, size in _sizes(pictures):
        try:
            if isinstance(size, str):
                raise BoxesError(size)
            images.append(_image(path, size, annotations.get(image_name(path.name)), needs_annotation, notes))
        except (AnnotationError, BoxesError) as error:
            left_out[str(path)] = str(error)
    return CellImages(tuple(images), left_out, tuple(notes))


def _image(
    path: Path, size: tuple[int, int], annotation: Path | None, needs_annotation: bool, notes: list[str]
) -> CellImage:
    if annotation is None and needs_annotation:
        raise BoxesError(
            f"has no annotation beside it: images without cells belong in {NEGATIVE}, unlabelled ones elsewhere"
        )
    found = read_boxes(annotation).box if annotation else np.zeros((0, 4))
    boxes = clip_boxes(found, *size)
    if len(boxes) < len(found):
        notes.append(f"{annotation}: {len(found) - len(boxes)} of {len(found)} boxes lie outside the image")
    if len(found) and not needs_annotation:
        raise BoxesError(f"is in {NEGATIVE} and has boxes: it can be only one")
    if len(found) and not len(boxes):
        raise BoxesError("all its boxes lie outside: the annotation is another image's, or of another magnification")
    if needs_annotation and not len(found):
        notes.append(f"{annotation}: no box: taken as an image without cells")
    return CellImage(image_name(path.name), path, ANNOTATED if len(boxes) else NORMAL, boxes, *size)


def _sizes(paths: Sequence[Path]) -> list[tuple[Path, tuple[int, int] | str]]:
    """(width, height) of each image, or why it cannot be decoded."""

    def size(path: Path) -> tuple[int, int] | str:
        try:
            with Image.open(path) as file:
                file.load()
                return file.size
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            return f"cannot be read ({error})"

    with ThreadPoolExecutor(2) as pool:
        return list(zip(paths, pool.map(size, paths)))


def _check_names(folder: Path, images: Sequence[CellImage]) -> None:
    names = [image.name for image in images]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BoxesError(f"{folder}: two images are called {twice[0]}: rename one")


def read_groups(path: str | os.PathLike[str]) -> dict[str, dict[str, str]]:
    """image -> what the filled cells of a table (CSV: image, and any of slide_id, patient_id, organ, split) say of it. An image goes by
    `image_name`. Raises BoxesError."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), reader.fieldnames or []
    known = [name for name in ("slide_id", "patient_id", "organ", "split") if name in names]
    if "image" not in names or not known:
        raise BoxesError(
            f"{path}: needs the column image and one of slide_id, patient_id, organ, split; it has {', '.join(names)}"
        )
    groups: dict[str, dict[str, str]] = {}
    for row in rows:
        said = {column: text for column in known if (text := (row[column] or "").strip())}
        said |= {"split": said["split"].lower()} if "split" in said else {}
        name = image_name((row["image"] or "").strip())
        if said.get("split", "train") not in SPLIT_NAMES:
            raise BoxesError(f"{path}: the split of {name} is {said['split']!r}: give one of {', '.join(SPLIT_NAMES)}")
        if groups.setdefault(name, said) != said:
            raise BoxesError(f"{path}: two rows of the image {name} say different things: keep one")
    return groups


def check_groups(path: str | os.PathLike[str], groups: Mapping[str, object], names: Sequence[str]) -> tuple[str, ...]:
    """What is to be told of rows of a table of groups (see `read_groups`) whose image is not among `names`. Raises BoxesError where no
    row's image is."""
    missing = sorted(set(groups) - set(names))
    if len(missing) == len(groups):
        first = "".join(f"; it names {name}" for name in missing[:1])
        raise BoxesError(
            f"{path}: none of its {len(groups)} rows is of an image, the first of which is {names[0]}{first}"
        )
    return (f"{path}: {len(missing)} of {len(groups)} rows are of no image: {listed(missing)}",) if missing else ()


def assign_folds(
    names: Sequence[str],
    kinds: Sequence[str],
    groups: Mapping[str, Mapping[str, str]],
    *,
    folds: int,
    mode: str,
    seed: int,
) -> np.ndarray:
    """int [N]: the fold of each image, kinds spread evenly over folds. mode: "easy" divides images; "hard" keeps together what shares a
    slide, a patient or an organ, as far as `groups` (see `read_groups`) and, for slides, the names tell. BoxesError for too few groups."""
    unit = _units(names, groups) if mode == "hard" else np.arange(len(names))
    found = np.unique(unit)
    if len(found) < folds:
        raise BoxesError(
            f"{folds} folds of {len(names)} images from {len(found)} independent groups: give fewer folds, or --fold_mode=easy"
        )
    order = np.random.default_rng([seed, len(found)]).permutation(found)
    kind = np.asarray(kinds)
    counts = {
        number: np.array([((unit == number) & (kind == k)).sum() for k in (ANNOTATED, NORMAL)]) for number in order
    }
    totals, fold_of = np.zeros((folds, 2), int), {}
    for number in sorted(order, key=lambda n: tuple(-counts[n])):
        column = 0 if counts[number][0] else 1
        fold_of[number] = min(range(folds), key=lambda f: (totals[f, column], totals[f].sum()))
        totals[fold_of[number]] += counts[number]
    return np.array([fold_of[number] for number in unit])


def _units(names: Sequence[str], groups: Mapping[str, Mapping[str, str]]) -> np.ndarray:
    """int [N]: the same for images that share a slide, a patient or an organ, directly or through others."""
    unit = np.arange(len(names))
    first: dict[tuple[str, str], int] = {}
    for row, name in enumerate(names):
        said = {column: value for column, value in groups.get(name, {}).items() if value}
        for column, value in {"slide_id": name.split(_LEVEL)[0], **said}.items():
            if column != "split":
                other = first.setdefault((column, value), row)
                unit[unit == unit[row]] = unit[other]
    return unit
