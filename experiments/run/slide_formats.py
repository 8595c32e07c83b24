"""The files of one finished slide, format by format (--formats)."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.annotations import write_asap_xml
from data_pipelines.contours import Region, find_regions, group_colours
from data_pipelines.exports import write_map, write_overlay, write_table
from data_pipelines.geojson import region_features, tile_features, write_geojson
from data_pipelines.ome_tiff import write_colour_tiff, write_value_tiff
from data_pipelines.prepare import PreparedSlide
from data_pipelines.slides import RegionError, SlideError
from experiments.run.program import UsageError
from experiments.run.slide_quality import write_slide_page
from experiments.run.slides import UNEXPECTED
from srcc_jax.kernels.heat_maps import HeatMap

PICTURE_PX = 1200  # longer side of the overlays


@dataclasses.dataclass(frozen=True)
class MapStyle:
    """unit: what the values of a map are, as legends, classes of regions and pages say it; stem: how the names of its files begin;
    limits: the values that the ends of the colours stand for, None: 0 and the map's highest."""

    unit: str
    stem: str
    limits: tuple[float, float] | None = None

    @property
    def picture(self) -> str:
        """The file of the overlay."""
        return f"{self.stem}.png"

    def limits_of(self, values: np.ndarray) -> tuple[float, float]:
        """The ends of the colours for a map with these values."""
        if self.limits is not None:
            return self.limits
        return 0.0, max(float(np.nanmax(values)), 1e-6) if np.isfinite(values).any() else 1.0


PROBABILITY_MAP = MapStyle("probability", "probability", (0.0, 1.0))
GRAD_CAM_MAP = MapStyle("Grad-CAM", "gradcam")


@dataclasses.dataclass(frozen=True)
class FinishedSlide:
    """A slide whose tiles are all scored. values float64 [N], NaN: unreadable, and the name of their column in tables; maps: the
    first is that of the values; thumbnail uint8 [h, w, 3] of `downsample` level-0 px per pixel; thresholds: the values from which
    on a region is outlined; headline: what its page says first, if not the highest value."""

    prepared: PreparedSlide
    values: np.ndarray
    column: str
    maps: Mapping[MapStyle, HeatMap]
    thumbnail: np.ndarray
    downsample: float
    thresholds: tuple[float, ...] = (0.5,)
    headline: str = ""

    @property
    def style(self) -> MapStyle:
        """Of the map of the values."""
        return next(iter(self.maps))

    def regions(self) -> Iterator[Region]:
        """Where the values are at or above each threshold."""
        return find_regions(self.maps[self.style], thresholds=self.thresholds, label=self.style.unit)

    def region_colours(self) -> dict[str, tuple[int, int, int]]:
        """Of the class of each threshold's regions: that of the threshold in the picture."""
        limits = self.style.limits_of(self.maps[self.style].values)
        return group_colours(self.thresholds, label=self.style.unit, limits=limits)


Writer = Callable[[pathlib.Path, Any], None]
"""Writes a format of a finished slide, or of what a kind of model makes of one, into a folder."""


def write_formats(
    folder: pathlib.Path, slide: FinishedSlide, formats: Sequence[str], writers: Mapping[str, Writer] | None = None
) -> None:
    """The slide's files of these formats, into `folder`. writers: of the formats, if not FORMATS."""
    for name in formats:
        (writers or FORMATS)[name](folder, slide)


def chosen_formats(
    given: Sequence[str] | None, writers: Mapping[str, Writer], default: Sequence[str]
) -> tuple[str, ...]:
    """The formats asked for (None: the default), in the order in which they are written. UsageError for those that are none."""
    wanted = default if given is None else given
    unknown = [name for name in wanted if name not in writers]
    if unknown:
        raise UsageError(f"--formats={','.join(wanted)}: {unknown[0]!r} is none of {', '.join(writers)}")
    return tuple(name for name in writers if name in wanted)


