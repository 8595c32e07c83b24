"""One reader per annotation format: the parsed XML or JSON of a file -> shapes in the file's own pixels."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal
from xml.etree.ElementTree import Element

import numpy as np

from data_pipelines.polygons import EXCLUSION_GROUPS, Shape

ELLIPSE_VERTICES = 64
NO_VERTICES = "without vertices"
HOLE_OF = (
    "hole of "  # so begins the name of an excluded ASAP polygon that belongs to one other alone, whose name follows
)


class AnnotationError(ValueError):
    """An annotation file that cannot be read or does not fit its slide: names the file, the place in it and the cure."""


@dataclasses.dataclass
class Content:
    """What a file holds: shapes, those that are cut from the shapes of their group, and why others were left out."""

    shapes: list[Shape] = dataclasses.field(default_factory=list)
    cuts: list[Shape] = dataclasses.field(default_factory=list)
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def skip(self, reason: str) -> None:
        """Counts a shape that is left out."""
        self.skipped[reason] += 1


def _vertices(points: Iterable[Any], where: str) -> np.ndarray:
    """Float64 [n, 2] of the first two numbers of each point. Raises AnnotationError."""
    try:
        return np.array([(float(point[0]), float(point[1])) for point in points], np.float64).reshape(-1, 2)
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise AnnotationError(f"{where}: vertices must be pairs of numbers x, y ({error})") from error


def _open(ring: np.ndarray) -> np.ndarray:
    """The ring [n, 2] without its closing vertex, a repetition of the first."""
    closed = len(ring) > 1 and np.array_equal(ring[0], ring[-1])
    return ring[:-1] if closed else ring


def _box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64)


def _number(text: str | None, where: str) -> float:
    try:
        return float(text)  # type: ignore[arg-type]  # None raises, and is told as the missing value it is
    except (TypeError, ValueError) as error:
        raise AnnotationError(f"{where} must be a number, not {text!r}") from error


def _attributes(elements: Sequence[Element], names: Sequence[str], where: str) -> np.ndarray:
    """Numbers [n, len(names)] from the elements' attributes."""
    try:
        found = [[float(element.attrib[name]) for name in names] for element in elements]
    except (KeyError, ValueError) as error:
        what = f"<{elements[0].tag}> needs numbers as {' and '.join(names)}"
        raise AnnotationError(f"{where}: each {what} ({type(error).__name__}: {error})") from error
    return np.array(found, np.float64).reshape(-1, len(names))


def read_asap(root: Element) -> Content:
    """ASAP XML: one Shape per Annotation (per point of a PointSet), vertices in the order of `Order`.

    A Spline becomes the polygon of its control points, as all common tools read it; Measurements are left out. An excluded
    polygon called "hole of <name>", as write_asap_xml has them, is a hole of the last one before it of that name; other
    excluded polygons are shapes, which rasterize cuts from all.
    """
    content = Content()
    owner: dict[str, int] = {}  # polygon by name
    for index, annotation in enumerate(root.iterfind("Annotations/Annotation")):
        label = annotation.get("Name", "")
        where = f"annotation {index + 1} ({label!r})"
        listed = annotation.findall("Coordinates/Coordinate")
        points = _attributes(listed, "XY", where)
        if all("Order" in item.attrib for item in listed):
            points = points[_attributes(listed, ["Order"], where)[:, 0].argsort(kind="stable")]
        group = annotation.get("PartOfGroup", "None")
        group = "" if group == "None" else group
        kind = annotation.get("Type", "Polygon")
        if kind not in ("Polygon", "Spline", "Rectangle", "Dot", "PointSet"):
            content.skip(f"of type {kind}, which is no area")
        elif not len(points):
            content.skip(NO_VERTICES)
        elif kind in ("Dot", "PointSet"):
            content.shapes += [Shape("point", point[None], name=label, group=group) for point in points]
        else:
            form: Literal["box", "polygon"] = "box" if kind == "Rectangle" else "polygon"
            shape = Shape(form, _open(points), name=label, group=group)
            outer = owner.get(label.removeprefix(HOLE_OF)) if group in EXCLUSION_GROUPS else None
            if outer is not None and label.startswith(HOLE_OF):
                whole = content.shapes[outer]
                content.shapes[outer] = dataclasses.replace(whole, holes=(*whole.holes, shape.exterior))
            else:
                owner[label] = len(content.shapes)
                content.shapes.append(shape)
    return content


def read_imagescope(root: Element) -> Content:
    """Aperio ImageScope XML: one Shape per Region, group = the layer's Name, or its Id where it has none.

    A region with NegativeROA is cut from its layer.  Rectangles and ellipses (types 1, 2) given by two opposite corners are
    spelt out; with more vertices, every region but an arrow or a ruler (3, 4) is the polygon of its vertices, as its Area is.
    """
    content = Content()
    for layer in root.iterfind("Annotation"):
        group = layer.get("Name") or layer.get("Id") or ""
        for region in layer.iterfind("Regions/Region"):
            where = f"layer {group!r}, region {region.get('Id', '?')}"
            points = _open(_attributes(region.findall("Vertices/Vertex"), "XY", where))
            kind = region.get("Type", "0")
            if kind in ("3", "4"):
                content.skip("arrows or rulers")
                continue
            if len(points) == 2 and kind in ("1", "2"):
                points = _box(*points.ravel()) if kind == "1" else _ellipse(*points.ravel())
            if not len(points):
                content.skip(NO_VERTICES)
                continue
            shape = Shape("polygon", points, name=region.get("Text", ""), group=group)
            (content.cuts if region.get("NegativeROA") == "1" else content.shapes).append(shape)
    return content


