"""The gland images of GlaS (Sirinukunwattana et al. 2017) as a list of patches with masks."""

from __future__ import annotations

import csv
import pathlib

import numpy as np
from PIL import Image

from data_pipelines.exports import write_image, write_table
from data_pipelines.files import atomic_folder
from data_pipelines.lesion_masks import read_mask, write_mask
from experiments.run.program import UsageError


def write_glas(source: pathlib.Path, folder: pathlib.Path, *, reduce: int, side: int) -> pathlib.Path:
    """patches.csv in `folder`, with crops of `side` pixels of each image, which is made `reduce` times smaller first: label
    benign or malignant by Grade.csv, mask: where there is a gland. Nothing is done where the list is there."""
    listing = folder / "patches.csv"
    if listing.exists():
        return listing
    rows: list[tuple[str, str, str, str]] = []
    with atomic_folder(folder) as temporary:
        for name, grade in _grades(source / "Grade.csv").items():
            if not (source / f"{name}.png").exists():
                continue
            image, mask = _reduced(source, name, reduce)
            for number, (top, left) in enumerate(_corners(mask.shape, side)):
                window = (slice(top, top + side), slice(left, left + side))
                crop = f"{name}_{number}"
                write_image(temporary / f"{crop}.png", image[window])
                write_mask(temporary / f"{crop}_mask.png", mask[window])
                rows.append((f"{crop}.png", grade, f"{crop}_mask.png", name))
        if not rows:
            raise UsageError(f"{source}: holds no image that Grade.csv names")
        columns = dict(zip(("path", "label", "mask", "slide_id"), zip(*rows)))
        write_table(temporary / "patches.csv", columns)
    return listing


def _grades(path: pathlib.Path) -> dict[str, str]:
    """Image -> benign or malignant."""
    if not path.is_file():
        raise UsageError(f"{path} is missing: --glas is the folder of GlaS with its images and their grades")
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = [{key.strip(): value.strip() for key, value in row.items()} for row in csv.DictReader(file)]
    return {row["name"]: row["grade (GlaS)"] for row in rows}


def _reduced(source: pathlib.Path, name: str, factor: int) -> tuple[np.ndarray, np.ndarray]:
    with Image.open(source / f"{name}.png") as image:
        pixels = np.asarray(image.convert("RGB").reduce(factor))
    mask = Image.fromarray(read_mask(source / f"{name}_anno.png").astype(np.uint8) * 255).reduce(factor)
    return pixels, np.asarray(mask) >= 128


def _corners(shape: tuple[int, ...], side: int) -> list[tuple[int, int]]:
    """(top, left) of about as many crops as an image has room for, spread evenly. UsageError for an image smaller than a crop."""
    if min(shape) < side:
        raise UsageError(f"images of {shape[1]} x {shape[0]} pixels hold no crop of {side}")
    rows, columns = (
        [_start(length - side, n, round(length / side)) for n in range(round(length / side))] for length in shape
    )
    return [(top, left) for top in rows for left in columns]


def _start(room: int, number: int, count: int) -> int:
    """Where crop `number` of `count` begins, when `room` pixels are left beside one; a single one lies in the middle."""
    return room // 2 if count == 1 else round(room * number / (count - 1))
