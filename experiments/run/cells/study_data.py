"""Images whose cells are all known, made into ones that are annotated in part: what a detector may see, and the whole truth beside it."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

from data_pipelines.boxes import IMAGE_ENDINGS, Boxes, BoxesError, read_boxes, write_boxes
from data_pipelines.cell_images import POSITIVE, clip_boxes
from data_pipelines.exports import write_image, write_table

_WITHHELD = 7  # purpose that a seed is folded with
MASKS = ("_mask.png", "_anno.png")  # endings of the names of masks: MoNuSeg's 0 and 255, GlaS's instances
MIN_SIDE = 6.0  # pixels; smaller boxes are crumbs of masks


@dataclasses.dataclass(frozen=True)
class Material:
    """A folder as cell_detection reads it. data, unlabelled: its folders; groups: its table of splits; truth: image -> all boxes; withheld:
    training image -> the boxes that its annotation lacks."""

    data: pathlib.Path
    unlabelled: pathlib.Path
    groups: pathlib.Path
    truth: Mapping[str, np.ndarray]
    withheld: Mapping[str, np.ndarray]


def read_truth(folder: pathlib.Path) -> dict[str, tuple[pathlib.Path, np.ndarray]]:
    """image -> its file and all its boxes [N, 4], from masks (<image>_mask.png, <image>_anno.png) or annotations beside it."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_ENDINGS and not path.name.endswith(MASKS):
            annotation = path.with_suffix(".xml")
            masks = [mask for ending in MASKS if (mask := path.with_name(path.stem + ending)).exists()]
            if not annotation.exists() and not masks:
                continue
            boxes = read_boxes(annotation).box if annotation.exists() else mask_boxes(masks[0])
            with Image.open(path) as image:
                boxes = clip_boxes(boxes, *image.size)
            found[path.stem] = path, boxes[(boxes[:, 2:] - boxes[:, :2]).min(axis=1) >= MIN_SIDE]
    if not found:
        raise BoxesError(f"{folder}: holds no image with an annotation or a mask beside it")
    return found


def mask_boxes(path: pathlib.Path) -> np.ndarray:
    """Boxes [N, 4] of the instances of a mask; where it has one value besides 0, of its connected parts."""
    mask = np.asarray(Image.open(path))
    mask = mask[..., 0] if mask.ndim == 3 else mask
    labels = ndimage.label(mask)[0] if len(np.unique(mask)) <= 2 else mask
    places = [place for place in ndimage.find_objects(labels.astype(np.int32)) if place]
    return np.asarray([(x.start, y.start, x.stop, y.stop) for y, x in places], float).reshape(-1, 4)


def write_material(
    folder: pathlib.Path, images: Mapping[str, tuple[pathlib.Path, np.ndarray]], *, test: Sequence[str],
    unlabelled: Sequence[str], share: float, seed: int,
) -> Material:  # fmt: skip
    """Lays images out for training: those of `test` held out with all boxes, those of `unlabelled` without any, the others with all but
    `share` of theirs, drawn by the seed."""
    data, extra = folder / "data", folder / "unlabelled"
    withheld = {}
    for number, (name, (path, boxes)) in enumerate(images.items()):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        to = extra if name in unlabelled else data / POSITIVE
        if not (to / f"{name}.png").exists():
            write_image(to / f"{name}.png", pixels)
        if name not in unlabelled:
            order = np.random.default_rng([seed, _WITHHELD, number]).permutation(len(boxes))
            hidden = order[: 0 if name in test else round(share * len(boxes))]
            withheld[name] = boxes[hidden]
            kept = np.delete(boxes, hidden, axis=0)
            write_boxes(
                data / POSITIVE / f"{name}.xml", Boxes(kept, np.full(len(kept), np.nan)),
                image=f"{name}.png", width=pixels.shape[1], height=pixels.shape[0],
            )  # fmt: skip
    groups = write_splits(folder / "groups.csv", [name for name in images if name not in unlabelled], test)
    truth = {name: boxes for name, (_, boxes) in images.items()}
    return Material(data, extra, groups, truth, {name: boxes for name, boxes in withheld.items() if name not in test})


def copy_folder(files: Sequence[pathlib.Path], to: pathlib.Path) -> pathlib.Path:
    """The folder `to`, with copies of files that are not there yet."""
    to.mkdir(parents=True, exist_ok=True)
    for file in files:
        if not (to / file.name).exists():
            shutil.copy(file, to / file.name)
    return to


def write_halves(files: Sequence[pathlib.Path], to: pathlib.Path) -> tuple[list[str], list[str]]:
    """Cuts images in two down the middle: the names of the left halves and of the right ones, which are in the folder `to` as PNG."""
    names: tuple[list[str], list[str]] = [], []
    for file in files:
        pixels = np.asarray(Image.open(file).convert("RGB"))
        middle = pixels.shape[1] // 2
        for half, place, found in zip((pixels[:, :middle], pixels[:, middle:]), ("left", "right"), names):
            found.append(f"{file.stem}-{place}")
            if not (to / f"{found[-1]}.png").exists():
                write_image(to / f"{found[-1]}.png", np.ascontiguousarray(half))
    return names


def write_splits(path: pathlib.Path, names: Sequence[str], test: Sequence[str]) -> pathlib.Path:
    """The table that cell_detection --groups takes, with the split of each image."""
    write_table(path, {"image": list(names), "split": ["test" if name in test else "train" for name in names]})
    return path