def _ellipse(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    angle = np.linspace(0, 2 * math.pi, ELLIPSE_VERTICES, endpoint=False)
    x, y = np.cos(angle) * (x1 - x0) / 2, np.sin(angle) * (y1 - y0) / 2
    return np.stack([(x0 + x1) / 2 + x, (y0 + y1) / 2 + y], axis=1)


def read_voc(root: Element) -> Content:
    """Pascal VOC XML as DigestPath has it: one box per object, with its confidence where there is one."""
    content = Content()
    for index, item in enumerate(root.iterfind("object")):
        where, label = f"object {index + 1}", item.findtext("name", "")
        sides = (f"bndbox/{side}" for side in ("xmin", "ymin", "xmax", "ymax"))
        corners = [_number(item.findtext(side), f"{where}: {side}") for side in sides]
        found = item.findtext("confidence")
        score = None if found is None else _number(found, f"{where}: confidence")
        content.shapes.append(Shape("box", _box(*corners), name=label, group=label, score=score))
    return content


def read_ncrf(data: dict[str, Any]) -> Content:
    """NCRF JSON: polygons of group "positive"; the negative ones are cut from them."""
    content = Content()
    for key, into in (("positive", content.shapes), ("negative", content.cuts)):
        listed = data.get(key, [])
        if not isinstance(listed, list):
            raise AnnotationError(f"{key}: must be a list of polygons")
        for index, item in enumerate(listed):
            where = f"{key} polygon {index + 1}"
            if not isinstance(item, dict) or not isinstance(item.get("vertices"), list):
                raise AnnotationError(f"{where}: must be an object with a list of vertices")
            points = _open(_vertices(item["vertices"], where))
            if len(points):
                into.append(Shape("polygon", points, name=str(item.get("name", "")), group="positive"))
            else:
                content.skip(NO_VERTICES)
    return content


def read_geojson(data: Any) -> Content:
    """GeoJSON as QuPath writes it: a FeatureCollection, a Feature, a list of them, or a bare geometry.

    One Shape per polygon of a MultiPolygon and per point of a MultiPoint; group = the name of the classification.
    """
    content = Content()
    for index, feature in enumerate(_features(data)):
        where = f"feature {index + 1}"
        properties = feature.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        name, group = str(properties.get("name") or ""), _classification(properties)
        for kind, coordinates in _geometries(feature.get("geometry"), where):
            if kind == "MultiPoint":
                points = _vertices(coordinates, where)
                content.shapes += [Shape("point", point[None], name=name, group=group) for point in points]
            elif kind == "MultiPolygon":
                for exterior, *holes in _polygons(coordinates, where):
                    if len(exterior):
                        content.shapes.append(Shape("polygon", exterior, tuple(holes), name, group))
                    else:
                        content.skip(NO_VERTICES)
            else:
                content.skip(f"of type {kind}, which is no area")
    return content


def _features(data: Any) -> Iterator[dict[str, Any]]:
    if isinstance(data, list):
        for item in data:
            yield from _features(item)
    elif not isinstance(data, dict) or not isinstance(data.get("type"), str):
        raise AnnotationError(
            "JSON, but neither GeoJSON (each item an object with a `type`) nor NCRF (`positive`, `negative`)"
        )
    elif data["type"] == "FeatureCollection":
        yield from _features(data.get("features", []))
    elif data["type"] == "Feature":
        yield data
    else:
        yield {"geometry": data}


def _classification(properties: dict[str, Any]) -> str:
    found = properties.get("classification") or ""
    if isinstance(found, dict):
        found = found.get("name") or ": ".join(map(str, found.get("names") or []))
    return str(found)


def _geometries(geometry: Any, where: str) -> Iterator[tuple[str, Any]]:
    """The simple geometries of one, as (type, coordinates)."""
    if not isinstance(geometry, dict):
        yield "nothing", None
    elif geometry.get("type") == "GeometryCollection":
        for part in geometry.get("geometries") or []:
            yield from _geometries(part, where)
    else:
        kind, coordinates = str(geometry.get("type")), geometry.get("coordinates")
        if not isinstance(coordinates, list):
            raise AnnotationError(f"{where}: its {kind} has no list of coordinates")
        yield ("Multi" + kind, [coordinates]) if kind in ("Polygon", "Point") else (kind, coordinates)


def _polygons(coordinates: list[Any], where: str) -> Iterator[list[np.ndarray]]:
    """The rings of each polygon, the exterior first; an empty exterior for a polygon without any."""
    for polygon in coordinates:
        if not isinstance(polygon, list):
            raise AnnotationError(f"{where}: a polygon must be a list of rings")
        exterior, *holes = [_open(_vertices(points, where)) for points in polygon or [[]]]
        yield [exterior, *(hole for hole in holes if len(hole))]
