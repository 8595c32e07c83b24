"""The files of one finished slide, format by format (--formats)."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from PIL import Image

from data_pipelines.annotations import write_asap_xml
from data_pipelines.contours import Region, find_regions, group_colours
from data_pipelines.exports import write_map, write_overlay, write_table
from data_pipelines.geojson import region_features, tile_features, write_geojson
from data_pipelines.ome_tiff import write_colour_tiff, write_value_tiff
from data_pipelines.prepare import PreparedSlide
from data_pipelines.slides import RegionError, SlideError
from experiments.run.slide_quality import write_slide_page
from experiments.run.slides import UNEXPECTED
from srcc_jax.kernels.heat_maps import HeatMap

PICTURE_PX = 1200  # longer side of the overlays
PICTURES = {"probability": "probability.png", "Grad-CAM": "gradcam.png"}
_STEMS = {"probability": "probability", "Grad-CAM": "gradcam"}


@dataclasses.dataclass(frozen=True)
class FinishedSlide:
    """A slide whose tiles are all scored. probability float64 [N], NaN: unreadable; maps: unit -> map; thumbnail uint8 [h, w, 3]
    of `downsample` level-0 px per pixel; thresholds: the probabilities from which on a region is outlined."""

    prepared: PreparedSlide
    probability: np.ndarray
    maps: Mapping[str, HeatMap]
    thumbnail: np.ndarray
    downsample: float
    thresholds: tuple[float, ...] = (0.5,)

    def regions(self) -> Iterator[Region]:
        """Where the probability is at or above each threshold."""
        return find_regions(self.maps["probability"], thresholds=self.thresholds)

    def limits(self, unit: str) -> tuple[float, float]:
        """The values that the ends of the colours stand for."""
        return (0.0, 1.0) if unit == "probability" else (0.0, _highest(self.maps[unit].values))


def write_formats(folder: pathlib.Path, slide: FinishedSlide, formats: tuple[str, ...]) -> None:
    """The slide's files of these formats, into `folder`."""
    for name in formats:
        FORMATS[name](folder, slide)


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
    for unit, heat_map in slide.maps.items():
        write_overlay(
            folder / PICTURES[unit],
            slide.thumbnail,
            heat_map,
            thumbnail_downsample=slide.downsample,
            limits=slide.limits(unit),
            label=unit,
        )


def _highest(values: np.ndarray) -> float:
    return max(float(np.nanmax(values)), 1e-6) if np.isfinite(values).any() else 1.0


def _write_arrays(folder: pathlib.Path, slide: FinishedSlide) -> None:
    for unit, heat_map in slide.maps.items():
        write_map(folder / f"{_STEMS[unit]}.npz", heat_map, unit=unit)


def _write_tiles(folder: pathlib.Path, slide: FinishedSlide) -> None:
    tiles = slide.prepared.tiles
    columns = {"x": tiles.x, "y": tiles.y, "probability": slide.probability, "tissue": tiles.tissue}
    write_table(folder / "tiles.csv", columns)


def _write_page(folder: pathlib.Path, slide: FinishedSlide) -> None:
    write_slide_page(folder, slide.prepared, slide.probability, pictures=PICTURES)


def _write_tiffs(folder: pathlib.Path, slide: FinishedSlide) -> None:
    size = (slide.prepared.slide.width, slide.prepared.slide.height)
    for unit, heat_map in slide.maps.items():
        colours = folder / f"{_STEMS[unit]}.ome.tiff"
        write_colour_tiff(colours, heat_map, slide_size=size, label=unit, limits=slide.limits(unit))
        write_value_tiff(folder / f"{_STEMS[unit]}_values.ome.tiff", heat_map, label=unit)


def _write_regions(folder: pathlib.Path, slide: FinishedSlide) -> None:
    opened, colours = slide.prepared.slide, group_colours(slide.thresholds)
    slide_id, offset = slide.prepared.record.slide_id, opened.bounds[:2]
    features = region_features(slide.regions(), slide_id=slide_id, colours=colours, offset=offset)
    write_geojson(folder / "regions.geojson", features)


def _write_tile_objects(folder: pathlib.Path, slide: FinishedSlide) -> None:
    tiles, opened = slide.prepared.tiles, slide.prepared.slide
    measured = {"probability": slide.probability, "tissue": tiles.tissue}
    slide_id, offset = slide.prepared.record.slide_id, opened.bounds[:2]
    features = tile_features(tiles.x, tiles.y, tiles.side, slide_id=slide_id, measurements=measured, offset=offset)
    write_geojson(folder / "tiles.geojson", features)


def _write_asap(folder: pathlib.Path, slide: FinishedSlide) -> None:
    shapes = [region.shape for region in slide.regions()]
    write_asap_xml(folder / "regions.xml", shapes, colours=group_colours(slide.thresholds))


FORMATS: dict[str, Callable[[pathlib.Path, FinishedSlide], None]] = {
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
