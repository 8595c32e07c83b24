"""Slides that are broken in the ways that real cohorts have them, for trials of how a cohort is worked through."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import tifffile
from PIL import Image

from data_pipelines.pyramids import write_pyramid

_BLANK = 243  # gray of an empty slide


def _truncated(sound: pathlib.Path, path: pathlib.Path) -> None:
    """The upload was cut off."""
    content = sound.read_bytes()
    path.write_bytes(content[: int(0.6 * len(content))])


def _without_header(sound: pathlib.Path, path: pathlib.Path) -> None:
    path.write_bytes(bytes(16) + sound.read_bytes()[16:])


def _without_scale(sound: pathlib.Path, path: pathlib.Path) -> None:
    with tifffile.TiffWriter(path) as writer:
        writer.write(tifffile.imread(sound, level=0), tile=(256, 256), photometric="rgb", metadata=None)


def _absurd_scale(sound: pathlib.Path, path: pathlib.Path) -> None:
    """A unit was mistaken for another: 100 times too fine."""
    write_pyramid(path, tifffile.imread(sound, level=0), mpp=0.005)


def _tiles_damaged(every: int) -> Callable[[pathlib.Path, pathlib.Path], None]:
    """Noise in the place of one of `every` compressed tiles of each level."""

    def damage(sound: pathlib.Path, path: pathlib.Path) -> None:
        shutil.copy(sound, path)
        with tifffile.TiffFile(path) as tif:
            places = [
                (offset, count) for page in tif.pages for offset, count in zip(page.dataoffsets, page.databytecounts)
            ]
        noise = np.random.default_rng(0)
        with path.open("r+b") as file:
            for offset, count in places[::every]:
                file.seek(offset)
                file.write(noise.bytes(count))

    return damage


def _gray(sound: pathlib.Path, path: pathlib.Path) -> None:
    """A scan of fluorescence among the stained ones."""
    with tifffile.TiffWriter(path) as writer:
        pixels = tifffile.imread(sound, level=0)[..., 0]
        writer.write(pixels, tile=(256, 256), resolution=(20_000, 20_000), resolutionunit="CENTIMETER", metadata=None)


def _blank(sound: pathlib.Path, path: pathlib.Path) -> None:
    write_pyramid(path, np.full((1500, 1500, 3), _BLANK, np.uint8), mpp=0.5)


def _cut_picture(sound: pathlib.Path, path: pathlib.Path) -> None:
    Image.fromarray(tifffile.imread(sound, level=0)[:512, :512]).save(path, format="PNG")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


# Name -> ending of the file, and what makes it of a sound slide.
DAMAGES: dict[str, tuple[str, Callable[[pathlib.Path, pathlib.Path], object]]] = {
    "missing": (".tiff", lambda sound, path: None),
    "empty": (".tiff", lambda sound, path: path.write_bytes(b"")),
    "text": (".svs", lambda sound, path: path.write_text("this is not a slide")),
    "truncated": (".tiff", _truncated),
    "without_header": (".tiff", _without_header),
    "without_scale": (".tiff", _without_scale),
    "absurd_scale": (".tiff", _absurd_scale),
    "some_tiles_damaged": (".tiff", _tiles_damaged(6)),
    "all_tiles_damaged": (".tiff", _tiles_damaged(1)),
    "gray": (".tiff", _gray),
    "no_tissue": (".tiff", _blank),
    "cut_picture": (".png", _cut_picture),
}


def damaged_slides(sound: pathlib.Path, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Makes one slide for each of DAMAGES out of a sound pyramid; returns name -> file (that of "missing" is not there)."""
    folder.mkdir(parents=True, exist_ok=True)
    slides = {}
    for name, (ending, damage) in DAMAGES.items():
        slides[name] = folder / f"{name}{ending}"
        damage(sound, slides[name])
    return slides
