"""Results to files: each appears whole under its name or not at all (see `files`)."""

import csv
import dataclasses
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.files import atomic_write
from data_pipelines.overlays import SlideMap, draw_overlay

_ARRAYS = ("values", "missing", "downsample", "origin", "mpp", "unit")


@dataclasses.dataclass(frozen=True)
class StoredMap:
    """A map read back from a file, with the unit of its values."""

    values: np.ndarray
    missing: np.ndarray
    downsample: float
    origin: tuple[float, float]
    mpp: float
    unit: str


def write_text(path: str | os.PathLike, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Dataclasses, NumPy and paths are written as what they stand for; NaN and infinities, unknown to JSON, as null."""
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_table(path: str | os.PathLike, columns: Mapping[str, Sequence | np.ndarray]) -> None:
    """Columns [N] by name to CSV with a header; None and NaN become empty cells. ValueError if lengths differ."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns of {path} differ in length: {lengths}")
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(value) for value in row] for row in zip(*columns.values()))


def write_image(path: str | os.PathLike, rgb: np.ndarray) -> None:
    """rgb uint8 [H, W, 3] as PNG."""
    with atomic_write(path) as temporary:
        Image.fromarray(rgb).save(temporary, format="PNG", compress_level=3)  # half the time of 6, a twentieth larger


def write_overlay(
    path: str | os.PathLike, thumbnail: np.ndarray, slide_map: SlideMap, *, thumbnail_downsample: float, **drawing: Any
) -> None:
    """The map over the slide's thumbnail as PNG; `drawing` goes to overlays.draw_overlay (alpha, limits, label, ...)."""
    write_image(path, draw_overlay(thumbnail, slide_map, thumbnail_downsample=thumbnail_downsample, **drawing))


def write_map(path: str | os.PathLike, slide_map: SlideMap, *, unit: str) -> None:
    """The map as .npz with scale and origin, `unit` saying what its values are ("probability", "Grad-CAM")."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            values=np.asarray(slide_map.values, np.float32),
            missing=np.asarray(slide_map.missing, bool),
            downsample=np.float64(slide_map.downsample),
            origin=np.asarray(slide_map.origin, np.float64),
            mpp=np.float64(slide_map.mpp),
            unit=np.str_(unit),
            about=np.str_(
                "values [row, column], NaN: nothing known; missing: tissue that could not be read; "
                "downsample: level-0 px per cell; origin: (x, y) level-0 px of the top-left corner of cell (0, 0); "
                "mpp: um per cell"
            ),
        )


def read_map(path: str | os.PathLike) -> StoredMap:
    """What write_map wrote; ValueError naming the file if it is something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            values, missing, downsample, origin, mpp, unit = (file[name] for name in _ARRAYS)
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no heat map of ours ({error}): predict the slide again") from error
    return StoredMap(values, missing, float(downsample), (float(origin[0]), float(origin[1])), float(mpp), str(unit))


def _cell(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float | np.floating) and np.isnan(value)) else value


def _plain(value: Any) -> Any:
    """The same in dict, list, str, int, float, bool and None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return str(value) if isinstance(value, os.PathLike) else value
