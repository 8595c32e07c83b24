"""QuPath GeoJSON, written one feature at a time, so that memory does not follow the number of objects.

QuPath counts pixels from the corner of the slide's bounds where it crops to them, as it does unless told otherwise:
`offset`, the (bounds x, bounds y) of the slide, is then subtracted from level-0 pixels (leave it at 0 for slides that
are opened whole). `annotations.read_annotation` with the same offset gives them back. Identifiers are computed from
what an object is, so that writing it again gives the same bytes.
"""

import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from data_pipelines.contours import Region
from data_pipelines.files import atomic_write
from data_pipelines.polygons import Shape

Colour = tuple[int, int, int]
ObjectType = Literal["annotation", "detection", "tile", "cell"]

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "srcc_jax/data_pipelines/geojson.py")  # must never change


def write_geojson(path: str | os.PathLike[str], features: Iterable[Mapping[str, Any]]) -> int:
    """A FeatureCollection of the features, which are taken one by one, one to a line; returns how many there were."""
    count = 0
    with atomic_write(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for count, feature in enumerate(features, start=1):
            file.write(",\n" if count > 1 else "\n")
            file.write(json.dumps(feature, ensure_ascii=False, allow_nan=False))
        file.write("\n]}\n")
    return count


def shape_feature(
    shape: Shape,
    *,
    slide_id: str,
    object_type: ObjectType = "annotation",
    colour: Colour | None = None,
    measurements: Mapping[str, float] | None = None,
    offset: tuple[float, float] = (0.0, 0.0),
) -> dict[str, Any]:
    """A shape in level-0 px as a QuPath object, its group as classification, in this colour (QuPath chooses one if None).

    measurements: numbers by name; those that are not finite are written as text, as QuPath does.
    """
    geometry = _geometry(shape, offset)
    identity = json.dumps([slide_id, object_type, shape.group, geometry])
    properties: dict[str, Any] = {"objectType": object_type}
    if shape.name:
        properties["name"] = shape.name
    if shape.group:
        coloured = {} if colour is None else {"color": [int(value) for value in colour]}
        properties["classification"] = {"name": shape.group, **coloured}
    if measurements:
        properties["measurements"] = {name: _number(value) for name, value in measurements.items()}
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_NAMESPACE, identity)),
        "geometry": geometry,
        "properties": properties,
    }


def region_features(
    regions: Iterable[Region],
    *,
    slide_id: str,
    colours: Mapping[str, Colour] | None = None,
    offset: tuple[float, float] = (0.0, 0.0),
) -> Iterator[dict[str, Any]]:
    """Suspicious regions as annotations with their measurements; colours: by group of their shapes."""
    for region in regions:
        colour = (colours or {}).get(region.shape.group)
        yield shape_feature(
            region.shape, slide_id=slide_id, colour=colour, measurements=region.measurements, offset=offset
        )


def tile_features(
    x: np.ndarray,
    y: np.ndarray,
    side: np.ndarray | float,
    *,
    slide_id: str,
    measurements: Mapping[str, np.ndarray],
    offset: tuple[float, float] = (0.0, 0.0),
) -> Iterator[dict[str, Any]]:
    """Squares [N] of this side with their top-left corner at (x, y), level-0 px, as `tile` objects.

    measurements: numbers [N] by name; NaN (an unreadable tile) stays NaN in QuPath's measurement maps.
    """
    sides = np.broadcast_to(np.asarray(side, np.float64), np.shape(x))
    for i, (left, top, length) in enumerate(zip(x, y, sides, strict=True)):
        right, bottom = left + length, top + length
        corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]], np.float64)
        measured = {name: float(values[i]) for name, values in measurements.items()}
        yield shape_feature(
            Shape("box", corners), slide_id=slide_id, object_type="tile", measurements=measured, offset=offset
        )


def _geometry(shape: Shape, offset: tuple[float, float]) -> dict[str, Any]:
    if shape.kind == "point":
        return {"type": "Point", "coordinates": _coordinates(shape.exterior - offset)[0]}
    rings = [_ring(shape.exterior - offset, positive=True)]
    return {"type": "Polygon", "coordinates": rings + [_ring(hole - offset, positive=False) for hole in shape.holes]}


def _ring(points: np.ndarray, *, positive: bool) -> list[list[float]]:
    """The ring closed, as GeoJSON has it, and turning as RFC 7946 asks: exteriors by positive area, holes by negative."""
    x, y = (points - points[0]).T
    if (np.dot(x, np.roll(y, -1)) >= np.dot(y, np.roll(x, -1))) != positive:
        points = np.concatenate([points[:1], points[:0:-1]])
    return _coordinates(np.concatenate([points, points[:1]]))


def _coordinates(points: np.ndarray) -> list[list[float]]:
    """Whole numbers without their ".0": a third of the file."""
    return [[int(value) if value.is_integer() else value for value in point] for point in points.tolist()]


def _number(value: float) -> float | str:
    """JSON knows no NaN and no infinities; QuPath reads their names as text."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value