def picture_of(prepared: PreparedSlide) -> tuple[np.ndarray, float, str]:
    """A picture of the whole slide, its level-0 px per pixel, and what is wrong with it: the tissue in gray where a level
    cannot be read that no tile needed."""
    slide, tissue = prepared.slide, prepared.tissue
    downsample = max(1.0, max(slide.width, slide.height) / PICTURE_PX)
    try:
        return slide.thumbnail(downsample * slide.mpp), downsample, ""
    except (RegionError, SlideError) as error:
        problem = f"no picture of the slide: {error}"
    except UNEXPECTED as error:
        problem = f"no picture of the slide: {type(error).__name__}: {error}"
    gray = Image.fromarray(np.where(tissue, 200, 255).astype(np.uint8))
    size = (math.ceil(slide.width / downsample), math.ceil(slide.height / downsample))
    return np.array(gray.resize(size, Image.Resampling.NEAREST).convert("RGB")), downsample, problem


def _write_pictures(folder: pathlib.Path, slide: FinishedSlide) -> None:
    for style, heat_map in slide.maps.items():
        write_overlay(
            folder / style.picture,
            slide.thumbnail,
            heat_map,
            thumbnail_downsample=slide.downsample,
            limits=style.limits_of(heat_map.values),
            label=style.unit,
        )


def _write_arrays(folder: pathlib.Path, slide: FinishedSlide) -> None:
    for style, heat_map in slide.maps.items():
        write_map(folder / f"{style.stem}.npz", heat_map, unit=style.unit)


def _write_tiles(folder: pathlib.Path, slide: FinishedSlide) -> None:
    tiles = slide.prepared.tiles
    write_table(folder / "tiles.csv", {"x": tiles.x, "y": tiles.y, slide.column: slide.values, "tissue": tiles.tissue})


def _write_page(folder: pathlib.Path, slide: FinishedSlide) -> None:
    pictures = {style.unit: style.picture for style in slide.maps}
    write_slide_page(
        folder, slide.prepared, slide.values, pictures=pictures, unit=slide.style.unit, headline=slide.headline
    )


def _write_tiffs(folder: pathlib.Path, slide: FinishedSlide) -> None:
    size = (slide.prepared.slide.width, slide.prepared.slide.height)
    for style, heat_map in slide.maps.items():
        colours, limits = folder / f"{style.stem}.ome.tiff", style.limits_of(heat_map.values)
        write_colour_tiff(colours, heat_map, slide_size=size, label=style.unit, limits=limits)
        write_value_tiff(folder / f"{style.stem}_values.ome.tiff", heat_map, label=style.unit)


def _write_regions(folder: pathlib.Path, slide: FinishedSlide) -> None:
    slide_id, offset = slide.prepared.record.slide_id, slide.prepared.slide.bounds[:2]
    features = region_features(slide.regions(), slide_id=slide_id, colours=slide.region_colours(), offset=offset)
    write_geojson(folder / "regions.geojson", features)


def _write_tile_objects(folder: pathlib.Path, slide: FinishedSlide) -> None:
    tiles, opened = slide.prepared.tiles, slide.prepared.slide
    measured = {slide.column: slide.values, "tissue": tiles.tissue}
    slide_id, offset = slide.prepared.record.slide_id, opened.bounds[:2]
    features = tile_features(tiles.x, tiles.y, tiles.side, slide_id=slide_id, measurements=measured, offset=offset)
    write_geojson(folder / "tiles.geojson", features)


def _write_asap(folder: pathlib.Path, slide: FinishedSlide) -> None:
    write_asap_xml(folder / "regions.xml", [r.shape for r in slide.regions()], colours=slide.region_colours())


FORMATS: dict[str, Writer] = {
    "png": _write_pictures,
    "npz": _write_arrays,
    "csv": _write_tiles,
    "ome_tiff": _write_tiffs,
    "geojson": _write_regions,
    "geojson_tiles": _write_tile_objects,
    "asap": _write_asap,
    "html": _write_page,  # after "png", whose pictures it shows
}
DEFAULT_FORMATS = ("png", "npz", "csv", "ome_tiff", "geojson", "html")
